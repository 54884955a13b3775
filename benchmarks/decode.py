"""Decode steps of a model on CPU: MSD W8A16 weights beside bfloat16 and float32 ones.

    python -m benchmarks.decode                       # batches of 1, 2 and 4, one thread
    python -m benchmarks.decode --batches 1 8 --threads 2

A mixture of experts with latent attention (one routed expert per token and a shared one) whose
matrices exceed the last-level cache several times, so that a step reads its weights from memory.
Only the weights differ: head, attention and cache are bfloat16 (with float32 weights: float32).
Candidates take turns in one process (see `timing`); one thread: pinned to a core, CPU time; more:
wall time.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from benchmarks.timing import least_times
from cmjax import native
from cmjax.console import terminal
from cmjax.cores import keep_to_cores, usable_cores
from cmjax.interrupt import leave
from cmjax.models.moe import Arithmetic, LatentAttention, MoEConfig, MoEModel, from_config
from cmjax.models.moe.layers.cache import empty_cache
from cmjax.models.moe.model import parameters
from cmjax.options import run_program

CONFIG = MoEConfig(
    vocab_size=512,
    hidden_size=2048,
    layers=2,
    dense_layers=(0,),
    heads=16,
    attention=LatentAttention(
        q_lora_rank=768, kv_lora_rank=256, qk_nope_dim=64, qk_rope_dim=32, v_dim=64
    ),
    ffn_size=8192,
    expert_ffn_size=4096,
    routed_experts=2,
    shared_experts=1,
    experts_per_token=1,
    expert_groups=1,
    groups_per_token=1,
)
MSD = Arithmetic(projections="msd_w8a16", dense="msd_w8a16", experts="msd_w8a16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    batches: tuple[int, ...] = (1, 2, 4)
    """Requests per step."""
    context: int = 64
    """Tokens the cache has room for; half are there."""
    threads: int = 1
    """Threads of every candidate."""
    seconds: float = 10.0
    """Time for each batch size."""

    def __post_init__(self):
        if min(*self.batches, self.threads) < 1 or self.context < 2 or not self.seconds > 0:
            raise ValueError(
                "--batches and --threads must be at least 1, --context at least 2 and --seconds "
                f"positive, got {self.batches}, {self.threads}, {self.context} and {self.seconds}"
            )


def main(options: Options) -> None:
    """Time and print."""
    keep_to_cores(usable_cores()[-options.threads :])
    console = terminal()
    models = _models()
    clock = "CPU" if options.threads == 1 else "wall"
    console.print(f"{native.status().reason}; {options.threads} thread(s), {clock} time")
    table = Table(title="A decode step, ms")
    table.add_column("batch", justify="right")
    for name, model in models.items():
        size = sum(x.nbytes for x in jax.tree.leaves(parameters(model)))
        table.add_column(f"{name}\n{size / 1e6:,.0f} MB", justify="right")
    table.add_column("bfloat16 / msd_w8a16", justify="right")
    for batch in options.batches:
        steps = {name: decode_call(model, batch, options.context) for name, model in models.items()}
        least = least_times(steps, options.seconds, options.threads)
        ratio = least["bfloat16"] / least["msd_w8a16"]
        times = (f"{1e3 * seconds:.2f}" for seconds in least.values())
        table.add_row(str(batch), *times, f"{ratio:.2f}")
    console.print(table)


def decode_call(model: MoEModel, batch: int, context: int) -> Callable[[], object]:
    """A call that decodes one token of every request, the cache half full."""
    graph, state = nnx.split(model)
    cache = empty_cache(model.config, batch, context, model.arithmetic.kv_cache)
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None]
    lengths = jnp.full((batch,), context // 2, jnp.int32)

    @jax.jit
    def decode(state, tokens, cache, lengths):
        main = nnx.merge(graph, state).main
        hidden, _ = main.decode((tokens,), (cache,), (lengths,))
        return main.logits(hidden[0])

    return lambda: decode(state, tokens, cache, lengths).block_until_ready()


def _models() -> dict[str, MoEModel]:
    exact = from_config(CONFIG)
    return {
        "float32": exact,
        "bfloat16": exact.with_arithmetic("bfloat16"),
        "msd_w8a16": exact.with_arithmetic(MSD),
    }


if __name__ == "__main__":
    leave(run_program(main, Options, __doc__))
