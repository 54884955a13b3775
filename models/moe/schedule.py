"""In which order and on which streams the blocks of a layer are issued.

A schedule changes no number. It is read by the pricing: operations of one stream run in program
order, streams overlap. Source: CloudMatrix384 paper, sections 4.2 (decode: an attention stream and
a MoE stream) and 4.3 (prefill: by engine).
"""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Literal

import jax

from cmjax.program.mark import ahead, stream

BLOCKS = ("attention", "router", "dispatch", "experts", "combine")
Order = Literal["microbatch", "stage", "interleaved"]
_TURNS: dict[str, tuple[int, ...]] = {
    "microbatch": (0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1),
    "stage": (0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1),
    "interleaved": (0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1),
}
"""Whose next stage is issued: a microbatch's are what comes before attention over the cache, the
rest of attention with the router, dispatch, experts, shared expert, combine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Microbatching and streams of a step."""

    microbatches: int = 1
    """1, or 2 to let one microbatch's attention overlap the other's experts."""
    streams: Mapping[str, tuple[str, int | None, int | None]] = dataclasses.field(
        default_factory=dict
    )
    """Block -> (stream name, cube cores, vector cores); a block not named runs unmarked."""
    order: Order = "microbatch"
    """`microbatch`: a layer issues all blocks of one microbatch, then of the next. `stage`: it
    issues attention and router of each microbatch, then dispatch of all, experts of all, combine
    of all. `interleaved`: the second microbatch's attention is in two steps, of which the first
    (before the cache is attended) runs while the first microbatch is dispatched, and the other
    while it is combined."""

    def __post_init__(self):
        if self.microbatches not in (1, 2):
            raise ValueError(f"Schedule: microbatches must be 1 or 2, got {self.microbatches}")
        if self.order not in _TURNS:
            known = " or ".join(map(repr, _TURNS))
            raise ValueError(f"Schedule: order must be {known}, got {self.order!r}")
        unknown = sorted(set(self.streams) - set(BLOCKS))
        if unknown:
            raise ValueError(
                f"Schedule: streams names unknown blocks {unknown}; blocks are {', '.join(BLOCKS)}"
            )

    def __hash__(self):
        return hash((self.microbatches, tuple(sorted(self.streams.items())), self.order))

    @property
    def shared_before_experts(self) -> bool:
        """Whether a shared expert that is in no slot runs while its tokens are dispatched, and not
        while they are combined."""
        return self.order == "interleaved"

    def issue[Result](self, stages: Sequence[Generator[None, None, Result]]) -> tuple[Result, ...]:
        """What the microbatches return, their stages issued in the order of the schedule; one may
        have fewer."""
        found: dict[int, Result] = {}
        for number in _TURNS[self.order]:
            if number < len(stages) and number not in found:
                try:
                    next(stages[number])
                except StopIteration as end:
                    found[number] = end.value
        return tuple(found[number] for number in range(len(stages)))

    def head_start(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Trace the first stage of a microbatch: if the order is `interleaved`, that of the first
        one may be issued while the layer before waits for the second one's tokens."""
        first = self.order == "interleaved" and number == 0
        return ahead() if first else contextlib.nullcontext()

    @contextlib.contextmanager
    def block(self, name: str, scope: str | None = None) -> Iterator[None]:
        """Trace what is inside as block `name`: on its stream, under the named scope `scope`."""
        with contextlib.ExitStack() as marks:
            if name in self.streams:
                stream_name, cube, vector = self.streams[name]
                marks.enter_context(stream(stream_name, cube=cube, vector=vector))
            marks.enter_context(jax.named_scope(scope or name))
            yield


def overlapped_exchange(order: Order = "stage") -> Schedule:
    """Two microbatches; dispatch and combine move data (SDMA, or a NIC) beside all computation.

    Prefill of the CloudMatrix384 paper (section 4.3) and of DeepSeek's H800 system, whose decode
    has the attention in two steps (`interleaved`: its overview of inference, open-infra-index).
    """
    compute = ("compute", None, None)
    exchange = ("exchange", None, None)
    return Schedule(
        microbatches=2,
        streams={
            "attention": compute,
            "router": compute,
            "experts": compute,
            "dispatch": exchange,
            "combine": exchange,
        },
        order=order,
    )


def two_stream_decode(cube_cores: int = 24, vector_cores: int = 48) -> Schedule:
    """Decode of the CloudMatrix384 paper (section 4.2): attention on two thirds of each die's cores
    (16 cube and 32 vector of 24 and 48), the MoE on the rest; two microbatches swap streams."""
    cube, vector = cube_cores * 2 // 3, vector_cores * 2 // 3
    moe = ("moe", cube_cores - cube, vector_cores - vector)
    return Schedule(
        microbatches=2,
        streams={
            "attention": ("attention", cube, vector),
            "router": moe,
            "dispatch": moe,
            "experts": moe,
            "combine": moe,
        },
    )
