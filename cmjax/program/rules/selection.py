"""Sorting, selecting and scattering."""

from cmjax.program.rules.registry import cost_rule
from cmjax.program.size import Size, log2, maximum
from cmjax.program.work import Operand, Work


@cost_rule("sort")
def _sort(*operands: Operand, dimension: int, **_) -> Work:
    """A merge sort on the vector cores: log2(n) passes, four of them per trip through HBM."""
    passes = log2(operands[0].shape[dimension])
    nbytes = sum((operand.nbytes for operand in operands), Size())
    trips = maximum(Size(1.0), passes / 4.0)
    return Work(
        vector_bytes=nbytes * passes,
        flops=operands[0].size * passes,
        read_bytes=nbytes * trips,
        write_bytes=nbytes * trips,
    )


@cost_rule("top_k", "approx_top_k")
def _top_k(operand: Operand, *, out, **_) -> Work:
    """One selection pass over the rows, then a sort of what is kept: about two passes."""
    return Work(vector_bytes=operand.nbytes * 2.0, flops=operand.size)


@cost_rule("scatter")
def _scatter(operand: Operand, indices: Operand, updates: Operand, *, out, **_) -> Work:
    """In place: reads the updates, writes as many elements; the rest is not touched."""
    return Work(
        vector_bytes=updates.nbytes,
        read_bytes=updates.nbytes + indices.nbytes,
        write_bytes=updates.nbytes,
    )


@cost_rule(
    *"scatter-add scatter-sub scatter-mul scatter-min scatter-max scatter_add scatter_sub "
    "scatter_mul scatter_min scatter_max".split()
)
def _scatter_combine(operand: Operand, indices: Operand, updates: Operand, *, out, **_) -> Work:
    """In place with arithmetic: the touched elements are read as well."""
    return Work(
        vector_bytes=updates.nbytes,
        flops=updates.size * (2.0 if updates.is_complex else 1.0),
        read_bytes=updates.nbytes * 2.0 + indices.nbytes,
        write_bytes=updates.nbytes,
    )
