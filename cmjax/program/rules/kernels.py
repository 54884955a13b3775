"""Kernels written by hand, of which only their author knows the work."""

from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from cmjax.program.rules.elementwise import TRANSCENDENTAL_INSTRUCTIONS
from cmjax.program.rules.registry import UnpricedPrimitive, cost_rule
from cmjax.program.size import Size, maximum, minimum
from cmjax.program.work import Operand, Work, matmul_flops


@cost_rule("pallas_call")
def _pallas_call(*operands: Operand, out, jaxpr, cost_estimate, **params) -> Work:
    """What `pl.pallas_call(..., cost_estimate=pl.CostEstimate(...))` declares.

    Its FLOP run on the cube cores if the kernel multiplies matrices, else on the vector cores. Of
    its bytes, the results are written and the rest is read.
    """
    name = params.get("name") or "pallas_call"
    if cost_estimate is None:
        raise UnpricedPrimitive(
            f"Pallas kernel {name!r} has no cost estimate: call it as pl.pallas_call(..., "
            "cost_estimate=pl.CostEstimate(flops=..., transcendentals=..., bytes_accessed=...))"
        )
    flops = float(cost_estimate.flops)
    width = max((x.itemsize for x in (*operands, *out)), default=4.0)
    element_wise = float(cost_estimate.transcendentals) * TRANSCENDENTAL_INSTRUCTIONS
    engine = {}
    if multiplied := [v.aval.dtype for e in _products(jaxpr) for v in e.invars]:
        engine = matmul_flops(max(multiplied, key=lambda dtype: dtype.itemsize), Size(flops))
    else:
        element_wise += flops
    written = sum((x.nbytes for x in out), Size())
    total = Size(float(cost_estimate.bytes_accessed))
    return Work(
        flops=flops,
        transcendentals=float(cost_estimate.transcendentals),
        vector_bytes=element_wise * width,
        read_bytes=maximum(total - written, Size()),
        write_bytes=minimum(total, written),
        **engine,
    )


def _products(jaxpr: Jaxpr) -> Iterator:
    """Matrix products in a kernel, in its loops and branches too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)
        ):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from _products(getattr(inner, "jaxpr", inner))
