"""What is recomputed, and where stages begin: an exact programme beside a continuous relaxation.

    python -m studies.recomputation [--out docs]

Writes `tables/recomputation.md`: plans on Ascend 910 with all layers recomputed, with as little as
fits on stages of as even numbers of layers as there are (`fewest_recomputed`), with the fastest
numbers of layers (`fastest_stages`), and with what gradient descent finds on shares of the layers,
rounded to whole ones.
"""

import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cmjax.files import replace_text
from cmjax.hardware import Supernode, load_machine
from cmjax.interrupt import leave
from cmjax.models.dense import DenseConfig, preset
from cmjax.options import run_program
from cmjax.parallelism import Plan, Prices, parse_plan
from cmjax.parallelism.layerwise import Counts, shortest
from cmjax.parallelism.memory import USABLE, stage_memory
from cmjax.parallelism.recomputation import fastest_stages, fewest_recomputed
from studies.manual_tables import markdown

MACHINE = "ascend910-2048"
TABLES = ("recomputation",)
STEPS = 2000
WORDY = "8b-128k-words"
CASES = (
    ("pangu-200b", "data=16,tensor=8,pipeline=16,optimizer=zero1,overlap=true", 512),
    ("pangu-200b", "data=32,tensor=4,pipeline=16,optimizer=zero1,overlap=true", 512),
    ("pangu-13b", "data=256,pipeline=4,optimizer=zero1,overlap=true", 1024),
    ("pangu-13b", "data=64,pipeline=16,optimizer=zero1,overlap=true", 1024),
    (WORDY, "data=128,tensor=4,pipeline=4,optimizer=zero1,overlap=true", 1024),
    ("pangu-2.6b", "data=512,micro_batch=2,optimizer=zero1,overlap=true", 1024),
)
"""Models, plans, and sequences of a step; the first is the published one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the study."""

    out: Path = Path("docs")
    """Folder of the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A plan's step under ways to say what is recomputed, and where.

    Fields:
      full_s: all of every layer, as `even_s` with as even stages as there are; that recomputes as
        little as fits. exact: likewise, with the fastest boundaries. rounded: what the relaxation
        gives, in whole layers that fit. exact_s, rounded_s: their steps.
      relaxed_s: the pipeline's seconds but for transfers, with shares of layers.
      exact_pipeline_s: with whole ones.
      exact_took_s, relaxed_took_s: seconds of the two searches.
    """

    full_s: float
    even_s: float
    exact: Plan
    exact_s: float
    exact_pipeline_s: float
    rounded: Plan
    rounded_s: float
    relaxed_s: float
    exact_took_s: float
    relaxed_took_s: float


def model_of(name: str) -> DenseConfig:
    """A preset, or a decoder of Llama 3 8B's sizes (arXiv 2407.21783, table 3), whose head takes as
    long as two of its layers."""
    if name != WORDY:
        return preset(name)
    return DenseConfig(
        layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, sequence=2048,
        gated=True, norm="rms", positions="rotary", biases=False, tied=False,
    )  # fmt: skip


def compare(model: DenseConfig, plan: Plan, batch: int, machine: Supernode) -> Comparison:
    """All of it, for one plan that fits when all is recomputed."""
    prices = Prices(model, machine, (plan.micro_batch,))
    usable = USABLE * float(machine.chip.hbm_bytes)

    def seconds(stage, counts):
        return prices.stage_s(plan, stage, counts)

    def fastest() -> Plan:
        waited = prices.waited_at_least(plan)
        found = fastest_stages(model, plan, batch, usable, seconds, at_least=seconds, waited=waited)
        if not found:
            raise ValueError(f"plan: {plan} fits in no way")
        return min(found, key=lambda plan: prices.step(plan, batch).step_s)

    even = fewest_recomputed(model, plan, batch, usable, seconds)
    full = prices.step(dataclasses.replace(plan, recompute="full"), batch)
    fastest()  # traces and prices
    begin = time.perf_counter()
    exact = fastest()
    middle = time.perf_counter()
    numbers, shares, relaxed_s = relaxed(model, plan, batch, usable, prices)
    end = time.perf_counter()
    rounded = whole_layers(model, plan, batch, usable, numbers, shares)
    counts = exact.counts(model.layers)
    stages = [float(seconds(stage, each)) for stage, each in enumerate(counts)]
    rest = (sum(stages) - max(stages)) / plan.interleave
    return Comparison(
        full_s=full.step_s, even_s=np.inf if even is None else prices.step(even, batch).step_s,
        exact=exact, exact_s=prices.step(exact, batch).step_s,
        exact_pipeline_s=plan.micro_batches(batch) * max(stages) + rest,
        rounded=rounded, rounded_s=prices.step(rounded, batch).step_s, relaxed_s=relaxed_s,
        exact_took_s=middle - begin, relaxed_took_s=end - middle,
    )  # fmt: skip


def relaxed(
    model: DenseConfig, plan: Plan, batch: int, usable: float, prices: Prices
) -> tuple[np.ndarray, np.ndarray, float]:
    """(layers of every stage, their shares [stage, of none, selective, full], the pipeline's
    seconds but for transfers), by gradient descent on what lies between a stage's three extremes,
    all of which grow by the layer, with a price on missing memory that rises."""
    layers, stages = model.layers // plan.interleave, range(plan.pipeline)

    def lines(of) -> tuple[jnp.ndarray, jnp.ndarray]:
        """What a stage has without a layer, and for each, by what is recomputed."""
        one, two = (
            np.array([[float(of(s, Counts(n, n * full, n * some))) for full, some in _EXTREMES]
                      for s in stages])
            for n in (1, 2)
        )  # fmt: skip
        return jnp.asarray(2 * one - two), jnp.asarray(two - one)

    taken = lines(functools.partial(prices.stage_s, plan))
    held = lines(lambda s, counts: stage_memory(model, plan, batch, s, counts).peak)
    m, start = plan.micro_batches(batch), jnp.full(plan.pipeline, layers / plan.pipeline)

    def pipeline_s(numbers, shares):
        each = jnp.sum(shares * (taken[0] + numbers[:, None] * taken[1]), -1)
        top = jnp.max(each)
        return m * top + (jnp.sum(each) - top) / plan.interleave

    worst = float(pipeline_s(start, jnp.array([[0.0, 0.0, 1.0]] * plan.pipeline)))

    def values(logits):
        return layers * jax.nn.softmax(logits[:, 0]), jax.nn.softmax(logits[:, 1:])

    def loss(logits, price):
        numbers, shares = values(logits)
        needed = jnp.sum(shares * (held[0] + numbers[:, None] * held[1]), -1)
        missing = jnp.sum(jnp.maximum(needed / usable - 1, 0.0))
        return pipeline_s(numbers, shares) / worst + price * missing

    adam = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))

    def step(carry, price):
        logits, state = carry
        updates, state = adam.update(jax.grad(loss)(logits, price), state)
        return (optax.apply_updates(logits, updates), state), None

    logits = jnp.zeros((plan.pipeline, 4))
    rising = jnp.linspace(0.1, 10.0, STEPS)
    (logits, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, adam.init(x)), rising))(logits)
    numbers, shares = values(logits)
    return np.asarray(numbers), np.asarray(shares), float(pipeline_s(numbers, shares))


_EXTREMES = ((0, 0), (0, 1), (1, 0))
"""All layers of a stage recomputed whole, and in part."""


def whole_layers(
    model: DenseConfig, plan: Plan, batch: int, usable: float, numbers, shares
) -> Plan:
    """The nearest numbers of layers, and more recomputed where they do not fit; what fits in no way
    goes to the stage that has most room."""
    total = model.layers // plan.interleave
    whole = np.maximum(1, np.floor(numbers).astype(int))
    while whole.sum() != total:  # the largest remainders first
        step = 1 if whole.sum() < total else -1
        allowed = np.where((step > 0) | (whole > 1), step * (numbers - whole), -np.inf)
        whole[np.argmax(allowed)] += step

    def least(stage: int, layers: int) -> float:
        counts = Counts(layers, layers, 0)
        return float(stage_memory(model, plan, batch, stage, counts).peak)

    for _ in range(total):
        peaks = np.array([least(stage, n) for stage, n in enumerate(whole)])
        full = np.argmax(np.where(whole > 1, peaks, -np.inf))
        if peaks.max() <= usable:
            break
        whole[full] -= 1
        whole[np.argmin(peaks)] += 1
    chosen = []
    for stage, (layers, (none, selective, _)) in enumerate(zip(whole, shares, strict=True)):
        kept = round(none * layers)
        some = min(layers - kept, round(selective * layers))
        while True:
            counts = Counts(int(layers), int(layers - kept - some), int(some))
            fitting = stage_memory(model, plan, batch, stage, counts).peak <= usable
            if fitting or kept == some == 0:
                break
            kept, some = (kept - 1, some + 1) if kept else (0, some - 1)
        chosen.append(counts)
    layers = tuple(each.layers for each in chosen)
    layers = () if layers == plan.stages(model.layers) else layers
    return dataclasses.replace(plan, layers=layers, recompute=shortest(chosen))


def main(options: Options) -> int:
    """Compare all cases and write the table."""
    machine, rows = load_machine(MACHINE), []
    for name, text, batch in CASES:
        found = compare(model_of(name), parse_plan(text), batch, machine)
        said = found.exact.to_dict()
        rows.append((
            name, f"`{text.removesuffix(',overlap=true')}`", f"{found.full_s:.3f}",
            f"{found.even_s:.3f}", f"{found.exact_s:.3f}", f"`{said['layers']}`",
            f"`{said['recompute']}`", f"{found.rounded_s:.3f}",
            f"{found.exact_pipeline_s / found.relaxed_s - 1:+.1%}",
            f"{1e3 * found.exact_took_s:.0f}", f"{found.relaxed_took_s:.1f}",
        ))  # fmt: skip
    heads = (
        "model", "plan", "all recomputed, s", "even stages, s", "exact, s", "layers", "recompute",
        "relaxed and rounded, s", "exact over relaxed pipeline", "exact took, ms",
        "relaxed took, s",
    )  # fmt: skip
    table = markdown(heads, rows)
    print(table)
    tables = options.out / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    replace_text(tables / f"{TABLES[0]}.md", table + "\n")
    return 0


if __name__ == "__main__":
    leave(run_program(main, Options, "python -m studies.recomputation"))
