"""The study: what is asked is there, every way reads the model it says, and XL3M's claim holds."""

import dataclasses

import numpy as np
import pytest

from cmjax.models.moe.layers.rope import frequencies
from cmjax.models.moe.model import parameters
from cmjax.models.moe.positions import LinearScaling, YarnConfig
from cmjax.models.moe.xl3m import XL3MConfig, key_context, segment_starts
from studies.xl3m import Study, Tally, main
from studies.xl3m_methods import (
    ASKED,
    SEGMENT,
    STRIDE,
    by_xl3m,
    draw_haystack,
    read_whole,
    scorer_of,
    stretched,
    truncated,
)
from train.passkey import Recall, initial_model, train

VOCABULARY = Recall().vocabulary


@pytest.mark.parametrize("length", [64, 100, 4096])
def test_every_question_has_one_pair_in_the_haystack_and_a_segment_that_holds_it(length):
    haystack = draw_haystack(np.random.default_rng(0), VOCABULARY, length)
    assert len(haystack.content) + 2 == length
    assert len(haystack.answers) == min(ASKED, (length - 2) // 16)
    for question, answer, place in zip(
        haystack.questions, haystack.answers, haystack.places, strict=True
    ):
        assert np.flatnonzero(haystack.content == question[1]).tolist() == [place]
        assert haystack.content[place + 1] == answer
    holds = haystack.holds(segment_starts(length - 2, SEGMENT, STRIDE))
    assert holds.any(axis=1).all()


def test_stretching_keeps_the_fastest_frequency_or_divides_all_as_the_papers_say():
    config = Recall().model_config()
    ways = stretched(config, 4 * config.max_position)
    plain = frequencies(config)
    np.testing.assert_allclose(frequencies(ways["RoPE linear"]), plain / 4, rtol=1e-6)
    ntk = frequencies(ways["RoPE NTK"])
    np.testing.assert_allclose(ntk[[0, -1]], plain[[0, -1]] / [1, 4], rtol=1e-5)
    assert isinstance(ways["RoPE linear"].rope.scaling, LinearScaling)
    assert isinstance(ways["RoPE YaRN"].rope.scaling, YarnConfig)
    assert ways["sliding window"].attention.window == 64  # type: ignore
    short = stretched(config, 32)
    np.testing.assert_array_equal(frequencies(short["RoPE NTK"]), plain)


@pytest.mark.slow
def test_reading_once_for_all_questions_equals_reading_for_each():
    model = initial_model(Recall())
    haystack = draw_haystack(np.random.default_rng(1), VOCABULARY, 64)
    found = read_whole(model.config, parameters(model), haystack)
    for question, answer in zip(haystack.questions, found, strict=True):
        logits = model(np.append(haystack.content, question)[None].astype(np.int32))
        assert int(np.argmax(logits[0, -1])) == answer


def test_wilsons_interval_of_known_counts():
    low, high = Tally(right=8, asked=10).interval
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert Tally(right=16, asked=16).interval[1] == 1


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be at least 1"):
        main(Study(seeds=0, out=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_at_128_times_the_trained_length_xl3m_still_finds_what_the_others_have_lost(tmp_path, seed):
    unsure = train(Recall(out=tmp_path, seed=seed))
    rng = np.random.default_rng(7)
    haystacks = [draw_haystack(rng, VOCABULARY, 8192) for _ in range(2)]

    def accuracy(answers):
        pairs = zip(answers, haystacks, strict=True)
        return float(np.mean([found == haystack.answers for found, haystack in pairs]))

    scorer = scorer_of(unsure)
    found = [by_xl3m(scorer, haystack, (1, None))[0] for haystack in haystacks]
    # The surest of 680 segments is now and then a wrong one: 98 % and more with seeds 0 to 3.
    assert accuracy([answers[0] for answers in found]) >= 0.85
    assert accuracy([answers[1] for answers in found]) >= 0.9
    params = parameters(unsure)
    plain = accuracy([read_whole(unsure.config, params, h) for h in haystacks])
    assert plain <= 0.2
    assert accuracy([truncated(scorer, h) for h in haystacks]) <= 0.2


@pytest.mark.slow
def test_a_model_that_is_never_unsure_misleads_xl3m(tmp_path):
    scorer = scorer_of(train(Recall(out=tmp_path, unanswerable=0.0)))
    haystack = draw_haystack(np.random.default_rng(7), VOCABULARY, 8192)
    (answers,), _ = by_xl3m(scorer, haystack, (1,))
    assert np.mean(answers == haystack.answers) <= 0.7


@pytest.mark.slow
def test_one_kept_segment_answers_as_the_segment_itself_does(tmp_path):
    """With k = 1 the key context is the surest segment: what NBCE, which takes the scores of the
    surest segment at every token, answers with one token."""
    model = train(Recall(out=tmp_path, stages=(dataclasses.replace(Recall().stages[0]),)))
    scorer = scorer_of(model)
    haystack = draw_haystack(np.random.default_rng(3), VOCABULARY, 512)
    config = XL3MConfig(window=40, segment=SEGMENT, stride=STRIDE, answer=1, keep=1)
    (answers,), entropies = by_xl3m(scorer, haystack, (1,))
    starts = segment_starts(haystack.content.size, SEGMENT, STRIDE)
    for question, answer, h in zip(haystack.questions, answers, entropies, strict=True):
        start = starts[np.argmin(h)]
        row = np.append(haystack.content[start : start + SEGMENT], question)
        assert int(np.argmax(scorer(row[None], np.array([row.size]))[0])) == answer
        key = key_context(haystack.content, question, scorer, config)
        np.testing.assert_array_equal(key.tokens, row)
