"""Calibration of few-bit weights on sample text, without training.

The recipe of CloudMatrix384 (Zuo et al., arXiv 2506.12708, section 4.5) names scale search, block
clipping, outlier-suppressing equivalent transforms and error compensation. The first three are:

1. *Equivalent transforms* (SmoothQuant, Xiao et al. 2023, equation 4). Channel k of a matrix's
   input is divided by `s_k` and row k of the matrix multiplied by it:

       s_k = max|x_k|^a / max|w_k|^(1 - a)

   The division is folded into what makes the input: a norm's weight, or the columns of the matrix
   before. In exact arithmetic the model stays what it was, and nothing is added to its steps.
2. *Scale search with clipping* per output channel, weighted with the inputs' mean squares:
   `cmjax.models.moe.layers.linear.clipped_scale`.

Error compensation between columns (GPTQ) is left out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.layers.linear import Linear, observing

_SMALLEST = 1e-5
_LARGEST = 1e4  # of a factor s_k: beyond, a channel is dead rather than an outlier


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """What went into one matrix, or a stack of them.

    Fields:
      largest: `max|x_k|`, `[*stack, in]`.
      mean_square: `E[x_k^2]`, likewise (of experts: over the rows reserved for them, so that only
        ratios mean something).
    """

    largest: Float32[np.ndarray, "*stack k"]
    mean_square: Float32[np.ndarray, "*stack k"]


def input_statistics(
    graph: Any, params: dict[str, Any], tokens: Int[Array | np.ndarray, "sequences length"]
) -> dict[str, InputStatistics]:
    """Run the model on sample text and note what goes into each matrix.

    Args:
      graph, params: of a float model on one rank, as `nnx.split` of a `MoEModel` gives them.
      tokens: sample text; every sequence starts at position 0.
    Returns: statistics by the path of the matrix, `main/moe/layers/moe/experts/down`. The draft
      module's are not in it: it does not run.
    Raises:
      ValueError: no tokens, or some outside the vocabulary.
    """
    model = nnx.merge(graph, params)
    given = np.asarray(tokens)
    if given.ndim != 2 or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(
            f"calibration: expected integers [sequences, length], got {given.dtype}"
            f"{list(given.shape)}"
        )
    if given.min() < 0 or given.max() >= model.config.vocab_size:
        raise ValueError(
            f"calibration: tokens lie from {given.min()} to {given.max()}, the vocabulary from 0 "
            f"to {model.config.vocab_size - 1}"
        )
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.name = "/".join(map(str, path))
    seen: dict[str, list[tuple[Array, Array]]] = {}

    def note(name: str, x: Array) -> None:
        x = x.astype(jnp.float32)
        over = tuple(range(x.ndim - 1))
        if "experts" in name.split("/"):  # a matrix per slot
            over = over[1:]
        seen.setdefault(name, []).append(
            (jnp.max(jnp.abs(x), axis=over), jnp.mean(jnp.square(x), axis=over))
        )

    with observing(note), jax.disable_jit():  # layers are visited in order, with values
        model(jnp.asarray(given, jnp.int32))
    found = {}
    for name, layers in seen.items():
        largest, squares = (np.stack(parts) for parts in zip(*layers, strict=True))
        stacked = "layers" in name.split("/")
        found[name] = (
            InputStatistics(largest, squares)
            if stacked
            else InputStatistics(largest[0], squares[0])
        )
    return found


def smooth(
    params: dict[str, Any],
    statistics: dict[str, InputStatistics],
    arithmetic: Arithmetic,
    strength: float = 0.5,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Move outliers of W8A8 (and W4A8) matrices' inputs into the matrices.

    Args:
      params: of the float one-rank model.
      statistics: of its inputs (`input_statistics`).
      arithmetic: says which matrices meet INT8 inputs; the rest stays as it is.
      strength: `a` above: 0 balances the weights, 1 the activations.
    Returns: parameters of the same function; and the mean squares of the inputs as they are now, by
      path, for the scale search.
    Raises: ValueError: a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"smooth: strength must lie in [0, 1], got {strength}")
    migration = _Migration(jax.tree.map(lambda x: x, params), statistics, strength)
    for kind in ("dense", "moe"):
        where = f"main/{kind}/layers"
        if kind not in migration.params["main"]:
            continue
        if arithmetic.projections == "w8a8":
            migration.attention(f"{where}/attention")
        if kind == "dense" and arithmetic.dense == "w8a8":
            migration.migrate(f"{where}/norm/gain", [f"{where}/ffn/gate_up"])
            migration.swiglu(f"{where}/ffn")
        if kind == "moe":
            migration.moe(f"{where}/moe", arithmetic)
    squares = {
        name: jnp.asarray(s.mean_square) / jnp.square(migration.factors.get(name, 1.0))
        for name, s in statistics.items()
    }
    return migration.params, {f"/{name}": square for name, square in squares.items()}


class _Migration:
    """Parameters between which quantization difficulty is migrated, as SmoothQuant calls it."""

    def __init__(self, params, statistics, strength):
        self.params, self.statistics, self.strength = params, statistics, strength
        self.factors: dict[str, Array] = {}

    def attention(self, where: str) -> None:
        """Latent: norm -> q_a (or q_b), kv_a; q_norm -> q_b; up_value -> out. Grouped: norm ->
        qkv."""
        held = self.at(where)
        if "qkv" in held:
            self.migrate(f"{where}/norm/gain", [f"{where}/qkv"])
            return
        if "q_a" in held:
            self.migrate(f"{where}/norm", [f"{where}/q_a", f"{where}/kv_a"])
            self.migrate(f"{where}/q_norm", [f"{where}/q_b"])
        else:
            self.migrate(f"{where}/norm", [f"{where}/q_b", f"{where}/kv_a"])
        factor = self.factor([f"{where}/out"])
        up = held["up_value"]  # [layers, heads, rank, v]; `out` has a row per head and v
        each = factor.reshape(up.shape[0], up.shape[1], 1, up.shape[3])
        held["up_value"] = (up / each).astype(up.dtype)
        self.scale_rows(f"{where}/out", factor)

    def moe(self, where: str, arithmetic: Arithmetic) -> None:
        """Norm -> router, experts, shared expert; within experts up -> down."""
        held = self.at(where)
        if arithmetic.dispatches_int8:
            readers = [f"{where}/experts/gate_up"]
            if "shared" in held:
                readers.append(f"{where}/shared/gate_up")
            factor = self.migrate(f"{where}/norm/gain", readers)
            router = held["router"]
            router["weight"] = router["weight"] * factor[..., None]
            self.swiglu(f"{where}/experts")
        if "shared" in held and arithmetic.dense == "w8a8":
            self.swiglu(f"{where}/shared")

    def swiglu(self, where: str) -> None:
        """`up` is linear in what `down` reads: its columns take the division."""
        factor = self.factor([f"{where}/down"])
        gate_up = self.at(where)["gate_up"]
        both = jnp.concatenate([jnp.ones_like(factor), 1 / factor], axis=-1)
        gate_up["weight"] = _times(gate_up["weight"], both[..., None, :])
        if "bias" in gate_up:
            gate_up["bias"] = gate_up["bias"] * both
        self.scale_rows(f"{where}/down", factor)

    def migrate(self, norm: str, readers: list[str]) -> Array:
        """From a norm's weight to the matrices that read it."""
        factor = self.factor(readers)
        folder, _, name = norm.rpartition("/")
        self.at(folder)[name] = self.at(folder)[name] / factor
        for reader in readers:
            self.scale_rows(reader, factor)
        return factor

    def factor(self, readers: list[str]) -> Array:
        """`s`, `[*stack, in]`, for matrices that share their input."""
        largest, weights = 0.0, 0.0
        for reader in readers:
            weight, seen = self.at(reader)["weight"], self.statistics[reader].largest
            row = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=-1)
            if row.ndim == 3 and reader.endswith("gate_up"):  # all slots read one norm
                row, seen = jnp.max(row, axis=1), np.max(seen, axis=1)
            largest, weights = jnp.maximum(largest, seen), jnp.maximum(weights, row)
        top, weights = jnp.maximum(largest, _SMALLEST), jnp.maximum(weights, _SMALLEST)
        factor = top**self.strength / weights ** (1 - self.strength)
        factor = jnp.clip(factor, 1 / _LARGEST, _LARGEST)
        return jnp.where(jnp.asarray(largest) > 0, factor, 1.0)  # an input that never came

    def scale_rows(self, path: str, factor: Array) -> None:
        """Multiply the rows of a matrix, and remember that its input is divided."""
        held = self.at(path)
        if held["weight"].ndim - factor.ndim == 2:  # one factor for all slots
            factor = factor[:, None]
        held["weight"] = _times(held["weight"], factor[..., None])
        self.factors[path] = factor

    def at(self, path: str) -> dict[str, Any]:
        found = self.params
        for key in path.split("/"):
            found = found[key]
        return found


def _times(weight: Array, factor: Array) -> Array:
    return (weight.astype(jnp.float32) * factor).astype(weight.dtype)
