"""Algorithms against the definition of correlation, in exact rationals, and against tables."""

import math
from fractions import Fraction

import numpy as np
import pytest

from cmjax.primitives.convolution.toom_cook import ALGORITHMS, nested, split, supported, toom_cook

LAVIN, HALF, BEST = (0, 1, -1, 2, -2), (0, 1, -1, 2, "-1/2"), (0, "3/2", "-3/2", "2/3", "-2/3")
EIGHT = (*LAVIN, "1/2", "-1/2")
TABLE = {
    (2, 3, "lavin"): (0, 1, -1),
    (3, 3, "mixed"): (0, 1, -2, "-1/2"),
    (3, 3, "symmetric"): (0, 1, -1, 2),
    (4, 3, "lavin"): LAVIN,
    (4, 3, "half"): HALF,
    (4, 3, "best"): BEST,
    (2, 5, "lavin"): LAVIN,
    (2, 5, "half"): HALF,
    (2, 5, "best"): BEST,
    (3, 5, "usual"): (*LAVIN, "1/2"),
    (4, 5, "usual"): EIGHT,
    (6, 3, "usual"): EIGHT,
    (2, 7, "usual"): EIGHT,
    (4, 7, "usual"): (*LAVIN, 3, -3, 4, -4),
}
FORMS = {key: toom_cook(f"F({key[0]},{key[1]})", *key[:2], points) for key, points in TABLE.items()}


def _apply(form, d, g):
    """A^T [(G g) * (B^T d)] in whatever numbers d and g are."""
    bt, gm, at = (np.array(m, dtype=object) for m in (form.bt, form.g, form.at))
    v, u = bt @ np.array(d, dtype=object), gm @ np.array(g, dtype=object)
    return v, u, at @ (u * v)


@pytest.mark.parametrize("form", [*ALGORITHMS.values(), *FORMS.values()], ids=lambda f: f.name)
def test_every_algorithm_is_exact_in_rationals(form):
    rng = np.random.default_rng(0)
    for _ in range(20):
        d = [int(v) for v in rng.integers(-99, 100, form.window)]
        g = [int(v) for v in rng.integers(-99, 100, form.r)]
        direct = [sum(d[i + j] * g[j] for j in range(form.r)) for i in range(form.m)]
        assert list(_apply(form, d, g)[2]) == direct
    assert all(c.denominator == 1 for row in form.bt for c in row)
    assert all(math.gcd(*map(int, row)) == 1 for row in form.bt)


@pytest.mark.parametrize(
    ("key", "d", "g", "v", "u", "y"),
    [
        ((2, 3, "lavin"), (1, 2, 3, 4), (1, -2, 3), "-2 5 1 2", "1 1 3 3", "6 8"),
        (
            (2, 5, "lavin"),
            (3, -1, 4, 1, -5, 9),
            (2, -7, 1, 8, -2),
            "-13 16 26 -5 -13 0",
            "1/2 1/3 0 1 -19/6 -2",
            "35 -87",
        ),
        (
            (2, 5, "half"),
            (3, -1, 4, 1, -5, 9),
            (2, -7, 1, 8, -2),
            "-26 29 -13 -16 13 39",
            "1 1/3 0 4/5 74/15 -1",
            "35 -87",
        ),
    ],
)
def test_golden_vectors(key, d, g, v, u, y):
    for got, want in zip(_apply(FORMS[key], d, g), (v, u, y), strict=True):
        assert list(got) == [Fraction(number) for number in want.split()]


@pytest.mark.parametrize(
    ("key", "growth"),
    [
        ((2, 3, "lavin"), (2, 2, 2, 2)),
        ((3, 3, "symmetric"), (6, 4, 6, 2, 6)),
        ((4, 3, "lavin"), (10, 10, 10, 6, 6, 10)),
        ((2, 5, "lavin"), (10, 10, 10, 6, 6, 10)),
        ((3, 5, "usual"), (30, 20, 28, 14, 14, 10, 30)),
        ((4, 5, "usual"), (50, 50, 50, 30, 30, 30, 30, 50)),
        ((2, 7, "usual"), (50, 50, 50, 30, 30, 30, 30, 50)),
    ],
)
def test_growth_of_integers_by_rows_of_the_input_transform(key, growth):
    form = FORMS[key]
    got = [int(sum(abs(c) for c in row)) for row in form.bt]
    # the points 2, -2 and 1/2 come in an order of the author's choice
    assert sorted(got) == sorted(growth)
    assert form.growth == max(growth)


@pytest.mark.parametrize(
    ("key", "safe"),
    [
        ((2, 3, "lavin"), 63),
        ((3, 3, "symmetric"), 21),
        ((4, 3, "lavin"), 12),
        ((2, 5, "lavin"), 12),
        ((3, 5, "usual"), 4),
        ((4, 5, "usual"), 2),
        ((6, 3, "usual"), 2),
        ((4, 7, "usual"), 0),
    ],
)
def test_inputs_in_the_safe_range_never_leave_int8_and_one_more_does(key, safe):
    form = FORMS[key]
    assert form.safe_range() == safe
    bt = np.array([[int(c) for c in row] for row in form.bt])
    rng = np.random.default_rng(0)
    inputs = np.concatenate([np.sign(bt) * safe, rng.integers(-safe, safe + 1, (200, form.window))])
    assert np.abs(inputs @ bt.T).max() <= 127
    worst = np.sign(bt[np.abs(bt).sum(1).argmax()]) * (safe + 1)
    assert np.abs(bt @ worst).max() > 127


@pytest.mark.parametrize(
    ("key", "amplification"),
    [
        ((2, 3, "lavin"), 5 / 3),
        ((3, 3, "mixed"), 3.67),
        ((4, 3, "lavin"), 10.77),
        ((4, 3, "half"), 6.94),
        ((4, 3, "best"), 4.76),
        ((2, 5, "lavin"), 12.27),
        ((2, 5, "half"), 7.78),
        ((2, 5, "best"), 5.33),
        ((4, 5, "usual"), 19.07),
        ((6, 3, "usual"), 20.63),
        ((2, 7, "usual"), 24.76),
    ],
)
def test_noise_amplification_equals_the_closed_form_to_three_digits(key, amplification):
    assert FORMS[key].amplification(key[1]) == pytest.approx(amplification, rel=1e-3)


def test_noise_amplification_is_what_rounding_noise_does():
    """White noise of one relative size on every transformed input and filter of F(4,3)."""
    form, rng = ALGORITHMS["F(4,3)"], np.random.default_rng(0)
    bt, g, at = (np.array(m, float) for m in (form.bt, form.g, form.at))
    d, w = rng.normal(size=(form.window, 200_000)), rng.normal(size=(form.r, 200_000))
    v, u = bt @ d, g @ w
    epsilon = 1e-3

    def noisy(values):
        size = np.sqrt((values**2).mean(1, keepdims=True))
        return values + epsilon * size * rng.normal(size=values.shape)

    exact, off = at @ (u * v), at @ (noisy(u) * noisy(v))
    measured = ((off - exact) ** 2).mean() / (exact**2).mean() / (2 * epsilon**2)
    assert measured == pytest.approx(form.amplification(3), rel=0.02)


@pytest.mark.parametrize(
    ("name", "taps", "saving", "loss_db"),
    [
        ("direct", 7, 1, 0),
        ("F(2,3)+F(2,2)", 5, 1.43, 2.6),
        ("F(3,3)+F(3,2)", 5, 1.67, 4.6),
        ("F(4,3)+F(4,2)", 5, 1.82, 6.5),
        ("F(3,4)+F(3,3)", 7, 1.91, 6.3),
        ("N69", 7, 2.1, 7.8),
        ("N88", 7, 8 / 3, 13.9),
        ("F(4,4)", 7, 2.0, 10.9),
        ("F(3,3)", 7, 1.4, 5.8),
    ],
)
def test_saving_and_loss_of_composed_algorithms(name, taps, saving, loss_db):
    form = ALGORITHMS[name]
    assert form.saving(taps) == pytest.approx(saving, abs=0.005)
    assert 10 * math.log10(form.amplification(taps)) == pytest.approx(loss_db, abs=0.06)


def test_an_output_point_scaled_differently_is_another_librarys_int8_transform():
    """ncnn's F(4,3), rows of 6, 4 and 1, its last product taken four times, gives 24 y."""
    g = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 6]]
    bt = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
    bt += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
    at = np.array(
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 4]]
    )
    ours = FORMS[4, 3, "lavin"]
    for row, theirs, filter_row, their_filter in zip(ours.bt, bt, ours.g, g, strict=True):
        sign = 1 if list(row) == theirs else -1
        assert [sign * c for c in row] == theirs
        size = 6 if their_filter == [0, 0, 6] else 24
        assert [sign * size * c for c in filter_row] == their_filter
    rng = np.random.default_rng(0)
    d, w = rng.integers(-127, 128, 6), rng.integers(-127, 128, 3)
    want = [24 * int(d[i : i + 3] @ w) for i in range(4)]
    assert list(at @ ((np.array(g) @ w) * (np.array(bt) @ d))) == want


def test_supported_algorithms_come_fastest_first_and_blocks_serve_long_filters():
    assert supported(3)[0] == "F(6,3)"
    assert supported(7)[:2] == ("N88", "F(4,4)+F(4,3)")
    assert set(supported(32)) == {"direct", "F(2,2)", "F(3,3)", "F(4,4)", "N44", "N66", "N88"}
    assert ALGORITHMS["N88"].tap_blocks(32) == 4
    savings = [ALGORITHMS[name].saving(32) for name in supported(32)]
    assert savings == sorted(savings, reverse=True)
    assert supported(0) == ()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: toom_cook("F(2,3)", 2, 3, (0, 1)),
            r"F\(2,3\) needs 3 distinct finite points, got 0, 1",
        ),
        (lambda: toom_cook("F(2,3)", 2, 3, (0, 1, 1)), "distinct"),
        (
            lambda: nested("N", ALGORITHMS["F(2,3)"], ALGORITHMS["F(2,3)"]),
            r"F\(R, R\), got F\(2,3\)",
        ),
        (lambda: split(ALGORITHMS["F(2,3)"], ALGORITHMS["F(3,3)"]), "differ in outputs"),
        (
            lambda: ALGORITHMS["F(4,3)"].tap_blocks(5),
            r"F\(4,3\) serves 1 to 3 taps, got 5; for 5 taps there are F\(4,5\), N66",
        ),
        (lambda: ALGORITHMS["F(3,3)"].tap_blocks(0), "any number of blocks, got 0"),
    ],
)
def test_bad_inputs_are_refused_with_what_would_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()
