"""What is held out by name is never trained on: in lists, folders, tables and fields."""

import io
import json

import numpy as np
import pytest
import soundfile

from train.data.folders import load
from train.data.splits import named_split, path_split, stated_split

HELD = (
    "valid val validation dev devel development eval evaluation test testing heldout held-out "
    "held_out holdout dev-clean test_other eval92 dev93 train_dev train-valid testset ValidSet TEST"
).split()


def _sound(seed: int, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).normal(0, 0.1, rate)
    soundfile.write(file, noise, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


@pytest.mark.parametrize("name", HELD)
def test_every_name_of_a_held_out_part_is_one(name):
    assert named_split(name) in ("dev", "test")
    assert named_split(f"{name}_manifest") in ("dev", "test")
    assert named_split(f"my.{name}.list") in ("dev", "test")


@pytest.mark.parametrize(
    "name", ["train", "training", "trainManifest", "train-clean-100", "trainset"]
)
def test_every_name_of_a_training_part_is_one(name):
    assert named_split(name) == "train"


@pytest.mark.parametrize(
    "name", ["recordings", "latest", "contest", "developer", "constrained", "a"]
)
def test_words_that_only_contain_one_say_nothing(name):
    assert named_split(name) is None


def test_the_folder_nearest_to_the_file_decides():
    assert path_split(["test", "corpus", "train-clean-5", "19"]) == "train"
    assert path_split(["train", "valid", "19"]) == "dev"
    assert path_split(["corpus", "19"]) is None


def test_a_field_that_says_neither_is_refused_by_line():
    assert stated_split("Validation", "x") == "dev" and stated_split(None, "x") is None
    for value in ("other", 3, ["train"]):
        with pytest.raises(ValueError, match=r"l\.json, line 4: split must be train, or what is"):
            stated_split(value, "l.json, line 4")


@pytest.mark.parametrize("held", HELD)
def test_a_held_out_manifest_is_not_trained_on(tmp_path, held):
    for seed, name in enumerate(("train", held)):
        (tmp_path / f"{seed}.wav").write_bytes(_sound(seed))
        row = {"audio_filepath": f"{seed}.wav", "text": "yes"}
        (tmp_path / f"{name}_manifest.json").write_text(json.dumps(row) + "\n")
    corpus = load("manifest", tmp_path)
    assert [u.name for u in corpus.train] == ["0.wav"]
    assert [u.name for u in corpus.tests["test"]] == ["1.wav"]


def test_dev_and_test_are_two_test_sets(tmp_path):
    for seed, name in enumerate(("train", "valid", "test")):
        (tmp_path / f"{name}.wav").write_bytes(_sound(seed))
        row = {"audio_filepath": f"{name}.wav", "text": "yes"}
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    corpus = load("manifest", tmp_path)
    assert [u.name for u in corpus.train] == ["train.wav"]
    sets = {name: [u.name for u in items] for name, items in corpus.tests.items()}
    assert sets == {"test": ["test.wav"], "dev": ["valid.wav"]}


def test_what_is_named_for_neither_beside_a_training_part_is_left_out_by_name(tmp_path):
    for seed, name in enumerate(("train", "valid", "extra")):
        (tmp_path / f"{name}.wav").write_bytes(_sound(seed))
        row = {"audio_filepath": f"{name}.wav", "text": "yes"}
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    corpus = load("manifest", tmp_path)
    assert [u.name for u in corpus.train] == ["train.wav"]
    (skipped,) = corpus.skipped
    assert skipped.name == "extra.wav" and "no part of the data set" in skipped.reason


def test_kaldi_subfolders_are_what_their_names_say(tmp_path):
    for seed, part in enumerate(("train_si84", "eval92", "dev93")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.wav").write_bytes(_sound(seed))
        (tmp_path / part / "wav.scp").write_text(f"u{seed}\ta.wav\n")
        (tmp_path / part / "text").write_text(f"u{seed}\tone two\n")
    corpus = load("kaldi", tmp_path, rate=8000)
    assert [u.name for u in corpus.train] == ["u0"]
    assert {name: [u.name for u in items] for name, items in corpus.tests.items()} == {
        "test": ["u1"],
        "dev": ["u2"],
    }


@pytest.mark.parametrize("column", ["split", "Subset", "partition"])
def test_a_column_of_a_table_says_it(tmp_path, column):
    rows = [f"file,speaker,words,{column}"]
    for seed, part in enumerate(("train", "valid", "Training")):
        (tmp_path / f"{seed}.wav").write_bytes(_sound(seed, 16000))
        rows.append(f"{seed}.wav,ann,yes,{part}")
    (tmp_path / "transcripts.csv").write_text("\n".join(rows))
    corpus = load("an4", tmp_path)
    assert [u.name for u in corpus.train] == ["0.wav", "2.wav"]
    assert [u.name for u in corpus.tests["test"]] == ["1.wav"]


def test_the_folder_of_a_file_says_it_where_nothing_else_does(tmp_path):
    for seed, path in enumerate(("train/0_1.wav", "heldout/1_1.wav")):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(_sound(seed))
    corpus = load("yesno", tmp_path)
    assert [u.name for u in corpus.train] == ["0_1.wav"]
    assert [u.name for u in corpus.tests["test"]] == ["1_1.wav"]


def test_only_a_test_part_leaves_nothing_to_train_on(tmp_path):
    (tmp_path / "a.wav").write_bytes(_sound(0))
    (tmp_path / "test.json").write_text('{"audio_filepath": "a.wav", "text": "yes"}')
    corpus = load("manifest", tmp_path)
    assert not corpus.train and len(corpus.tests["test"]) == 1
