"""Experts stored as transformers 5 holds them in memory: one tensor for all experts of a layer.

    experts.gate_up_proj [experts, 2 * width, hidden]  ->  gate_proj, up_proj [width, hidden] each
    experts.down_proj    [experts, hidden, width]      ->  down_proj [hidden, width] each

An expert's matrix is a run of bytes of the file, so each is listed as a tensor of its own.
"""

import dataclasses
import math
import re

from cmjax.models.moe.checkpoint.folder import add_distinct
from cmjax.models.moe.checkpoint.safetensor_file import StoredTensor
from cmjax.models.moe.checkpoint.tensor_names import expert_names
from cmjax.models.moe.config import MoEConfig

_FUSED = re.compile(
    r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(?:\.weight)?(_scale_inv|_scale)?"
)
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.(weight)")


def unfused(tensors: dict[str, StoredTensor], config: MoEConfig) -> dict[str, StoredTensor]:
    """The tensors by the names of published checkpoints, every expert's apart.

    Raises: ValueError: a fused tensor of another shape than config.json makes it, or scales that
      cannot be divided among the experts; or a tensor that is there in both forms.
    """
    found: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        if match := _FUSED.fullmatch(name):
            add_distinct(found, _experts(stored, match, config))
        elif config.family == "mixtral" and (match := _ROUTER.fullmatch(name)):
            name = f"{match[1]}.block_sparse_moe.gate.weight"
            add_distinct(found, {name: dataclasses.replace(stored, name=name)})
        else:
            add_distinct(found, {name: stored})
    return found


def _experts(
    stored: StoredTensor, match: re.Match[str], config: MoEConfig
) -> dict[str, StoredTensor]:
    experts, width, hidden = config.routed_experts, config.expert_ffn_size, config.hidden_size
    layer, kind, scales = match[1], match[2], match[3] or ""
    down = kind == "down_proj"
    if not scales:
        shape = (experts, hidden, width) if down else (experts, 2 * width, hidden)
        if stored.shape != shape:
            raise ValueError(
                f"{stored.path}: tensor {stored.name!r} has shape {list(stored.shape)}, "
                f"config.json makes it {list(shape)}"
            )
    elif stored.shape[:1] != (experts,) or len(stored.shape) not in (1, 2, 3):
        raise ValueError(
            f"{stored.path}: tensor {stored.name!r} has shape {list(stored.shape)}; scales of "
            f"{experts} experts begin with that number"
        )
    each = stored.shape[1:]
    parts = ("down",) if down else ("gate", "up")
    alike = math.prod(each) == 1  # gate and up share one scale
    if not down and not alike and each[0] % 2:
        raise ValueError(
            f"{stored.path}: tensor {stored.name!r} has shape {list(stored.shape)}; its scales "
            "cannot be divided between gate and up projection"
        )
    found = {}
    size = stored.nbytes // experts
    for expert in range(experts):
        names = expert_names(config, layer, expert)
        for number, part in enumerate(parts):
            shape, offset = each, stored.offset + expert * size
            if not down and not alike:
                shape = (each[0] // 2, *each[1:])
                offset += number * size // 2
            name = names[part] + scales
            found[name] = dataclasses.replace(stored, name=name, shape=shape, offset=offset)
    return found
