"""Steps: what `module:function` can name, and what a user calls the sizes."""

import re
import sys

import jax
import jax.numpy as jnp
import pytest

from cmjax.hardware import load_machine
from cmjax.program import Program
from cmjax.program.step import Step, load_function, step_of

MACHINE = load_machine("cloudmatrix384")
MODULE = '''
"""Programs of a user."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Int32

from cmjax.program.step import Step


class LayeredStep(Step):
    pass


def layer(x: BFloat16[Array, "tokens 7168"], w: BFloat16[Array, "7168 wide"]):
    return jnp.tanh(x @ w)


def lookup(table: Float[Array, "rows 64"], index: Int[Array, "n"], scale: Float[Array, ""], by=2.0):
    return table[index] * scale * by


def products(x: Float[Array, "2*b c-1"]):
    return x @ x.T


def untyped(x, y: int):
    return x


def decode_step(machine) -> LayeredStep:
    assert machine.name == "cloudmatrix384"
    x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("requests"), 8), jnp.float32)
    return LayeredStep(fn=jnp.tanh, args=(x,), sizes=sizes)


def sizes(batch, context=4096):
    if batch <= 0:
        raise ValueError("batch must be positive")
    return {"requests": batch * 2}


value = 3
'''


def load_step(target, machine):
    return step_of(load_function(target), machine, target)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A folder of a user's programs, as the working directory."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text("")
    (tmp_path / "zoo" / "programs_of_test.py").write_text(MODULE)
    (tmp_path / "zoo" / "broken_of_test.py").write_text("import no_such_package_of_test\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path])
    yield "zoo.programs_of_test"
    for name in [n for n in sys.modules if n == "zoo" or n.startswith("zoo.")]:
        del sys.modules[name]


def test_a_function_with_jaxtyping_shapes_is_a_step_of_its_shape_names(program):
    step = load_step(f"{program}:layer", MACHINE)
    assert [a.dtype for a in step.args] == [jnp.bfloat16] * 2
    traced = step.trace()
    assert isinstance(traced, Program) and traced.symbols == {"tokens", "wide"}
    given = step.symbols({"tokens": 96, "wide": 512})
    totals = traced.totals(given)
    assert totals["cube_flops_16bit"] == 2 * 96 * 7168 * 512
    assert totals["transcendentals"] == 96 * 512


def test_families_of_dtypes_scalars_and_defaults_are_understood(program):
    step = load_step(f"{program}:lookup", MACHINE)
    assert [a.dtype for a in step.args] == [jnp.float32, jnp.int32, jnp.float32]
    assert step.args[2].shape == ()
    assert step.trace().symbols == {"n"}  # the table itself is not read


def test_shapes_may_be_expressions(program):
    traced = load_step(f"{program}:products", MACHINE).trace()
    assert traced.totals({"b": 4, "c": 11})["flops"] == 2 * 8 * 8 * 10


def test_a_builder_is_called_and_its_sizes_translate(program):
    step = load_step(f"{program}:decode_step", MACHINE)
    assert type(step).__name__ == "LayeredStep"
    assert step.symbols({"batch": 4.0}) == {"requests": 8.0}
    assert step.symbols({"batch": 4.0, "context": 10}) == {"requests": 8.0}
    assert step.trace().totals(step.symbols({"batch": 4.0}))["transcendentals"] == 64
    assert jax.grad(lambda b: step.symbols({"batch": b})["requests"])(4.0) == 2.0


@pytest.mark.parametrize(
    "given, message",
    [
        ({"batsh": 4}, "unknown size 'batsh'; this step takes batch"),
        ({"zzz": 4}, "unknown size 'zzz'; this step takes batch, context"),
        ({}, "size 'batch' is needed; this step takes batch, context"),
        ({"context": 4}, "size 'batch' is needed; this step takes batch, context"),
        ({"batch": -1}, "batch must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(program, given, message):
    step = load_step(f"{program}:decode_step", MACHINE)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        step.symbols(given)


@pytest.mark.parametrize(
    "target, message",
    [
        ("zoo.programs_of_test", "program {t!r}: expected module:function"),
        (":layer", "program {t!r}: expected module:function"),
        ("zoo.programs_of_test:", "program {t!r}: expected module:function"),
        (
            "zoo/programs_of_test.py:layer",
            "program {t!r}: expected module:function, as in zoo.programs_of_test:layer",
        ),
        (
            "zoo.program_of_test:layer",
            "program {t!r}: no module 'zoo.program_of_test'; closest: zoo.programs_of_test",
        ),
        ("zo.programs_of_test:layer", "program {t!r}: no module 'zo'"),
        (
            "zoo.programs_of_test:layr",
            "program {t!r}: zoo.programs_of_test has no function 'layr'; it has layer",
        ),
        (
            "zoo.programs_of_test:value",
            "program {t!r}: zoo.programs_of_test has no function 'value'",
        ),
        (
            "zoo.programs_of_test:untyped",
            "program {t!r}: parameter 'x' needs a jaxtyping shape, such as "
            'BFloat16[Array, "tokens 7168"], so that it can be traced',
        ),
        (
            "zoo.broken_of_test:layer",
            "program {t!r}: zoo.broken_of_test needs 'no_such_package_of_test'",
        ),
    ],
)
def test_a_target_that_names_no_program_is_refused(program, target, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(t=target))}"):
        load_step(target, MACHINE)


def test_a_function_of_any_sizes_takes_what_is_given():
    step = Step(fn=jnp.tanh, args=(), sizes=lambda **sizes: sizes)
    assert step.symbols({"anything": 3}) == {"anything": 3}
