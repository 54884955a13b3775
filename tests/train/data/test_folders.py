"""Every layout of data set on disk: what is read, how it is split, what is skipped by name."""

import io
import json
import struct
import tarfile

import numpy as np
import pytest
import soundfile

from cmjax.models.asr.audio import read_audio
from cmjax.models.asr.containers import BadAudio
from train.data import folders
from train.data.folders import load


def _sound(seconds: float = 0.5, rate: int = 8000, kind: str = "WAV") -> bytes:
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate)) / rate)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype="PCM_16")
    return file.getvalue()


def _fsdd(folder, names):
    for name in names:
        (folder / name).write_bytes(_sound())


def test_fsdd_reads_loose_files_and_archives_by_the_official_split(tmp_path):
    _fsdd(tmp_path, ["3_ann_0.wav", "3_ann_5.wav"])
    with tarfile.open(tmp_path / "recordings.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("recordings/7_bob_12.wav")
        info.size = len(_sound())
        archive.addfile(info, io.BytesIO(_sound()))
    corpus = load("fsdd", tmp_path)
    assert [(u.name, u.speaker, u.text) for u in corpus.train] == [
        ("3_ann_5.wav", "ann", "three"),
        ("7_bob_12.wav", "bob", "seven"),
    ]
    assert [u.name for u in corpus.tests["test"]] == ["3_ann_0.wav"]
    assert corpus.units == "words" and corpus.joinable


def test_an_unseen_speaker_is_in_no_other_set(tmp_path):
    _fsdd(tmp_path, [f"{d}_{s}_{i}.wav" for d in "01" for s in ("ann", "bob") for i in (0, 9)])
    corpus = load("fsdd", tmp_path, unseen=["bob"])
    assert {u.speaker for u in corpus.train} == {"ann"}
    assert {u.speaker for u in corpus.tests["test"]} == {"ann"}
    assert len(corpus.tests["unseen"]) == 4
    with pytest.raises(ValueError, match="no speaker eve; there are ann, bob"):
        load("fsdd", tmp_path, unseen=["eve"])


def test_broken_recordings_are_skipped_by_name_and_reason(tmp_path):
    whole = _sound()
    bad_rate = bytearray(whole)
    struct.pack_into("<I", bad_rate, 24, 12)
    silent = io.BytesIO()
    soundfile.write(silent, np.zeros(800), 8000, format="WAV")
    contents = {
        "0_a_10.wav": whole,
        "1_a_10.wav": b"",
        "2_a_10.wav": whole[: len(whole) // 2],
        "3_a_10.wav": whole[:20],
        "4_a_10.wav": bytes(bad_rate),
        "5_a_10.wav": b"this is no audio at all" * 10,
        "6_a_10.wav": silent.getvalue(),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    corpus = load("fsdd", tmp_path)
    assert [u.name for u in corpus.train] == ["0_a_10.wav"]
    reasons = {item.name: item.reason for item in corpus.skipped}
    for name, reason in {
        "1_a_10.wav": "the file is empty",
        "2_a_10.wav": "truncated: 3978 of 8000 bytes",
        "3_a_10.wav": "header ends before the sound",
        "4_a_10.wav": "12 samples per second",
        "5_a_10.wav": "not readable as audio",
        "6_a_10.wav": "is silent",
    }.items():
        assert reason in reasons.pop(name)
    assert not reasons


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    (tmp_path / "1_a_10.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no usable recording: 1_a_10.wav: the file is empty"):
        load("fsdd", tmp_path)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_any_rate_is_resampled_to_the_one_wanted(rate):
    samples = read_audio(_sound(1.0, rate), 8000).astype(float)
    assert len(samples) == pytest.approx(8000, abs=1)
    spectrum = np.abs(np.fft.rfft(samples[:8000] * np.hanning(len(samples[:8000]))))
    assert spectrum.argmax() == pytest.approx(300, abs=1)


def test_a_length_that_contradicts_the_list_is_refused():
    with pytest.raises(BadAudio, match="holds 4000 samples, its list says 8000"):
        read_audio(_sound(), 8000, samples=8000)
    with pytest.raises(BadAudio, match="a wrong sample rate in the header"):
        read_audio(_sound(), 8000, seconds=0.25)


def test_librispeech_reads_transcripts_beside_flac(tmp_path):
    for subset, speaker in (("train-clean-5", "19"), ("dev-clean-2", "84")):
        chapter = tmp_path / "LibriSpeech" / subset / speaker / "7"
        chapter.mkdir(parents=True)
        lines = [f"{speaker}-7-{n:04} HELLO WORLD'S {word}" for n, word in enumerate(("A", "B"))]
        (chapter / f"{speaker}-7.trans.txt").write_text("\n".join(lines) + "\n")
        (chapter / f"{speaker}-7-0000.flac").write_bytes(_sound(1, 16000, "FLAC"))
    corpus = load("librispeech", tmp_path / "LibriSpeech")
    assert [(u.name, u.speaker, u.text) for u in corpus.train] == [
        ("19-7-0000", "19", "hello world's a")
    ]
    assert [u.name for u in corpus.tests["test"]] == ["84-7-0000"]
    assert {item.name: item.reason for item in corpus.skipped} == {
        "19-7-0001": "no such file",
        "84-7-0001": "no such file",
    }


def test_kaldi_reads_segments_and_runs_no_command(tmp_path):
    (tmp_path / "a.wav").write_bytes(_sound(2.0))
    (tmp_path / "wav.scp").write_text("rec1 a.wav\nrec2 sph2pipe -f wav b.sph |\n")
    (tmp_path / "segments").write_text(
        "u1 rec1 0.0 1.0\nu2 rec1 1.0 1.5\nu3 rec2 0 1\nu4 rec1 1 9\n"
    )
    (tmp_path / "text").write_text("u1 one\nu2 two\nu3 three\nu4 four\n")
    (tmp_path / "utt2spk").write_text("u1 ann\nu2 ann\nu3 bob\nu4 bob\n")
    corpus = load("kaldi", tmp_path, rate=8000)
    read = {u.name: u for u in (*corpus.train, *corpus.tests["test"])}
    assert {name: len(u.samples) for name, u in read.items()} == {"u1": 8000, "u2": 4000}
    assert read["u2"].speaker == "ann"
    reasons = {item.name: item.reason for item in corpus.skipped}
    assert reasons["u3"].startswith("no such file") and "lies outside 2.00 s" in reasons["u4"]


@pytest.mark.parametrize("line", ["u1 rec 0.0", "u1 rec 0.0 end", "u2 rec 0 1"])
def test_a_broken_line_of_segments_names_the_utterance(tmp_path, line):
    (tmp_path / "wav.scp").write_text("rec a.wav\n")
    (tmp_path / "segments").write_text(line + "\n")
    (tmp_path / "text").write_text("u1 one\n")
    with pytest.raises(ValueError, match="segments: no recording, start and end for u1"):
        load("kaldi", tmp_path)


def test_manifest_reads_json_lines_with_durations_and_splits(tmp_path):
    (tmp_path / "a.wav").write_bytes(_sound(1.0))
    rows = [
        {"audio_filepath": "a.wav", "text": "Yes!", "duration": 1.0, "split": "train"},
        {"audio_filepath": "a.wav", "text": "no", "duration": 2.0, "split": "dev"},
        {"audio_filepath": "a.wav", "text": "", "split": "dev"},
        {"audio_filepath": "a.wav", "text": "maybe", "split": "dev"},
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load("manifest", path, rate=8000)
    assert [u.text for u in corpus.train] == ["yes"]
    assert [u.text for u in corpus.tests["test"]] == ["maybe"]
    assert [item.reason.split(":")[0] for item in corpus.skipped] == [
        "lasts 1.00 s at the 8000 Hz of its header, its list says 2.00 s",
        "has no transcript",
    ]


@pytest.mark.parametrize(
    "line", ["{", '{"text": "a"}', '{"audio_filepath": "a", "text": 1, "duration": "x"}']
)
def test_a_broken_manifest_line_is_named(tmp_path, line):
    path = tmp_path / "list.jsonl"
    path.write_text('{"audio_filepath": "a.wav", "text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"list\.jsonl, line 2"):
        load("manifest", path)


@pytest.mark.parametrize(
    "layout, message",
    [
        ("fsdd", "no recordings"),
        ("librispeech", "no \\*.trans.txt"),
        ("kaldi", "no file .*wav.scp"),
        ("manifest", "no list"),
        ("an4", "no recordings"),
    ],
)
def test_an_empty_folder_is_an_error_that_says_what_was_looked_for(tmp_path, layout, message):
    with pytest.raises(ValueError, match=message):
        load(layout, tmp_path)
    with pytest.raises(ValueError, match="absent"):
        load(layout, tmp_path / "absent")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:120],
        lambda data: data[:100] + b"damaged" + data[107:],
        lambda data: b"no archive at all",
    ],
)
def test_a_broken_archive_is_named(tmp_path, damage):
    sound = _sound()
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("3_ann_5.wav")
        info.size = len(sound)
        archive.addfile(info, io.BytesIO(sound))
    data = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "whole.tar.gz").write_bytes(damage(data))
    with pytest.raises(ValueError, match=r"whole\.tar\.gz is no archive, or a broken one"):
        load("fsdd", tmp_path)


def test_a_wrong_name_is_refused(tmp_path):
    (tmp_path / "hello.wav").write_bytes(_sound())
    with pytest.raises(ValueError, match=r"hello\.wav is not named DIGIT_SPEAKER_TAKE"):
        load("fsdd", tmp_path)
    with pytest.raises(ValueError, match=r"hello\.wav is not named by zeros and ones"):
        load("yesno", tmp_path)


def test_an4_reads_the_layout_of_its_distribution(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav" / "an1-mblw-b.wav").write_bytes(_sound(1, 16000))
    (tmp_path / "wav" / "an2-fclc-b.wav").write_bytes(_sound(1, 16000))
    (tmp_path / "etc" / "an4_train.transcription").write_text("<s> GO </s> (an1-mblw-b)\n")
    (tmp_path / "etc" / "an4_test.transcription").write_text("STOP (an2-fclc-b)\n")
    corpus = load("an4", tmp_path)
    assert [(u.speaker, u.text) for u in corpus.train] == [("mblw", "go")]
    assert [(u.speaker, u.text) for u in corpus.tests["test"]] == [("fclc", "stop")]


def test_the_public_sets_are_read_whole(data):
    an4 = load("an4", data / "speech_an4_subset")
    assert len(an4.train) + len(an4.tests["test"]) == 38 and not an4.skipped
    assert not {u.speaker for u in an4.train} & {u.speaker for u in an4.tests["test"]}
    yesno = load("yesno", data / "speech_yesno")
    assert len(yesno.train) + len(yesno.tests["test"]) == 48 and not yesno.skipped
    assert all(len(u.text.split()) == 8 for u in yesno.train)


def test_loaders_return_entries_without_reading_audio(tmp_path):
    (tmp_path / "1_a_3.wav").write_bytes(b"not audio")
    (entry,) = folders.fsdd(tmp_path)
    assert (entry.text, entry.split) == ("one", "test")
