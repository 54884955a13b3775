"""Which arithmetic each part of a model computes in: projections, attention and cache.

    w8a8         y = (xq @ wq) x_scale w_scale         one step per token, one per output channel
    msd_w8a16    y = (M / 127) (a1 @ wq + a2 @ wq / 254) w_scale     activations split, not rounded
    msd_w4a16    the same over MXFP4 weights: blocks of 32 with power-of-two scales
    w4a8         as w8a8 with int4 weights, a step per 256 inputs and output; routed experts only

W8A8 is the recipe of CloudMatrix-Infer (Zuo et al., arXiv 2506.12708, section 4.5), the others are
multi-scale products (Zheng et al., arXiv 2605.13915; `cmjax.primitives.msd.product`). In all of
them norms, routers, embedding and residual stream stay in floating point, and so do the per-head
up-projections of latent attention: absorbed, they act on activations.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp

from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.primitives.int4 import group_size

Format = Literal["float32", "bfloat16", "w8a8", "msd_w8a16", "msd_w4a16"]
FLOATS = ("float32", "bfloat16")
FORMATS = (*FLOATS, "w8a8", "msd_w8a16", "msd_w4a16")
ExpertFormat = Literal["float32", "bfloat16", "w8a8", "msd_w8a16", "msd_w4a16", "w4a8"]
EXPERT_FORMATS = (*FLOATS, "w8a8", "w4a8", "msd_w8a16", "msd_w4a16")
KVCache = Literal["float32", "bfloat16", "int8", "mxfp4"]
KV_CACHES = (*FLOATS, "int8", "mxfp4")
AttentionCore = Literal["exact", "pasa_fp16"]
Precision = Literal["float32", "bfloat16", "int8"]
"""Names of the three arithmetics that weights can be loaded in directly."""
_BLOCK = 32  # values that share a scale in MXFP4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Formats of a model's parts. Hashable: programs are compiled per arithmetic.

    Fields:
      projections: format of attention's down-, up- (of the queries) and output projections, and of
        the draft module's.
      dense: of dense feed-forward blocks and shared experts.
      experts: of routed experts (and shared ones that live in slots). Tokens are dispatched in
        INT8 if they are W8A8 or W4A8.
      head: of the output matrix; must be a float where it is the embedding.
      activations: of the residual stream, and of products with float weights.
      attention: `exact` softmax in float32, or `pasa_fp16`, all of it in float16
        (`cmjax.primitives.attention.pasa`).
      kv_cache: of the latent, or of keys and values; the rotary key of latent attention stays
        bfloat16 beside INT8 and MXFP4.
    Raises: ValueError: an unknown name.
    """

    projections: Format = "bfloat16"
    dense: Format = "bfloat16"
    experts: ExpertFormat = "bfloat16"
    head: Format = "bfloat16"
    activations: Literal["float32", "bfloat16"] = "bfloat16"
    attention: AttentionCore = "exact"
    kv_cache: KVCache = "bfloat16"

    def __post_init__(self):
        known: dict[str, tuple[str, ...]] = dict.fromkeys(("projections", "dense", "head"), FORMATS)
        known["experts"] = EXPERT_FORMATS
        known |= {"activations": FLOATS, "attention": ("exact", "pasa_fp16")}
        for name, allowed in (known | {"kv_cache": KV_CACHES}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Arithmetic: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )

    @staticmethod
    def of(given: "Arithmetic | str") -> "Arithmetic":
        """An arithmetic as it is, or by its name in `ARITHMETICS`.

            >>> Arithmetic.of("int8").experts
            'w8a8'

        Raises: ValueError: an unknown name; lists those that there are.
        """
        if isinstance(given, Arithmetic):
            return given
        if given not in ARITHMETICS:
            raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {given!r}")
        return ARITHMETICS[given]

    @property
    def dtype(self) -> Any:
        """dtype of the residual stream."""
        return jnp.dtype(self.activations)

    @property
    def dispatches_int8(self) -> bool:
        """Whether tokens travel to the experts as INT8."""
        return self.experts in ("w8a8", "w4a8")

    @property
    def quantized(self) -> bool:
        """Whether any matrix is held in few bits."""
        formats = (self.projections, self.dense, self.experts, self.head)
        return not set(FLOATS).issuperset(formats)

    def check(self, config: MoEConfig, tensor: int = 1) -> None:
        """Refuse a model that this arithmetic does not fit.

        Args:
          config: the model. tensor: ranks that share its inner widths.
        Raises: ValueError: MXFP4 with widths that are no multiples of 32, or few-bit weights of a
          head that is the embedding; names the width.
        """
        if config.tie_embeddings and self.head not in FLOATS:
            raise ValueError(
                f"Arithmetic: this model's head is its embedding, which stays in floating point; "
                f"got head={self.head!r}"
            )
        if self.experts == "w4a8" and not config.dense:
            for width in (config.hidden_size, config.expert_ffn_size):
                group_size(width)
        for name, kind, width in self._mxfp4_widths(config, tensor):
            if width % _BLOCK:
                raise ValueError(
                    f"Arithmetic: {kind}: blocks of {_BLOCK} do not divide {name}, {width}; "
                    "choose another format for it"
                )

    def _mxfp4_widths(self, config: MoEConfig, tensor: int) -> Iterator[tuple[str, str, int]]:
        """Widths that have to be whole blocks: name, what asks for it, width."""
        sizes = config.attention
        grouped = isinstance(sizes, GroupedAttention)
        whole, part = "the model's", "the model's" if tensor == 1 else "a rank's part of"
        if "msd_w4a16" in (self.projections, self.dense, self.experts, self.head):
            yield f"{whole} hidden_size", "msd_w4a16", config.hidden_size
        if self.projections == "msd_w4a16":
            width = config.heads // tensor * (sizes.head_dim if grouped else sizes.v_dim)
            yield f"{part} heads * value width", "projections='msd_w4a16'", width
            if not grouped and sizes.q_lora_rank is not None:
                yield f"{whole} q_lora_rank", "projections='msd_w4a16'", sizes.q_lora_rank
        if self.dense == "msd_w4a16":
            if config.dense_layers:
                yield f"{part} ffn_size", "dense='msd_w4a16'", config.ffn_size // tensor
            if config.shared_experts:
                shared = config.shared_experts * config.expert_ffn_size // tensor
                yield f"{part} shared experts' width", "dense='msd_w4a16'", shared
        if self.experts == "msd_w4a16":
            yield f"{whole} expert_ffn_size", "experts='msd_w4a16'", config.expert_ffn_size
        if self.kv_cache == "mxfp4":
            if grouped:
                yield f"{whole} head_dim", "kv_cache='mxfp4'", sizes.head_dim
            else:
                yield f"{whole} kv_lora_rank", "kv_cache='mxfp4'", sizes.kv_lora_rank


def _everywhere(form: Format, **others: Any) -> Arithmetic:
    """One format for all projections; the head stays bfloat16 unless it is given."""
    return Arithmetic(projections=form, dense=form, experts=form, **others)


ARITHMETICS: dict[str, Arithmetic] = {
    "float32": _everywhere("float32", head="float32", activations="float32", kv_cache="float32"),
    "bfloat16": Arithmetic(),
    "int8": _everywhere("w8a8", kv_cache="int8"),
    "msd_w8a16": _everywhere("msd_w8a16", kv_cache="int8"),
    "msd_w4a16": _everywhere("msd_w4a16", kv_cache="int8"),
    "msd_w8a16_head8": _everywhere("msd_w8a16", head="msd_w8a16", kv_cache="int8"),
    "msd_w4a16_head8": _everywhere("msd_w4a16", head="msd_w8a16", kv_cache="int8"),
    "msd_w4a16_kv4": _everywhere("msd_w4a16", kv_cache="mxfp4"),
    "pasa_fp16": Arithmetic(attention="pasa_fp16"),
    "int8_pasa_fp16": _everywhere("w8a8", attention="pasa_fp16", kv_cache="int8"),
    "w4a8": Arithmetic(projections="w8a8", dense="w8a8", experts="w4a8", kv_cache="int8"),
}
"""Arithmetics by name. `int8` is W8A8, with everything else as CloudMatrix-Infer has it; `w4a8` has
its experts in four bits; `_head8` the output matrix, of which every token reads all, in 8 bits."""
