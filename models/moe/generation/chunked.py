"""Prefill in chunks: prompts are run a few tokens at a time against the cache.

A chunk attends the cache, itself included, as a decode step with many new tokens does, so memory
grows with the chunk and not with the prompt (Agrawal et al. 2023, "SARATHI", section 4.1). Padding
behind a shorter prompt runs along; nothing attends it, and decoding overwrites its cache entries.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.cache import ModelCache
from cmjax.models.moe.layers.mtp import draft
from cmjax.models.moe.layers.transformer import decode_attention
from cmjax.models.moe.model import MoEModel, abstract_model
from cmjax.models.moe.parallelism import Parallelism
from cmjax.models.moe.sample import sample
from cmjax.models.moe.steps import Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkInputs:
    """A chunk of a rank's prompts, all from the same position on."""

    tokens: Int32[Array, "sequences chunk"]
    following: Int32[Array, "sequences chunk"]  # the prompt's token after each of them
    start: Int32[Array, "sequences"]  # tokens of the prompt before the chunk
    lengths: Int32[Array, "sequences"]  # real tokens of each whole prompt
    found: Int32[Array, "sequences new"]  # of earlier chunks: first token, then with MTP a draft
    sampling: Sampling


def chunk_step(
    model: MoEModel, cache: ModelCache, inputs: ChunkInputs
) -> tuple[Int32[Array, "sequences new"], ModelCache]:
    """Run a chunk; its tokens enter the cache.

    Returns: `inputs.found`, with the first generated token (and a draft) of every prompt that ends
      in this chunk, and the cache.
    """
    main, chunk = model.main, inputs.tokens.shape[1]
    hidden, (cache,) = main.decode((inputs.tokens,), (cache,), (inputs.start,))
    last = inputs.lengths - 1 - inputs.start  # where the prompt ends, in the chunk
    ends_here = (last >= 0) & (last < chunk)
    at = jnp.clip(last, 0, chunk - 1)[:, None, None]

    def newest(h):
        return jnp.take_along_axis(h, at, axis=1)[:, 0]

    with jax.named_scope("sample"):
        how = inputs.sampling
        logits = main.logits(newest(hidden[0]))
        first = sample(logits, how.uniform, how.temperature, how.top_p, how.top_k)
    found = [first]
    if model.mtp is not None:
        with jax.named_scope("mtp"):
            is_last = jnp.arange(chunk, dtype=jnp.int32) == last[:, None]
            following = jnp.where(is_last, first[:, None], inputs.following)
            drafting, (drafts_cache,) = model.mtp(
                main,
                hidden,
                (following,),
                (cache.mtp,),
                decode_attention((inputs.start,), main.parallelism),
            )
            cache = dataclasses.replace(cache, mtp=drafts_cache)
            found.append(draft(main, newest(drafting[0])))
    return jnp.where(ends_here[:, None], jnp.stack(found, axis=1), inputs.found), cache


def chunk_fn(
    config: MoEConfig, parallelism: Parallelism, precision: Arithmetic | str, *, mtp: bool = False
) -> Callable[[dict[str, Any], ModelCache, ChunkInputs], tuple[Array, ModelCache]]:
    """`chunk_step` as a function of a rank's parameters, cache and inputs."""
    graph, _ = abstract_model(config, parallelism, precision, mtp=mtp)
    return lambda params, cache, inputs: chunk_step(nnx.merge(graph, params), cache, inputs)
