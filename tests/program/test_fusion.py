"""What is one kernel, and what it reads and writes at its boundary."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cmjax.hardware import load_machine, replace_leaf
from cmjax.program import fused, stream, trace

F32 = jnp.float32
N = 64 * 128
BYTES = N * 4


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


X, W = array(64, 128), array(128, 128)


def traffic(fn, *args):
    totals = trace(fn, *args).totals({})
    return totals["read_bytes"], totals["write_bytes"]


def names(program):
    return [op.name for op in program.operations]


def test_a_kernel_that_the_engine_lacks_is_taken_apart():
    @fused("Norm")
    def norm(x):
        return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))

    @fused("Prolog")
    def prolog(x, w):
        return norm(x) @ w

    machine = load_machine("cloudmatrix384")
    assert names(trace(prolog, X, W, machine=machine)) == ["Prolog"]
    lacking = replace_leaf(machine, f"engines.{machine.engine}.unfused", ("Prolog",))
    program = trace(prolog, X, W, machine=lacking)
    assert [op.scope for op in program.operations] == [("Prolog", "Norm"), ("Prolog",)]
    totals = program.totals({})
    assert totals["launches"] == 2
    assert totals["read_bytes"] == 2 * BYTES + 128 * 128 * 4  # the normed x goes through HBM
    without_norm = replace_leaf(lacking, f"engines.{machine.engine}.unfused", ("Prolog", "Norm"))
    assert len(trace(prolog, X, W, machine=without_norm).operations) > 2


@pytest.mark.parametrize("length", [1, 2, 20])
def test_an_elementwise_chain_reads_and_writes_hbm_once(length):
    def chain(x):
        for _ in range(length):
            x = jnp.tanh(x) * 2.0
        return x

    program = trace(chain, X)
    assert len(program.operations) == 1
    assert traffic(chain, X) == (BYTES, BYTES)
    assert program.totals({})["launches"] == 1
    # tanh is four instructions and the product one, each over four-byte elements.
    assert program.totals({})["vector_bytes"] == length * 5 * BYTES


def test_an_operand_used_three_times_is_read_once():
    assert traffic(lambda x, y: x * y + x - jnp.exp(x), X, X) == (2 * BYTES, BYTES)


def test_a_broadcast_reads_its_source():
    assert traffic(lambda x, row: x + row, X, array(128)) == (BYTES + 128 * 4, BYTES)
    assert traffic(lambda x: x + 1.0, X) == (BYTES, BYTES)


def test_slices_read_their_part_and_together_no_more_than_the_whole():
    assert traffic(lambda x: x[:, :32] * 2.0, X) == (BYTES // 4, BYTES // 4)
    assert traffic(lambda x: x[:, :64] + x[:, 64:], X) == (BYTES, BYTES // 2)
    overlapping = traffic(lambda x: x[:48] + x[16:], X)
    assert overlapping == (BYTES, BYTES * 3 // 4)


def test_reshapes_and_transposes_are_views():
    program = trace(lambda x: x.reshape(128, 64).T * 2.0, X)
    assert names(program) == ["mul"]
    assert traffic(lambda x: x.reshape(2, 32, 128).transpose(1, 0, 2) * 2.0, X) == (BYTES, BYTES)


def test_a_reduction_ends_a_kernel():
    program = trace(lambda x: jnp.sum(x * x, axis=1) * 2.0, X)
    assert names(program) == ["mul+reduce_sum", "mul"]
    first, second = (op.work for op in program.operations)
    assert (first.read_bytes, first.write_bytes) == (BYTES, 64 * 4)
    assert (second.read_bytes, second.write_bytes) == (64 * 4, 64 * 4)


def test_a_matrix_product_is_a_kernel_of_its_own():
    program = trace(lambda x, w: jnp.tanh(jnp.tanh(x) @ w), X, W)
    assert names(program) == ["tanh", "dot_general", "tanh"]
    assert traffic(lambda x, w: jnp.tanh(jnp.tanh(x) @ w), X, W) == (
        3 * BYTES + 128**2 * 4,
        3 * BYTES,
    )


def test_a_value_that_others_need_is_written_where_it_is_made():
    def both(x):
        y = jnp.tanh(x)
        return y, y * 2.0

    assert traffic(both, X) == (BYTES, 2 * BYTES)


def test_dead_code_is_not_charged():
    def wasteful(x, w):
        unused = jnp.exp(x @ w)
        _ = unused * 2.0
        return x + 1.0

    program = trace(wasteful, X, W)
    assert names(program) == ["add"]
    assert program.totals({})["cube_flops_32bit"] == 0


def test_dead_results_of_a_loop_body_that_no_output_needs_are_not_charged():
    def body(x, w):
        _ = jnp.exp(x @ w)
        return x + 1.0, None

    program = trace(lambda x, ws: lax.scan(body, x, ws)[0], X, array(5, 128, 128))
    totals = program.totals({})
    assert (totals["cube_flops_32bit"], totals["flops"]) == (0, 5 * N)


def test_a_fused_function_is_one_kernel_that_reads_and_writes_its_boundary():
    @fused("block")
    def block(x, w):
        h = jnp.tanh(x @ w)
        h = h - jnp.max(h, axis=-1, keepdims=True)
        return h @ w

    program = trace(block, X, W)
    (kernel,) = program.operations
    assert kernel.name == "block" and kernel.scope == ("block",)
    assert kernel.work.read_bytes == BYTES + 128 * 128 * 4
    assert kernel.work.write_bytes == BYTES
    assert kernel.work.launches == 1
    loose = trace(lambda x, w: block.__wrapped__(x, w), X, W)
    for field in ("cube_flops_32bit", "vector_bytes", "flops", "transcendentals"):
        assert program.totals({})[field] == loose.totals({})[field]
    assert len(loose.operations) == 4


def test_a_fused_function_is_an_ordinary_function_when_it_runs():
    double = fused("double")(lambda x, *, by: x * by)
    assert double(jnp.ones(3), by=2.0).tolist() == [2.0, 2.0, 2.0]
    assert jax.grad(lambda x: double(x, by=3.0))(1.0) == 3.0


def test_two_calls_of_a_fused_function_are_two_kernels():
    layer = fused("layer")(lambda x, w: jnp.tanh(x @ w))
    program = trace(lambda x, w: layer(layer(x, w), w), X, W)
    assert names(program) == ["layer", "layer"]
    assert traffic(lambda x, w: layer(layer(x, w), w), X, W) == (
        2 * (BYTES + 128**2 * 4),
        2 * BYTES,
    )


def test_a_fused_function_inside_a_fused_function_belongs_to_the_outer_kernel():
    inner = fused("inner")(jnp.tanh)
    program = trace(fused("outer")(lambda x, w: inner(x @ w)), X, W)
    assert names(program) == ["outer"]


def test_only_the_needed_results_of_a_fused_kernel_are_computed_and_written():
    pair = fused("pair")(lambda x: (jnp.tanh(x), jnp.exp(x)))
    assert traffic(lambda x: pair(x), X) == (BYTES, 2 * BYTES)
    assert traffic(lambda x: pair(x)[0], X) == (BYTES, BYTES)


def test_a_collective_inside_a_fused_kernel_is_refused():
    def reduce(x):
        return lax.psum(x * 2.0, "npu")

    with pytest.raises(ValueError, match=r"^psum\w* inside a fused kernel \(sum\): move it out$"):
        trace(fused("sum")(reduce), X, axis_sizes={"npu": 8})


@pytest.mark.parametrize("how", ["dynamic_update_slice", "scatter", "loop"])
def test_writing_into_a_cache_charges_only_what_is_written(how):
    length, width, new = 4096, 128, 4
    moved = new * width * 4

    def write(cache, rows, at):
        if how == "scatter":
            where = (at + jnp.arange(new, dtype=jnp.int32))[:, None]
            dims = lax.ScatterDimensionNumbers((1,), (0,), (0,))
            return lax.scatter(cache, where, rows, dims, mode="promise_in_bounds")
        if how == "loop":

            def step(cache, _):
                return lax.dynamic_update_slice(cache, rows, (at, jnp.int32(0))), None

            return lax.scan(step, cache, length=3)[0]
        return lax.dynamic_update_slice(cache, rows, (at, jnp.int32(0)))

    program = trace(write, array(length, width), array(new, width), array(dtype=jnp.int32))
    totals, times = program.totals({}), 3 if how == "loop" else 1
    indices = 1000  # a few index bytes
    assert times * moved <= totals["read_bytes"] <= times * moved + indices
    assert times * moved <= totals["write_bytes"] <= times * moved + indices


def test_operations_of_different_streams_or_scopes_do_not_fuse():
    def two_streams(x):
        with stream("a"):
            x = jnp.tanh(x)
        with stream("b"):
            return jnp.exp(x)

    def two_scopes(x):
        with jax.named_scope("first"):
            x = jnp.tanh(x)
        with jax.named_scope("second"):
            return jnp.exp(x)

    for fn in (two_streams, two_scopes):
        program = trace(fn, X)
        assert names(program) == ["tanh", "exp"]
        assert traffic(fn, X) == (2 * BYTES, 2 * BYTES)
    assert [op.scope for op in trace(two_scopes, X).operations] == [("first",), ("second",)]


def test_index_arithmetic_is_free_of_launches():
    program = trace(lambda i: (i + 1) // 2, array(64, dtype=jnp.int32))
    assert program.totals({})["launches"] == 0
    assert trace(lambda x: x + 1, array(64)).totals({})["launches"] == 1


def test_a_kernel_waits_for_every_kernel_it_reads():
    def diamond(x, w):
        left = x @ w
        right = jnp.tanh(x) @ w
        return left @ right.T

    program = trace(diamond, X, W)
    waits = {
        op.name + re.sub(r"\D", "", str(i)): sorted(s.op for s in op.sources if s.op is not None)
        for i, op in enumerate(program.operations)
    }
    last = len(program.operations) - 1
    produced = [i for i, op in enumerate(program.operations[:-1]) if op.name == "dot_general"]
    assert waits[f"dot_general{last}"] == produced and len(produced) == 2


def test_a_loop_inside_a_fused_kernel_is_refused():
    def powers(x):
        return lax.fori_loop(0, 3, lambda _, y: y * x, x)

    with pytest.raises(ValueError, match=r"^loop inside a fused kernel \(powers\)"):
        trace(fused("powers")(powers), X)


def test_the_backward_pass_of_a_fused_kernel_finds_arguments_and_matrix_products_only():
    @fused("Kernel")
    def kernel(x, w):
        return jnp.sin(jnp.tanh(jnp.exp(x @ w)))

    def plain(x, w):
        return jnp.sin(jnp.tanh(jnp.exp(x @ w)))

    x, w = jnp.full(X.shape, 0.01), jnp.full(W.shape, 0.02)
    out, back = jax.vjp(kernel, x, w)
    kept = sum(leaf.size for leaf in jax.tree.leaves(back))
    assert kept <= x.size + w.size + out.size
    assert kept < sum(leaf.size for leaf in jax.tree.leaves(jax.vjp(plain, x, w)[1]))
    want = jax.vjp(plain, x, w)[1](out)
    for got, expected in zip(back(out), want, strict=True):
        assert jnp.allclose(got, expected, rtol=1e-5)


def test_a_fused_kernel_without_jit_shows_its_values():
    seen = []

    @fused("Kernel")
    def kernel(x):
        seen.append(float(x[0]))
        return 2 * x

    with jax.disable_jit():
        kernel(jnp.ones(3))
    assert seen == [1.0]
