"""PASA against dense attention in float64 NumPy: algebra, half-precision errors, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.primitives import flash_attention, merge_by_lse, pasa_attention
from cmjax.primitives.attention.pasa import pasa_attention_p


def dense(q, k, v, mask=None, causal=False):
    """Softmax attention [batch, t, heads, dv] and its log-sum-exp [batch, t, heads], float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    mass = weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bnts,bsnd->btnd", weights / np.where(mass == 0, 1, mass), v)
    with np.errstate(divide="ignore"):
        lse = (np.where(np.isneginf(top), 0, top) + np.log(mass))[..., 0]
    return out, lse.swapaxes(1, 2)


def draw(kv_len, *, q_len=24, batch=2, heads=4, kv_heads=2, d=16, dv=8, bias=0.0, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, q_len, heads, d)) + bias
    k = rng.normal(size=(batch, kv_len, kv_heads, d)) + bias
    return q, k, rng.normal(size=(batch, kv_len, kv_heads, dv))


def masks(batch, heads, q_len, kv_len):
    """Every kind: full, causal from either corner, a window, random, and per-axis broadcasts."""
    rng = np.random.default_rng(1)
    shape = (batch, heads, q_len, kv_len)
    query, key = np.arange(q_len)[:, None], np.arange(kv_len)
    lengths = rng.integers(1, kv_len, size=(batch, 1, 1, 1))
    return {
        "full": np.ones(shape, bool),
        "causal, top left": np.broadcast_to(key <= query, shape),
        "causal, bottom right": np.broadcast_to(key <= query + kv_len - q_len, shape),
        "window": np.broadcast_to(np.abs(query + kv_len - q_len - key) <= 50, shape),
        "random": rng.random(shape) < 0.3,
        "lengths": np.broadcast_to(key < lengths, shape),
    }


@pytest.mark.parametrize(
    ("beta", "shift"),
    [(b, "gemm") for b in (0.9375, 0.968994140625, 0.5, -0.3, 0.9844970703125)] + [(0.5, "mean")],
)
@pytest.mark.parametrize(("kv_len", "block_size"), [(3 * 128 + 29, 128), (6 * 64 + 29, 64)])
def test_float64_equals_dense_attention_for_any_beta_mask_and_short_last_block(
    kv_len, block_size, beta, shift
):
    """A negative beta is no use, but the algebra holds for it: hence the primitive itself."""
    with jax.enable_x64(True):
        fn = jax.jit(
            lambda q, k, v, mask: pasa_attention_p.bind(
                q, k, v, mask, precision="fp64", statistics="fp32", shift=shift, beta=beta,
                block_size=block_size, scale=0.25, causal=False,
            )
        )  # fmt: skip
        for bias in (0, 3, 30):
            q, k, v = draw(kv_len, bias=bias)
            for mask in masks(2, 4, 24, kv_len).values():
                out, lse = fn(q, k, v, mask)
                want, want_lse = dense(q, k, v, mask)
                np.testing.assert_allclose(out, want, atol=1e-9)
                np.testing.assert_allclose(lse, want_lse, rtol=1e-12, atol=1e-13)  # some are near 0


@pytest.mark.parametrize("statistics", ["fp32", "exact_offset"])
@pytest.mark.parametrize(("kv_len", "causal"), [(1, False), (5, True), (129, True), (256, False)])
def test_any_length_and_jax_nns_causal_mask(statistics, kv_len, causal):
    with jax.enable_x64(True):
        q, k, v = draw(kv_len, bias=3)
        options = {"precision": "fp64", "statistics": statistics, "causal": causal}
        out, lse = pasa_attention(q, k, v, return_lse=True, **options)
        want, want_lse = dense(q, k, v, causal=causal)
        np.testing.assert_allclose(out, want, atol=1e-11)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-12, atol=1e-12)
        peer = jax.nn.dot_product_attention(q, k, v[..., :1].repeat(16, -1), is_causal=causal)
        same = pasa_attention(q, k, v[..., :1].repeat(16, -1), **options)
        np.testing.assert_allclose(same, peer, atol=3e-6)  # its softmax is float32


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_float32_equals_dense_attention_for_random_shapes_masks_and_options(data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kv_heads, group, batch = integers(1, 3), integers(1, 3), integers(1, 2)
    shape = (batch, kv_heads * group, integers(1, 9), integers(1, 40))
    q, k, v = draw(
        shape[3], q_len=shape[2], batch=batch, heads=shape[1], kv_heads=kv_heads, d=4, bias=1.0
    )
    mask_shape = tuple(size if data.draw(st.booleans()) else 1 for size in shape)
    mask = np.random.default_rng(integers(0, 99)).random(mask_shape) < 0.6
    options = {
        "mask": mask,
        "causal": data.draw(st.booleans()),
        "block_size": integers(1, 20),
        "shift": data.draw(st.sampled_from(["auto", "gemm", "mean"])),
        "precision": "fp32",
    }
    out, lse = pasa_attention(q, k, v, return_lse=True, **options)
    want, want_lse = dense(q, k, v, np.broadcast_to(mask, shape), options["causal"])
    # scores of about 10 hold 1e-6; the gain of 15 and the exponential carry it to a few 1e-5
    np.testing.assert_allclose(out, want, atol=2e-4)
    np.testing.assert_allclose(lse, want_lse, atol=2e-4)
    assert not np.isnan(lse).any()


@pytest.mark.parametrize(
    ("precision", "statistics"),
    [("fp16", "fp32"), ("fp16", "storage"), ("fp16_fp32", "exact_offset"), ("bf16", "fp32")],
)
def test_what_sees_nothing_gives_zeros_and_minus_infinity(precision, statistics):
    """Row 3 and ten rows of one head see no key, and all of batch 1 none of the first block."""
    q, k, v = draw(300)
    mask = np.ones((2, 4, 24, 300), bool)
    mask[:, :, 3] = False
    mask[1, :, :, :128] = False
    mask[0, 2, :10] = False
    options = {"precision": precision, "statistics": statistics, "mask": mask}
    out, lse = pasa_attention(q, k, v, return_lse=True, **options)
    want, want_lse = dense(q, k, v, mask)
    hidden = np.isneginf(want_lse)
    assert hidden.any()
    np.testing.assert_array_equal(np.isneginf(lse), hidden)
    np.testing.assert_array_equal(np.asarray(out)[hidden], 0)
    coarse = 0.08 if precision == "bf16" else 0.02
    np.testing.assert_allclose(out, want, atol=coarse)

    def loss(q, k, v):
        out, lse = pasa_attention(q, k, v, return_lse=True, **options)
        return jnp.sum(out**2) + jnp.sum(jnp.where(hidden, 0, lse))

    assert all(np.isfinite(g).all() for g in jax.grad(loss, (0, 1, 2))(q, k, v))


def test_padding_changes_nothing_while_the_mean_covers_it_and_everything_if_it_did_not():
    """Hidden keys may be zeros, copies or noise. A mean over visible columns alone is wrong."""
    with jax.enable_x64(True):
        q, k, v = draw(100, bias=3)
        fill = np.random.default_rng(2).normal(size=(2, 28, 2, 16))
        seen = np.arange(128) < 100
        want = dense(q, k, v)[0]
        for padding in (0 * fill, np.broadcast_to(k[:, -1:], fill.shape), 5 * fill):
            longer = np.concatenate([k, padding], axis=1)
            values = np.concatenate([v, np.zeros((2, 28, 2, 8))], axis=1)
            got = pasa_attention(
                q, longer, values, mask=seen[None, None, None], precision="fp64", block_size=64
            )
            np.testing.assert_allclose(got, want, atol=1e-12)
            shifted = np.concatenate(
                [b - 0.9375 * b.mean(1, keepdims=True) for b in np.split(longer, 2, axis=1)], axis=1
            )
            scores = np.einsum("btnd,bsnd->bnts", q, shifted.repeat(2, axis=2)) / 4
            blocks = np.where(seen, scores, np.nan).reshape(*scores.shape[:3], 2, 64)
            wrong = blocks + 15 * np.nanmean(blocks, axis=-1, keepdims=True)
            right = np.einsum("btnd,bsnd->bnts", q, longer.repeat(2, axis=2)) / 4
            off = np.abs(np.where(seen, wrong.reshape(scores.shape) - right, 0)).max()
            assert off > (0.1 if padding is not None and np.ptp(padding) else 1)


def _rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def _half(x):
    return x.astype(np.float16).astype(np.float32)


def _uniform(mean, amplitude, *, kv_len=1280, zero_mean_v=False):
    rng = np.random.default_rng(2024724)
    q, k, v = (
        rng.uniform(centre - amplitude, centre + amplitude, (1, kv_len, 1, 128))
        for centre in (mean, mean, 0 if zero_mean_v else mean)
    )
    return _half(q[:, :256]), _half(k), _half(v)


# (mean, amplitude, zero-mean V): relative RMSE allowed for "storage", "fp32" and "exact_offset",
# twice what a NumPy simulator of 1280 x 128 showed; exact offset where it was simulated.
CEILINGS = {
    (0, 0.5, False): (1.6e-3, 1.44e-3, None),
    (0, 5, False): (5.2e-3, 4.8e-3, None),
    (0, 20, False): (2.2e-2, 2.2e-2, None),
    (10, 0.5, False): (3.4e-3, 1.26e-3, None),
    (10, 5, False): (2.8e-2, 5.0e-3, None),
    (20, 20, False): (6.2e-2, 2.2e-2, None),
    (30, 0.5, False): (7.0e-3, 2.6e-3, None),
    (30, 10, False): (4.8e-2, 1.08e-2, None),
    (5, 1, True): (6.2e-2, 6.4e-3, 2.0e-3),
    (10, 0.5, True): (2.4e-1, 2.4e-2, 1.94e-3),
    (10, 5, True): (1.3e-1, 2.2e-2, 9.8e-3),
    (30, 5, True): (6.4e-1, 7.6e-2, 1.72e-2),
}


@pytest.mark.parametrize(("mean", "amplitude", "zero_mean_v"), CEILINGS)
def test_half_precision_errors_stay_under_the_simulated_ceilings(mean, amplitude, zero_mean_v):
    q, k, v = _uniform(mean, amplitude, zero_mean_v=zero_mean_v)
    want = dense(q, k, v)[0]
    for statistics, ceiling in zip(
        ("storage", "fp32", "exact_offset"), CEILINGS[mean, amplitude, zero_mean_v], strict=True
    ):
        got = pasa_attention(q, k, v, statistics=statistics)
        error = _rms(got - want) / _rms(want)
        assert ceiling is None or error <= ceiling, (statistics, error)


@pytest.mark.parametrize("start", [0.9375, 0.968994140625, 0.9844970703125])
@pytest.mark.parametrize("statistics", ["fp32", "storage"])
@pytest.mark.parametrize("amplitude", [0.5, 20])
def test_pasa_is_finite_where_flash_attention_in_float16_is_not(start, statistics, amplitude):
    q, k, v = _uniform(30, amplitude, kv_len=400)
    with np.errstate(over="ignore"):
        assert np.isinf(np.einsum("btnd,bsnd->bnts", q, k).astype(np.float16)).all()
    for precision, kept in (("fp16", "storage"), ("fp16_fp32", "fp32")):
        assert np.isnan(flash_attention(q, k, v, precision=precision, statistics=kept)).all()
    assert np.isfinite(pasa_attention(q, k, v, beta=start, statistics=statistics)).all()


@pytest.mark.parametrize("phase", [0.0, np.pi])
def test_resonance_overflows_flash_attention_and_not_pasa(phase):
    rng = np.random.default_rng(0)
    angle = 2 * np.pi * 8 * np.arange(128) / 128
    noise = rng.normal(size=(3, 1, 1280, 1, 128))
    q, k = _half(60 * np.cos(angle) + noise[0]), _half(60 * np.cos(angle + phase) + noise[1])
    v = _half(noise[2])
    want = dense(q, k, v)[0]
    assert np.isnan(flash_attention(q, k, v, precision="fp16", statistics="storage")).all()
    errors = {
        statistics: _rms(pasa_attention(q, k, v, statistics=statistics) - want) / _rms(want)
        for statistics in ("storage", "fp32", "exact_offset")
    }
    assert errors["exact_offset"] <= 2e-2
    assert errors["fp32"] <= 0.3
    assert np.isfinite(errors["storage"]) and errors["storage"] > errors["fp32"]


def test_a_short_last_block_costs_no_accuracy_in_float16():
    """127 keys too many for three blocks: as accurate as four whole blocks, at a strong bias."""
    errors = {}
    for kv_len in (3 * 128 + 127, 4 * 128):
        q, k, v = _uniform(30, 0.5, kv_len=kv_len, zero_mean_v=True)
        want = dense(q, k, v)[0]
        errors[kv_len] = _rms(pasa_attention(q, k, v) - want) / _rms(want)
    assert errors[511] < 1.5 * errors[512]


def test_decoding_against_a_padded_cache_equals_the_last_row_of_the_whole():
    q, k, v = draw(200, q_len=200, bias=5)
    cache = [np.concatenate([x, np.zeros((2, 56, *x.shape[2:]))], axis=1) for x in (k, v)]
    seen = (np.arange(256) < 200)[None, None, None]
    whole = pasa_attention(q, k, v, causal=True, precision="fp32")
    one = pasa_attention(q[:, -1:], *cache, mask=seen, precision="fp32")
    np.testing.assert_allclose(one, whole[:, -1:], atol=1e-4)
    half = pasa_attention(q[:, -1:], *cache, mask=seen)
    np.testing.assert_allclose(half, whole[:, -1:], atol=3e-2)


@pytest.mark.parametrize(
    ("q_len", "group", "shift"), [(1, 1, "mean"), (1, 63, "mean"), (1, 64, "gemm"), (64, 1, "gemm")]
)
def test_the_shift_is_a_product_only_where_enough_query_rows_reuse_it(q_len, group, shift):
    q, k = jnp.ones((1, q_len, group, 8)), jnp.ones((1, 256, 1, 8))
    (equation,) = jax.make_jaxpr(lambda q, k: pasa_attention(q, k, k))(q, k).eqns
    assert equation.primitive.name == "cm_pasa_attention"
    assert equation.params["shift"] == shift


@pytest.mark.parametrize("lengths", [(1, 7, 200, 64, 128, 13), (128, 128), (5,)])
def test_parts_of_the_keys_merge_by_their_log_sum_exp(lengths):
    """Split-KV: every part has a shift matrix, a gain and a reference of its own."""
    with jax.enable_x64(True):
        q, k, v = draw(sum(lengths), bias=20)
        mask = np.random.default_rng(3).random((2, 4, 24, sum(lengths))) < 0.3
        mask[:, :, :2, : lengths[0]] = False  # a part that some queries do not see
        mask[0, 0, 5] = False
        ends = np.cumsum(lengths)
        parts = [
            pasa_attention(
                q, k[:, a:b], v[:, a:b], mask=mask[..., a:b], precision="fp64", block_size=200,
                return_lse=True,
            )
            for a, b in zip(ends - lengths, ends, strict=True)
        ]  # fmt: skip
        out, lse = merge_by_lse(*(jnp.stack(x) for x in zip(*parts, strict=True)))
        want, want_lse = dense(q, k, v, mask)
        np.testing.assert_allclose(out, want, atol=1e-11)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-12)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_grouped_heads_equal_repeated_ones_bit_for_bit(precision):
    q, k, v = (x.astype(np.float32) for x in draw(300, q_len=70, d=64, dv=64, bias=3))
    grouped = pasa_attention(q, k, v, precision=precision)
    repeated = pasa_attention(q, *(np.repeat(x, 2, axis=2) for x in (k, v)), precision=precision)
    np.testing.assert_array_equal(grouped, repeated)


def test_multi_head_latent_attention_has_wider_keys_than_values():
    with jax.enable_x64(True):
        q, k, _ = draw(150, kv_heads=1, d=24, bias=5)
        latent = k[..., :16]  # the value is the unshifted latent part of the key
        got = pasa_attention(q, k, latent, precision="fp64")
        np.testing.assert_allclose(got, dense(q, k, latent)[0], atol=1e-11)


def test_without_a_batch_axis_and_with_the_dtype_of_q():
    q, k, v = draw(50)
    batched = pasa_attention(q, k, v, precision="fp32")
    single, lse = pasa_attention(q[0], k[0], v[0], precision="fp32", return_lse=True)
    np.testing.assert_allclose(single, batched[0], atol=1e-6)
    assert lse.shape == (24, 4) and lse.dtype == jnp.float32
    assert pasa_attention(*(x.astype(jnp.bfloat16) for x in (q, k, v))).dtype == jnp.bfloat16


def _call(**changes):
    q, k, v = (x.astype(np.float32) for x in draw(40))
    return pasa_attention(**({"q": q, "k": k, "v": v} | changes))


def _ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": "text"}, TypeError, "q must be an array, got str"),
        ({"q": _ones(24, 16)}, ValueError, r"q must be \[batch, length, heads, d\].*\(24, 16\)"),
        ({"k": _ones(40, 2, 16)}, ValueError, r"k must be \[batch, length, heads, d\]"),
        ({"q": _ones(2, 24, 3, 16)}, ValueError, "3 query heads and 2 key heads"),
        ({"q": _ones(2, 24, 4, 16, dtype=np.int32)}, TypeError, "q must be floating.*int32"),
        ({"v": _ones(2, 40, 2, 8, dtype=np.complex64)}, TypeError, "v must be floating"),
        ({"k": _ones(2, 40, 2, 8)}, ValueError, "q and k must agree in d"),
        ({"k": _ones(3, 40, 2, 16), "v": _ones(3, 40, 2, 8)}, ValueError, "all in batch"),
        ({"v": _ones(2, 41, 2, 8)}, ValueError, "k and v in all but d"),
        ({"k": _ones(2, 0, 2, 16), "v": _ones(2, 0, 2, 8)}, ValueError, "k must not be empty"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"block_size": 12.5}, TypeError, "block_size must be an integer, got 12.5"),
        ({"beta": 1.0}, ValueError, r"beta must lie in \[0, 1\), got 1.0"),
        ({"beta": -0.1}, ValueError, r"beta must lie in \[0, 1\), got -0.1"),
        ({"beta": float("nan")}, ValueError, "beta must lie in"),
        ({"beta": 1.5, "statistics": "exact_offset"}, ValueError, r"beta must lie in \[0, 1\]"),
        (
            {"beta": 0.99999, "k": _ones(2, 128, 2, 16), "v": _ones(2, 128, 2, 8), "shift": "gemm"},
            ValueError,
            "cannot be undone once rounded",
        ),
        ({"scale": 1e-6}, ValueError, "scale, folded into the keys, must be at least 6.1e-05"),
        ({"beta": jnp.ones(2)}, TypeError, "beta must be a number known at trace time"),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ({"scale": -1}, ValueError, "scale must be positive and finite, got -1.0"),
        ({"scale": float("nan")}, ValueError, "scale must be positive and finite, got nan"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        ({"precision": "fp8"}, ValueError, "precision must be one of fp16, .*, got 'fp8'"),
        ({"precision": "fp64"}, ValueError, "needs JAX's jax_enable_x64"),
        ({"statistics": "fp8"}, ValueError, "statistics must be one of fp32, .*, got 'fp8'"),
        ({"statistics": "storage", "precision": "fp32"}, ValueError, "is for precision 'fp16'"),
        ({"shift": "none"}, ValueError, "shift must be 'auto', 'gemm' or 'mean', got 'none'"),
        ({"shift": "gemm", "statistics": "exact_offset"}, ValueError, "shift must be 'mean'"),
        ({"mask": _ones(2, 4, 24, 40)}, TypeError, "mask must be boolean .*, got float32"),
        ({"mask": _ones(24, 40, dtype=bool)}, ValueError, r"broadcastable to \(2, 4, 24, 40\)"),
        ({"mask": _ones(2, 2, 24, 40, dtype=bool)}, ValueError, r"got \(2, 2, 24, 40\)"),
    ],
    ids=str,
)
def test_bad_inputs_are_refused_with_what_would_do(changes, error, message):
    with jax.enable_x64(False), pytest.raises(error, match=message):
        _call(**changes)


def test_bad_inputs_speak_of_the_function_that_was_called():
    q, k, v = draw(40)
    with pytest.raises(ValueError, match="flash_attention: statistics must be 'fp32' or 'storage'"):
        flash_attention(q, k, v, statistics="exact_offset")
    with pytest.raises(ValueError, match=r"merge_by_lse: out must be \[parts, ..., q_len"):
        merge_by_lse(jnp.ones((2, 3, 4, 5)), jnp.ones((2, 3, 5)))
