"""Windows, soft caps, biases and sinks of PASA, FlashAttention and MSD attention, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cmjax.primitives import (
    flash_attention,
    merge_by_lse,
    msd_attention,
    pasa_attention,
    quantize_kv,
    with_sinks,
)
from cmjax.primitives.msd.kv import keys_of, values_of
from cmjax.program import trace

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, D = 2, 37, 150, 4, 2, 32
SCALE = 0.3
CACHES = [("int8", "token"), ("int8", "channel"), ("mxfp4", "token")]
OPTIONS = {
    "window": {"causal": True, "window": 9},
    "softcap": {"softcap": 2.0},
    "bias": {"bias": (BATCH, HEADS, QUERIES, KEYS)},
    "bias by key": {"bias": (1, 1, 1, KEYS)},
    "sinks": {"sinks": (HEADS,)},
    "all": {
        "causal": True,
        "window": 20,
        "softcap": 3.0,
        "bias": (1, HEADS, QUERIES, KEYS),
        "sinks": (HEADS,),
        "mask": True,
    },
}


def draw(name, offset=0.0):
    """q, k, v and the options of a case."""
    rng = np.random.default_rng(0)
    q = offset + rng.normal(size=(BATCH, QUERIES, HEADS, D))
    k, v = offset + rng.normal(size=(2, BATCH, KEYS, KV_HEADS, D))
    options = dict(OPTIONS[name])
    for array in ("bias", "sinks"):
        if array in options:
            options[array] = rng.normal(size=options[array])
    if "bias" in options:
        options["bias"][..., 7] = -np.inf
    if "mask" in options:
        options["mask"] = rng.random((BATCH, 1, QUERIES, KEYS)) < 0.7
    return q, k, v, options


def dense(
    q, k, v, causal=False, window=None, softcap=None, bias=None, sinks=None, mask=None, first=0
):
    """Softmax attention and its log-sum-exp, from the formula; jnp, so that it has derivatives."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, 2) for x in (k, v))
    scores = SCALE * jnp.einsum("bqhd,bkhd->bhqk", q, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    at, key = first + np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
    seen = np.ones((q.shape[1], k.shape[1]), bool)
    if causal:
        seen &= key <= at
    if window is not None:
        seen &= key > at - window
    seen = seen if mask is None else seen & mask
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        extra = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, extra], -1)
    lse = jax.scipy.special.logsumexp(scores, -1)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])
    return jnp.einsum("bhqk,bkhd->bqhd", weights[..., : k.shape[1]], v), jnp.moveaxis(lse, 1, 2)


FORMS = {
    "flash": functools.partial(flash_attention, precision="fp64"),
    "pasa": functools.partial(pasa_attention, precision="fp64"),
    "pasa by means": functools.partial(pasa_attention, precision="fp64", shift="mean"),
    "exact offset": functools.partial(
        pasa_attention, precision="fp64", statistics="exact_offset", block_size=64
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_derivatives_equal_the_formula_in_float64(name, form):
    with jax.enable_x64(True):
        q, k, v, options = draw(name)
        moving = {n: jnp.asarray(options.pop(n)) for n in ("bias", "sinks") if n in options}
        ct = np.random.default_rng(1).normal(size=q.shape)
        ct_lse = np.random.default_rng(2).normal(size=q.shape[:-1])

        def loss(fn, q, k, v, moving):
            out, lse = fn(q, k, v, **moving, **options)
            return (out * ct).sum() + (jnp.where(jnp.isneginf(lse), 0, lse) * ct_lse).sum()

        ours = functools.partial(FORMS[form], scale=SCALE, return_lse=True)
        got, want = (fn(q, k, v, **moving, **options) for fn in (ours, dense))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), got, want)
        got, want = (
            jax.jit(jax.grad(functools.partial(loss, fn), (0, 1, 2, 3)))(q, k, v, moving)
            for fn in (ours, dense)
        )
        finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), want)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-9), got, finite)


def test_jax_nns_attention_has_the_same_windows_and_biases():
    q, k, v, options = draw("bias")
    q, k, v, bias = (x.astype(np.float32) for x in (q, k, v, np.maximum(options["bias"], -9)))
    ours = flash_attention(q, k, v, bias=bias, causal=True, window=5, precision="fp32", scale=SCALE)
    theirs = jax.nn.dot_product_attention(
        *map(jnp.asarray, (q, k, v, bias)), is_causal=True, local_window_size=(4, 0), scale=SCALE
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_pytorch_computes_the_same(name):
    torch = pytest.importorskip("torch")
    q, k, v, options = draw(name)
    given = {n: np.float32(x) if n == "sinks" else x for n, x in options.items()}
    ours = flash_attention(
        *(x.astype(np.float32) for x in (q, k, v)), precision="fp32", scale=SCALE, **given
    )
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    if name == "window":
        at, key = torch.arange(QUERIES)[:, None], torch.arange(KEYS)
        seen = (key <= at) & (key > at - 9)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=SCALE)
    else:  # a key whose score is the sink's and whose value is 0
        sink = torch.from_numpy(options["sinks"])[:, None, None].expand(BATCH, -1, QUERIES, 1)
        scores = torch.cat([SCALE * q @ k.transpose(-1, -2), sink], -1)
        theirs = scores.softmax(-1)[..., :-1] @ v
    np.testing.assert_allclose(ours, theirs.transpose(1, 2), atol=2e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_float16_stays_close_though_the_scores_overflow_it(name):
    q, k, v, options = draw(name, offset=60.0)
    if "softcap" in options:
        options["softcap"] = 1e6  # of scores up to 34,000
    options = {n: np.float32(x) if n in ("bias", "sinks") else x for n, x in options.items()}
    q, k, v = (x.astype(np.float16).astype(np.float32) for x in (q, k, v))
    assert np.abs(np.einsum("bqhd,bkd->bhqk", q, k[:, :, 0])).max() > 65504
    got = pasa_attention(q, k, v - 60, scale=SCALE, statistics="exact_offset", **options)
    with jax.enable_x64(True):
        wide = (x.astype(float) for x in (q, k, v - 60))
        want = np.asarray(dense(*wide, **options)[0])
    assert np.abs(got - want).max() < 0.15
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.02


@pytest.mark.parametrize("name", OPTIONS)
def test_it_maps_shards_and_exports(name):
    q, k, v, options = draw(name)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    options = {n: np.float32(x) if n in ("bias", "sinks") else x for n, x in options.items()}
    fn = jax.jit(functools.partial(pasa_attention, **options))
    want = fn(q, k, v)
    mapped = jax.vmap(fn, in_axes=(0, None, None))(np.stack([q, 2 * q]), k, v)
    np.testing.assert_array_equal(mapped[0], want)
    np.testing.assert_array_equal(export.export(fn)(q, k, v).call(q, k, v), want)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    shards = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (q, k, v)]
    compiled = fn.lower(*shards).compile()
    assert "all-" not in compiled.as_text()
    # Half a batch compiles to other sums than a whole one, up to float32's last bit.
    np.testing.assert_allclose(compiled(*shards), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("format, per", CACHES)
def test_msd_attention_has_the_same_options(name, format, per):
    q, k, v, options = draw(name)
    k, v = k[:, :128], v[:, :128]
    for array in ("bias", "mask"):
        if array in options:
            options[array] = options[array][..., :128]
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    cache = quantize_kv(k, v, format=format, per=per)
    moving = {
        n: jnp.asarray(options.pop(n), jnp.float32) for n in ("bias", "sinks") if n in options
    }
    causal = options.pop("causal", False)

    def ours(q, moving):
        return msd_attention(
            q,
            cache.k,
            cache.v,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            format=format,
            scale=SCALE,
            causal=causal,
            **options,
            **moving,
        )

    def exact(q, moving):
        keys = keys_of(cache.k, cache.k_scale, format)
        values = values_of(cache.v, cache.v_scale, format)
        more = options | moving
        return dense(q, keys, values, causal=causal, first=128 - QUERIES, **more)[0]

    want = exact(q, moving)
    error = {"int8": 3e-4, "mxfp4": 0.1}[format]
    assert np.abs(ours(q, moving) - want).max() < error * np.abs(want).max()
    ct = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    got, want = (
        jax.grad(lambda *x, fn=fn: (fn(*x) * ct).sum(), (0, 1))(q, moving) for fn in (ours, exact)
    )
    finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), want)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4), got, finite)
    mapped = jax.vmap(ours, (0, None))(np.stack([q, 2 * q]), moving)
    np.testing.assert_allclose(mapped[0], ours(q, moving), rtol=1e-6, atol=1e-7)


def test_a_sink_is_a_part_without_values_to_merge_with():
    q, k, v, _ = draw("sinks")
    sinks = np.linspace(-1, 3, HEADS).astype(np.float32)
    out, lse = flash_attention(*(x.astype(np.float32) for x in (q, k, v)), return_lse=True)
    of_sinks = jnp.zeros_like(out), jnp.broadcast_to(sinks, lse.shape)
    merged = merge_by_lse(*map(jnp.stack, zip((out, lse), of_sinks, strict=True)))
    for got, want in zip(with_sinks(out, lse, jnp.asarray(sinks)), merged, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_a_window_is_priced_by_the_keys_it_holds_and_a_cap_by_its_instructions():
    def work(**options):
        shape = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float16)
        fn = functools.partial(pasa_attention, causal=True, **options)
        operations = trace(fn, shape, shape, shape).operations
        (one,) = (op.work for op in operations if "attention" in op.name)
        return {f: float(one.column(f).evaluate({})) for f in ("flops", "vector_bytes")}

    whole, window, capped = work(), work(window=512), work(softcap=50.0)
    shift = 4096 * 8 * 64 * 2 * 128
    pairs = 4096 * 512 - 512 * 512 / 2
    assert window["flops"] - shift == pytest.approx(pairs * 8 * 4 * 64)
    assert window["vector_bytes"] < 0.3 * whole["vector_bytes"]
    assert capped["vector_bytes"] > 1.5 * whole["vector_bytes"]
    assert capped["flops"] == whole["flops"]


@pytest.mark.parametrize("fn", [pasa_attention, flash_attention])
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"window": 4}, ValueError, "window must be an integer of at least 1 key and needs causal"),
        ({"window": 0, "causal": True}, ValueError, "window must be an integer of at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        ({"sinks": np.zeros(3, np.float32)}, ValueError, r"sinks must be floating point \[4\]"),
        ({"bias": np.zeros((1, 1, 1, KEYS), int)}, TypeError, "bias must be floating point"),
        ({"bias": np.zeros((1, 1, 1, 9), np.float32)}, ValueError, "bias must be broadcastable to"),
    ],
)
def test_bad_options_are_refused_with_what_would_do(fn, options, error, message):
    q, k, v, _ = draw("sinks")
    with pytest.raises(error, match=f"{fn.__name__}: {message}"):
        fn(*(x.astype(np.float32) for x in (q, k, v)), **options)
