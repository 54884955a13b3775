"""XL3M against hand-worked segments, a counted key context, and an analytic language model."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.models.moe.xl3m.context import (
    XL3MConfig,
    best_segments,
    entropy,
    key_context,
    score_segments,
    segment_starts,
    select,
)

SMALL = XL3MConfig(window=40, segment=8, stride=4, answer=4, batch=3)
QUESTION = np.array([90, 91])


@pytest.mark.parametrize(
    ("logits", "nats"),
    [
        ([0, 0, 0, 0], 1.386294),
        ([10, 0, 0, 0], 0.001498),
        ([2, 1, 0], 0.832396),
        ([5, 5, 0], 0.713299),
        ([0, -np.inf, -np.inf], 0.0),
        ([0] * 32000, 10.373491),
        ([1002, 1001, 1000], 0.832396),
    ],
)
def test_entropy_in_nats(logits, nats):
    assert float(entropy(jnp.array(logits, jnp.float32))) == pytest.approx(nats, abs=2e-5)


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        ((12, 4, 2), [0, 2, 4, 6, 8]),
        ((13, 4, 2), [0, 2, 4, 6, 8, 9]),
        ((3, 4, 2), [0]),
        ((4, 4, 2), [0]),
        ((5, 4, 4), [0, 1]),
    ],
)
def test_segments_cover_the_text_and_the_last_is_right_aligned(sizes, starts):
    np.testing.assert_array_equal(segment_starts(*sizes), starts)


@pytest.mark.parametrize(("segment", "stride", "count"), [(1024, 512, 39062), (2048, 1024, 19531)])
def test_twenty_million_tokens_make_this_many_segments(segment, stride, count):
    assert len(segment_starts(20_000_000 - 128, segment, stride)) == count


def test_lowest_entropies_win_ties_go_to_the_earlier_and_overlaps_merge():
    h = [2.1, 0.3, 1.0, 0.3, 3.0]
    assert select(h, range(0, 500, 100), 10, room=1000, keep=3)[0] == (1, 2, 3)
    kept, intervals = select([9, 0, 0, 0], [0, 2, 4, 6], 4, room=8)
    assert kept == (1, 2, 3)
    assert intervals == ((2, 10),)


def test_a_text_that_fits_is_kept_token_for_token():
    text = np.arange(34)

    def never(tokens, lengths):
        raise AssertionError("nothing needs to be scored")

    found = key_context(text, QUESTION, never, SMALL)
    np.testing.assert_array_equal(found.tokens, [*range(34), 90, 91])


def _peaked_where(needle):
    """A model that is certain exactly if the bigram `needle` is in its input."""

    def next_logits(tokens, lengths):
        seen = (tokens[:, :-1] == needle[0]) & (tokens[:, 1:] == needle[1])
        return jnp.where(jnp.asarray(seen.any(1))[:, None], 20.0, 0.0) * jnp.eye(1, 50)

    return next_logits


@given(
    length=st.integers(60, 400),
    depth=st.floats(0, 1),
    segment=st.integers(2, 20),
    overlap=st.integers(1, 10),
    seed=st.integers(0, 5),
)
def test_a_needle_shorter_than_the_overlap_is_always_kept(length, depth, segment, overlap, seed):
    stride = max(segment - overlap, 1)
    config = XL3MConfig(window=60, segment=segment, stride=stride, answer=4, batch=5)
    text = np.random.default_rng(seed).integers(0, 80, length)
    at = int(depth * (length - 2))
    text[at : at + 2] = 97, 98
    found = key_context(text, QUESTION, _peaked_where((97, 98)), config)
    assert found.tokens.size + config.answer <= config.window
    inside = found.tokens.tolist()
    assert (97, 98) in list(itertools.pairwise(inside))
    assert inside[-2:] == QUESTION.tolist()
    pieces = np.concatenate([text[begin:end] for begin, end in found.intervals])
    np.testing.assert_array_equal(pieces, inside[:-2])
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found.intervals))


def test_without_overlap_a_needle_is_cut_as_often_as_counting_says():
    """A span of l tokens at a uniform place is whole in no segment with probability
    ((l - 1) - (segment - stride)) / stride."""
    config = XL3MConfig(window=30, segment=8, stride=8, answer=4, batch=64)
    cut = 0
    trials = 400
    rng = np.random.default_rng(0)
    for _ in range(trials):
        text = rng.integers(0, 80, 160)
        at = int(rng.integers(0, 158))
        text[at : at + 2] = 97, 98
        scores = score_segments([text], QUESTION, _peaked_where((97, 98)), config)
        cut += min(h for _, h in scores) > 1
    share = 1 / 8
    assert abs(cut / trials - share) < 3 * math.sqrt(share * (1 - share) / trials)


@given(
    length=st.integers(1, 200),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    stride=st.integers(1, 8),
    batch=st.integers(1, 7),
)
def test_scores_do_not_depend_on_chunks_or_batches(length, cuts, stride, batch):
    text = np.random.default_rng(length).integers(0, 50, length)

    def next_logits(tokens, lengths):  # depends on every real token and its place
        place = np.arange(tokens.shape[1])
        real = np.where(place < lengths[:, None], tokens * (place % 7 + 1), 0)
        return jnp.asarray(real.sum(1)[:, None] % 11 * np.array([[0.0, 0.3]]))

    def scores(chunks, batch):
        config = XL3MConfig(window=40, segment=8, stride=stride, answer=4, batch=batch)
        return list(score_segments(chunks, QUESTION, next_logits, config))

    whole = scores([text], 4)
    places = sorted(min(c, length) for c in cuts)
    assert scores(np.split(text, places), batch) == whole
    assert [start for start, _ in whole] == segment_starts(length, 8, stride).tolist()


def test_the_best_of_a_stream_come_lowest_first():
    assert best_segments(iter([(0, 2.0), (4, 1.0), (8, 1.0), (12, 3.0)]), 2) == [(4, 1.0), (8, 1.0)]


def test_a_prefix_stands_before_every_segment_and_the_key_context():
    config = XL3MConfig(window=40, segment=8, stride=4, answer=4, batch=3, prefix=(7, 8))
    seen = []

    def next_logits(tokens, lengths):
        seen.append(tokens[:, :2])
        return jnp.zeros((len(tokens), 5))

    found = key_context(np.arange(100), QUESTION, next_logits, config)
    assert (np.concatenate(seen) == [7, 8]).all()
    assert found.tokens[:2].tolist() == [7, 8]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: XL3MConfig(window=9, stride=5, segment=4), "stride 5 is larger than segment 4"),
        (lambda: XL3MConfig(window=0), "window must be at least 1, got 0"),
        (lambda: XL3MConfig(window=9, keep=0), "keep must be at least 1, or None, got 0"),
        (
            lambda: key_context(np.arange(99), np.arange(30), _peaked_where((1, 2)), SMALL),
            "do not fit into the window of 40; use a segment of at most 6",
        ),
        (
            lambda: key_context(np.ones(99), QUESTION, _peaked_where((1, 2)), SMALL),
            "content must be one row of integer token ids, got float64",
        ),
        (
            lambda: key_context(np.arange(99), [], _peaked_where((1, 2)), SMALL),
            "question is empty",
        ),
        (
            lambda: key_context(
                np.arange(99), QUESTION, lambda t, n: jnp.full((len(t), 3), jnp.nan), SMALL
            ),
            "logits for the segment at token 0 are not finite",
        ),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(run, message):
    with pytest.raises(ValueError, match=message):
        run()
