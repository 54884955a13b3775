"""The annotation hook: what it refuses, and what it leaves alone."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int, TypeCheckError

from cmjax import primitives
from tests.annotations import checked


@checked
def _doubled(x: Float[Array, "rows 3"]) -> Float[Array, "rows 3"]:
    if x.ndim != 2:
        raise ValueError("x must be [rows, 3]")
    return jnp.concatenate([x, x], axis=1)[:, : 3 if x.shape[0] < 5 else 4]


def test_a_result_of_another_shape_is_refused():
    assert _doubled(jnp.ones((2, 3))).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="return value"):
        _doubled(jnp.ones((5, 3)))


def test_an_accepted_argument_of_another_shape_or_dtype_is_refused():
    for x in (jnp.ones((2, 4)), np.ones((2, 3), np.int32)):
        with pytest.raises(TypeCheckError, match="parameter 'x'"):
            _doubled(x)


def test_a_function_refuses_its_arguments_in_its_own_words():
    with pytest.raises(ValueError, match=r"x must be \[rows, 3\]"):
        _doubled(jnp.ones(3))


def test_tracers_and_numpy_arrays_count_as_arrays():
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(jax.jit(_doubled)(x), _doubled(x))


def test_fields_of_results_are_checked_with_one_size_for_every_name():
    @dataclasses.dataclass
    class Pair:
        a: Float[Array, " n"]
        b: Int[Array, " n"]

    class Named(NamedTuple):
        a: Float[Array, ""]

    @checked
    def make(kind, *fields):
        return kind(*fields)

    make(Pair, jnp.ones(2), jnp.ones(2, int))
    make(Named, jnp.ones(()))
    with pytest.raises(TypeCheckError, match="parameter 'b'"):
        make(Pair, jnp.ones(2), jnp.ones(3, int))
    with pytest.raises(TypeCheckError, match="parameter 'a'"):
        make(Named, jnp.ones(4))


@pytest.mark.parametrize("name", ["msd_dot", "pasa_attention", "winograd_conv1d", "dispatch"])
def test_the_operations_of_the_library_are_checked_in_this_session(name):
    operation = getattr(primitives, name)
    assert operation.__code__ is _doubled.__code__ and operation.__wrapped__ is not operation
