"""Strings, perturbation, synthetic speech and batches: reproducible, and fit for CTC."""

import itertools

import numpy as np
import pytest

from cmjax.models.asr.features import LogMel
from cmjax.models.asr.text import Alphabet
from train.data import synthetic
from train.data.audio import Utterance
from train.data.batches import Framing, TrainingStream, fitting, pack, test_batches
from train.data.corpus import Corpus
from train.data.perturb import Perturb, behind_remnant, perturb
from train.data.strings import Strings, join, strings_of

RATE = 8000
test_batches.__test__ = False  # its name is not that of a test


def _take(name: str, speaker: str, text: str, samples: int = 3000) -> Utterance:
    seed = [len(name), ord(speaker[0]), ord(text[0]), samples]
    wave = np.random.default_rng(seed).normal(0, 3000, samples)
    return Utterance(name, speaker, text, wave.astype(np.int16))


def _corpus(joinable: bool = True) -> Corpus:
    takes = tuple(
        _take(f"{word}_{speaker}_{i}", speaker, word, 2000 + 300 * i)
        for speaker in ("ann", "bob")
        for word in ("one", "two", "three")
        for i in range(4)
    )
    return Corpus(takes, {"test": takes[:2]}, "words", RATE, joinable)


def _framing(corpus: Corpus) -> Framing:
    return Framing(LogMel(), Alphabet.of_words(u.text for u in corpus.train), stride=4)


def _stream(corpus: Corpus, **changed) -> TrainingStream:
    options = {
        "batch": 3,
        "strings": Strings(longest=3),
        "augment": Perturb(),
        "seed": 5,
    }
    return TrainingStream(corpus, _framing(corpus), **{**options, **changed})


def test_batch_n_is_the_same_however_one_comes_to_it():
    corpus = _corpus()
    straight = [_stream(corpus).at(n) for n in range(9)]
    fresh = _stream(corpus)
    again = list(_stream(corpus).run(4, 9))
    for n in (8, 2, 5):
        names, batch = fresh.at(n)
        assert names == straight[n][0]
        np.testing.assert_array_equal(batch.samples, straight[n][1].samples)
    for number, names, batch in again:
        assert names == straight[number][0]
        np.testing.assert_array_equal(batch.samples, straight[number][1].samples)
    assert _stream(corpus, seed=6).at(0)[0] != straight[0][0]


@pytest.mark.parametrize("joinable", [True, False])
def test_an_epoch_uses_every_take_once(joinable):
    corpus = _corpus(joinable)
    stream = _stream(corpus)
    used, step = [], 0
    while stream.epoch(step) < 1:
        used += [name for string in stream.at(step)[0] for name in string.split("+")]
        step += 1
    assert sorted(used) == sorted(u.name for u in corpus.train)


def test_a_batch_holds_the_labels_of_its_strings_and_paths_for_them():
    corpus = _corpus()
    framing = _framing(corpus)
    stream = _stream(corpus)
    for n in range(6):
        names, batch = stream.at(n)
        for row, name in enumerate(names):
            text = " ".join(take.split("_")[0] for take in name.split("+"))
            labels = batch.labels[row, : batch.counts[row]].tolist()
            assert framing.alphabet.decode(labels) == text
            assert batch.lengths[row] >= framing.least_samples(labels)
            assert not batch.samples[row, batch.lengths[row] :].any()
        assert not batch.lengths[len(names) :].any()


def test_strings_are_of_one_speaker_with_silence_around_and_between():
    ann = [_take("a", "ann", "one"), _take("b", "ann", "two")]
    options = Strings(gap_s=(0.1, 0.1), edge_s=(0.2, 0.2), noise=(1e-9, 1e-9), bare=0.0)
    string = join(ann, RATE, options, np.random.default_rng(0))
    assert (string.text, string.name) == ("one two", "a+b")
    assert len(string.wave) == 2 * 3000 + 800 + 2 * 1600
    loud = np.abs(string.wave) > 1e-6
    assert not loud[:1600].any() and not loud[4600:5400].any() and loud[1600:4600].mean() > 0.9
    tests = strings_of(_corpus().train, 20, RATE, Strings(), seed=0)
    assert (
        tests[0].samples.shape
        == strings_of(_corpus().train, 20, RATE, Strings(), 0)[0].samples.shape
    )
    assert all(2 <= len(u.text.split()) <= 5 for u in tests)
    assert all({u.speaker} == {t.split("_")[1] for t in u.name.split("+")} for u in tests)


def test_speed_changes_length_and_pitch_together():
    tone = np.sin(2 * np.pi * 500 * np.arange(8000) / RATE).astype(np.float32)
    none = {"gain_db": 0.0, "noise_share": 0.0}
    lengths = set()
    for seed in range(8):
        out = perturb(tone, Perturb(speed=0.2, **none), np.random.default_rng(seed))
        power = np.abs(np.fft.rfft(out * np.hanning(len(out))))
        pitch = power.argmax() * RATE / len(out)
        assert pitch * len(out) == pytest.approx(500 * 8000, rel=5e-3)
        lengths.add(len(out))
    assert len(lengths) > 3
    same = perturb(tone, Perturb(speed=0.0, **none), np.random.default_rng(0))
    np.testing.assert_array_equal(same, tone)


def test_noise_has_the_ratio_asked_for():
    tone = (0.1 * np.sin(2 * np.pi * 500 * np.arange(16000) / RATE)).astype(np.float32)
    options = Perturb(speed=0, gain_db=0, noise_share=1, snr_db=(20, 20))
    for seed in range(4):
        noise = perturb(tone, options, np.random.default_rng(seed)) - tone
        found = 10 * np.log10(np.mean(tone**2) / np.mean(noise**2))
        assert found == pytest.approx(20, abs=2.5)  # brown noise of 2 s varies that much


def test_a_remnant_is_the_end_of_a_word_and_no_part_of_the_transcript():
    word = np.linspace(0.1, 0.8, 3000, dtype=np.float32)
    wave = np.full(500, 0.5, np.float32)
    longest = 0
    for seed in range(20):
        whole = behind_remnant(wave, word, RATE, np.random.default_rng(seed))
        end = len(whole) - len(wave)
        np.testing.assert_array_equal(whole[end:], wave)
        gain = whole[end - 1] / word[-1]
        assert 0.1 <= gain <= 1
        np.testing.assert_allclose(whole[:end], gain * word[len(word) - end :], rtol=1e-6)
        longest = max(longest, end)
    assert 1000 < longest <= 1500  # half of the word
    corpus, own = _corpus(), {"speed": 0.0, "gain_db": 0.0, "noise_share": 0.0}
    _, plain = _stream(corpus, augment=Perturb(remnant_share=0.0, **own)).at(0)
    _, behind = _stream(corpus, augment=Perturb(remnant_share=1.0, **own)).at(0)
    np.testing.assert_array_equal(behind.labels, plain.labels)
    assert (behind.lengths > plain.lengths).all()


def test_what_the_model_cannot_spell_or_fit_is_skipped_by_name():
    corpus = _corpus(joinable=False)
    bad = (
        _take("odd", "ann", "eleven"),
        _take("short", "ann", "one two three one two", 900),
        Utterance("long", "ann", "one", np.ones(36 * RATE, np.int16)),
    )
    framing = _framing(corpus)
    wide = Corpus((*corpus.train, *bad), corpus.tests, "words", RATE)
    kept = fitting(wide, framing)
    assert len(kept.train) == len(corpus.train)
    reasons = {item.name: item.reason for item in kept.skipped}
    assert "unknown words 'eleven'" in reasons["odd"]
    assert reasons["short"] == "its 5 labels need 5 output frames, 900 samples give 3"
    assert "lasts 36.0 s" in reasons["long"]
    with pytest.raises(ValueError, match="no utterance fits the model: odd"):
        fitting(Corpus(bad, {}, "words", RATE), framing)


def test_least_samples_is_the_fewest_that_have_a_path():
    framing = _framing(_corpus())
    for labels in ([1], [1, 2], [1, 1], [2, 2, 2, 1]):
        least = framing.least_samples(labels)
        needed = len(labels) + sum(a == b for a, b in itertools.pairwise(labels))
        assert framing.outputs(least) == needed and framing.outputs(least - 1) == needed - 1


def test_tests_cover_every_utterance_once():
    corpus = _corpus()
    seen = []
    for indices, batch in test_batches(corpus.train, _framing(corpus), 5, RATE):
        seen += indices
        assert (batch.lengths > 0).sum() == len(indices)
    assert sorted(seen) == list(range(len(corpus.train)))


def test_a_wave_too_short_for_its_labels_gets_silence_behind():
    framing = _framing(_corpus())
    batch = pack([np.ones(500, np.float32)], [[1, 2, 3]], framing, 2, RATE, most=4)
    assert framing.outputs(batch.lengths[0]) == 3 and batch.samples[0].sum() == 500
    assert batch.lengths[1] == 0


def test_synthetic_digits_differ_by_word_voice_and_take():
    corpus = synthetic.digits(voices=2, unseen=1, takes=2, test_takes=1)
    assert len(corpus.train) == 2 * 10 * 2 and len(corpus.tests["unseen"]) == 10 * 3
    assert len({u.samples.tobytes() for u in corpus.train}) == 40
    again = synthetic.digits(voices=2, unseen=1, takes=2, test_takes=1)
    np.testing.assert_array_equal(again.train[7].samples, corpus.train[7].samples)
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match="'ten' is not one of zero, one"):
        synthetic.speak("ten", synthetic.voice(random), random)


def test_a_synthetic_vowel_has_its_formants():
    who = synthetic.Voice(pitch_hz=100, tract=1.0, tempo=0.5, breath=0.0, tilt=0.3)
    random = np.random.default_rng(0)
    wave = np.concatenate([synthetic.speak("two", who, random)[-1600:-400] for _ in range(5)])
    power = np.abs(np.fft.rfft(wave.reshape(5, -1) * np.hanning(1200), 8192)).mean(axis=0)
    hz = np.arange(len(power)) * RATE / 8192
    first = hz[(hz > 150) & (hz < 500)][power[(hz > 150) & (hz < 500)].argmax()]
    second = hz[(hz > 600) & (hz < 1500)][power[(hz > 600) & (hz < 1500)].argmax()]
    assert first == pytest.approx(300, abs=110) and second == pytest.approx(870, abs=150)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Strings(shortest=3, longest=2), "shortest <= longest"),
        (lambda: Strings(gap_s=(0.3, 0.1)), "gap_s must be a range"),
        (lambda: Perturb(speed=0.6), "speed < 0.5"),
        (lambda: Perturb(noise_share=2.0), "noise_share must lie"),
        (lambda: Perturb(remnant_share=-0.1), "remnant_share must lie"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_utterances_of_many_words_stand_alone_among_joined_strings():
    corpus = _corpus()
    long = tuple(_take(f"long{i}", "ann", "one two three two", 9000) for i in range(3))
    mixed = Corpus((*corpus.train, *long), {}, "words", RATE, joinable=True)
    stream, step, alone = _stream(mixed, strings=Strings(longest=3)), 0, []
    while stream.epoch(step) < 1:
        names, batch = stream.at(step)
        for name, count in zip(names, batch.counts, strict=False):
            if "long" in name:
                alone.append(name)
                assert count == 4
        assert batch.labels.shape[1] == 4
        step += 1
    assert sorted(alone) == ["long0", "long1", "long2"]
