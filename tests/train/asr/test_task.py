"""From data to a task: alphabets, test sets, and what a finished run may be tested on."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
from rich.console import Console

from cmjax.models.asr.decoding import Decoding
from cmjax.models.asr.dfsmn import ConvDFSMNConfig
from train.asr import run as module
from train.asr.config import Config, FloatStage
from train.asr.task import prepare
from train.asr.trained_on import remember, without_trained
from train.data.folders import load
from train.data.perturb import Perturb


def _sound(seed: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).normal(0, 0.1, 8000)
    soundfile.write(file, noise, 8000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _manifest(folder, texts, *, first=0, encoding="utf-8", **parts):
    """A folder of recordings with these texts; of `parts` each is a list of numbers of texts."""
    folder.mkdir(exist_ok=True)
    for part, numbers in (parts or {"all": range(len(texts))}).items():
        rows = []
        for n in numbers:
            (folder / f"{n}.wav").write_bytes(_sound(first + n))
            rows.append({"audio_filepath": f"{n}.wav", "text": texts[n], "speaker": f"s{n}"})
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{part}.json").write_text(text, encoding=encoding)
    return folder


def _config(folder, **changed) -> Config:
    return Config(**{"data": "manifest", "data_dir": folder, "rate": 8000, **changed})


RUSSIAN = ["да", "нет, да", "Ёж", "объём", "й"]


def test_an_alphabet_is_that_of_the_data_where_letters_do_not_spell_it(tmp_path):
    task = prepare(_config(_manifest(tmp_path / "ru", RUSSIAN, train=range(4), test=[0, 4])))
    assert task.framing.alphabet.symbols == tuple(" абдежмнотъё")
    assert [u.text for u in task.corpus.train] == ["да", "нет да", "ёж", "объём"]
    english = _manifest(tmp_path / "en", ["yes", "see"], train=[0], test=[1])
    assert prepare(_config(english)).framing.alphabet.size == 29
    assert prepare(_config(english, alphabet="data")).framing.alphabet.symbols == ("e", "s", "y")


def test_an_alphabet_in_a_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "alphabet.txt"
    path.write_text("\ufeff<space>\nа\n\nд\r\nе\nн\nт\n", encoding="utf-8")
    folder = _manifest(tmp_path / "ru", RUSSIAN, train=range(4), test=[0])
    task = prepare(_config(folder, alphabet=str(path)))
    assert task.framing.alphabet.symbols == tuple(" адент")
    assert [u.text for u in task.corpus.train] == ["да", "нет да"]
    assert {s.name for s in task.corpus.skipped} == {"2.wav", "3.wav"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("а\nбв\n", "line 2: one character in lower case is wanted, got 'бв'"),
        ("а\nБ\n", "line 2: one character in lower case"),
        ("а\nб\nа\n", "line 3: 'а' stands in line 1 too"),
        ("\n\n", "no symbols"),
    ],
)
def test_a_broken_alphabet_names_the_line(tmp_path, text, message):
    path = tmp_path / "alphabet.txt"
    path.write_text(text, encoding="utf-8")
    folder = _manifest(tmp_path / "ru", RUSSIAN, train=[0, 1], test=[0])
    with pytest.raises(ValueError, match=rf"--alphabet .*alphabet\.txt.*{message}"):
        prepare(_config(folder, alphabet=str(path)))


def test_lists_in_a_named_encoding_are_trained_on(tmp_path):
    folder = _manifest(tmp_path / "ru", RUSSIAN, encoding="cp1251", train=range(4), test=[0])
    with pytest.raises(ValueError, match=r"test\.json, line 1: byte 0x.. is not utf-8"):
        prepare(_config(folder))
    assert len(prepare(_config(folder, encoding="cp1251")).corpus.train) == 4


@pytest.mark.parametrize("texts", [["yes", "no"], ["yes", "no", "Å"]])
def test_a_run_without_a_test_set_ends_at_its_start(tmp_path, texts):
    """Also where the model can spell no utterance of the only test set."""
    parts = {"train": [0, 1]} | ({"test": [2]} if len(texts) > 2 else {})
    folder = _manifest(tmp_path / "x", texts, **parts)
    with pytest.raises(ValueError, match="no test set: all 2 usable utterances are for training"):
        prepare(_config(folder, alphabet="letters"))
    for remedy in ({"unseen": ("s1",)}, {"test_dir": folder}):
        assert prepare(_config(folder, alphabet="letters", **remedy)).corpus.tests


def test_only_tests_leave_nothing_to_train_on_and_can_be_tested_on(tmp_path):
    folder = _manifest(tmp_path / "x", ["yes", "no"], test=[0, 1])
    with pytest.raises(ValueError, match="no training utterance"):
        module.start(_config(folder, out=tmp_path / "out", alphabet="letters"), Console(quiet=True))
    task = prepare(_config(folder, evaluate_only=True, alphabet="letters"), tests_only=True)
    assert len(task.corpus.tests["test"]) == 2


def test_of_other_data_all_is_tested_but_what_is_named_for_training(tmp_path):
    folder = _manifest(tmp_path / "x", ["a", "b", "c"], train=[0], valid=[1], test=[2])
    corpus = load("manifest", folder, rate=8000, tests_only=True)
    assert {name: [u.text for u in items] for name, items in corpus.tests.items()} == {
        "test": ["c"],
        "dev": ["b"],
    }
    unnamed = _manifest(tmp_path / "y", ["a", "b", "c"])
    corpus = load("manifest", unnamed, rate=8000, tests_only=True)
    assert not corpus.train and len(corpus.tests["test"]) == 3
    only = _manifest(tmp_path / "z", ["a"], train=[0])
    with pytest.raises(ValueError, match="no test set: every recording is named for training"):
        load("manifest", only, rate=8000, tests_only=True)


def test_recordings_that_were_trained_on_are_left_out_of_other_data(tmp_path):
    texts = ["yes", "no", "no yes", "yes yes", "no no"]
    task = prepare(_config(_manifest(tmp_path / "a", texts)))
    remember(task, tmp_path / "out")
    trained = {u.text for u in task.corpus.train}
    moved = prepare(_config(_manifest(tmp_path / "b", texts)), tests_only=True)
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    left = without_trained(moved, tmp_path / "out", console)
    assert {u.text for u in left.corpus.tests["test"]} == set(texts) - trained
    assert f"{len(trained)} of 5 recordings are left out" in console.export_text()
    some = sorted(trained)[0]
    known = prepare(
        _config(_manifest(tmp_path / "c", texts, test=[texts.index(some)])), tests_only=True
    )
    with pytest.raises(ValueError, match="was trained on all of these recordings"):
        without_trained(known, tmp_path / "out", console)
    without_trained(moved, tmp_path / "absent", console)
    assert "no trained_on.txt" in console.export_text()


def test_a_finished_run_is_tested_with_its_own_network_and_the_data_named(tmp_path):
    trained = _config(
        tmp_path,
        dfsmn=ConvDFSMNConfig(strides=(4,), width=8),
        float_stage=FloatStage(steps=7),
        perturb=Perturb(snr_db=(1.0, 2.0)),
        unseen=("ann",),
        seed=5,
    )
    record = json.loads(json.dumps(trained.record()))
    plain = Config(evaluate_only=True, out=tmp_path / "o", decoding=Decoding(beam=3))
    config, others = plain.tested(record)
    assert not others and config == dataclasses.replace(
        trained, evaluate_only=True, out=tmp_path / "o", decoding=Decoding(beam=3)
    )
    config, others = dataclasses.replace(
        plain, data="kaldi", data_dir=tmp_path / "new", encoding="latin-1"
    ).tested(record)
    assert others and config.dfsmn == trained.dfsmn and config.seed == 5
    assert (config.data, config.data_dir) == ("kaldi", tmp_path / "new")
    assert config.unseen == () and config.encoding == "latin-1"


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_rates_that_train_nothing_are_refused_by_option(value):
    with pytest.raises(ValueError, match=r"--float-stage\.learning-rate must"):
        Config(float_stage=FloatStage(learning_rate=value))
    for seed in (-1, 10**20):
        with pytest.raises(ValueError, match="--seed must be 0 to 4294967295"):
            Config(seed=seed)


def test_joined_test_strings_do_not_depend_on_how_recordings_are_packed(tmp_path):
    names = [f"{d}_{s}_{t}.wav" for s in ("ann", "bob") for d in "31" for t in (0, 1, 7)]
    loose, packed, nested = (tmp_path / n for n in ("loose", "packed", "nested"))
    for folder in (loose, packed, nested / "b", nested / "a"):
        folder.mkdir(parents=True)
    with tarfile.open(packed / "x.tar.gz", "w:gz") as archive:
        for seed, name in enumerate(names):
            (loose / name).write_bytes(_sound(seed))
            (nested / "ab"[seed % 2] / name).write_bytes(_sound(seed))
        for name in reversed(names):
            archive.add(loose / name, arcname=f"recordings/{name}")
    tasks = [prepare(Config(data="fsdd", data_dir=folder)) for folder in (loose, packed, nested)]
    wanted = tasks[0].corpus
    assert len(wanted.tests["test strings"]) == 1000
    for task in tasks[1:]:
        for name, items in (*wanted.tests.items(), ("train", wanted.train)):
            others = task.corpus.train if name == "train" else task.corpus.tests[name]
            assert [u.digest() for u in items] == [u.digest() for u in others]
