"""Which weights of a checkpoint are few-bit values times scales, by its config.json.

    w[i, j] = q[i, j] * scale[i // rows, j // columns]

Read are block-wise and per-tensor FP8 (E4M3; `quant_method: fp8`) and the 8-bit integers and floats
of compressed-tensors, per tensor, row, group or block. Weights are read as these values; how
activations were to be rounded (`input_scale`) is the arithmetic's business, not the file's.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from cmjax.models.moe.checkpoint import block_fp8
from cmjax.models.moe.checkpoint.block_fp8 import Block
from cmjax.models.moe.checkpoint.config_schema import Size
from cmjax.models.moe.checkpoint.json_file import convert
from cmjax.models.moe.checkpoint.safetensor_file import StoredTensor

_SUFFIXES = ("_scale_inv", "_scale")
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_OF_ACTIVATIONS = re.compile(r".*\.(input|output|activation|k|v)_scale(_inv)?")
_BlockSize = Annotated[list[Size], Meta(min_length=2, max_length=2)]


class _Method(Struct):
    quant_method: str


class _Fp8(Struct):
    """`FineGrainedFP8Config`, and what vLLM's tools write under the same name."""

    fmt: Literal["e4m3"] | None = None
    weight_block_size: _BlockSize | UnsetType | None = UNSET
    expert_dtype: Literal["fp8"] = "fp8"


class _Weights(Struct):
    num_bits: Literal[8]
    type: Literal["int", "float"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["tensor", "channel", "group", "block"] | None = None
    block_structure: _BlockSize | None = None


class _Group(Struct):
    weights: _Weights | None = None


class _Compressed(Struct):
    config_groups: dict[str, Any]
    format: Literal["int-quantized", "float-quantized", "naive-quantized", "dense"]
    transform_config: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Scale:
    """Scales of one weight."""

    stored: StoredTensor
    shape: tuple[int, ...]
    """As a matrix: one scale per block."""
    block: Block


@dataclasses.dataclass(frozen=True)
class WeightScales:
    """What a config.json says of scaled weights."""

    types: frozenset[str] = frozenset()
    """Types whose weights have scales."""
    block: Block | None = None
    """Rows and columns that share a scale; `None`: the scales' shape says it."""
    default_block: bool = False
    """The file does not say it: scales called `weight_scale_inv` are of 128 x 128 blocks."""

    def of(self, stored: StoredTensor, tensors: dict[str, StoredTensor]) -> Scale | None:
        """The scales of a weight; `None` for one that is stored as it is, whatever lies beside it.

        Raises: ValueError: a weight of few bits without scales, with two, or with some that do not
          fit; or where config.json speaks of none.
        """
        name = stored.dtype.name
        if name in _FLOATS:
            return None
        if name not in self.types:
            if name != "float8_e4m3fn":
                raise ValueError(
                    f"{stored.path}: tensor {stored.name!r} has type {stored.dtype}; weights are "
                    f"{', '.join((*_FLOATS, *sorted(self.types or {'float8_e4m3fn'})))} here"
                )
            raise ValueError(
                f"{stored.path}: tensor {stored.name!r} is FP8, but config.json has no "
                "quantization_config that says so; without scales its values mean nothing"
            )
        scales = [s for suffix in _SUFFIXES if (s := tensors.get(stored.name + suffix))]
        if not scales or len(stored.shape) != 2:
            kind = "FP8" if name.startswith("float8") else "INT8"
            what = "block scales" if self.block or self.default_block else "scales"
            wanted = stored.name + ("_scale_inv" if what == "block scales" else "_scale")
            raise ValueError(
                f"{stored.path}: {kind} tensor {stored.name!r} of shape {list(stored.shape)} needs "
                f"{what} {wanted!r}"
            )
        if len(scales) > 1:
            raise ValueError(
                f"{stored.path}: {stored.name!r} has scales twice: {scales[0].name!r} and "
                f"{scales[1].name!r}"
            )
        return self._fitted(stored, scales[0])

    def _fitted(self, stored: StoredTensor, scale: StoredTensor) -> Scale:
        if scale.dtype.name not in _FLOATS:
            raise ValueError(
                f"{scale.path}: {scale.name!r} has type {scale.dtype}; scales are "
                f"{', '.join(_FLOATS)} here"
            )
        block = self.block
        if self.default_block and scale.name.endswith("_scale_inv"):
            block = (128, 128)
        rows, columns = stored.shape
        if block is not None:
            expected = block_fp8.scale_shape(stored.shape, block)
            if scale.shape != expected:
                raise ValueError(
                    f"{scale.path}: {scale.name!r} has shape {list(scale.shape)}; blocks of "
                    f"{block[0]} x {block[1]} of {list(stored.shape)} make it {list(expected)}"
                )
            return Scale(scale, expected, block)
        shape = (*scale.shape, 1, 1)[:2] if len(scale.shape) < 3 else (0, 0)
        r, c = shape
        fits = c > 0 and columns % c == 0 and (r == rows or (r, c) == (1, 1))
        if not fits:
            raise ValueError(
                f"{scale.path}: {scale.name!r} has shape {list(scale.shape)}; scales of "
                f"{list(stored.shape)} are one, one per row, or one per group of a row"
            )
        return Scale(scale, shape, (rows // r, columns // c))


def read_scales(quantization: Any, path: Path) -> WeightScales:
    """From the `quantization_config` of the config.json `path`.

    Raises: ValueError: a method or format this reader does not know; names it.
    """
    where = "quantization_config"
    if not quantization:
        return WeightScales()
    method = convert(quantization, _Method, path, where).quant_method
    if method == "fp8":
        keys = convert(quantization, _Fp8, path, where)
        size = keys.weight_block_size
        fp8 = frozenset({"float8_e4m3fn"})
        if isinstance(size, msgspec.UnsetType):
            return WeightScales(fp8, default_block=True)
        return WeightScales(fp8, None if size is None else (size[0], size[1]))
    if method == "compressed-tensors":
        return _compressed(convert(quantization, _Compressed, path, where), path)
    raise ValueError(
        f"{path}: quantization_config has quant_method {method!r}; this reader knows 'fp8', "
        "'compressed-tensors' of 8 bits, and unquantized weights"
    )


def is_scale(name: str, weights: set[str]) -> bool:
    """Whether a tensor that no parameter is read from may be there: scales beside a weight, or of
    activations or the cache."""
    beside = any(name.removesuffix(suffix) in weights for suffix in _SUFFIXES)
    return beside or _OF_ACTIVATIONS.fullmatch(name) is not None


def _compressed(keys: _Compressed, path: Path) -> WeightScales:
    for name in ("transform_config", "sparsity_config"):
        value = getattr(keys, name)
        if value and value.get("format") != "dense":
            raise ValueError(
                f"{path}: quantization_config has {name} {value!r}; this reader knows "
                "compressed-tensors of dense, untransformed weights"
            )
    groups = [
        convert(group, _Group, path, f"quantization_config: config_groups: {name}")
        for name, group in keys.config_groups.items()
    ]
    weights = [group.weights for group in groups if group.weights]
    types = {"int": "int8", "float": "float8_e4m3fn"}
    blocks = {tuple(w.block_structure) for w in weights if w.block_structure}
    others = [w for w in weights if not w.block_structure]
    if len(blocks) > 1 or (blocks and others):
        raise ValueError(
            f"{path}: quantization_config has groups of several block structures; this reader "
            "knows one for all weights"
        )
    block = next(iter(blocks), None)
    return WeightScales(
        frozenset(types[w.type] for w in weights), None if block is None else (block[0], block[1])
    )
