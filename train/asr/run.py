"""The run: stages one after the other, metrics, checkpoints, and resumption as if never stopped.

    float      all weights, CTC, float32
    scales     calibrate steps and ranges, then learn the steps alone
    all        weights and steps, with the float32 network as teacher

Batch n, its augmentation and every random number depend on the seed and n alone. Of several
processes each makes its own rows of a batch; the parameters are the same on all of them.
"""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cmjax.files import replace_text
from cmjax.mesh import RankMesh
from cmjax.models.asr.acoustic import AcousticModel, layer_algorithms
from cmjax.models.asr.decoding import make_decoder
from cmjax.models.asr.deployed import whole_call
from cmjax.models.asr.plans import restore_plans, saved_plans
from cmjax.models.asr.recognizer import FILE, Recognizer, save_recognizer
from cmjax.models.asr.text import Alphabet
from cmjax.processes import from_rows, is_first, of_every_process, own_rows
from train import checkpoint
from train.asr.config import FREE, Config, Loss
from train.asr.evaluate import Result, evaluate
from train.asr.learner import Learner, Network, Params, make_step, optimiser, take_apart
from train.asr.quantize import calibrate
from train.asr.task import Task, measure_statistics, prepare
from train.asr.trained_on import remember, without_trained
from train.data.batches import TrainingStream
from train.data.corpus import shared
from train.data.folders import own_rate
from train.metrics import LossNotFinite, MetricsLog

STAGES = ("float", "scales", "all")


@dataclasses.dataclass
class Run:
    """A run in its folder.

    Attributes:
      config, task: what to learn and how.
      model: the network, of which parameters are replaced as they are learnt.
      stage: index in `STAGES`; its length when all is done.
      step: steps made in this stage.
      learner: parameters and optimiser of this stage, or None before its first step.
      teacher: parameters of the float32 network, once trained (and its scales, unused).
    """

    config: Config
    task: Task
    model: AcousticModel
    stage: int = 0
    step: int = 0
    learner: Learner | None = None
    teacher: Params | None = None

    @property
    def steps(self) -> tuple[int, int, int]:
        """Steps of every stage."""
        quant = self.config.quant
        if quant.precision == "float32":
            return self.config.float_stage.steps, 0, 0
        return self.config.float_stage.steps, quant.scale_steps, quant.steps

    @property
    def done(self) -> bool:
        """Nothing is left to train."""
        return self.stage == len(STAGES)

    @property
    def position(self) -> int:
        """Steps made in all stages."""
        return sum(self.steps[: self.stage]) + self.step


def start(config: Config, console: Console) -> Run:
    """Read the data, and the last checkpoint of the folder if there is one.

    Raises:
      ValueError: no test set, which an hour of training would end without a result for; the
        checkpoint is of another configuration; or `evaluate_only` without one.
    """
    found = checkpoint.latest(config.out / "checkpoints")
    if found is None:
        if config.evaluate_only:
            raise ValueError(f"--evaluate-only: no checkpoint in {config.out}")
        task = prepare(config)
        if not task.corpus.train:
            raise ValueError("the data set has no training utterance")
        _report(task, console)
        run = Run(config, task, task.model(config))
        if config.quant.precision != "float32":  # before hours of training, not behind them
            layer_algorithms(run.model, config.quant.precision, config.quant.algorithm)
        run.model.set_statistics(
            *measure_statistics(task.corpus.train, task.framing, task.corpus.rate)
        )
        if is_first():
            remember(task, config.out)
        return run
    if config.evaluate_only:
        return _to_test(config, found, console)
    found.check_config(config.record(), ignore=FREE)
    return _going_on(config, prepare(config, _saved_alphabet(found)), found, console)


def _to_test(config: Config, found: checkpoint.SavedRun, console: Console) -> Run:
    """A run to be tested: its network is that of the checkpoint, its data may be others."""
    config, others = config.tested(found.config)
    rate = found.progress.get("rate") or config.rate
    if rate is None and config.data != "synthetic":  # of a version that did not save it
        rate = own_rate(found.config["data"]) if found.config["data"] != "synthetic" else 8000
    task = prepare(config, _saved_alphabet(found), rate=rate, tests_only=others)
    if others:
        task = without_trained(task, config.out, console)
    return _going_on(config, task, found, console)


def _going_on(config: Config, task: Task, found: checkpoint.SavedRun, console: Console) -> Run:
    _report(task, console)
    stage = found.count("stage", len(STAGES))
    run = Run(config, task, task.model(config), stage)
    run.step = found.count("step", 0 if run.done else run.steps[stage])
    _restore(run, found)
    console.print(f"going on from {found.path}")
    return run


def _saved_alphabet(found: checkpoint.SavedRun) -> Alphabet:
    try:
        saved = found.progress["alphabet"]
        return Alphabet(saved["units"], tuple(saved["symbols"]))
    except (KeyError, TypeError) as error:
        raise checkpoint.Damaged(f"{found.path / 'run.json'}: no alphabet ({error!r})") from None


def train(run: Run, console: Console) -> None:
    """Every stage that is left."""
    config = run.config
    log = MetricsLog(config.out / "metrics.jsonl", keep=run.position) if is_first() else None
    stream = TrainingStream(
        run.task.corpus,
        run.task.framing,
        batch=config.batch,
        strings=config.strings,
        augment=config.perturb if config.augment else None,
        seed=config.seed,
        rows=own_rows(config.batch),
    )
    while not run.done:
        if run.steps[run.stage]:
            _train_stage(run, stream, log, console)
        _finish_stage(run, stream, console)


def measure(run: Run, *, only: str | None = None) -> dict[str, dict[str, Result]]:
    """Error rates of every network that the run has, on every test set: by precision, then set.

    Args:
      run: trained.
      only: one precision instead of all.
    """
    results: dict[str, dict[str, Result]] = {}
    decode = make_decoder(run.task.framing.alphabet, run.config.decoding)
    for precision, (network, params) in _networks(run).items():
        if only not in (None, precision):
            continue
        call = whole_call(network.model(params), run.task.framing.front)
        results[precision] = {}
        for name, utterances in run.task.corpus.tests.items():
            result = evaluate(
                call,
                utterances,
                run.task.framing,
                decode,
                batch=run.config.batch,
                rate=run.task.corpus.rate,
            )
            results[precision][name] = result
    _write(
        run.config.out / "results.json",
        {
            precision: {name: result.record() for name, result in by_set.items()}
            for precision, by_set in results.items()
        },
    )
    _write(
        run.config.out / "errors.json",
        {
            precision: {name: result.wrong for name, result in by_set.items()}
            for precision, by_set in results.items()
        },
    )
    return results


def _train_stage(
    run: Run, stream: TrainingStream, log: MetricsLog | None, console: Console
) -> None:
    config, stage = run.config, STAGES[run.stage]
    network, params = take_apart(run.model)
    transform = _optimiser(run)
    learner = run.learner or Learner(params, transform.init(params))
    step = make_step(
        network,
        transform,
        run.task.framing,
        config,
        weights=Loss(task=1, local=0, teacher=0, saturation=0) if stage == "float" else config.loss,
        teacher=None if run.teacher is None else (_float(run.model), run.teacher),
    )
    root, mesh = jax.random.key(config.seed), RankMesh(nodes=config.devices, npus=1)
    first, last = run.position, run.position - run.step + run.steps[run.stage]
    with _progress(console) as bar:
        shown = bar.add_task(stage, total=run.steps[run.stage], completed=run.step, loss=math.nan)
        for number, names, own in stream.run(first, last):
            began = time.perf_counter()
            key = jax.random.fold_in(root, number)
            batch = from_rows(own.lasting(max(of_every_process(own.time))), mesh)
            learner, parts, norm = jax.block_until_ready(step(learner, batch, key))
            values = {f.name: float(getattr(parts, f.name)) for f in dataclasses.fields(parts)}
            loss, norm = float(parts.total(config.loss)), float(norm)
            if not math.isfinite(loss) or not math.isfinite(norm):
                _stop(run, number, names, values, norm)
            run.learner, run.step = learner, run.step + 1
            if log is not None:
                log.write(
                    step=number,
                    stage=stage,
                    epoch=round(stream.epoch(number), 4),
                    loss=loss,
                    **values,
                    gradient_norm=norm,
                    seconds=round(time.perf_counter() - began, 4),
                )
            bar.update(shown, advance=1, loss=loss)
            if run.step % config.checkpoint_every == 0 and run.step < run.steps[run.stage]:
                _save(run)


def _finish_stage(run: Run, stream: TrainingStream, console: Console) -> None:
    """Put what was learnt into the model, and make it ready for the next stage."""
    if run.learner is not None:
        params = jax.tree.map(jnp.asarray, jax.device_get(run.learner.params))  # off the mesh
        run.model = take_apart(run.model)[0].model(params)
    run.stage, run.step, run.learner = run.stage + 1, 0, None
    if STAGES[run.stage - 1] == "float":
        quant = run.config.quant
        if quant.precision == "float32":
            run.stage = len(STAGES)
        else:
            batches = [stream.at(n)[1] for n in range(quant.calibration_batches)]
            console.print(f"calibrating {quant.precision} on {len(batches)} batches")
            calibrate(
                run.model,
                batches,
                run.task.framing,
                quant.precision,
                algorithm=quant.algorithm,
                ranges=quant.ranges,
            )
            run.teacher = take_apart(run.model)[1]
    _save(run)
    write_recognizer(run)


def write_recognizer(run: Run) -> None:
    """Write what `cmjax transcribe` reads, into the run's folder."""
    if not is_first():
        return
    framing = run.task.framing
    networks = {name: network.model(params) for name, (network, params) in _networks(run).items()}
    recognizer = Recognizer(run.config.sizes, framing.front, framing.alphabet, networks)
    save_recognizer(run.config.out / FILE, recognizer)


def _optimiser(run: Run):
    config, stage = run.config, STAGES[run.stage]
    steps = run.steps[run.stage]
    if stage == "float":
        rates = (config.float_stage.learning_rate, 0.0, config.float_stage.weight_decay)
    elif stage == "scales":
        rates = (0.0, config.quant.scale_rate, 0.0)
    else:
        rates = (config.quant.learning_rate, config.quant.scale_rate, 0.0)
    return optimiser(steps, *rates)


def _float(model: AcousticModel) -> Network:
    """The structure of a model in float32."""
    network, params = take_apart(model)
    copy = network.model(params)
    copy.switch("float32")
    return take_apart(copy)[0]


def _networks(run: Run) -> dict[str, tuple[Network, Params]]:
    if run.teacher is None:
        return {"float32": take_apart(run.model)}
    exact = _float(run.model), run.teacher
    return {"float32": exact, run.config.quant.precision: take_apart(run.model)}


def _save(run: Run) -> None:
    network, params = take_apart(run.model)
    if run.learner is not None:
        params = run.learner.params
    arrays = {"params": params, "constants": network.constants, "teacher": run.teacher}
    arrays["optimiser"] = None if run.learner is None else run.learner.optimiser
    checkpoint.save(
        run.config.out / "checkpoints",
        {name: value for name, value in arrays.items() if value is not None},
        config=run.config.record(),
        progress={
            "stage": run.stage,
            "step": run.step,
            "alphabet": dataclasses.asdict(run.task.framing.alphabet),
            "plans": saved_plans(run.model),
            "rate": run.task.corpus.rate,
            "teacher": run.teacher is not None,
            "optimiser": run.learner is not None,
        },
    )


def _restore(run: Run, found: checkpoint.SavedRun) -> None:
    """Fill a new run from a checkpoint."""
    network, params = take_apart(run.model)
    like: dict[str, Any] = {"constants": network.constants}
    if found.progress["teacher"]:
        restore_plans(run.model, found.progress["plans"])
        network, params = take_apart(run.model)
        like["teacher"] = params
    like["params"] = params
    if found.progress["optimiser"]:
        like["optimiser"] = jax.eval_shape(_optimiser(run).init, params)
    arrays = found.arrays(like)
    network = dataclasses.replace(network, constants=arrays["constants"])
    run.model = network.model(arrays["params"])
    run.teacher = arrays.get("teacher")
    if found.progress["optimiser"]:
        run.learner = Learner(arrays["params"], arrays["optimiser"])


def _stop(run: Run, number: int, names: tuple[str, ...], values: dict, norm: float) -> None:
    path = run.config.out / "bad_batch.json"
    _write(
        path,
        {
            "step": number,
            "stage": STAGES[run.stage],
            "loss": {name: str(value) for name, value in values.items()},
            "gradient_norm": str(norm),
            "utterances": names,
        },
    )
    raise LossNotFinite(
        f"the loss or its gradient is not finite at step {number} ({STAGES[run.stage]}); the "
        f"utterances of the batch are in {path}. A lower learning rate may do"
    )


def _report(task: Task, console: Console) -> None:
    corpus = task.corpus
    seconds = sum(len(utterance.samples) for utterance in corpus.train) / corpus.rate
    sizes = ", ".join(f"{name} {len(items)}" for name, items in corpus.tests.items())
    console.print(
        f"{len(corpus.train)} training utterances ({seconds / 60:.1f} min); tests: {sizes}; "
        f"{task.framing.alphabet.size} labels"
    )
    for name, names in shared(corpus, (item.digest() for item in corpus.train)).items():
        console.print(
            f"{name}: {len(names)} of its recordings are in the training data too, such as "
            f"{names[0]}",
            markup=False,
        )
    for item in corpus.skipped:
        said = f"skipped {item.name}: {item.reason}"
        console.print(said, markup=False, highlight=False)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _write(path: Path, value: Any) -> None:
    if not is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(value, indent=1, default=np.ndarray.tolist) + "\n")
