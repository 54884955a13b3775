"""A traced program: operations with symbolic work, their dependencies, and loops over bodies."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from cmjax.program.choice import PROBE, broken
from cmjax.program.size import Size, evaluate_monomial
from cmjax.program.work import FIELDS, Operand, Work


@dataclasses.dataclass(frozen=True)
class Stream:
    """An in-order queue of operations with a share of the die's cores (`None`: all of them)."""

    name: str = "main"
    cube_cores: int | None = None
    vector_cores: int | None = None


MAIN = Stream()
"""Where operations go that no stream marks."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An array while tracing. A view (reshape, slice) names the value it looks into as `base`, and
    as `part` which of its bytes it sees; inside a `shard_map`, `shard` is what this rank has of it.
    """

    operand: Operand
    nbytes: Size
    producer: tuple[int, int] | None = None  # (node, output)
    external: tuple[str, int] | None = None  # ("const", 0) or ("carry", i)
    base: "Value | None" = None
    part: object = None
    shard: Size | None = None

    @property
    def root(self) -> "Value":
        return self.base or self

    @property
    def held(self) -> Size:
        """Bytes of the whole array, as far as this rank has it."""
        return self.root.nbytes if self.shard is None else self.shard

    @property
    def bytes_seen(self) -> object:
        """Equal for two views of the same bytes."""
        return self.part or self


@dataclasses.dataclass(eq=False)
class Node:
    """One equation, before fusion. `reads` and `writes` override bytes by argument or result."""

    index: int
    kind: str  # "elementwise", "reduce", "anchor" or "loop"
    name: str
    inputs: list[Value | None]
    work: Work
    scope: tuple[str, ...]
    stream: Stream
    region: int | None
    ahead: bool = False
    shard_map: int | None = None
    outputs: list[Value] = dataclasses.field(default_factory=list)
    reads: dict[int, Size] = dataclasses.field(default_factory=dict)
    writes: dict[int, Size] = dataclasses.field(default_factory=dict)
    loop: "Loop | None" = None
    carry_inputs: list[Value | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a dependency comes from: result `index` of operation `op`, or an input of the program.

    With `op` None, `index` is a carried input, or -1 for anything ready at the start.
    """

    op: int | None
    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One kernel (or collective, or loop) of a program, priced as a whole. `ahead` marks one that
    the loop around it may issue an iteration earlier."""

    name: str
    scope: tuple[str, ...]
    stream: Stream
    work: Work
    sources: tuple[Source, ...]
    loop: "Loop | None" = None
    ahead: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """`length` iterations of a body whose first `carried` inputs are its outputs of before."""

    body: "Program"
    length: int
    carried: int
    carry_sources: tuple[Source, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Operations in issue order, and where each carried output comes from.

    Fields:
      operations, outputs: the program.
      inputs: every symbol in the shape of an argument, also one that no work depends on.
      assumed: pairs of sizes (left, right) of which `left <= right` was taken to hold, where it
        decided what fuses with what or which branch is charged.
      retrace: reads the function again with such choices made at other sizes.
    """

    operations: tuple[Operation, ...]
    outputs: tuple[Source, ...] = ()
    inputs: frozenset[str] = frozenset()
    assumed: tuple[tuple[Size, Size], ...] = ()
    retrace: "Callable[[Mapping[str, float]], Program] | None" = dataclasses.field(
        default=None, repr=False
    )

    def __post_init__(self):
        monomials = sorted(
            {m for op in self.operations for f in FIELDS for m in op.work.column(f).terms}, key=str
        )
        table = np.zeros((len(monomials), len(FIELDS), len(self.operations)))
        row = {m: i for i, m in enumerate(monomials)}
        for j, op in enumerate(self.operations):
            for k, field in enumerate(FIELDS):
                for monomial, coefficient in op.work.column(field).terms.items():
                    table[row[monomial], k, j] += coefficient
        object.__setattr__(self, "monomials", tuple(monomials))
        object.__setattr__(self, "coefficients", table)

    monomials: tuple = dataclasses.field(init=False, repr=False)
    coefficients: np.ndarray = dataclasses.field(init=False, repr=False)

    @property
    def symbols(self) -> set[str]:
        """Names of all the sizes that must be given."""
        names = {s for m in self.monomials for s in Size({m: 1.0}).symbols()}
        return names.union(*(op.loop.body.symbols for op in self.operations if op.loop))

    def at(self, **sizes: float) -> "Program":
        """The program with some symbols fixed."""
        again = self.retrace
        return dataclasses.replace(
            self,
            operations=tuple(_fix(op, sizes) for op in self.operations),
            inputs=self.inputs - set(sizes),
            assumed=tuple((left.fix(sizes), right.fix(sizes)) for left, right in self.assumed),
            retrace=again and (lambda rest: again({**rest, **sizes}).at(**sizes)),
        )

    def broken_assumptions(self, sizes: Mapping[str, float]) -> list[str]:
        """Which assumptions of the program do not hold at `sizes`, as text."""
        return broken(self.assumed, sizes)

    def decided_at(self, sizes: Mapping[str, float]) -> "Program":
        """The program with its kernels and branches chosen at `sizes` instead of where it was
        traced; itself, if that makes no difference."""
        if self.retrace is None or not self.broken_assumptions(sizes):
            return self
        return dataclasses.replace(self.retrace(sizes), inputs=self.inputs)

    @property
    def streams(self) -> tuple[str, ...]:
        names = {op.stream.name for op in self.operations}
        names |= {s for op in self.operations if op.loop for s in op.loop.body.streams}
        return tuple(sorted(names))

    @property
    def levels(self) -> list[tuple["Program", int]]:
        """This program and the bodies of its loops, outer first, with how often each is run."""
        found: list[tuple[Program, int]] = [(self, 1)]
        for op in self.operations:
            if op.loop is not None:
                found += [(body, n * op.loop.length) for body, n in op.loop.body.levels]
        return found

    def total(self, *fields: str) -> Size:
        """Sum of some work fields over the program, per rank, loops multiplied out, in symbols."""
        amounts = (
            op.work.column(field) * float(times)
            for level, times in self.levels
            for op in level.operations
            for field in fields
        )
        return sum(amounts, Size())

    def totals(self, sizes: Mapping[str, float] | None) -> dict[str, float]:
        """Total of every work field over the program, per rank, loops multiplied out.

        Args:
          sizes: value of each symbol; `None` puts every symbol at `PROBE`.
        """
        if sizes is None:
            sizes = dict.fromkeys(self.symbols, PROBE)
        totals = np.zeros(len(FIELDS))
        for level, times in self.levels:
            powers = np.array([float(evaluate_monomial(m, sizes)) for m in level.monomials])
            totals += times * np.einsum("m,mkj->k", powers, level.coefficients)
        return {field: float(amount) for field, amount in zip(FIELDS, totals, strict=True)}


def _fix(op: Operation, sizes: Mapping[str, float]) -> Operation:
    columns = {f: op.work.column(f).fix(sizes) for f in FIELDS}
    loop = op.loop and dataclasses.replace(op.loop, body=op.loop.body.at(**sizes))
    return dataclasses.replace(op, work=dataclasses.replace(op.work, **columns), loop=loop)
