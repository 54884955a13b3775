"""What one operation asks of the machine, in symbolic sizes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import dtypes

from cmjax.program.size import Size, product

ENGINES = ("cube_flops_8bit", "cube_flops_16bit", "cube_flops_32bit", "vector_bytes")
TRAFFIC = (
    "die_bytes",
    "node_bytes",
    "supernode_bytes",
    "once_per_node_bytes",
    "flags",
    "local_bytes",
    "copies",
    "copy_bytes",
    "die_copies",
    "node_copies",
    "supernode_copies",
)
COUNTED = ("flops", "transcendentals", "read_bytes", "write_bytes", "launches")
STACKED = ("stack_bytes", "stack_row_bytes")
FIELDS = ENGINES + TRAFFIC + COUNTED + STACKED + ("inner_blocks",)
"""The columns of a priced program's work table, all additive."""

KINDS = ("compute", "grouped", "attention", "permute", "collective", "dispatch", "combine")
"""How an operation's time follows from its work; set by its cost rule. `compute` is a kernel that
runs on its engines at once, whatever they do; products of a stack of matrices (experts), each with
rows of its own, and attention have efficiencies of their own; a kernel that permutes rows only runs
where the exchange before or after it leaves that to it."""
INNER_BLOCK = 128.0
"""Numbers of the inner dimension that a matrix product's loop takes at a time (DeepGEMM's)."""
COMPUTE = ("compute", "grouped", "attention", "permute")
"""Kinds that stay on their die."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """An argument or result of an operation: its symbolic shape and its dtype."""

    shape: tuple[Size, ...]
    dtype: Any

    @staticmethod
    def of(aval) -> "Operand":
        return Operand(tuple(Size.of(d) for d in aval.shape), aval.dtype)

    @property
    def size(self) -> Size:
        """Number of elements."""
        return product(self.shape)

    @property
    def itemsize(self) -> float:
        """Bytes of one element; sub-byte integers count their bits."""
        if jnp.issubdtype(self.dtype, dtypes.extended):
            return 8.0  # a PRNG key
        name = jnp.dtype(self.dtype).name
        return 0.5 if name in ("int4", "uint4", "float4_e2m1fn") else jnp.dtype(self.dtype).itemsize

    @property
    def is_complex(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.complexfloating)

    @property
    def nbytes(self) -> Size:
        return self.size * self.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one operation on one rank. Sizes or numbers; what is not named is zero.

    Fields:
      cube_flops_8bit, cube_flops_16bit, cube_flops_32bit: matrix FLOP by operand width.
      inner_blocks: steps that a core takes one after another along the inner dimensions of matrix
        products, of `INNER_BLOCK` numbers each.
      vector_bytes: operand bytes through the vector cores (elements x bytes x instructions).
      die_bytes, node_bytes, supernode_bytes: bytes sent to ranks of each tier.
      once_per_node_bytes: as supernode_bytes, if a token crosses to a node once however many of
        its experts are there.
      flags: source ranks whose flags are polled; local_bytes: HBM bytes that cannot overlap.
      copies, copy_bytes: messages that vector cores write into other ranks one by one, and their
        bytes. die_copies, node_copies, supernode_copies: of them, to ranks of each tier.
      flops, transcendentals: as XLA's cost analysis counts them; for cross-checks and reports.
      read_bytes, write_bytes: HBM traffic; `None` means all arguments once, all results once.
      launches: kernels started.
      stack_bytes: of what is read, a stack of matrices (experts) each of which is read only if it
        has rows; stack_row_bytes: the same times the rows of a matrix.
      kind: one of `KINDS`.
      reach: the furthest tier that the operation waits for: -1 none, 0 die, 1 node, 2 supernode.
      ranks: how many ranks must have arrived before it can end; 1: it waits for no other.
    """

    cube_flops_8bit: Size | float = 0.0
    cube_flops_16bit: Size | float = 0.0
    cube_flops_32bit: Size | float = 0.0
    inner_blocks: Size | float = 0.0
    vector_bytes: Size | float = 0.0
    die_bytes: Size | float = 0.0
    node_bytes: Size | float = 0.0
    supernode_bytes: Size | float = 0.0
    once_per_node_bytes: Size | float = 0.0
    flags: Size | float = 0.0
    local_bytes: Size | float = 0.0
    copies: Size | float = 0.0
    copy_bytes: Size | float = 0.0
    die_copies: Size | float = 0.0
    node_copies: Size | float = 0.0
    supernode_copies: Size | float = 0.0
    flops: Size | float = 0.0
    transcendentals: Size | float = 0.0
    read_bytes: Size | float | None = None
    write_bytes: Size | float | None = None
    launches: Size | float = 1.0
    stack_bytes: Size | float = 0.0
    stack_row_bytes: Size | float = 0.0
    kind: str = "compute"
    reach: int = -1
    ranks: int = 1

    def column(self, field: str) -> Size:
        value = getattr(self, field)
        return Size.of(0.0 if value is None else value)


def of_stack(x: Operand, stack: Operand) -> dict[str, Any]:
    """The fields of a stack of matrices, `[*stack, n, k]`, that multiply rows `[*stack, rows, k]`;
    none of a single matrix."""
    if len(stack.shape) < 3:
        return {}
    rows = stack.nbytes * x.shape[-2]
    return {"kind": "grouped", "stack_bytes": stack.nbytes, "stack_row_bytes": rows}


def matmul_flops(dtype: Any, flops: Size, inner: Size | float = 0.0) -> dict[str, Any]:
    """The fields on which a matrix product of operands of `dtype` is charged.

    Args:
      inner: numbers in its inner dimension, along which the loop of a tile runs; 0 where tiles are
        made in another way.
    """
    bits = jnp.dtype(dtype).itemsize * 8  # complex: two numbers of at least 32 bits
    width = 8 if bits <= 8 else 16 if bits == 16 else 32
    return {f"cube_flops_{width}bit": flops, "inner_blocks": inner / INNER_BLOCK}
