"""Rows in the order of their experts: nothing moves here, and how many bytes a machine moves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.cost import price
from cmjax.hardware import load_machine
from cmjax.primitives.permute import permute, unpermute
from cmjax.program import trace

H800 = load_machine("h800-pod")
BOTH = pytest.mark.parametrize("function", [permute, unpermute])


@BOTH
def test_rows_come_back_as_they_are_and_so_do_their_gradients(function):
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 5))

    def moved(x):
        return function(x, ranks=32, copies=8)

    np.testing.assert_array_equal(jax.jit(jax.vmap(moved))(x), x)
    out, pull = jax.vjp(moved, x[0])
    np.testing.assert_array_equal(pull(2 * out)[0], 2 * x[0])


@pytest.mark.parametrize(("ranks", "copies"), [(2, 1), (2, 3), (3, 4), (4, 3)])
def test_a_token_is_once_on_every_rank_that_its_experts_are_on(ranks, copies):
    # every way that a token's copies can fall on the ranks, counted
    ways = list(itertools.product(range(ranks), repeat=copies))
    tokens = np.mean([len(set(way)) for way in ways]) / copies
    rows = jax.ShapeDtypeStruct((2, 64, 32), jnp.int8)
    for function, reads, writes in ((permute, tokens, 1), (unpermute, 1, tokens)):
        program = trace(lambda x, f=function: f(x, ranks=ranks, copies=copies), rows)
        totals = program.totals({})
        assert totals["read_bytes"] == pytest.approx(reads * 2 * 64 * 32)
        assert totals["write_bytes"] == pytest.approx(writes * 2 * 64 * 32)


@BOTH
def test_it_takes_hbms_time_where_the_exchange_overflows_l2_and_none_where_it_fits(function):
    hbm = H800.chip.hbm_bytes_per_s * H800.efficiency.hbm

    def seconds(nbytes):
        rows = jax.ShapeDtypeStruct((1, int(nbytes) // 1024, 1024), jnp.int8)
        return float(price(trace(lambda x: function(x, ranks=1, copies=1), rows), H800, {}).total_s)

    with jax.enable_x64(True):
        large = 4 * H800.chip.l2_bytes
        moved = 2 * (large // 1024 * 1024) / hbm
        assert seconds(large) == pytest.approx(moved + H800.chip.vector_startup_s, rel=1e-6)
        assert seconds(H800.chip.l2_bytes / 2) == 0.0
