"""What a user says about a deployment: one instance, its size and its arithmetic."""

import dataclasses
import typing
from typing import Literal

import tyro

from cmjax.inputs import check_count
from cmjax.models.moe.parallelism import MOST_TENSOR

Phase = Literal["decode", "prefill"]
Quant = Literal["int8", "bf16", "msd_w8a16", "msd_w4a16", "w4a8"]
CacheFormat = Literal["bf16", "int8", "mxfp4"]
MOST_DRAFTS = 8
_NPUS: dict[Phase, int] = {"decode": 160, "prefill": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """One instance of a disaggregated serving system: its size and its arithmetic."""

    phase: tyro.conf.Positional[Phase]
    """Which half of a disaggregated system."""
    model: str = "deepseek-r1"
    """Preset name, or the path of a Hugging Face config.json."""
    npus: int | None = None
    """NPUs of one instance (default: 160 for decode, 16 for prefill)."""
    ep: int = 0
    """Ranks (dies) per expert-parallel group; 0 means all of the instance."""
    tp: int = 1
    """Ranks (dies) of a node that share each request: attention heads, dense blocks, shared experts
    and vocabulary (tensor parallelism)."""
    redundant: int | None = None
    """Copies of routed experts beyond one of each, over all ranks of a group (default: as many as
    the published deployments)."""
    microbatches: Literal["auto", 1, 2] = "auto"
    """Overlapping microbatches; auto takes the faster."""
    quant: Quant = "int8"
    """Matrices and dispatched tokens (8-bit is FP8 on a chip that has it); w4a8 is int8, with
    experts in int4."""
    attention: Literal["exact", "pasa_fp16"] = "exact"
    """Softmax attention as it is, or in float16 with the shifted scores of PASA."""
    kv_cache: CacheFormat = "bf16"
    """Format of the latent cache."""
    mtp: bool = True
    """Draft tokens with the MTP module."""
    drafts: int = 1
    """Tokens that a request drafts in a step of decode (with mtp)."""
    engine: str | None = None
    """Serving engine, whose host time the NPU waits for (default: the machine's first one)."""

    def __post_init__(self):
        if self.npus is None:
            object.__setattr__(self, "npus", _NPUS.get(self.phase))

    def check(self) -> None:
        """Raise ValueError, naming the field, for a value that it does not take."""
        for name, annotation in typing.get_type_hints(type(self)).items():
            allowed = [str(value) for value in typing.get_args(annotation)]
            value = getattr(self, name)
            if typing.get_origin(annotation) is Literal and str(value) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        check_count("npus", self.instance_npus)
        if not 1 <= self.drafts <= MOST_DRAFTS:
            raise ValueError(
                f"drafts must lie in 1..{MOST_DRAFTS} (no-mtp for none), got {self.drafts}"
            )
        if self.ep < 0:
            raise ValueError(f"ep must be at least 1 (or 0 for all ranks), got {self.ep}")
        check_count("ep", self.ep, least=0)
        if self.redundant is not None:
            check_count("redundant", self.redundant, least=0)
        if not 1 <= self.tp <= MOST_TENSOR:
            raise ValueError(f"tp must lie in 1..{MOST_TENSOR} (1 for none), got {self.tp}")

    @property
    def instance_npus(self) -> int:
        """NPUs of the instance, the default of the phase where none were given."""
        return _NPUS[self.phase] if self.npus is None else self.npus

    @property
    def decoding(self) -> bool:
        return self.phase == "decode"

    def choices(self) -> tuple["Deployment", ...]:
        """This deployment with every number of microbatches that `microbatches` allows.

        Raises: ValueError as `check` does.
        """
        self.check()
        counts = (1, 2) if self.microbatches == "auto" else (self.microbatches,)
        return tuple(dataclasses.replace(self, microbatches=count) for count in counts)
