"""The face of a price: any JAX function on a machine, in one call."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cmjax.cost import Timeline, price_function
from cmjax.hardware import Supernode, as_machine
from cmjax.program import Tiers
from cmjax.program.step import Step


def price(
    fn: Callable | Step | str,
    machine: Supernode | str | Path = "cloudmatrix384",
    /,
    *,
    args: tuple | None = None,
    static: Mapping[str, Any] | None = None,
    tiers: Tiers | None = None,
    **sizes: Any,
) -> Timeline:
    """Time, FLOP and bytes of one run of a JAX function on a machine; nothing is run.

    Args:
      fn: a function whose parameters carry jaxtyping shapes (every name in a shape is a size), a
        function that builds a step for a machine, a `Step`, or `"module:function"`.
      machine: a `Supernode`, the name of one in the catalog, or a `.toml` file.
      args: abstract arguments (arrays or `jax.ShapeDtypeStruct`s) of a function without shapes.
      static: arguments with fixed values, by name.
      tiers: link tier of each mesh axis of a sharded function.
      **sizes: a number for every size.
    Returns: a pytree; `jax.grad`, `jax.vmap` and `jax.jit` go through, in the machine's constants
      and in the sizes. See `cmjax.cost.price_function`, which says more of all of them.
    Raises: ValueError: a size missing or unknown, a parameter without a shape, an unknown machine.

    >>> import cmjax
    >>> from jaxtyping import Array, BFloat16
    >>> def project(x: BFloat16[Array, "tokens 7168"], w: BFloat16[Array, "7168 4096"]):
    ...     return x @ w
    >>> f"{float(cmjax.price(project, 'cloudmatrix384', tokens=4096).total_s) * 1e3:.1f} ms"
    '0.8 ms'
    """
    return price_function(fn, as_machine(machine), args=args, static=static, tiers=tiers, **sizes)
