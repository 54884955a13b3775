"""The closed forms of multi-scale products against programs as traced, and their known values."""

import jax
import jax.numpy as jnp
import pytest
from jax import export, lax

from cmjax.cost.price import price
from cmjax.hardware import load_machine
from cmjax.primitives.msd.product import msd_dot
from cmjax.program import trace
from studies.msd_closed_forms import crossover_rows, dequantized_product, kv_bytes, parts_product

N, K = 2048, 7168


def _bfloat16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _int8(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int8)


def _scale(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("rows", [1.0, 16.0, 4096.0])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_parts_closed_form_is_what_the_tracer_counts(rows, passes):
    (m,) = export.symbolic_shape("m")
    program = trace(
        lambda x, w, s: msd_dot(x, w, w_scale=s, passes=passes),
        _bfloat16(m, K),
        _int8(N, K),
        _scale(N),
    )
    totals = program.totals({"m": rows})
    closed = parts_product(rows, N, K, passes=passes)
    assert totals["vector_bytes"] == closed.vector_bytes
    assert totals["cube_flops_8bit"] == closed.cube_flops_8bit
    assert totals["read_bytes"] + totals["write_bytes"] == closed.hbm_bytes + 4 * N


@pytest.mark.parametrize("rows", [1.0, 4096.0])
def test_the_dequantized_closed_form_is_what_the_tracer_counts(rows):
    """Cast, then scale in bfloat16: one element-wise kernel that writes what the product reads."""
    (m,) = export.symbolic_shape("m")

    def dense(x, w, s):
        return x @ (w.astype(jnp.bfloat16) * s[:, None]).T

    program = trace(dense, _bfloat16(m, K), _int8(N, K), _bfloat16(N))
    totals = program.totals({"m": rows})
    closed = dequantized_product(rows, N, K, through_memory=True)
    assert totals["cube_flops_16bit"] == closed.cube_flops_16bit
    assert totals["vector_bytes"] == closed.vector_bytes
    assert totals["read_bytes"] + totals["write_bytes"] == closed.hbm_bytes + 2 * N


def test_attention_traffic_is_five_two_and_one_byte_per_value():
    keys, d = 4096.0, 128.0
    assert kv_bytes(keys, d, "dequantize") / kv_bytes(keys, d, "parts") == 2.5
    assert kv_bytes(keys, d, "dequantize") / kv_bytes(keys, d, "stacked") == 5


def test_attention_traffic_is_what_the_tracer_counts():
    """One query per head: what is left beside the cache is small, and is taken off."""
    (n,) = export.symbolic_shape("n")
    d, keys = 128, 4096.0
    query, key = _bfloat16(1, d), _int8(n, d)

    def dequantize(q, k, s):
        return q @ (k.astype(jnp.bfloat16) * s).T

    def parts(q1, q2, k):
        both = [
            lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
            for q in (q1, q2)
        ]
        return both[0] * 254 + both[1]

    def traffic(program, without):
        totals = program.totals({"n": keys})
        return totals["read_bytes"] + totals["write_bytes"] - without

    one = trace(dequantize, query, key, jax.ShapeDtypeStruct((), jnp.bfloat16))
    two = trace(parts, _int8(1, d), _int8(1, d), key)
    stacked = trace(lambda q, k, s: msd_dot(q, k, w_scale=s), query, key, _scale(n))
    assert traffic(one, 2 * d + 2 + 2 * keys) == kv_bytes(keys, d, "dequantize")
    assert traffic(two, 2 * d + 5 * 4 * keys) == kv_bytes(keys, d, "parts")
    assert traffic(stacked, 2 * d + 4 * keys + 2 * keys) == kv_bytes(keys, d, "stacked")


def test_vector_work_crosses_over_at_1365_rows_for_unit_costs():
    assert int(crossover_rows(4096, 4096)) == 1365
    costs = {"dequantize": 2.0, "decompose": 10.0, "recombine": 3.5}
    rows = crossover_rows(N, K, **costs)
    before, after = (
        dequantized_product(m, N, K).vector_bytes / 2 - parts_product(m, N, K).vector_bytes / 4
        for m in (rows * 0.999, rows * 1.001)
    )
    assert before > 0 > after


def test_unfused_and_unstacked_parts_cost_what_they_move():
    fused = parts_product(8, N, K).hbm_bytes
    assert parts_product(8, N, K, stacked=False).hbm_bytes - fused == N * K
    assert parts_product(8, N, K, fused=False).hbm_bytes - fused == 2 * 2 * 8 * K + 8 * 2 * 8 * N


def test_latency_has_gradients_to_the_machine_and_agrees_with_the_pricer():
    machine = load_machine("cloudmatrix384")
    rows = 4096.0

    def seconds(chip):
        return parts_product(rows, N, K).seconds(chip)

    chip = machine.chip
    slope = jax.grad(lambda c: jnp.log(seconds(c)))(chip)
    elasticity = sum(
        getattr(slope, f) * getattr(chip, f)
        for f in ("cube_flops_8bit", "vector_bytes_per_s", "hbm_bytes_per_s")
    )
    assert abs(float(elasticity) + 1) < 1e-5
    waiting = dequantized_product(rows, N, K).seconds(chip, overlapped=False)
    assert waiting > dequantized_product(rows, N, K).seconds(chip)
    program = trace(
        lambda x, w, s: msd_dot(x, w, w_scale=s), _bfloat16(4096, K), _int8(N, K), _scale(N)
    )
    cube = price(program, machine, {}).parts[0].cube[0]
    ideal = parts_product(rows, N, K).cube_flops_8bit / chip.cube_flops_8bit
    assert abs(float(cube * machine.efficiency.gemm / ideal) - 1) < 1e-5


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="path must be one of dequantize, parts, stacked"):
        kv_bytes(1, 1, "direct")  # type: ignore[arg-type]
