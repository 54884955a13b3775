"""What a program does: a traced JAX function as operations with symbolic work."""

from cmjax.program.mark import fused, stream, trip_count
from cmjax.program.operation import Loop, Operation, Program, Source, Stream
from cmjax.program.rules import UnpricedPrimitive, cost_rule, exchange, tier_shares
from cmjax.program.size import Size, maximum, minimum
from cmjax.program.trace import trace
from cmjax.program.work import FIELDS, Operand, Work, matmul_flops

__all__ = [
    "FIELDS",
    "Loop",
    "Operand",
    "Operation",
    "Program",
    "Size",
    "Source",
    "Stream",
    "UnpricedPrimitive",
    "Work",
    "cost_rule",
    "exchange",
    "fused",
    "matmul_flops",
    "maximum",
    "minimum",
    "stream",
    "tier_shares",
    "trace",
    "trip_count",
]
