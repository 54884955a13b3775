"""Scores of the token that follows each of many short texts, spread over a mesh.

    logits[row] = head(h[row, lengths[row] - 1]),     h = final hidden states of tokens[row]

The head is applied to one position a row and no cache is kept, so memory is that of one batch. A
row's scores depend on that row alone: neither on the batch it is in nor on how many ranks share it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from cmjax.mesh import RANKED, RankMesh, on_every_rank
from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.model import MoEModel, abstract_model, assemble
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sharding import param_specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model on its mesh, ready to score rows; compiled once per shape of a batch.

    Attributes:
      config: the model.
      params: its parameters on the mesh, as `load_params` or `place_params` gives them.
      parallelism: of the parameters; `parallelism.axes` are the mesh's.
      mesh: the ranks; each takes an equal share of the rows.
      precision: of the parameters.
    """

    config: MoEConfig
    params: dict[str, Any]
    parallelism: Parallelism
    mesh: RankMesh
    precision: Arithmetic | str = "float32"

    def __call__(
        self, tokens: Int[np.ndarray, "rows length"], lengths: Int[np.ndarray, "rows"]
    ) -> Float32[Array, "rows vocab"]:
        """Scores of the token after the first `lengths` of each row; the rest of it is padding.

        Raises:
          ValueError: tokens outside the vocabulary, rows longer than the model is meant for, or
            lengths outside 1..length.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        self._check(tokens, lengths)
        rows, ranks = len(tokens), self.mesh.ranks
        each = -(-rows // ranks)
        # rows that fill the last ranks up repeat the last one
        take = np.minimum(np.arange(ranks * each), rows - 1)
        found = _on_mesh(self.config, self.parallelism, self.mesh, self.precision)(
            {"main": self.params["main"]},
            tokens[take].reshape(ranks, each, -1).astype(np.int32),
            lengths[take].reshape(ranks, each).astype(np.int32),
        )
        # awaited: collectives of steps that run ahead of each other can deadlock
        return jax.block_until_ready(found).reshape(ranks * each, -1)[:rows]

    def _check(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if tokens.ndim != 2 or not tokens.size or lengths.shape != tokens.shape[:1]:
            raise ValueError(
                "Scorer: tokens must be [rows, length] and lengths [rows], neither empty; got "
                f"{tokens.shape} and {lengths.shape}"
            )
        if tokens.shape[1] > self.config.context_limit:
            raise ValueError(
                f"Scorer: rows of {tokens.shape[1]} tokens are longer than the "
                f"{self.config.context_limit} the model is meant for (max_position)"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"Scorer: token {low if low < 0 else high} is outside the model's vocabulary, "
                f"0..{self.config.vocab_size - 1}"
            )
        if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
            raise ValueError(
                f"Scorer: lengths must lie in 1..{tokens.shape[1]}, got {lengths.min()} to "
                f"{lengths.max()}"
            )


def next_logits(
    model: MoEModel, tokens: Int32[Array, "rows length"], lengths: Int32[Array, "rows"]
) -> Float32[Array, "rows vocab"]:
    """Scores of the token after the first `lengths` of each row, on one rank."""
    hidden, _ = model.main.prefill((tokens,), model.arithmetic.kv_cache)
    last = jnp.take_along_axis(hidden[0], lengths[:, None, None] - 1, axis=1)[:, 0]
    return model.main.logits(last)


@functools.lru_cache(maxsize=16)
def _on_mesh(
    config: MoEConfig, parallelism: Parallelism, mesh: RankMesh, precision: Arithmetic | str
) -> Callable:
    """`next_logits` of every rank's share of the rows."""
    graph, shapes = abstract_model(config, parallelism, precision)
    specs = (param_specs(shapes, parallelism), RANKED, RANKED)

    def score(params, tokens, lengths):
        return next_logits(assemble(graph, params), tokens, lengths)

    return jax.jit(on_every_rank(score, mesh, specs, RANKED))


__all__ = ["Scorer", "next_logits"]
