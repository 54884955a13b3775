"""What a user says about a deployment; a model family turns it into a step."""

import dataclasses
import os
from types import ModuleType
from typing import Literal

from cmjax.hardware import Supernode
from cmjax.program.step import Step, import_from_here

PROVIDER = "models.moe.deployment"
"""Module whose `build(deployment, machine)` makes the step. Found by name, as models are programs
that cmjax prices and not a part of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """One serving instance.

    Fields:
      phase: `decode` or `prefill`.
      model: preset name, or the path of a Hugging Face `config.json`.
      npus: NPUs of the instance. ep: ranks (dies) per expert-parallel group; 0 means all.
      microbatches: 1, or 2 to overlap.
      quant: width of matrices and dispatched tokens (8-bit runs as FP8 where the chip has it).
        `msd_w8a16` and `msd_w4a16` split 16-bit activations over INT8 and MXFP4 weights.
      attention: `exact`, or `pasa_fp16`.
      kv_cache: format of the latent cache. mtp: one draft token per request and step.
    """

    phase: Literal["decode", "prefill"]
    model: str = "deepseek-r1"
    npus: int = 160
    ep: int = 0
    microbatches: int = 2
    quant: str = "int8"
    attention: Literal["exact", "pasa_fp16"] = "exact"
    kv_cache: str = "bf16"
    mtp: bool = True

    def __post_init__(self):
        for name, allowed in (
            ("phase", ("decode", "prefill")),
            ("microbatches", (1, 2)),
            ("quant", ("int8", "bf16", "msd_w8a16", "msd_w4a16")),
            ("attention", ("exact", "pasa_fp16")),
            ("kv_cache", ("bf16", "int8", "mxfp4")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(map(str, allowed))}, got {getattr(self, name)!r}"
                )
        if self.npus < 1:
            raise ValueError(f"npus must be at least 1, got {self.npus}")
        if self.ep < 0:
            raise ValueError(f"ep must be at least 1 (or 0 for all ranks), got {self.ep}")


def build_step(deployment: Deployment, machine: Supernode) -> Step:
    """The step of a deployment.

    Raises: ValueError: the models are not importable from here, or the deployment makes no sense.
    """
    return _provider().build(deployment, machine)


def build_layer(
    model: str,
    machine: Supernode,
    *,
    ranks: int,
    nodes: int | None,
    experts: int,
    redundant: int,
) -> Step:
    """One MoE block of `model` with another number of experts, on `ranks` ranks: what a placement
    is judged on. Its sizes are `tokens` (per rank) and `rows` (on the slowest rank).

    Raises: ValueError: unknown model, slots or ranks that do not divide.
    """
    return _provider().build_layer(
        model,
        machine,
        ranks=ranks,
        nodes=nodes,
        experts=experts,
        redundant=redundant,
    )


def _provider() -> ModuleType:
    try:
        return import_from_here(PROVIDER)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot import {PROVIDER} ({error.name} is missing): models are run from a checkout "
            f"of cmjax, not from the wheel; start in its folder (now in {os.getcwd()})"
        ) from None
