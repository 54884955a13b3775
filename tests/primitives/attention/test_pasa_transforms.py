"""PASA under JAX's transformations: derivatives, batching, sharding, export; and its price."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cmjax.cost import price
from cmjax.hardware import load_machine
from cmjax.primitives import attention, flash_attention, merge_by_lse, pasa_attention
from cmjax.program import trace


def draw(*, batch=2, q_len=37, kv_len=150, heads=4, kv_heads=2, d=16, dv=8, bias=0.0):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, q_len, heads, d)) + bias
    k = rng.normal(size=(batch, kv_len, kv_heads, d)) + bias
    return q, k, rng.normal(size=(batch, kv_len, kv_heads, dv))


def half(*arrays):
    return [jnp.asarray(x, jnp.float16) for x in arrays]


def dense(mask):
    """Dense attention in plain jnp, whose derivatives JAX takes."""

    def fn(q, k, v):
        k, v = (jnp.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
        scores = jnp.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
        lse = jax.nn.logsumexp(jnp.where(mask, scores, -jnp.inf), axis=-1)
        weights = jnp.where(mask, jnp.exp(scores - lse[..., None]), 0)
        return jnp.einsum("bnts,bsnd->btnd", weights, v), lse.swapaxes(1, 2)

    return fn


@pytest.mark.parametrize(("bias", "shift"), [(0, "mean"), (20, "gemm")])
def test_derivatives_in_float64_equal_those_of_dense_attention(bias, shift):
    with jax.enable_x64(True):
        q, k, v = draw(bias=bias)
        rng = np.random.default_rng(1)
        mask = rng.random((2, 4, 37, 150)) < 0.4
        towards = tuple(rng.normal(size=x.shape) for x in (q, k, v))
        cotangents = rng.normal(size=(2, 37, 4, 8)), rng.normal(size=(2, 37, 4))

        def pasa(q, k, v):
            return pasa_attention(
                q, k, v, mask=mask, precision="fp64", shift=shift, block_size=64, return_lse=True
            )

        want = jax.jvp(dense(mask), (q, k, v), towards)[1]
        got = jax.jvp(pasa, (q, k, v), towards)[1]
        for w, g in zip(want, got, strict=True):
            np.testing.assert_allclose(g, w, atol=2e-12 * np.abs(w).max())
        want = jax.vjp(dense(mask), q, k, v)[1](cotangents)
        got = jax.vjp(pasa, q, k, v)[1](cotangents)
        for w, g in zip(want, got, strict=True):
            np.testing.assert_allclose(g, w, atol=2e-12 * np.abs(w).max())


def test_second_derivatives_equal_those_of_dense_attention():
    with jax.enable_x64(True):
        q, k, v = draw(q_len=5, kv_len=20, batch=1, heads=2, kv_heads=1)
        towards = tuple(np.random.default_rng(1).normal(size=x.shape) for x in (q, k, v))
        mask = np.tri(5, 20, dtype=bool)

        def curved(attend):
            def loss(q, k, v):
                out, lse = attend(q, k, v)
                return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

            return jax.jvp(jax.grad(loss, (0, 1, 2)), (q, k, v), towards)[1]

        want = curved(dense(mask))
        got = curved(
            lambda *x: pasa_attention(
                *x, causal=True, precision="fp64", block_size=8, return_lse=True
            )
        )
        for w, g in zip(want, got, strict=True):
            np.testing.assert_allclose(g, w, atol=1e-11)


def test_gradients_of_half_precision_survive_a_bias_that_overflows_flash_attention():
    """They are those of exact attention, to float32, not of the rounded forward pass."""
    q, k, v = half(*draw(d=128, q_len=16, bias=30))
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    weight = np.random.default_rng(1).normal(size=(2, 16, 4, 8))

    def loss(attend, *operands):
        return jnp.sum(weight * attend(*operands))

    with jax.enable_x64(True):
        full = np.ones((1, 1, 16, 150), bool)
        want = jax.grad(lambda *x: loss(lambda *y: dense(full)(*y)[0], *x), (0, 1, 2))(*wide)
    got = jax.grad(lambda *x: loss(pasa_attention, *x), (0, 1, 2))(*half(*wide))
    for w, g in zip(want, got, strict=True):
        np.testing.assert_allclose(
            np.asarray(g, np.float64), w, atol=4e-3 * np.abs(np.asarray(w)).max()
        )


def test_an_operand_without_tangent_costs_nothing_and_changes_nothing():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw())

    def fn(q, k, v):
        return jnp.sum(pasa_attention(q, k, v, precision="fp32") ** 2)

    together = jax.grad(fn, (0, 1, 2))(q, k, v)
    for i, g in enumerate(together):
        np.testing.assert_allclose(jax.grad(fn, i)(q, k, v), g, atol=1e-5)


def test_reverse_mode_keeps_no_matrix_of_scores():
    q, k, v = (jnp.zeros((1, 1024, 1, 8), jnp.float32) for _ in "qkv")
    step = jax.jit(jax.grad(lambda *x: jnp.sum(pasa_attention(*x) ** 2), (0, 1, 2)))
    temporaries = step.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 1024 * 1024 * 4  # one float32 matrix of scores


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": lambda f: lambda *x: jax.vmap(f)(*x),
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "vmap of q alone": lambda f: (
        lambda q, k, v: jnp.stack([jax.vmap(f, (0, None, None))(q, k[i], v[i])[i] for i in (0, 1)])
    ),
    "vmap of another axis": lambda f: (
        lambda q, k, v: jax.vmap(f, (1, 0, 3))(jnp.moveaxis(q, 0, 1), k, jnp.moveaxis(v, 0, 3))
    ),
    "remat": jax.checkpoint,
    "scan": lambda f: lambda *x: jax.lax.scan(lambda c, row: (c, f(*row)), 0, x)[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transformation_gives_the_batched_result_and_gradient(name):
    """Without a batch axis where the transformation provides it; the mask is closed over."""
    q, k, v = half(*draw(bias=3))
    mask = np.random.default_rng(1).random((1, 37, 150)) < 0.5
    mapped = name in ("jit", "remat")
    given = mask[None] if mapped else mask

    def attend(q, k, v):
        return pasa_attention(q, k, v, mask=given)

    def whole(q, k, v):
        return pasa_attention(q, k, v, mask=mask[None])

    fn = TRANSFORMS[name](attend)
    np.testing.assert_allclose(fn(q, k, v), whole(q, k, v), atol=2e-3)  # one or two float16 steps

    def loss(f):
        return jax.grad(lambda *x: jnp.sum(f(*x).astype(jnp.float32) ** 2), (0, 1, 2))

    for a, b in zip(loss(fn)(q, k, v), loss(whole)(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=4e-3 * float(jnp.abs(b).max()))


def test_gradients_per_example_equal_those_one_by_one():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(batch=3))
    masks = np.random.default_rng(1).random((3, 1, 1, 150)) < 0.5

    def loss(q, k, v, mask):
        return jnp.sum(pasa_attention(q, k, v, mask=mask, precision="fp32") ** 2)

    many = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(q, k, v, masks)
    for i in range(3):
        one = jax.grad(loss, (0, 1, 2))(q[i], k[i], v[i], masks[i])
        for a, b in zip(many, one, strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-4)


def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


SPEC = P("data", None, "model")


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sharded_batch_and_heads_need_no_collective_and_change_nothing(differentiated, masked):
    q, k, v = half(*draw(heads=8, kv_heads=4, d=64, dv=64))
    mask = np.random.default_rng(1).random((2, 8, 37, 150)) < 0.5 if masked else None

    def fn(q, k, v):
        return pasa_attention(q, k, v, mask=mask, causal=not masked)

    if differentiated:
        plain = fn

        def fn(q, k, v):
            return jax.grad(lambda *x: jnp.sum(plain(*x).astype(jnp.float32) ** 2), (0, 1, 2))(
                q, k, v
            )

    placed = NamedSharding(mesh(), SPEC)
    compiled = jax.jit(fn, in_shardings=(placed,) * 3).lower(q, k, v).compile()
    collectives = re.findall(
        r"all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+", compiled.as_text()
    )
    assert not collectives
    operands = jax.device_put((q, k, v), placed)
    whole = jax.jit(fn)(q, k, v)
    if not differentiated:
        np.testing.assert_array_equal(compiled(*operands), whole)
        return
    for a, b in zip(compiled(*operands), whole, strict=True):  # one float16 step, where XLA fuses
        np.testing.assert_allclose(a, b, rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_batch_and_heads_with_gradients(check_vma):
    q, k, v = half(*draw(heads=8, kv_heads=4))

    def loss(q, k, v):
        def local(q, k, v):
            out = pasa_attention(q, k, v).astype(jnp.float32)
            return jax.lax.psum(jnp.sum(out**2), ("data", "model"))

        return jax.shard_map(local, mesh=mesh(), in_specs=SPEC, out_specs=P(), check_vma=check_vma)(
            q, k, v
        )

    def whole(q, k, v):
        return jnp.sum(pasa_attention(q, k, v).astype(jnp.float32) ** 2)

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    for a, b in zip(got, jax.grad(whole, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=4e-3 * float(jnp.abs(b).max()))


def test_keys_sharded_over_devices_merge_by_log_sum_exp():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in draw(kv_len=8 * 24, bias=3))
    axes = ("data", "model")

    def local(q, k, v):
        out, lse = pasa_attention(q, k, v, precision="fp32", return_lse=True)
        return merge_by_lse(*(jax.lax.all_gather(x, axes) for x in (out, lse)))[0]

    split = jax.jit(
        jax.shard_map(
            local, mesh=mesh(), in_specs=(P(), P(None, axes), P(None, axes)), out_specs=P(),
            check_vma=False,
        )
    )  # fmt: skip
    whole = pasa_attention(q, k, v, precision="fp32")
    np.testing.assert_allclose(split(q, k, v), whole, atol=1e-4)


def test_export_round_trip_with_symbolic_batch_for_three_platforms_and_its_gradient():
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    (b,) = export.symbolic_shape("b")
    q, k, v = half(*draw())
    shapes = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (q, k, v)]
    fn = jax.jit(lambda q, k, v: pasa_attention(q, k, v, causal=True))
    exported = export.export(fn, platforms=("cpu", "cuda", "tpu"))(*shapes)
    again = export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_array_equal(again.call(q, k, v), fn(q, k, v))
    cotangent = jnp.ones_like(fn(q, k, v))
    got = again.vjp().call(q, k, v, cotangent)
    for a, w in zip(got, jax.vjp(fn, q, k, v)[1](cotangent), strict=True):
        np.testing.assert_allclose(a, w, atol=1e-3)


class _SelfAttention(nnx.Module):
    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        self.qkv = nnx.LinearGeneral(features, (3, heads, features // heads), rngs=rngs)
        self.out = nnx.LinearGeneral((heads, features // heads), features, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.moveaxis(self.qkv(x), -3, 0)
        return self.out(pasa_attention(q, k, v, causal=True))


def test_a_flax_nnx_module_trains_through_it():
    module = _SelfAttention(16, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 20, 16))

    @nnx.jit
    def step(module):
        loss, gradient = nnx.value_and_grad(lambda m: jnp.mean((m(x) - x) ** 2))(module)
        state = nnx.state(module, nnx.Param)
        moved = jax.tree.map(lambda p, g: p - 0.3 * g, state, gradient)
        nnx.update(module, moved)
        return loss

    losses = [float(step(module)) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def _work(fn, *shapes, dtype=jnp.float16):
    (operation,) = trace(fn, *(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).operations
    return operation.work


def test_the_price_of_a_shift_by_product_is_n_over_twice_the_rows_of_attention():
    t, heads, s, kv_heads, d, n = 1280, 8, 1280, 2, 128, 128
    shapes = ((1, t, heads, d), (1, s, kv_heads, d), (1, s, kv_heads, d))
    pasa, flash = (_work(f, *shapes) for f in (pasa_attention, flash_attention))
    assert flash.cube_flops_16bit == 4.0 * t * heads * s * d
    rows = t * heads // kv_heads
    ratio = pasa.cube_flops_16bit.constant / flash.cube_flops_16bit.constant
    assert ratio == pytest.approx(1 + n / (2 * rows))
    keys = 2.0 * s * kv_heads * d  # shifted once, kept for the later query blocks
    assert pasa.read_bytes - flash.read_bytes == keys
    assert pasa.write_bytes - flash.write_bytes == keys


def test_half_precision_halves_the_vector_work_and_wide_statistics_add_to_the_merge():
    shapes = ((1, 1024, 8, 128),) * 3
    work = {
        (p, s): _work(
            lambda q, k, v, p=p, s=s: pasa_attention(q, k, v, precision=p, statistics=s), *shapes
        ).vector_bytes.constant
        for p, s in (("fp16", "storage"), ("fp16", "fp32"), ("fp32", "fp32"))
    }
    scores = 8 * 1024**2
    merge = scores / 128 * (3 * 128 + 16)
    assert work["fp32", "fp32"] == 2 * work["fp16", "storage"]
    assert work["fp16", "fp32"] == work["fp16", "storage"] + 2 * merge
    assert work["fp16", "storage"] == scores * 8 * 2 + merge * 2


def test_a_causal_price_counts_the_scores_below_the_diagonal():
    def share(queries, keys):
        shapes = ((1, queries, 2, 64), (1, keys, 2, 64), (1, keys, 2, 64))
        whole, causal = (
            _work(lambda *x, c=c: flash_attention(*x, causal=c), *shapes).cube_flops_16bit
            for c in (False, True)
        )
        return causal.constant / whole.constant

    for queries, keys in ((512, 512), (512, 2048), (2048, 512)):
        exact = np.tri(queries, keys).mean()
        assert share(queries, keys) == pytest.approx(exact, rel=0.01)


def test_symbolic_sizes_trace_and_a_supernode_prices_them_below_float32_attention():
    b, s = export.symbolic_shape("b, s")
    q, k = (jax.ShapeDtypeStruct((b, s, h, 128), jnp.float16) for h in (32, 8))
    with jax.enable_x64(True):
        machine, sizes = load_machine("cloudmatrix384"), {"b": 1.0, "s": 8192.0}
        half_s = float(price(trace(pasa_attention, q, k, k), machine, sizes).total_s)
        plain = trace(lambda q, k, v: attention(q, k, v, scale=0.1, causal=False), q, k, k)
        plain_s = float(price(plain, machine, sizes).total_s)
    assert 0.2 * plain_s < half_s < plain_s
