"""Any JAX function priced by one call: what it takes, what it keeps, what it refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, BFloat16, Float

from cmjax.cost import price, price_function
from cmjax.hardware import load_machine
from cmjax.program import trace
from cmjax.program.step import Step

M, H800 = load_machine("cloudmatrix384"), load_machine("h800-pod")
BF16 = jnp.bfloat16


def project(x: BFloat16[Array, "tokens 7168"], w: BFloat16[Array, "7168 wide"]):
    return jnp.tanh(x @ w)


def by_hand(tokens, wide, machine=M):
    args = jax.ShapeDtypeStruct((tokens, 7168), BF16), jax.ShapeDtypeStruct((7168, wide), BF16)
    return float(price(trace(project, *args), machine, {}).total_s)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_an_annotated_function_takes_its_sizes_by_name():
    timeline = price_function(project, M, tokens=4096, wide=2048)
    assert float(timeline.total_s) == pytest.approx(by_hand(4096, 2048), rel=1e-12)
    assert float(timeline.flops) == 2 * 4096 * 7168 * 2048


def test_a_function_without_annotations_takes_abstract_arguments():
    (n,) = jax.export.symbolic_shape("n")
    args = jax.ShapeDtypeStruct((n, 7168), BF16), jax.ShapeDtypeStruct((7168, 2048), BF16)
    timeline = price_function(lambda x, w: jnp.tanh(x @ w), M, args=args, n=4096)
    assert float(timeline.total_s) == pytest.approx(by_hand(4096, 2048), rel=1e-12)
    fixed = price_function(jnp.matmul, M, args=(jnp.ones((8, 16)), np.ones((16, 4))))
    assert float(fixed.flops) == 2 * 8 * 16 * 4


def test_a_builders_step_is_built_once_for_a_machine():
    built = []

    def counted(machine) -> Step:
        built.append(machine)
        return build(machine)

    for batch in (1, 10):
        price_function(counted, M, batch=batch)
    assert built == [M]
    other = jax.tree.map(lambda x: x * 2, M)
    price_function(counted, other, batch=1)
    assert built == [M, other]


def build(machine) -> Step:
    (n,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, machine.npus_per_node * 64), jnp.float32)
    return Step(fn=jnp.exp, args=(x,), sizes=lambda batch: {"n": 2 * batch})


def test_a_step_and_its_builder_take_the_sizes_of_the_step():
    for step in (build(M), build):
        timeline = price_function(step, M, batch=100)
        assert float(timeline._total("transcendentals")) == 2 * 100 * 512
    with pytest.raises(ValueError, match=r"^unknown size 'n'; this step takes batch$"):
        price_function(build, M, n=100)
    slope = jax.grad(lambda m: price_function(build, m, batch=1e6).total_s)(M)
    assert slope.chip.hbm_bytes_per_s < 0


def test_a_name_of_a_function_is_that_function(tmp_path, monkeypatch):
    (tmp_path / "named_of_test.py").write_text(
        "import jax.numpy as jnp\n"
        "from jaxtyping import Array, Float\n"
        'def wave(x: Float[Array, " n"]):\n'
        "    return jnp.sin(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    timeline = price_function("named_of_test:wave", M, n=1000)
    assert timeline.program.totals({"n": 1000.0})["transcendentals"] == 1000


def activated(x: Float[Array, "n d"], kind, w: Float[Array, "d d"], *, times=1):
    for _ in range(times):
        x = getattr(jnp, kind)(x @ w)
    return x


def test_static_arguments_stand_anywhere_in_the_signature():
    timeline = price_function(activated, M, static={"kind": "tanh", "times": 3}, n=10, d=64)
    totals = timeline.program.totals({"n": 10.0, "d": 64.0})
    assert totals["transcendentals"] == 3 * 640 and totals["cube_flops_32bit"] == 3 * 2 * 10 * 64**2
    other = price_function(activated, M, static={"kind": "abs"}, n=10, d=64)
    assert other.program.totals({"n": 10.0, "d": 64.0})["transcendentals"] == 0


def test_gradients_batches_and_compilation_go_through():
    def total(machine, tokens):
        return price_function(project, machine, tokens=tokens, wide=2048.0).total_s

    at = float(total(M, 4096.0))
    assert float(jax.jit(total)(M, 4096.0)) == pytest.approx(at, rel=1e-12)
    slope = float(jax.grad(total, argnums=1)(M, 4096.0))
    quotient = float(total(M, 4097.0) - total(M, 4095.0)) / 2
    assert slope == pytest.approx(quotient, rel=1e-6)
    by_machine = jax.grad(total)(M, 4096.0)
    assert by_machine.chip.cube_flops_16bit < 0
    tokens = jnp.array([8.0, 4096.0, 30000.0])
    many = jax.vmap(lambda n: price_function(project, M, tokens=n, wide=2048.0))(tokens)
    one_by_one = [by_hand(int(n), 2048) for n in tokens]
    np.testing.assert_allclose(many.total_s, one_by_one, rtol=1e-12)


def test_a_function_is_traced_once():
    calls = []

    def counted(x: Float[Array, " n"]):
        calls.append(1)
        return jnp.sin(x)

    for n in (10, 1000, 10):
        for machine in (M, jax.tree.map(lambda x: x * 0.9, M)):
            price_function(counted, machine, n=n)
    jax.grad(lambda n: price_function(counted, M, n=n).total_s)(10.0)
    assert len(calls) == 1

    def looped(x: Float[Array, "n m"]):
        calls.append(1)
        return lax.map(jnp.sin, x)

    calls.clear()
    price_function(looped, M, n=4, m=8)
    first = len(calls)
    price_function(looped, M, n=4, m=8)
    assert len(calls) == first
    price_function(looped, M, n=5, m=8)
    assert len(calls) > first


def test_what_is_kept_holds_no_values_of_a_trace():
    def fresh(x: Float[Array, " n"]):
        return jnp.sin(x)

    with jax.checking_leaks():
        jax.jit(lambda m, n: price_function(fresh, m, n=n).total_s)(M, 10.0)
    assert float(price_function(fresh, M, n=10).total_s) > 0


def test_a_callable_that_cannot_be_kept_is_traced_again():
    class Model:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: Float[Array, " n"]):
            return jnp.sin(x)

    assert float(price_function(Model(), M, n=10).total_s) > 0
    half = functools.partial(activated, kind="tanh")
    found = price_function(half, M, static={"kind": "sin"}, n=10, d=64)
    assert found.program.totals({"n": 10.0, "d": 64.0})["transcendentals"] == 640


MESH = AbstractMesh((4, 16), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def reduced(x: Float[Array, "4*n 1024"]):
    def local(x):
        return lax.psum(x, "model")

    return jax.shard_map(local, mesh=MESH, in_specs=P("data", "model"), out_specs=P("data", None))(
        x
    )


def test_a_sharded_function_is_laid_on_the_machine_unless_tiers_say_where():
    laid = price_function(reduced, M, n=1000)
    shard = 1000 * 64 * 4
    assert {k: float(v) for k, v in laid.link_bytes.items()} == pytest.approx(
        {"die": 2 * shard / 16, "node": 2 * shard * 14 / 16, "supernode": 0.0}
    )
    far = price_function(reduced, M, n=1000, tiers={"model": "supernode"})
    assert float(far.link_bytes["supernode"]) == pytest.approx(2 * shard * 15 / 16)
    # H800: one die a GPU and eight of them a node, so sixteen ranks are on two nodes.
    on_gpus = price_function(reduced, H800, n=1000)
    assert {k: float(v) for k, v in on_gpus.link_bytes.items()} == pytest.approx(
        {"die": 0.0, "node": 2 * shard * 7 / 16, "supernode": 2 * shard * 8 / 16}
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: price_function(project, M, tokens=8),
            "price: no value for size 'wide'; needed: ['tokens', 'wide']",
        ),
        (
            lambda: price_function(project, M, token=8, wide=8),
            "price: no value for size 'tokens'; needed: ['tokens', 'wide']",
        ),
        (
            lambda: price_function(project, M, tokens=8, wide=8, wine=3),
            "price: the program has no size 'wine'; it has ['wide']",
        ),
        (
            lambda: price_function(lambda x: x, M),
            "program '<lambda>': parameter 'x' needs a jaxtyping shape, such as "
            'BFloat16[Array, "tokens 7168"], so that it can be traced, or a value (static)',
        ),
        (
            lambda: price_function(activated, M, static={"king": "tanh"}),
            "program 'activated': no parameter 'king' to fix; it takes kind",
        ),
        (
            lambda: price_function("nothing", M),
            "program 'nothing': expected module:function",
        ),
    ],
)
def test_what_cannot_be_priced_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
