"""Accuracy against time: a language model trained here, in every arithmetic that is priced.

    python -m studies.arithmetic                            trains the model first (a few minutes)
    python -m studies.arithmetic --checkpoint out/moe_lm    a finished run of train.moe_lm

Loss, divergence from float32 and agreement of greedy bytes on held-out text: the first half of each
window is prefilled, the second decoded over the cache, so that projections, attention and cache all
count. Beside it the predicted step of DeepSeek-R1 on CloudMatrix384 in the same arithmetic, from
the same operations (`cmjax predict --quant ... --attention ... --kv-cache ...`): decode of 96
requests per NPU on 160 NPUs, prefill of 16,384 tokens per NPU on 16.

The losses are of a small model; the times are predictions. The Ascend 910C has no 4-bit matrix
units: the MXFP4 rows are priced at twice the 8-bit rate, as on a chip that has them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from cmjax.console import terminal
from cmjax.deploy import Phase, predict
from cmjax.files import replace_text
from cmjax.interrupt import leave
from cmjax.models.moe import MoEModel, extend_cache
from cmjax.options import run_program
from studies.arithmetic_figure import plot
from train import checkpoint
from train.moe.config import LanguageModelConfig
from train.moe.run import start, train, trained_model

PRICED: dict[str, dict[str, Any]] = {
    "bfloat16": {"quant": "bf16", "kv_cache": "bf16"},
    "int8": {"quant": "int8", "kv_cache": "int8"},
    "msd_w8a16": {"quant": "msd_w8a16", "kv_cache": "int8"},
    "msd_w4a16": {"quant": "msd_w4a16", "kv_cache": "int8"},
    "msd_w4a16_kv4": {"quant": "msd_w4a16", "kv_cache": "mxfp4"},
    "pasa_fp16": {"quant": "bf16", "kv_cache": "bf16", "attention": "pasa_fp16"},
    "int8_pasa_fp16": {"quant": "int8", "kv_cache": "int8", "attention": "pasa_fp16"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of the study."""

    checkpoint: Path | None = None
    """Folder of a finished run of train.moe_lm; without it one is trained in `out`."""
    out: Path = Path("out/arithmetic")
    """Folder of the table (results.json), the picture and the run."""
    windows: int = 64
    """Held-out windows to test on."""
    steps: int = 250
    """Steps to train for, without a checkpoint."""

    def __post_init__(self):
        if self.windows < 1 or self.steps < 1:
            raise ValueError("--windows and --steps must be at least 1")


def main(study: Study, console: Console) -> None:
    """Train or load, measure, price, print and draw."""
    run = start(_config(study), console)
    train(run, console)
    held = run.windows.held_out(study.windows)
    sample = run.windows.batch(run.config.steps, 8)[:, :-1]
    rows = measure(trained_model(run), held, sample)
    for row in rows:
        row |= priced(row["name"].removesuffix(", calibrated"))
    study.out.mkdir(parents=True, exist_ok=True)
    replace_text(study.out / "results.json", json.dumps(rows, indent=1) + "\n")
    console.print(table(rows))
    plot(rows, study.out / "arithmetic.png")
    console.print(f"written: {study.out}/results.json, {study.out}/arithmetic.png")


def measure(
    model: MoEModel, held: Int[np.ndarray, "windows length"], sample: Int[np.ndarray, "n length"]
) -> list[dict[str, Any]]:
    """What every arithmetic does to a float32 model, on bytes it was not trained on.

    Args:
      model: float32, one rank.
      held: windows; the second half of each is scored.
      sample: training text to calibrate INT8 on.
    """
    labels = held[:, held.shape[1] // 2 + 1 :]
    exact = jax.nn.log_softmax(decoded_logits(model, held))
    rows = []
    for name in ("float32", *PRICED):
        for calibrated in (False, True) if name == "int8" else (False,):
            coarse = model.with_arithmetic(name, calibration=sample if calibrated else None)
            found = jax.nn.log_softmax(decoded_logits(coarse, held))
            loss = optax.softmax_cross_entropy_with_integer_labels(found, labels)
            divergence = jnp.sum(jnp.exp(exact) * (exact - found), axis=-1)
            agree = jnp.argmax(exact, axis=-1) == jnp.argmax(found, axis=-1)
            rows.append(
                {
                    "name": name + ", calibrated" * calibrated,
                    "loss": float(jnp.mean(loss)),
                    "divergence": float(jnp.mean(divergence)),
                    "agreement": float(jnp.mean(agree)),
                }
            )
    return rows


def decoded_logits(model: MoEModel, windows: Int[np.ndarray, "windows length"]) -> jax.Array:
    """Float32 scores for the second half of each window, decoded over a cache of the first."""
    half = windows.shape[1] // 2

    @jax.jit
    def run(model, first, second):
        _, caches = model.main.prefill((first,), model.arithmetic.kv_cache)
        cache = extend_cache(caches[0], windows.shape[1])
        lengths = jnp.full((len(windows),), half, jnp.int32)
        hidden, _ = model.main.decode((second,), (cache,), (lengths,))
        return model.main.logits(hidden[0])

    return run(model, windows[:, :half], windows[:, half:-1])


def priced(name: str) -> dict[str, float]:
    """Predicted milliseconds of DeepSeek-R1's decode and prefill steps; none for float32, which
    the chip's matrix units do not have."""
    if name not in PRICED:
        return {}
    phases: tuple[Phase, ...] = ("decode", "prefill")
    return {
        f"{phase}_ms": 1e3 * float(predict("deepseek-r1", phase=phase, **PRICED[name]).step_s)
        for phase in phases
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as people read them."""
    shown = Table(title="A language model in every arithmetic; DeepSeek-R1's steps in the same")
    shown.add_column("arithmetic")
    for name in ("loss, nats", "KL to float32", "greedy agreement, %", "decode, ms", "prefill, ms"):
        shown.add_column(name, justify="right")
    for row in rows:
        times = (f"{row[key]:.1f}" if key in row else "-" for key in ("decode_ms", "prefill_ms"))
        shown.add_row(
            row["name"],
            f"{row['loss']:.4f}",
            f"{row['divergence']:.1e}",
            f"{100 * row['agreement']:.2f}",
            *times,
        )
    return shown


def _config(study: Study) -> LanguageModelConfig:
    """The run's configuration, as its checkpoint remembers it."""
    if study.checkpoint is None:
        return LanguageModelConfig(out=study.out / "run", steps=study.steps)
    found = checkpoint.latest(study.checkpoint / "checkpoints")
    if found is None:
        raise ValueError(f"--checkpoint {study.checkpoint}: no checkpoint in this folder")
    held = found.config | {"text": tuple(map(Path, found.config["text"])), "out": study.checkpoint}
    try:
        config = LanguageModelConfig(**held)
    except TypeError as error:
        raise ValueError(
            f"--checkpoint {study.checkpoint}: not of train.moe_lm ({error})"
        ) from None
    if config.mesh != "1x1":
        raise ValueError(
            f"--checkpoint {study.checkpoint}: of mesh {config.mesh}, 1x1 is read here"
        )
    if found.progress["step"] < config.steps:
        raise ValueError(
            f"--checkpoint {study.checkpoint}: at step {found.progress['step']} of {config.steps}; "
            "finish the run first"
        )
    return config


if __name__ == "__main__":
    leave(run_program(lambda asked: main(asked, terminal()), Study, __doc__))
