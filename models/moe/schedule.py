"""In which order and on which streams the blocks of a layer are issued.

A schedule changes no number. It is read by the pricing: operations of one stream run in program
order, streams overlap. Source: CloudMatrix384 paper, sections 4.2 (decode: an attention stream and
a MoE stream) and 4.3 (prefill: by engine).
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import jax

from cmjax.program.mark import stream

BLOCKS = ("attention", "router", "dispatch", "experts", "combine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Microbatching and streams of a step."""

    microbatches: int = 1
    """1, or 2 to let one microbatch's attention overlap the other's experts."""
    streams: Mapping[str, tuple[str, int | None, int | None]] = dataclasses.field(
        default_factory=dict
    )
    """Block -> (stream name, cube cores, vector cores); a block not named runs unmarked."""
    order: Literal["microbatch", "stage"] = "microbatch"
    """`microbatch`: a layer issues all blocks of one microbatch, then of the next. `stage`: it
    issues attention and router of each microbatch, then dispatch of all, experts of all, combine
    of all."""

    def __post_init__(self):
        if self.microbatches not in (1, 2):
            raise ValueError(f"Schedule: microbatches must be 1 or 2, got {self.microbatches}")
        if self.order not in ("microbatch", "stage"):
            raise ValueError(f"Schedule: order must be 'microbatch' or 'stage', got {self.order!r}")
        unknown = sorted(set(self.streams) - set(BLOCKS))
        if unknown:
            raise ValueError(
                f"Schedule: streams names unknown blocks {unknown}; blocks are {', '.join(BLOCKS)}"
            )

    def __hash__(self):
        return hash((self.microbatches, tuple(sorted(self.streams.items())), self.order))

    @contextlib.contextmanager
    def block(self, name: str, scope: str | None = None) -> Iterator[None]:
        """Trace what is inside as block `name`: on its stream, under the named scope `scope`."""
        with contextlib.ExitStack() as marks:
            if name in self.streams:
                stream_name, cube, vector = self.streams[name]
                marks.enter_context(stream(stream_name, cube=cube, vector=vector))
            marks.enter_context(jax.named_scope(scope or name))
            yield


def overlapped_exchange() -> Schedule:
    """Two microbatches; dispatch and combine move data (SDMA, or a NIC) beside all computation.

    Prefill of the CloudMatrix384 paper (section 4.3) and both phases of DeepSeek's H800 system.
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
        order="stage",
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
