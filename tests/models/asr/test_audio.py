"""Recordings: every fault that a file can have is named, and what is no fault is read."""

import contextlib
import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from cmjax.models.asr.audio import read_audio, read_file
from cmjax.models.asr.containers import BadAudio

RATE = 16_000
WAVE = (0.3 * np.sin(np.arange(RATE // 2) / 5)).astype(np.float32)


def _sound(wave=WAVE, form="WAV", kind="PCM_16", rate=RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, subtype=kind)
    return file.getvalue()


def _with_size(size: int, riff: int | None = None, order: str = "<") -> bytes:
    """A WAV file whose header states `size` bytes of sound."""
    data = bytearray(_sound())
    struct.pack_into(order + "I", data, data.find(b"data") + 4, size)
    if riff is not None:
        struct.pack_into(order + "I", data, 4, riff)
    return bytes(data)


@pytest.mark.parametrize(
    "size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x7FFFFFDB, 0x7FFFFFD8, 0x80000000, 0xFFFFFFFF, 0xFFFFFFD3]
)
@pytest.mark.parametrize("riff", [None, 0, 36, 0xFFFFFFFF])
def test_a_wav_that_came_through_a_pipe_is_read_to_its_end(size, riff):
    np.testing.assert_array_equal(
        read_audio(_with_size(size, riff), RATE), read_audio(_sound(), RATE)
    )


def test_a_stream_that_ends_inside_a_sample_loses_that_sample_only():
    samples = read_audio(_with_size(0xFFFFFFFF)[:-1], RATE)
    np.testing.assert_array_equal(samples, read_audio(_sound(), RATE)[:-1])


def test_an_empty_wav_is_not_read_as_what_stands_behind_its_sound():
    data = _sound(WAVE[:0]) + b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + bytes(18)
    with pytest.raises(BadAudio, match="holds no samples"):
        read_audio(data, RATE)


@pytest.mark.parametrize(
    "form", ["WAV", "WAVEX", "RF64", "AIFF", "AU", "NIST", "FLAC", "OGG", "MP3"]
)
def test_a_torn_file_is_refused_in_every_format(form):
    kinds = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}
    data = _sound(form=form, kind=kinds.get(form, "PCM_16"))
    assert len(read_audio(data, RATE)) == len(WAVE)
    with pytest.raises(BadAudio, match=r"truncated|not readable"):
        read_audio(data[: len(data) // 2], RATE)


def test_an_aiff_that_came_through_a_pipe_is_read_to_its_end():
    data = bytearray(_sound(form="AIFF"))
    at = data.find(b"SSND")
    struct.pack_into(">I", data, at + 4, 0x7F000008)
    struct.pack_into(">I", data, data.find(b"COMM") + 10, 0x3F800000)
    np.testing.assert_array_equal(read_audio(bytes(data), RATE), read_audio(_sound(), RATE))


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("WAV", "GSM610"),
        ("WAV", "G721_32"),
        ("WAV", "MS_ADPCM"),
        ("WAV", "ALAW"),
        ("AU", "G723_24"),
    ],
)
def test_codecs_of_telephones_are_read(form, kind):
    samples = read_audio(_sound(form=form, kind=kind), RATE)[: len(WAVE)] / 32768
    assert np.corrcoef(samples, WAVE)[0, 1] > 0.99


def test_a_codec_that_cannot_be_read_is_a_fault_of_that_file_alone():
    with pytest.raises(BadAudio, match=r"not readable as audio: .*fseek"):
        read_audio(_sound(form="AIFF", kind="DWVW_16"), RATE)


@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_floats_in_units_of_integers_are_refused_with_their_unit(kind, bits):
    loud = np.append(WAVE * 2 ** (bits - 1), 0.99 * 2 ** (bits - 1))
    with pytest.raises(
        BadAudio, match=rf"{bits}-bit integers as floats; divide by {1 << bits - 1}"
    ):
        read_audio(_sound(loud, kind=kind), RATE)


def test_floats_a_little_too_loud_are_clipped_and_many_refused():
    wave = WAVE.copy()
    wave[:40] = 1.2  # half a percent
    assert read_audio(_sound(wave, kind="FLOAT"), RATE)[:40].tolist() == [32767] * 40
    with pytest.raises(BadAudio, match=r"\d+% of its floating-point samples are beyond full scale"):
        read_audio(_sound(WAVE * 4, kind="FLOAT"), RATE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(value):
    wave = WAVE.copy()
    wave[7] = value
    with pytest.raises(BadAudio, match="not finite"):
        read_audio(_sound(wave, kind="FLOAT"), RATE)


def test_channels_that_cancel_give_the_loudest_and_others_their_mean():
    def heard(*channels):
        return read_audio(_sound(np.stack(channels, 1), kind="FLOAT"), RATE)

    def alone(wave):
        return np.rint(wave * 32768).astype(np.int16)

    np.testing.assert_array_equal(heard(WAVE, -WAVE), alone(WAVE))
    np.testing.assert_array_equal(heard(0.5 * WAVE, -0.52 * WAVE), alone(-0.52 * WAVE))
    np.testing.assert_array_equal(heard(WAVE, WAVE), alone(WAVE))
    np.testing.assert_array_equal(heard(WAVE, 0 * WAVE), alone(WAVE / 2))
    with pytest.raises(BadAudio, match="is silent"):
        heard(0 * WAVE, 0 * WAVE)


def test_a_header_that_claims_more_than_memory_holds_costs_none():
    data = bytearray(_sound(form="FLAC"))
    at = data.find(b"fLaC") + 8 + 13  # the last 36 bits of rate, channels, bits and samples
    data[at : at + 5] = bytes([data[at] | 0x0F, 255, 255, 255, 255])
    with pytest.raises(BadAudio, match=r"truncated|not readable"):
        read_audio(bytes(data), RATE)


@given(
    st.binary(max_size=200), st.sampled_from(["RIFF", "FORM", ".snd", "NIST_1A", "fLaC", "OggS"])
)
def test_no_bytes_are_more_than_bad_audio(data, magic):
    form = b"WAVE" if magic == "RIFF" else b"AIFF"
    for given_ in (data, magic.encode() + data[:4] + form + data):
        with contextlib.suppress(BadAudio):
            read_audio(given_, RATE)


def test_a_file_that_cannot_be_opened_is_bad_audio(tmp_path):
    with pytest.raises(BadAudio, match="cannot be read: No such file"):
        read_file(tmp_path / "absent.wav", RATE)
    with pytest.raises(BadAudio, match="cannot be read: Is a directory"):
        read_file(tmp_path, RATE)
