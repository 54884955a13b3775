"""Steps of a mixture of experts whose ranks are all on one device: rows there beside static blocks.

    python -m benchmarks.ranks_on_a_device                        # 8, 48 and 384 ranks
    python -m benchmarks.ranks_on_a_device --ranks 8 --prompt 128 --arithmetic int8

A small DeepSeek-V3: 256 experts of which a token takes 8, and a shared one. The same programs, once
with the rows that are there (what `cmjax generate` runs) and once with a block of static size for
every source rank and slot, take turns in one process; times are wall clock, their ratio is that of
neighbours. Memory is what XLA sets aside for a step beside its arguments and results.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.table import Table

from cmjax.console import terminal
from cmjax.interrupt import leave
from cmjax.mesh import RankMesh
from cmjax.models.moe import LatentAttention, MoEConfig, open_generator
from cmjax.models.moe.generation.batch import RequestBatch, Sampler
from cmjax.models.moe.generation.generator import Generator
from cmjax.models.moe.generation.open import GeneratorOptions
from cmjax.options import run_program

CONFIG = MoEConfig(
    vocab_size=256,
    hidden_size=128,
    layers=3,
    dense_layers=(0,),
    heads=8,
    attention=LatentAttention(
        q_lora_rank=64, kv_lora_rank=64, qk_nope_dim=16, qk_rope_dim=16, v_dim=16
    ),
    ffn_size=256,
    expert_ffn_size=64,
    routed_experts=256,
    shared_experts=1,
    experts_per_token=8,
    expert_groups=8,
    groups_per_token=4,
    routed_scale=2.5,
    max_position=256,
)
_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    ranks: tuple[int, ...] = (8, 48, 384)
    """Virtual ranks of the device, each with one request."""
    prompt: int = 16
    """Tokens of each prompt; a prefill's blocks grow with it."""
    arithmetic: str = "float32"
    """As of `cmjax generate`."""
    rounds: int = 7
    """Turns of each program."""

    def __post_init__(self):
        longest = CONFIG.max_position - 1
        if min(*self.ranks, self.rounds) < 1 or not 1 <= self.prompt <= longest:
            raise ValueError(
                "--ranks and --rounds must be at least 1 and --prompt 1 to "
                f"{longest}, got {self.ranks}, {self.rounds} and {self.prompt}"
            )


def main(options: Options) -> None:
    """Time and print."""
    console = terminal()
    table = Table(title=f"{options.arithmetic}, prompts of {options.prompt} tokens")
    for column in ("ranks", "step", "blocks, ms", "rows, ms", "blocks / rows", "MiB", "MiB"):
        table.add_column(column, justify="right")
    for ranks in options.ranks:
        for phase, (blocks, rows) in _programs(ranks, options).items():
            times = _turns([blocks.run, rows.run], options.rounds)
            low, middle, high = np.percentile(times[0] / times[1], [25, 50, 75])
            table.add_row(
                str(ranks),
                phase,
                *(f"{1e3 * np.median(each):,.1f}" for each in times),
                f"{middle:.1f} ({low:.1f} to {high:.1f})",
                *(f"{step.memory_bytes / _MIB:,.0f}" for step in (blocks, rows)),
            )
    console.print(table)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A program to call, and what it needs beside its arguments and results."""

    run: Callable[[], Any]
    memory_bytes: int


def _programs(ranks: int, options: Options) -> dict[str, tuple[_Step, _Step]]:
    """Prefill and decode with blocks, and with rows; of the same parameters."""
    how = GeneratorOptions(arithmetic=options.arithmetic, drafts=0, prefill="data-parallel")
    rows = open_generator(CONFIG, RankMesh(1, ranks), how, prompt_tokens=options.prompt)
    rows = dataclasses.replace(rows, prefill_chunk=None)
    static = dataclasses.replace(rows.parallelism, sort_rows=False)
    blocks = dataclasses.replace(rows, parallelism=static)
    both = [_steps(generator, options.prompt) for generator in (blocks, rows)]
    return {phase: (both[0][phase], both[1][phase]) for phase in both[0]}


def _steps(generator: Generator, prompt: int) -> dict[str, _Step]:
    ranks = generator.mesh.ranks
    prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ranks, prompt)).tolist()
    batch = RequestBatch.of(prompts, prompt, ranks, 1, 0, Sampler())
    sizes = generator.sizes(requests=1, prompt=prompt, room=prompt + 1, greedy=True)
    prefill, decode = generator.prefilling(sizes).run, generator.decoding(sizes).run
    params, caches = generator.used_params, []
    tokens = np.zeros((ranks, 1, 1), np.int32)
    inputs = batch.decode_inputs(tokens, batch.lengths)

    def fill():
        caches[:] = [prefill(params, batch.prefill_inputs()).caches]

    def step():
        """The same every time: it writes one token at one place of the cache, which it is given."""
        caches[0] = decode(params, caches[0], inputs).caches

    programs = {"prefill": (prefill, fill), "decode": (decode, step)}
    return {
        name: _Step(run, program.compiled.memory_analysis().temp_size_in_bytes)
        for name, (program, run) in programs.items()
    }


def _turns(runs: list[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Seconds `[run, turn]`, after a call of each that is not counted."""
    for run in runs:
        jax.block_until_ready(run())
    times = np.zeros((len(runs), rounds))
    for turn in range(rounds):
        for number, run in enumerate(runs):
            began = time.perf_counter()
            run()
            times[number, turn] = time.perf_counter() - began
    return times


if __name__ == "__main__":
    leave(run_program(main, Options, __doc__))
