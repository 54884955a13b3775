"""Rounding against NumPy's own formats, and the published variant against a simulator."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export

from cmjax.primitives.attention.blockwise import Blocks, round_to
from cmjax.primitives.attention.pasa import pasa_attention
from cmjax.primitives.attention.pasa_shift import recovery_gain, shift_matrix


def _every_float16_and_the_values_between():
    bits = np.arange(2**16, dtype=np.uint16)
    halves = bits.view(np.float16)
    halves = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    between = (halves[1:] + halves[:-1]) / 2  # ties
    beyond = np.array([65519.9, 65520.0, 7e4, 1e30, 1e-9], np.float32)
    values = np.concatenate([halves, between, beyond])
    up, down = (np.nextafter(values, np.float32(to)) for to in (np.inf, -np.inf))
    values = np.concatenate([values, up, down, np.float32([np.inf])])
    return np.concatenate([values, -values])


@pytest.mark.parametrize("compiled", [True, False])
def test_rounding_to_float16_is_that_of_ieee_with_subnormals_and_overflow(compiled):
    values = _every_float16_and_the_values_between()
    with np.errstate(over="ignore"):
        want = values.astype(np.float16).astype(np.float32)
    rounded = (jax.jit(round_to, static_argnums=1) if compiled else round_to)(values, jnp.float16)
    np.testing.assert_array_equal(rounded, want)


def test_rounding_to_bfloat16_is_that_of_ml_dtypes():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=10000) * 10.0 ** rng.integers(-30, 30, 10000)).astype(np.float32)
    want = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(round_to, static_argnums=1)(values, jnp.bfloat16), want)


def test_rounding_to_a_wider_format_changes_nothing():
    x = jnp.float32(1 / 3)
    assert round_to(x, jnp.float32) is x and round_to(x, jnp.float64) is x


@pytest.mark.parametrize("chain", ["sum", "product"])
def test_rounding_holds_between_fused_operations(chain):
    """60000 + 60000 - 60000 is infinite, and 2048 + 1 - 2048 is 0, wherever XLA fuses."""

    def half(x):
        return round_to(x, jnp.float16)

    def together(a, b):
        grown = a * b if chain == "product" else a + b
        return half(half(grown) - a)

    compiled = jax.jit(together)
    if chain == "sum":
        assert np.isinf(compiled(60000.0, 60000.0)) and compiled(2048.0, 1.0) == 0
    else:
        assert np.isinf(compiled(60000.0, 2.0))
        assert compiled(2047.0, 2047 / 2048) == -1  # 2046.0005 is stored as 2046


def _half(x):
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def _simulate_published(q, k, v, beta, n):
    """PASA of one head in float16 at every step, written from the algorithm; [t, d] operands."""
    d = q.shape[-1]
    scale = d**-0.5
    matrix = shift_matrix(n, beta, scale).astype(np.float32)
    gain = _half(recovery_gain(n, beta, scale))
    r = _half
    state = None
    for j in range(len(k) // n):
        keys, values = k[j * n : (j + 1) * n], v[j * n : (j + 1) * n]
        s = r(q @ r(matrix @ keys).T)
        average, top = r(s.mean(axis=1)), s.max(axis=1)
        p = r(np.exp(r(s - top[:, None])))
        mass, total = r(p.sum(axis=1)), r(p @ values)
        if state is None:
            state = average, top, mass, total
            continue
        old_average, old_top, old_mass, old_total = state
        new_average = r(r(old_average * np.float32(j / (j + 1))) + r(average / np.float32(j + 1)))
        back = r(old_top + r(gain * r(old_average - new_average)))
        here = r(top + r(gain * r(average - new_average)))
        new_top = np.maximum(back, here)
        keep, add = r(np.exp(r(back - new_top))), r(np.exp(r(here - new_top)))
        new_mass = r(r(keep * old_mass) + r(add * mass))
        new_total = r(r(keep[:, None] * old_total) + r(add[:, None] * total))
        state = new_average, new_top, new_mass, new_total
    return r(state[3] / state[2][:, None])


@pytest.mark.parametrize(("mean", "amplitude"), [(0, 0.5), (5, 1), (10, 5), (30, 0.5)])
def test_published_variant_makes_the_rounding_errors_of_a_float16_simulator(mean, amplitude):
    """The errors of the two agree far better than either agrees with exact attention.

    Not bit for bit: matrix products sum in different orders, so that now and then a score is
    rounded to the neighbouring float16.
    """
    rng = np.random.default_rng(2024724)
    q, k = (_half(rng.uniform(mean - amplitude, mean + amplitude, (256, 64))) for _ in "qk")
    v = _half(rng.uniform(-1, 1, (256, 64)))
    got = pasa_attention(
        *(x[:, None] for x in (q, k, v)), statistics="storage", beta=0.9375, block_size=64
    )[:, 0]
    simulated = _simulate_published(q, k, v, 0.9375, 64)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    scores = wide[0] @ wide[1].T / 8
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact = weights @ wide[2] / weights.sum(axis=1, keepdims=True)

    def rms(x):
        return float(np.sqrt(np.mean(np.square(x))))

    assert np.mean(np.asarray(got) == simulated) > 0.8
    assert rms(got - simulated) < 0.2 * rms(simulated - exact)


def test_the_mean_of_scores_would_overflow_if_it_were_summed_in_float16():
    """128 scores of 637 sum to 81,779: the trap that accumulating the mean in float32 avoids."""
    rng = np.random.default_rng(0)
    q, k = (_half(rng.uniform(29.5, 30.5, (128, 128))) for _ in "qk")
    matrix = shift_matrix(128, 0.9375, 128**-0.5)
    shifted = _half(q @ _half(matrix @ k).T)
    assert shifted.max() < 700
    assert np.isinf(jnp.sum(jnp.asarray(shifted, jnp.float16), axis=-1)).all()
    out, lse = pasa_attention(
        *(x[:, None] for x in (q, k, k)), statistics="storage", return_lse=True
    )
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_the_last_block_ends_at_the_last_key_and_hides_what_it_repeats():
    blocks = Blocks.of(10, 4)
    assert (blocks.count, blocks.size) == (3, 4)
    x = jnp.arange(10)
    np.testing.assert_array_equal(blocks.take(x, 2, 0), [6, 7, 8, 9])
    np.testing.assert_array_equal(blocks.visible(2, 1, None, False), [False, False, True, True])
    assert Blocks.of(3, 128).size == 3
    assert Blocks.of(8, 4).visible(1, 1, None, False) is None


def test_a_symbolic_number_of_keys_exports_and_equals_the_same_call_with_numbers():
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    s, t = export.symbolic_shape("s, t", constraints=["s >= 129"])

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def fn(q, k, v):
        return pasa_attention(q, k, v, block_size=64)

    exported = export.export(jax.jit(fn))(shape(t, 4, 8), shape(s, 2, 8), shape(s, 2, 8))
    again = export.deserialize(exported.serialize())
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((40, 4, 8),) + 2 * ((150, 2, 8),)
    )
    np.testing.assert_allclose(again.call(q, k, v), fn(q, k, v), atol=2e-3)  # 2 float16 steps at 1
