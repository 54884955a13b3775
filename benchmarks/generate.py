"""Generation on CPU: every arithmetic beside transformers on torch, and the bound memory sets.

    python -m benchmarks.generate                                  # Qwen3-MoE, batches of 1 and 4
    python -m benchmarks.generate --model deepseek --batches 1 16 --prompt 1024
    python -m benchmarks.generate --no-peers                       # without torch
    python -m benchmarks.generate --json out/generate.json

The checkpoint has random weights: transformers writes it into a temporary folder, from which both
sides read it (`--no-peers` needs none). Candidates take turns in one process (`benchmarks.timing`
says why). A turn is one prefill and a few decode steps, greedy; the least time of a prefill and of
a step over all turns is what a candidate can do, whatever else the machine does. The bound is the
bytes of weights that one token touches (a batch: the experts that its tokens are expected to
touch), over the rate at which `cmjax_sum_words` reads memory.
"""

import contextlib
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from cmjax import native
from cmjax.console import exit_code, terminal
from cmjax.models import moe
from cmjax.models.moe.generation.open import GeneratorOptions

QWEN = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
DEEPSEEK = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
Candidate = tuple[Callable[[], tuple[float, list[float]]], float]
"""A turn, which gives seconds of its prefill and of each step; and bits of a weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    model: Literal["qwen", "deepseek"] = "qwen"
    """Architecture: Qwen3-MoE (grouped-query attention) or DeepSeek-V3 (latent attention)."""
    batches: tuple[int, ...] = (1, 4)
    """Requests of a batch."""
    prompt: int = 128
    """Tokens of every prompt."""
    steps: int = 16
    """Decode steps of a turn."""
    seconds: float = 30.0
    """Time for each batch size, all candidates together; three turns of each at least."""
    arithmetics: tuple[str, ...] = ("float32", "bfloat16", "int8", "msd_w8a16", "msd_w4a16")
    """What this library computes in."""
    peers: bool = True
    """Time transformers on torch too. Without them the weights are random numbers of our own."""
    json: Path | None = None
    """Write the numbers here as well."""

    def __post_init__(self):
        if min(*self.batches, self.prompt, self.steps) < 1 or not self.seconds > 0:
            raise ValueError(
                "--batches, --prompt, --steps and --seconds must be positive, got "
                f"{self.batches}, {self.prompt}, {self.steps} and {self.seconds}"
            )


def main(options: Options) -> None:
    """Time and print."""
    console = terminal()
    rate = read_rate()
    console.print(f"{native.status().reason}; memory is read at {rate / 1e9:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        source: Path | moe.MoEConfig = Path(folder)
        if options.peers:
            write_checkpoint(options.model, source)
        else:
            source = config_of(options.model, source)
        peers = dict(transformers_turns(Path(folder), console)) if options.peers else {}
        opened = {}
        for name in options.arithmetics:
            start = time.perf_counter()
            opened[name] = moe.open_generator(
                source, options=GeneratorOptions(arithmetic=name, drafts=0)
            )
            console.print(f"{name} in place: {time.perf_counter() - start:.1f} s")
        gc.collect()
        for batch in options.batches:
            prompts = np.random.default_rng(0).integers(0, 8192, (batch, options.prompt))
            candidates: dict[str, Callable[[], tuple[float, list[float]]]] = {}
            for name, make in peers.items():
                candidates[f"transformers {name}"] = make(prompts, options.steps)
            for name, generator in opened.items():
                candidates[name] = own_turn(generator, prompts, options.steps)
            times = take_turns(candidates, options.seconds)
            rows += [
                {
                    "candidate": name,
                    "batch": batch,
                    "prompt": options.prompt,
                    "prefill_s": prefill,
                    "decode_tokens_per_s": batch / step,
                    "bound_tokens_per_s": batch * rate / touched_bytes(options.model, name, batch),
                }
                for name, (prefill, step) in times.items()
            ]
            console.print(_table(rows, batch))
    if options.json is not None:
        options.json.write_text(json.dumps({"read_bytes_per_s": rate, "rows": rows}, indent=1))


def take_turns(
    candidates: dict[str, Callable[[], tuple[float, list[float]]]], seconds: float
) -> dict[str, tuple[float, float]]:
    """Least prefill and least step of each candidate, in seconds."""
    least = {name: (float("inf"), float("inf")) for name in candidates}
    for turn in candidates.values():
        turn()
    done, end = 0, time.perf_counter() + seconds
    while done < 3 or time.perf_counter() < end:
        done += 1
        for name, turn in candidates.items():
            time.sleep(0.02)  # threads of the one before may still spin
            prefill, steps = turn()
            least[name] = min(least[name][0], prefill), min(least[name][1], *steps)
    return least


def own_turn(generator: Any, prompts: np.ndarray, steps: int) -> Callable:
    """A turn of this library: what a caller of `generate` waits for."""

    def turn() -> tuple[float, list[float]]:
        ticks: list[float] = []
        found = generator.generate(
            prompts.tolist(), steps + 1, progress=lambda *_: ticks.append(time.perf_counter())
        )
        return found.prefill_s, np.diff(ticks).tolist()

    return turn


def transformers_turns(folder: Path, console: Console) -> Iterator[tuple[str, Callable]]:
    """Turns of transformers in float32 and bfloat16, or a line that says why there are none."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        console.print(f"transformers is not measured: {error}; pip install transformers torch")
        return

    for name in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name))
        model.eval()

        def make(prompts: np.ndarray, steps: int, model=model) -> Callable:
            tokens = torch.from_numpy(prompts)

            @torch.inference_mode()
            def turn() -> tuple[float, list[float]]:
                start = time.perf_counter()
                found = model(tokens, use_cache=True, logits_to_keep=1)
                token = found.logits[:, -1].argmax(-1, keepdim=True)
                ticks = [time.perf_counter()]
                for _ in range(steps):
                    found = model(token, past_key_values=found.past_key_values, use_cache=True)
                    token = found.logits[:, -1].argmax(-1, keepdim=True)
                    token.tolist()
                    ticks.append(time.perf_counter())
                return ticks[0] - start, np.diff(ticks).tolist()

            return turn

        yield name, make


def config_of(model: str, folder: Path) -> moe.MoEConfig:
    """The model, without a checkpoint; `folder` is written to."""
    kind, sizes = ("qwen3_moe", QWEN) if model == "qwen" else ("deepseek_v3", DEEPSEEK)
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": kind, "rope_theta": 10000.0, **sizes}))
    return moe.load_config(path)


def write_checkpoint(model: str, folder: Path) -> None:
    """A checkpoint of random weights, as transformers writes it.

    Raises: ValueError: transformers or torch is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the checkpoint needs transformers and torch ({error}); use --no-peers without them"
        ) from None
    torch.manual_seed(0)
    with _quiet():
        if model == "qwen":
            config = transformers.Qwen3MoeConfig(**QWEN)
            made = transformers.Qwen3MoeForCausalLM(config)
        else:
            config = transformers.DeepseekV3Config(**DEEPSEEK)
            made = transformers.DeepseekV3ForCausalLM(config)
        made.save_pretrained(folder)


def touched_bytes(model: str, candidate: str, batch: int) -> float:
    """Bytes of weights that a decode step reads, every expert that is expected to be used once."""
    sizes = QWEN if model == "qwen" else DEEPSEEK
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    heads, ffn = sizes["num_attention_heads"], sizes["moe_intermediate_size"]
    experts = sizes.get("num_experts", sizes.get("n_routed_experts", 0))
    if model == "qwen":
        dim = sizes["head_dim"]
        attention = hidden * dim * (2 * heads + 2 * sizes["num_key_value_heads"])
        dense, shared = 0, 0
    else:
        q, kv, rope = sizes["q_lora_rank"], sizes["kv_lora_rank"], sizes["qk_rope_head_dim"]
        nope, out = sizes["qk_nope_head_dim"], sizes["v_head_dim"]
        attention = hidden * (q + kv + rope) + q * heads * (nope + rope)
        attention += kv * heads * (nope + out) + heads * out * hidden
        dense, shared = sizes["first_k_dense_replace"], sizes["n_shared_experts"]
    used = experts * (1 - (1 - sizes["num_experts_per_tok"] / experts) ** batch) + shared
    weights = layers * attention + (layers - dense) * used * 3 * hidden * ffn
    weights += dense * 3 * hidden * sizes["intermediate_size"] + hidden * sizes["vocab_size"]
    bits = {"float32": 32, "bfloat16": 16, "msd_w4a16": 4.25}.get(candidate.split()[-1], 8)
    return weights * bits / 8


def read_rate() -> float:
    """Bytes per second at which this machine reads memory, with all the threads XLA has."""
    words = jnp.ones((1 << 26,), jnp.int32)
    if native.status().enabled:
        out = jax.ShapeDtypeStruct((1,), jnp.int32)
        total = jax.jit(lambda x: native.call("cmjax_sum_words", out, x))
    else:
        total = jax.jit(jnp.sum)
    total(words).block_until_ready()
    least = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        total(words).block_until_ready()
        least = min(least, time.perf_counter() - start)
    return words.nbytes / least


def _table(rows: list[dict[str, Any]], batch: int) -> Table:
    here = [row for row in rows if row["batch"] == batch]
    peers = {r["candidate"]: r for r in here if r["candidate"].startswith("transformers")}
    table = Table(title=f"batch {batch}, prompts of {here[0]['prompt']} tokens")
    table.add_column("")
    for name in ("decode, tokens/s", "of the bound", *(f"/ {p}" for p in peers), "prefill, s"):
        table.add_column(name, justify="right")
    for name in peers:
        table.add_column(f"/ {name}", justify="right")
    for row in here:
        speed = row["decode_tokens_per_s"]
        table.add_row(
            row["candidate"],
            f"{speed:,.1f}",
            f"{speed / row['bound_tokens_per_s']:.0%}",
            *(f"{speed / peer['decode_tokens_per_s']:.2f}" for peer in peers.values()),
            f"{row['prefill_s']:.3f}",
            *(f"{peer['prefill_s'] / row['prefill_s']:.2f}" for peer in peers.values()),
        )
    return table


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the writer."""
    before = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_DISABLE_PROGRESS_BARS"]
        else:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = before


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(Options, description=__doc__))))
