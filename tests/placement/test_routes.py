"""Routes count what a loop over tokens counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.placement import Routes


@st.composite
def routes(draw):
    experts, layers = draw(st.integers(2, 9)), draw(st.integers(1, 3))
    tokens, top_k = draw(st.integers(1, 30)), draw(st.integers(1, 3).filter(lambda k: k <= experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    order = rng.random((tokens, layers, experts)).argsort(-1)
    return Routes(order[..., :top_k], experts)


@settings(max_examples=40, deadline=None)
@given(routes(), st.integers(1, 4))
def test_counts_and_pairs_agree_with_a_loop_over_tokens(found, windows):
    windows = min(windows, found.tokens)
    counts = np.zeros((windows, found.layers, found.experts))
    together = np.zeros((found.layers, found.experts, found.experts))
    after = np.zeros((found.layers - 1, found.experts, found.experts))
    for window, part in enumerate(np.array_split(found.ids, windows)):
        for choices in part:
            for layer, chosen in enumerate(choices):
                for e in chosen:
                    counts[window, layer, e] += 1
                    for f in chosen:
                        together[layer, e, f] += e != f
                    for f in choices[layer + 1] if layer + 1 < found.layers else ():
                        after[layer, e, f] += 1
    np.testing.assert_array_equal(found.counts(windows), counts)
    np.testing.assert_array_equal(found.coactivation(), together)
    np.testing.assert_array_equal(found.transitions(), after)


def test_a_stretch_holds_the_tokens_of_its_windows():
    ids = np.random.default_rng(0).random((11, 2, 5)).argsort(-1)[..., :2]
    found = Routes(ids, 5, sequence=np.arange(11))
    part = found.stretch(4, 1, 3)
    np.testing.assert_array_equal(part.counts()[0], found.counts(4)[1:3].sum(0))
    assert part.sequence is not None and part.sequence.tolist() == [3, 4, 5, 6, 7, 8]


def test_ids_are_kept_in_the_smallest_type_and_cannot_be_changed():
    found = Routes(np.array([[[0, 255]]]), 256)
    assert found.ids.dtype == np.uint8 and not found.ids.flags.writeable
    assert Routes(np.array([[[0, 256]]]), 257).ids.dtype == np.uint16


def test_selected_tokens_keep_their_sequence_and_domain():
    found = Routes(
        np.arange(4).reshape(4, 1, 1), 4, np.array([7, 7, 8, 9]), np.array([0, 0, 1, 0]), ("a", "b")
    )
    some = found.select(np.array([False, True, True, False]))
    np.testing.assert_array_equal(some.sequence, [7, 8])
    assert {name: part.tokens for name, part in some.by_domain().items()} == {"a": 1, "b": 1}
    assert found.select(slice(2)).tokens == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 1, 1)), 4), "integers .*, found float64 of shape"),
        ((np.zeros((2, 1), int), 4), r"found int64 of shape \(2, 1\)"),
        ((np.array([[[4]]]), 4), "ids below 4 experts, found 4"),
        ((np.array([[[-1]]]), 4), "ids of 0 or more, .* found -1"),
        ((np.array([[[1, 1]]]), 4), "found one twice at token 0, layer 0"),
        ((np.array([[[1]]]), 4, np.arange(2)), r"one sequence per token \(1\), found shape \(2,\)"),
    ],
)
def test_ids_that_are_no_routes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Routes(*arguments)


def test_more_windows_than_tokens_are_refused():
    with pytest.raises(ValueError, match=r"1 to at most 2 windows \(tokens\), found 3"):
        Routes(np.zeros((2, 1, 1), int), 1).counts(3)
