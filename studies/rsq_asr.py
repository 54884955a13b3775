"""Int8 Winograd for speech recognition: what each way of quantizing costs, and what it gains.

    taskset -c 1 python -m studies.rsq_asr [--base.data fsdd --base.data-dir FOLDER]

Yao et al. (arXiv 2010.14841; ICASSP 2022, abstract) report for Wav2letter on ARMv7 phones 1.48x end
to end and 1.92x on the backbone, at about 0.07 % absolute word error rate. Here, for each network
and seed, one float32 network is trained and then made integer in nine ways: calibrated only (PTQ)
or trained for it (QAT), with the ranges of `train.asr.quantize`. Two trainings expand the range of
integers: "RSQ, one range" lets inputs leave the safe range and transformed values saturate, as the
abstract words it; "RSQ" has a range for every point of the transform. Every part is kept in the
output folder: an interrupted study goes on where it stopped. Without `taskset` XLA takes every
core, and speeds depend on what else runs.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from scipy import stats

from cmjax.console import terminal
from cmjax.files import replace_text
from cmjax.interrupt import leave
from cmjax.mesh import prepare_devices
from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.deployed import backbone, backbone_call, whole_call
from cmjax.options import run_program
from cmjax.primitives.convolution.packed import prepack
from studies.rsq_asr_figure import plot_tradeoff
from train import checkpoint
from train.asr.config import FREE, Config, FloatStage, Loss, QuantStage, Ranges
from train.asr.learner import take_apart
from train.asr.quantize import layer_inputs, layer_sqnr_db
from train.asr.run import Run, measure, start, train
from train.asr.task import prepare
from train.data.batches import Batch, test_batches

PAPER = {"end to end": 1.48, "backbone": 1.92, "WER loss, %": 0.07}
_TIMED_S = 10  # seconds of speech
Network = Literal["dfsmn", "wav2letter"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to integers: how ranges are chosen, and whether and with what loss it is trained."""

    precision: Literal["float32", "int8", "int8-winograd"]
    ranges: Ranges = "per-tap"
    trained: bool = False
    distilled: bool = True


VARIANTS = {
    "float32": Variant("float32"),
    "int8 direct, PTQ": Variant("int8"),
    "Winograd naive, PTQ": Variant("int8-winograd", "naive"),
    "Winograd one range, PTQ": Variant("int8-winograd", "scaled"),
    "Winograd per tap, PTQ": Variant("int8-winograd"),
    "QAT, naive ranges": Variant("int8-winograd", "naive", trained=True),
    "QAT, safe ranges": Variant("int8-winograd", "safe", trained=True),
    "RSQ, one range": Variant("int8-winograd", "scaled", trained=True),
    "RSQ, no distillation": Variant("int8-winograd", trained=True, distilled=False),
    "RSQ": Variant("int8-winograd", trained=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Compare the ways to integers."""

    base: Config = dataclasses.field(
        default_factory=lambda: Config(
            voices=8,
            dfsmn=dataclasses.replace(Config().dfsmn, kernel=3),
            wav2letter=dataclasses.replace(Config().wav2letter, kernel=7),
            augment=False,
            float_stage=FloatStage(steps=600),
            quant=QuantStage(scale_steps=30, steps=90),
            out=Path("out/study"),
        )
    )
    """Data, networks and training; its `model`, `seed` and stages are varied. The networks have the
    taps of ConvDFSMN's defaults and of the published Wav2letter, for which `algorithm` takes large
    tiles."""
    networks: tuple[Network, ...] = ("dfsmn", "wav2letter")
    """Networks."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each trains a float32 network of its own."""
    full: bool = False
    """Four times the steps, and twice the synthetic voices."""
    algorithm: str = "fast"
    """Short algorithm of the layers that have one; "auto" or "fast" choose per layer."""

    def config(self, network: Network, seed: int, name: str) -> Config:
        """Of one part of the study."""
        variant, more = VARIANTS[name], 4 if self.full else 1
        floating, loss = 0, self.base.loss
        if variant.precision == "float32":  # nothing of how integers are trained is part of it
            floating = more * self.base.float_stage.steps
            quant, loss = QuantStage(precision="float32"), Loss()
        else:
            steps = more if variant.trained else 0
            quant = dataclasses.replace(
                self.base.quant,
                precision=variant.precision,
                ranges=variant.ranges,
                algorithm=self.algorithm,
                scale_steps=steps * self.base.quant.scale_steps,
                steps=steps * self.base.quant.steps,
            )
        if not variant.distilled:
            loss = dataclasses.replace(loss, local=0.0, teacher=0.0)
        return dataclasses.replace(
            self.base,
            voices=self.base.voices * (2 if self.full else 1),
            model=network,
            seed=seed,
            float_stage=dataclasses.replace(self.base.float_stage, steps=floating),
            quant=quant,
            loss=loss,
            out=self.base.out / network / str(seed) / name.replace(" ", "_").replace(",", ""),
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one variant of one network and seed does.

    Attributes:
      wer: word error rate by test set.
      sqnr_db: of every convolution, against float32 on the same input.
      model_bytes: parameters as they are stored.
      end_to_end_s, backbone_s: processor time for ten seconds of speech; backbone are the layers
        that have a short algorithm.
    """

    wer: dict[str, float]
    sqnr_db: list[float]
    model_bytes: int
    end_to_end_s: float = 0.0
    backbone_s: float = 0.0


def run_variant(config: Config, teacher: AcousticModel | None, console: Console) -> Run:
    """Train (or find) one part; those in integers begin from a float32 network."""
    run = start(config, console)
    if teacher is not None and run.stage == 0:
        network, params = take_apart(teacher)
        run.model = network.model(params)
    train(run, console)
    return run


def outcome(run: Run, sample: Sequence[Batch]) -> Outcome:
    """Error rates, noise and size of a finished run."""
    precision = run.config.quant.precision
    results = measure(run, only=precision)[precision]
    noise = [] if precision == "float32" else layer_sqnr_db(run.model, sample, run.task.framing)
    wer = {name: result.words.rate for name, result in results.items()}
    return Outcome(wer, noise, model_bytes(run.model))


def model_bytes(model: AcousticModel) -> int:
    """Bytes of all parameters: transformed integer filters with their scales, or float32."""
    total = sum(4 * x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    for conv in model.convolutions():
        if conv.precision != "float32":
            packed = prepack(conv.kernel[...], conv.scales, stride=conv.stride, packed=False)
            total += packed.u.size - 4 * conv.kernel.size
    return total


def time_variants(
    runs: dict[str, Run], batch: Batch, repetitions: int
) -> dict[str, tuple[float, float]]:
    """(end to end, backbone) processor seconds of each, least of interleaved repetitions.

    The backbone of all variants is the same: layers with a stride of 1 and more than one tap.
    """
    calls: dict[str, tuple[Callable, Callable]] = {}
    for name, run in runs.items():
        given = layer_inputs(run.model, [batch], run.task.framing)
        inputs = [given[i] for i in backbone(run.model)]
        speech = jnp.asarray(batch.samples), jnp.asarray(batch.lengths)
        whole = functools.partial(whole_call(run.model, run.task.framing.front), *speech)
        calls[name] = whole, functools.partial(backbone_call(run.model), inputs)
        jax.block_until_ready([call() for call in calls[name]])
    least = {name: [np.inf, np.inf] for name in calls}
    for _ in range(repetitions):
        for name, pair in calls.items():
            for part, call in enumerate(pair):
                began = time.process_time()
                jax.block_until_ready(call())
                least[name][part] = min(least[name][part], time.process_time() - began)
    return {name: (float(end), float(backbone)) for name, (end, backbone) in least.items()}


def study(options: Study, console: Console) -> dict[str, dict[str, list[Outcome]]]:
    """All outcomes: by network, variant, and in the order of the seeds."""
    found: dict[str, dict[str, list[Outcome]]] = {
        network: {name: [] for name in VARIANTS} for network in options.networks
    }
    for seed in options.seeds:
        for network in options.networks:
            path = options.base.out / network / str(seed) / "outcomes.json"
            if path.exists():
                _check_same(options, network, seed)
            else:
                write_json(path, _one_seed(options, network, seed, console))
            outcomes = json.loads(path.read_text())
            for name in VARIANTS:
                found[network][name].append(Outcome(**outcomes[name]))
        report(options, found, console)
    return found


def rows(found: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """One row per variant of a network, averages and spreads over seeds."""
    direct, floating = found["int8 direct, PTQ"], found["float32"]
    out = []
    for name, outcomes in found.items():
        names = outcomes[0].wer
        losses = {
            k: [o.wer[k] - f.wer[k] for o, f in zip(outcomes, floating, strict=True)] for k in names
        }
        out.append(
            {
                "variant": name,
                "wer": {k: float(np.mean([o.wer[k] for o in outcomes])) for k in names},
                "wer_least": {k: min(o.wer[k] for o in outcomes) for k in names},
                "wer_most": {k: max(o.wer[k] for o in outcomes) for k in names},
                "wer_loss": {k: float(np.mean(losses[k])) for k in names},
                "wer_loss_interval": {k: half_width(losses[k]) for k in names},
                "least_sqnr_db": min((min(o.sqnr_db) for o in outcomes if o.sqnr_db), default=None),
                "sqnr_db": np.mean([o.sqnr_db for o in outcomes], axis=0).tolist(),
                "model_bytes": outcomes[0].model_bytes,
                "end_to_end": _ratio(direct, outcomes, "end_to_end_s"),
                "backbone": _ratio(direct, outcomes, "backbone_s"),
            }
        )
    return out


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % confidence interval of their mean (Student's t); infinite for one value."""
    if len(values) < 2:
        return float("inf")
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5


def results_table(network: str, found: list[dict[str, Any]]) -> Table:
    """What people read."""
    table = Table(
        title=f"{network}: mean over seeds (least to largest); speed over int8 direct",
        caption="loss: from the float32 network of the same seed, with its 95 % interval",
    )
    table.add_column("variant")
    for name in found[0]["wer"]:
        table.add_column(f"WER {name}, %", justify="right")
    for column in ("loss, points", "worst SQNR, dB", "KiB", "end to end", "backbone"):
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(
            row["variant"],
            *(_mean_and_range(row, name) for name in row["wer"]),
            _loss(row),
            "" if row["least_sqnr_db"] is None else f"{row['least_sqnr_db']:.1f}",
            f"{row['model_bytes'] / 1024:.0f}",
            f"{row['end_to_end']:.2f}x",
            f"{row['backbone']:.2f}x",
        )
    return table


def noise_table(network: str, found: list[dict[str, Any]]) -> Table:
    """Signal to noise of every layer, mean over seeds."""
    table = Table(title=f"{network}: SQNR of every convolution against float32, dB")
    table.add_column("layer", justify="right")
    quantized = [row for row in found if row["sqnr_db"]]
    for row in quantized:
        table.add_column(row["variant"], justify="right")
    for layer, noise in enumerate(zip(*(row["sqnr_db"] for row in quantized), strict=True)):
        table.add_row(str(layer), *(f"{value:.1f}" for value in noise))
    return table


def main(options: Study, console: Console) -> None:
    prepare_devices(1)
    if options.base.compiled is not None:
        jax.config.update("jax_compilation_cache_dir", str(options.base.compiled.absolute()))
    study(options, console)


def report(options: Study, outcomes: dict[str, dict[str, list[Outcome]]], console: Console) -> None:
    """Print and write what is known after a seed."""
    found = {network: rows(by_name) for network, by_name in outcomes.items()}
    for network, table in found.items():
        console.print(results_table(network, table), noise_table(network, table))
    console.print(
        f"published (Wav2letter, ARMv7): {PAPER['end to end']}x end to end, "
        f"{PAPER['backbone']}x backbone, about {PAPER['WER loss, %']} % WER"
    )
    write_json(options.base.out / "study.json", found)
    plot_tradeoff(found, options.base.out / "tradeoff.png", published=PAPER["end to end"])
    console.print(f"wrote {options.base.out}/study.json and tradeoff.png")


def write_json(path: Path, value: Any) -> None:
    """A file of plain values and outcomes, replaced at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    replace_text(whole, json.dumps(value, indent=1, default=dataclasses.asdict) + "\n")
    whole.replace(path)


def _one_seed(options: Study, network: Network, seed: int, console: Console) -> dict[str, Outcome]:
    runs: dict[str, Run] = {}
    outcomes: dict[str, Outcome] = {}
    task = prepare(options.config(network, seed, "float32"))
    speech = list(task.corpus.tests.values())[-1]
    sample = [b for _, b in test_batches(speech[:32], task.framing, 8, task.corpus.rate)]
    for name in VARIANTS:
        console.rule(f"{network}, seed {seed}: {name}")
        teacher = runs["float32"].model if name != "float32" else None
        runs[name] = run_variant(options.config(network, seed, name), teacher, console)
        kept = runs[name].config.out / "outcome.json"
        if not kept.exists():
            write_json(kept, outcome(runs[name], sample))
        outcomes[name] = Outcome(**json.loads(kept.read_text()))
    samples = np.concatenate([utterance.samples for utterance in speech])
    one = dataclasses.replace(speech[0], samples=samples[: _TIMED_S * task.corpus.rate])
    ((_, batch),) = test_batches([one], task.framing, 1, task.corpus.rate)
    timed = time_variants(runs, batch, repetitions=100)
    return {
        name: dataclasses.replace(o, end_to_end_s=timed[name][0], backbone_s=timed[name][1])
        for name, o in outcomes.items()
    }


def _check_same(options: Study, network: Network, seed: int) -> None:
    """Refuse outcomes of other options. Raises ValueError that names what differs."""
    for name in VARIANTS:
        config = options.config(network, seed, name)
        found = checkpoint.latest(config.out / "checkpoints")
        if found is not None:
            found.check_config(config.record(), ignore=FREE)


def _mean_and_range(row: dict[str, Any], test: str) -> str:
    mean, least, most = (100 * row[key][test] for key in ("wer", "wer_least", "wer_most"))
    return f"{mean:.2f} ({least:.2f} to {most:.2f})"


def _loss(row: dict[str, Any]) -> str:
    """Of the last test set, in points."""
    name = list(row["wer"])[-1]
    return f"{100 * row['wer_loss'][name]:+.2f} ± {100 * row['wer_loss_interval'][name]:.2f}"


def _ratio(direct: Sequence[Outcome], outcomes: Sequence[Outcome], field: str) -> float:
    pairs = zip(direct, outcomes, strict=True)
    return float(np.median([getattr(a, field) / getattr(b, field) for a, b in pairs]))


if __name__ == "__main__":
    leave(run_program(lambda asked: main(asked, terminal()), Study, __doc__))
