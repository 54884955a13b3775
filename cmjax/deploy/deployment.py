"""What a user says about a deployment: one instance, its size and its arithmetic."""

import dataclasses
from typing import Literal


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
