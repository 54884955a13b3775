"""Rotary positions in a config.json, as Hugging Face transformers 5 reads and writes them.

Both published forms are read: `rope_parameters`, which holds its own `rope_theta`, and the older
top-level `rope_theta` with `rope_scaling`. Where a file has both dictionaries, `rope_scaling` takes
the place of `rope_parameters`; they are written in the newer form.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from cmjax.models.moe.checkpoint.config_schema import CommonKeys, Factor, Size
from cmjax.models.moe.checkpoint.json_file import convert
from cmjax.models.moe.positions import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    RopeScaling,
    YarnConfig,
)

_ORIGINAL = "original_max_position_embeddings"
_Turns = Annotated[float, Meta(ge=0, le=1e12)]


class _Theta(Struct):
    rope_theta: Annotated[float, Meta(gt=1, le=1e30)]


class _Fraction(Struct):
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)]


class _Scaled(Struct, kw_only=True):
    factor: Factor
    mscale_all_dim: _Turns | None = None


class _Llama3(_Scaled, kw_only=True):
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_max_position_embeddings: Size


class _Yarn(_Scaled, kw_only=True):
    factor: Factor | None
    original_max_position_embeddings: Size
    beta_fast: _Turns | None = 32.0
    beta_slow: _Turns | None = 1.0
    mscale: _Turns | None = None
    attention_factor: Factor | None = None
    truncate: bool = True


def read_rope(raw: dict[str, Any], keys: CommonKeys, path: Path | None) -> Rope:
    """The rotary positions of a config.json, but for how its family pairs the dimensions.

    Raises:
      ValueError: a key missing, out of bounds or for something this model does not compute; or two
        places that disagree on `rope_theta`.
    """
    dictionaries = {name: raw.get(name) for name in ("rope_scaling", "rope_parameters")}
    for value in dictionaries.values():
        if value is not None and not isinstance(value, dict):
            raise ValueError(
                f"{path}: key 'rope_scaling' or 'rope_parameters' must be an object, got {value!r}"
            )
    scaling, parameters = (value or {} for value in dictionaries.values())
    name = "rope_scaling" if scaling or not parameters else "rope_parameters"
    given = scaling or parameters
    nested = [key for key, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"{path}: key {name!r} has rotary positions per kind of layer ({nested[0]!r}); this "
            "model has one kind"
        )
    fraction = _fraction(raw, given, keys.default_fraction, path)
    theta = _theta(raw, scaling, parameters, keys.default_theta, path)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rope(theta=theta, fraction=fraction)
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(
            f"{path}: key 'rope_type' must be 'default', "
            f"{', '.join(map(repr, _SCALINGS))} here, got {kind!r}"
        )
    most = keys.max_position_embeddings
    # transformers gives the top level's original length priority over the dictionary's
    original = raw.get(_ORIGINAL, given.get(_ORIGINAL, most))
    scaled = _SCALINGS[kind](given | {_ORIGINAL: original}, most, path, name)
    return Rope(theta=theta, fraction=fraction, scaling=scaled)


def rope_json(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` that read as `rope`."""
    match rope.scaling:
        case None:
            fields: dict[str, Any] = {"rope_type": "default"}
        case LinearScaling(factor=factor):
            fields = {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor=factor):
            fields = {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling() as scaling:
            fields = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                _ORIGINAL: scaling.original_max_position,
            }
        case YarnConfig() as scaling:
            fields = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                _ORIGINAL: scaling.original_max_position,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "mscale": scaling.mscale,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
    if rope.scaling is not None:
        fields["mscale_all_dim"] = rope.scaling.mscale_all_dim
    fields = {key: value for key, value in fields.items() if value is not None}
    return {"rope_theta": rope.theta} | fields


def _theta(
    raw: dict[str, Any],
    scaling: dict[str, Any],
    parameters: dict[str, Any],
    default: float,
    path: Path | None,
) -> float:
    """The base of the frequencies: the dictionary's own, else the top level's."""
    given, beside = scaling or parameters, parameters.get("rope_theta", default)
    if "rope_theta" in given:
        theta = given["rope_theta"]
    elif "rope_theta" in raw:
        theta = raw["rope_theta"]
    elif "rope_theta" not in parameters:
        raise ValueError(f"{path}: key 'rope_theta' is missing, also within 'rope_parameters'")
    elif beside == default:
        theta = beside
    else:  # transformers leaves 'rope_parameters' out and takes its class's default
        raise ValueError(
            f"{path}: 'rope_parameters' has rope_theta {beside!r}, but 'rope_scaling' beside it "
            f"takes its place and has none, for which transformers takes {default:g}; write "
            "rope_theta into 'rope_scaling'"
        )
    return convert({"rope_theta": theta}, _Theta, path).rope_theta


def _fraction(
    raw: dict[str, Any], given: dict[str, Any], default: float | None, path: Path | None
) -> float:
    """The part of each head that is rotated: the dictionary's own, else the top level's."""
    key = "partial_rotary_factor"
    said = [each[key] for each in (given, raw) if each.get(key) is not None]
    if default is None and any(factor != 1 for factor in said):
        raise ValueError(f"{path}: key {key!r} must be 1 here, got {said[0]!r}")
    return convert({key: (*said, default or 1.0)[0]}, _Fraction, path).partial_rotary_factor


_Given = dict[str, Any]


def _linear(given: _Given, most: int, path: Path | None, name: str) -> LinearScaling:
    keys = convert(given, _Scaled, path, name)
    return LinearScaling(factor=keys.factor, mscale_all_dim=keys.mscale_all_dim)


def _dynamic(given: _Given, most: int, path: Path | None, name: str) -> DynamicScaling:
    keys = convert(given, _Scaled, path, name)
    return DynamicScaling(factor=keys.factor, mscale_all_dim=keys.mscale_all_dim)


def _llama3(given: _Given, most: int, path: Path | None, name: str) -> Llama3Scaling:
    keys = convert(given, _Llama3, path, name)
    if keys.high_freq_factor <= keys.low_freq_factor:
        raise ValueError(
            f"{path}: {name}: key 'high_freq_factor' must be more than low_freq_factor "
            f"{keys.low_freq_factor:g}, got {keys.high_freq_factor:g}"
        )
    return Llama3Scaling(
        factor=keys.factor,
        low_freq_factor=keys.low_freq_factor,
        high_freq_factor=keys.high_freq_factor,
        original_max_position=keys.original_max_position_embeddings,
        mscale_all_dim=keys.mscale_all_dim,
    )


def _yarn(given: _Given, most: int, path: Path | None, name: str) -> YarnConfig:
    keys = convert(given, _Yarn, path, name)
    original = keys.original_max_position_embeddings
    return YarnConfig(
        # published as null by some: the ratio of the two lengths is meant
        factor=most / original if keys.factor is None else keys.factor,
        original_max_position=original,
        beta_fast=keys.beta_fast or 32.0,  # as in transformers, 0 is the default too
        beta_slow=keys.beta_slow or 1.0,
        mscale=keys.mscale,
        mscale_all_dim=keys.mscale_all_dim,
        attention_factor=keys.attention_factor,
        truncate=keys.truncate,
    )


_SCALINGS: dict[str, Callable[[_Given, int, Path | None, str], RopeScaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
