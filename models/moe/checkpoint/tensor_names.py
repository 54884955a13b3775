"""Which tensor of a Hugging Face checkpoint is which part of the model's parameters.

One list serves loading and saving. A file's matrices are [out, in], the model's [in, out]; the
model stacks layers and experts, joins gate and up (and query, key and value) by columns, and holds
the latent's up-projection as one tensor per use.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from cmjax.models.moe.config import GroupedAttention, LatentAttention, MoEConfig

Path = tuple[str, ...]
SHARED = -1
"""`WeightMapping.expert` of a shared expert."""


@dataclasses.dataclass(frozen=True)
class WeightMapping:
    """One tensor of a checkpoint."""

    name: str
    """In the file."""
    shape: tuple[int, ...]
    """In the file."""
    form: "Form"
    """How its values become those of the parameters."""
    paths: tuple[Path, ...]
    """The parameters it fills, in the nested dictionary of a model's."""
    index: tuple[int, ...] = ()
    """Where in their leading (layer) axis."""
    column: int = 0
    """Where in their last axis it starts."""
    expert: int | None = None
    """Routed expert that a slot may hold, or `SHARED`; `None` for everything else."""


@dataclasses.dataclass(frozen=True)
class Form:
    """Turns a file's tensor into parameters and back."""

    kind: Literal["as is", "transposed", "up-projection"]
    sizes: tuple[int, int, int] = (0, 0, 0)
    """Of an up-projection: heads, key width, value width."""

    def split(self, x: Array) -> tuple[Array, ...]:
        """The parameters, from the file's tensor."""
        if self.kind == "as is":
            return (x,)
        if self.kind == "transposed":
            return (x.T,)
        heads, key, value = self.sizes
        x = x.reshape(heads, key + value, x.shape[-1])
        return x[:, :key], jnp.swapaxes(x[:, key:], 1, 2)

    def join(self, *parts: Array) -> Array:
        """The file's tensor, from the parameters."""
        if self.kind == "as is":
            return parts[0]
        if self.kind == "transposed":
            return parts[0].T
        both = jnp.concatenate([parts[0], jnp.swapaxes(parts[1], 1, 2)], axis=1)
        return both.reshape(-1, both.shape[-1])


_VECTOR, _MATRIX = Form("as is"), Form("transposed")


def weight_mappings(config: MoEConfig, *, mtp: bool) -> Iterator[WeightMapping]:
    """Every tensor of a checkpoint of `config`, in the order of its layers."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield WeightMapping("model.embed_tokens.weight", (vocab, hidden), _VECTOR, (("main", "embed"),))
    place = {"dense": 0, "moe": 0}
    for layer in range(config.layers):
        kind = config.kind(layer)
        stack = ("main", kind, "layers")
        yield from _layer(config, layer, kind, stack, (place[kind],))
        place[kind] += 1
    yield WeightMapping("model.norm.weight", (hidden,), _VECTOR, (("main", "norm", "gain"),))
    if not config.tie_embeddings:
        head = (("main", "head", "weight"),)
        yield WeightMapping("lm_head.weight", (vocab, hidden), _MATRIX, head)
    if mtp:
        yield from _mtp(config)


def is_known(name: str, config: MoEConfig) -> bool:
    """Whether a tensor that `weight_mappings` does not list may be in a checkpoint and be left out.

    These are MTP layers (of which a model may hold the first, without its copies of the embedding
    and head), tables of rotary frequencies, and the head of a model that ties it.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight":
        return config.tie_embeddings
    mtp = range(config.layers, config.layers + config.mtp_layers)
    return any(name.startswith(f"model.layers.{layer}.") for layer in mtp)


def mtp_marker(config: MoEConfig) -> str:
    """A tensor that a checkpoint with MTP weights has."""
    return f"model.layers.{config.layers}.eh_proj.weight"


def expert_names(config: MoEConfig, layer: str, expert: int) -> dict[str, str]:
    """The names of one expert's matrices (`gate`, `up` and `down`) in a layer such as
    `model.layers.3`."""
    prefix = f"{_block(config, layer)}.experts.{expert}"
    parts = zip(("gate", "up", "down"), _parts(config), strict=True)
    return {own: f"{prefix}.{theirs}.weight" for own, theirs in parts}


def _block(config: MoEConfig, layer: str) -> str:
    return f"{layer}.block_sparse_moe" if config.family == "mixtral" else f"{layer}.mlp"


def _parts(config: MoEConfig) -> tuple[str, str, str]:
    mixtral = config.family == "mixtral"
    return ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")


def _layer(config: MoEConfig, layer: int, kind: str, stack: Path, index) -> Iterator[WeightMapping]:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    attention = config.attention
    if isinstance(attention, LatentAttention):
        yield from _latent(config, attention, prefix, (*stack, "attention"), index)
    else:
        yield from _grouped(config, attention, prefix, (*stack, "attention"), index)
    norm = f"{prefix}.post_attention_layernorm.weight"
    block = (*stack, "moe") if kind == "moe" else stack
    yield WeightMapping(norm, (hidden,), _VECTOR, ((*block, "norm", "gain"),), index)
    if kind == "dense":
        yield from _swiglu(config, f"{prefix}.mlp", config.ffn_size, (*stack, "ffn"), index)
    else:
        yield from _moe(config, prefix, block, index)


def _moe(config: MoEConfig, prefix: str, block: Path, index) -> Iterator[WeightMapping]:
    name = _block(config, prefix)
    shape = (config.routed_experts, config.hidden_size)
    yield WeightMapping(
        f"{name}.gate.weight", shape, _MATRIX, ((*block, "router", "weight"),), index
    )
    if config.score_bias:
        bias = f"{name}.gate.e_score_correction_bias"
        yield WeightMapping(bias, shape[:1], _VECTOR, ((*block, "router", "bias"),), index)
    for expert in range(config.routed_experts):
        experts = (*block, "experts")
        yield from _matrices(
            config, f"{name}.experts.{expert}", config.expert_ffn_size, experts, index, expert
        )
    if config.shared_experts:
        width = config.shared_experts * config.expert_ffn_size
        shared = (*block, "shared")
        yield from _swiglu(config, f"{name}.shared_experts", width, shared, index, SHARED)


def _swiglu(config, name, width, path, index, expert=None) -> Iterator[WeightMapping]:
    yield from _matrices(config, name, width, path, index, expert)
    if config.ffn_bias:
        gate_up, down = ((*path, "gate_up", "bias"),), ((*path, "down", "bias"),)
        yield WeightMapping(f"{name}.gate_proj.bias", (width,), _VECTOR, gate_up, index)
        yield WeightMapping(f"{name}.up_proj.bias", (width,), _VECTOR, gate_up, index, width)
        yield WeightMapping(f"{name}.down_proj.bias", (config.hidden_size,), _VECTOR, down, index)


def _matrices(config, name, width, path, index, expert) -> Iterator[WeightMapping]:
    hidden = config.hidden_size
    gate, up, down = _parts(config)
    gate_up = ((*path, "gate_up", "weight"),)
    for part, column in ((gate, 0), (up, width)):
        shape = (width, hidden)
        yield WeightMapping(f"{name}.{part}.weight", shape, _MATRIX, gate_up, index, column, expert)
    out = ((*path, "down", "weight"),)
    yield WeightMapping(f"{name}.{down}.weight", (hidden, width), _MATRIX, out, index, 0, expert)


def _latent(
    config: MoEConfig, sizes: LatentAttention, prefix: str, path: Path, index
) -> Iterator[WeightMapping]:
    hidden, heads, name = config.hidden_size, config.heads, f"{prefix}.self_attn"
    rank, q_rank = sizes.kv_lora_rank, sizes.q_lora_rank

    def linear(
        own: str, theirs: str, shape: tuple[int, int], bias: bool
    ) -> Iterator[WeightMapping]:
        yield WeightMapping(
            f"{name}.{theirs}.weight", shape, _MATRIX, ((*path, own, "weight"),), index
        )
        if bias:
            yield WeightMapping(
                f"{name}.{theirs}.bias", shape[:1], _VECTOR, ((*path, own, "bias"),), index
            )

    def norm(own: str, theirs: str, width: int) -> WeightMapping:
        return WeightMapping(f"{theirs}.weight", (width,), _VECTOR, ((*path, own),), index)

    yield norm("norm", f"{prefix}.input_layernorm", hidden)
    if q_rank is None:
        yield from linear("q_b", "q_proj", (heads * sizes.qk_dim, hidden), False)
    else:
        yield from linear("q_a", "q_a_proj", (q_rank, hidden), sizes.bias)
        yield norm("q_norm", f"{name}.q_a_layernorm", q_rank)
        yield from linear("q_b", "q_b_proj", (heads * sizes.qk_dim, q_rank), False)
    shape = (rank + sizes.qk_rope_dim, hidden)
    yield from linear("kv_a", "kv_a_proj_with_mqa", shape, sizes.bias)
    yield norm("kv_norm", f"{name}.kv_a_layernorm", rank)
    form = Form("up-projection", (heads, sizes.qk_nope_dim, sizes.v_dim))
    shape = (heads * (sizes.qk_nope_dim + sizes.v_dim), rank)
    ups = ((*path, "up_key"), (*path, "up_value"))
    yield WeightMapping(f"{name}.kv_b_proj.weight", shape, form, ups, index)
    yield from linear("out", "o_proj", (hidden, heads * sizes.v_dim), sizes.bias)


def _grouped(
    config: MoEConfig, sizes: GroupedAttention, prefix: str, path: Path, index
) -> Iterator[WeightMapping]:
    hidden, dim, name = config.hidden_size, sizes.head_dim, f"{prefix}.self_attn"
    norm = ((*path, "norm", "gain"),)
    yield WeightMapping(f"{prefix}.input_layernorm.weight", (hidden,), _VECTOR, norm, index)
    column = 0
    for part, heads in (("q", config.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
        width, qkv = heads * dim, (*path, "qkv")
        weight, bias = ((*qkv, "weight"),), ((*qkv, "bias"),)
        proj = f"{name}.{part}_proj"
        yield WeightMapping(f"{proj}.weight", (width, hidden), _MATRIX, weight, index, column)
        if sizes.bias:
            yield WeightMapping(f"{proj}.bias", (width,), _VECTOR, bias, index, column)
        column += width
    if sizes.qk_norm:
        for part in ("q_norm", "k_norm"):
            yield WeightMapping(f"{name}.{part}.weight", (dim,), _VECTOR, ((*path, part),), index)
    out = (hidden, config.heads * dim)
    yield WeightMapping(f"{name}.o_proj.weight", out, _MATRIX, ((*path, "out", "weight"),), index)
    if sizes.out_bias:
        yield WeightMapping(
            f"{name}.o_proj.bias", (hidden,), _VECTOR, ((*path, "out", "bias"),), index
        )


def _mtp(config: MoEConfig) -> Iterator[WeightMapping]:
    """The first multi-token-prediction module: one more layer, and what joins it to the model."""
    hidden, prefix = config.hidden_size, f"model.layers.{config.layers}"
    for own, theirs in (
        ("norm_embed", "enorm"),
        ("norm_hidden", "hnorm"),
        ("norm", "shared_head.norm"),
    ):
        yield WeightMapping(
            f"{prefix}.{theirs}.weight", (hidden,), _VECTOR, (("mtp", own, "gain"),)
        )
    project = (("mtp", "project", "weight"),)
    yield WeightMapping(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), _MATRIX, project)
    yield from _layer(config, config.layers, "moe", ("mtp", "stack", "layers"), (0,))
