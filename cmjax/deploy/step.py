"""The step of a deployment: a program, what a user calls its sizes, and how its experts lie."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from cmjax.program.step import Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEStep(Step):
    """A step of a mixture-of-experts model, and how its experts lie.

    Fields:
      layers: MoE layers in the main loop (of a dense model, all of them). microbatches:
        independent chains in it.
      ranks: of the expert-parallel group. sharing: of them, how many attend to the same requests.
      experts: number of routed experts. expert_slots: slots of all ranks; shared_slots: how many of
        those hold shared experts.
      experts_per_token: routed experts of a token. copies: slots that it is sent to, that of a
        shared expert included where there is one; 0 where all layers are dense.
      drafts: tokens that a request drafts in a step of decode.
    """

    layers: int = 1
    microbatches: int = 1
    ranks: int
    sharing: int = 1
    experts: int
    expert_slots: int
    shared_slots: int = 0
    experts_per_token: int
    copies: int
    drafts: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """From what a user gives to the symbols of the traced step.

    Fields:
      microbatches, dies_per_npu: what a batch of an NPU divides over.
      slots: of all ranks. copies: slots that a token is sent to.
      spread: ranks that share requests. drafts: per request and step.
    """

    microbatches: int
    dies_per_npu: int
    slots: int
    copies: int
    spread: int
    drafts: int

    def symbols(self, requests, length, tokens, load) -> dict[str, Any]:
        load = load if isinstance(load, Tracer) else np.asarray(load, float)
        if not self.copies:
            return {"requests": requests, "length": length}
        rows = tokens * self.copies / self.slots * load
        return {"requests": requests, "length": length, "slot_rows": rows}

    def per_microbatch(self, batch, *, spread: int):
        """Requests per rank and microbatch; `spread` ranks must share a whole number of them."""
        parts = self.dies_per_npu * self.microbatches
        if not isinstance(batch, Tracer) and jnp.ndim(batch) == 0:
            total = float(batch) * spread / parts
            if batch <= 0 or not math.isclose(total, round(total), abs_tol=1e-6):
                near = max(1, round(float(batch) * spread / parts)) * parts / spread
                groups = f" in groups of {spread} that share them" if spread > 1 else ""
                raise ValueError(
                    f"batch {float(batch):g} requests per NPU do not divide over "
                    f"{self.dies_per_npu} dies x {self.microbatches} microbatches{groups}; "
                    f"{near:g} would"
                )
        return batch / parts


class DecodeSizes(_Sizes):
    """Of a decode step: requests per NPU, cached tokens, rows on the slowest rank over the mean."""

    def __call__(self, batch, context, load=1.0) -> dict[str, Any]:
        requests = self.per_microbatch(batch, spread=self.spread)
        return self.symbols(requests, context, requests * (1 + self.drafts), load)


class PrefillSizes(_Sizes):
    """Of a prefill step: requests per NPU, prompt tokens, rows on the slowest rank over the mean.

    With sequence or tensor parallelism ranks share prompts: only the group's total counts.
    """

    def __call__(self, batch, prompt, load=1.0) -> dict[str, Any]:
        requests = self.per_microbatch(batch, spread=self.spread)
        return self.symbols(requests, prompt, requests * prompt, load)
