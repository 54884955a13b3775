"""The run: a plan's step over a text, with metrics, checkpoints and resumption."""

import dataclasses
import math
import time

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from cmjax.hardware import load_machine
from cmjax.models.dense import DenseModel
from cmjax.parallelism import Plan, TrainState, TrainStep, parse_plan, search, train_step
from cmjax.parallelism.shards import mesh_of
from train.data.text import Windows
from train.data.vocabulary import read_tokens
from train.loop import resumed, run_steps, save
from train.pangu.config import PanguConfig
from train.schedule import warmed_up


@dataclasses.dataclass
class PanguRun:
    """A run in its folder.

    Attributes:
      config, windows, step: what to learn, from which text, and how a step is made.
      state: parameters and optimizer, on all ranks.
      made: steps made.
    """

    config: PanguConfig
    windows: Windows
    step: TrainStep
    state: TrainState
    made: int = 0


def plan_of(config: PanguConfig, vocab: int) -> Plan:
    """The plan that is asked for, or the fastest that fits.

    Raises: ValueError: a plan that cannot be read, or that the model or the batch does not divide.
    """
    model = config.model(vocab)
    if config.plan == "search":
        machine = load_machine(config.on)
        return search(model, machine, config.devices, config.batch, top=1).plans[0].plan
    plan = parse_plan(config.plan)
    plan.check(model, config.batch)
    return plan


def start(config: PanguConfig, console: Console) -> PanguRun:
    """Read the text, join the other processes, and read the folder's last checkpoint if it has one.

    Raises: ValueError: a text or vocabulary that cannot be read, a plan that does not fit,
      processes that do not come together, a checkpoint of another configuration.
    """
    tokens, vocab = read_tokens(config.learned_text(), config.vocabulary)
    windows = Windows(tokens, config.length, config.seed)
    plan = plan_of(config, vocab)
    ranks = mesh_of(plan).ranks
    config.group.join(ranks)
    rate = warmed_up(config.learning_rate, config.steps)
    step = train_step(
        plan, config.model(vocab), global_batch=config.batch,
        optimizer=optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay),
    )  # fmt: skip
    state, made = resumed(config, lambda: step.initial(config.seed), console)
    where = f"{jax.process_count()} processes" if jax.process_count() > 1 else "one process"
    console.print(f"plan {plan}: {ranks} ranks in {where}", highlight=False)
    return PanguRun(config, windows, step, state, made)


def train(run: PanguRun, console: Console) -> None:
    """Every step that is left.

    Raises: LossNotFinite: the loss or its gradient is; the batch is saved.
    """
    config = run.config

    def step(number: int) -> dict[str, float]:
        tokens = run.step.place_tokens(
            lambda first, last: run.windows.batch(number, config.batch, slice(first, last))
        )
        began = time.perf_counter()
        run.state, result = jax.block_until_ready(run.step.compiled(run.state, tokens))
        seconds = time.perf_counter() - began
        loss = float(result.loss)
        run.made = number + 1
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "gradient_norm": float(result.gradient_norm),
            "tokens_per_s": round(config.batch * config.length / seconds, 1),
        }

    run_steps(
        config, run.windows, run.made, step,
        save=lambda: save(config, run.state, run.made), console=console,
    )  # fmt: skip


def held_out_loss(run: PanguRun) -> float:
    """Mean cross-entropy of the next token on text that was held out, nats, of the joined
    parameters on one device."""
    graph, like = nnx.split(nnx.eval_shape(lambda: DenseModel(run.step.model, rngs=nnx.Rngs(0))))
    whole = jax.tree.map(np.asarray, run.step.whole(run.state.params))
    nnx.replace_by_pure_dict(like, whole)
    tokens = run.windows.held_out(run.config.test_windows)
    return float(jax.jit(lambda p, x: nnx.merge(graph, p).loss(x))(like, tokens))
