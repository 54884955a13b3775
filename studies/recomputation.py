"""What is recomputed, layer by layer: an exact programme beside a continuous relaxation.

    python -m studies.recomputation [--out docs]

Writes `tables/recomputation.md`: plans of PanGu-alpha 200B and 13B on Ascend 910, with all layers
recomputed, with as little as fits, stage by stage (`fewest_recomputed`), and with what gradient
descent finds on shares of layers, rounded to whole ones. `boundaries` is what stages of equal time
would save at most, if layers could be cut up.
"""

import dataclasses
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
from cmjax.parallelism.recomputation import fewest_recomputed
from studies.manual_tables import markdown

MACHINE = "ascend910-2048"
TABLES = ("recomputation",)
STEPS = 2000
CASES = (
    ("pangu-200b", "data=16,tensor=8,pipeline=16,optimizer=zero1,overlap=true", 512),
    ("pangu-200b", "data=32,tensor=4,pipeline=16,optimizer=zero1,overlap=true", 512),
    ("pangu-13b", "data=256,pipeline=4,optimizer=zero1,overlap=true", 1024),
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
    """A plan's step under ways to say what is recomputed.

    Fields:
      full_s: all of every layer. exact: as little as fits. rounded: what the relaxation gives,
        in whole layers that fit. exact_s, rounded_s: their steps.
      relaxed_s: the pipeline's seconds but for transfers, with shares of layers.
      exact_pipeline_s: with whole ones.
      boundaries: of the exact plan's pipeline, what stages of equal time would save.
      exact_took_s, relaxed_took_s: seconds of the two searches.
    """

    full_s: float
    exact: Plan
    exact_s: float
    exact_pipeline_s: float
    rounded: Plan
    rounded_s: float
    relaxed_s: float
    boundaries: float
    exact_took_s: float
    relaxed_took_s: float


def compare(model: DenseConfig, plan: Plan, batch: int, machine: Supernode) -> Comparison:
    """All of it, for one plan that fits when all is recomputed."""
    prices = Prices(model, machine, (plan.micro_batch,))
    usable = USABLE * float(machine.chip.hbm_bytes)

    def seconds(stage, counts):
        return prices.stage_s(plan, stage, counts)

    full = prices.step(dataclasses.replace(plan, recompute="full"), batch)
    fewest_recomputed(model, plan, batch, usable, seconds)  # traces and prices
    begin = time.perf_counter()
    exact = fewest_recomputed(model, plan, batch, usable, seconds)
    middle = time.perf_counter()
    if exact is None:
        raise ValueError(f"plan: {plan} fits in no way")
    shares, relaxed_s = relaxed(model, plan, batch, usable, prices)
    end = time.perf_counter()
    rounded = whole_layers(model, plan, batch, usable, shares)
    layers = model.layers // (plan.pipeline * plan.interleave)
    stages = [
        float(seconds(stage, exact.recomputed(stage, layers))) for stage in range(plan.pipeline)
    ]
    rest = (sum(stages) - max(stages)) / plan.interleave
    return Comparison(
        full_s=full.step_s, exact=exact, exact_s=prices.step(exact, batch).step_s,
        exact_pipeline_s=plan.micro_batches(batch) * max(stages) + rest,
        rounded=rounded, rounded_s=prices.step(rounded, batch).step_s, relaxed_s=relaxed_s,
        boundaries=1 - sum(stages) / len(stages) / max(stages),
        exact_took_s=middle - begin, relaxed_took_s=end - middle,
    )  # fmt: skip


def relaxed(
    model: DenseConfig, plan: Plan, batch: int, usable: float, prices: Prices
) -> tuple[np.ndarray, float]:
    """(shares [stage, of none, selective, full], the pipeline's seconds but for transfers), by
    gradient descent on what lies between a stage's three extremes, with a price on missing
    memory that rises."""
    layers = model.layers // (plan.pipeline * plan.interleave)
    extremes = [Counts(layers, full, some) for full, some in ((0, 0), (0, layers), (layers, 0))]
    stages = range(plan.pipeline)
    taken = jnp.array([[float(prices.stage_s(plan, s, c)) for c in extremes] for s in stages])
    held = jnp.array(
        [[float(stage_memory(model, plan, batch, s, c).peak) for c in extremes] for s in stages]
    )
    m, worst = plan.micro_batches(batch), float(jnp.max(taken))

    def pipeline_s(shares):
        each = jnp.sum(shares * taken, -1)
        top = jnp.max(each)
        return m * top + (jnp.sum(each) - top) / plan.interleave

    def loss(logits, price):
        shares = jax.nn.softmax(logits)
        missing = jnp.sum(shares * held, -1) / usable - 1
        return pipeline_s(shares) / (m * worst) + price * jnp.sum(jnp.maximum(missing, 0.0))

    adam = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))

    def step(carry, price):
        logits, state = carry
        updates, state = adam.update(jax.grad(loss)(logits, price), state)
        return (optax.apply_updates(logits, updates), state), None

    start = jnp.zeros((plan.pipeline, 3))
    rising = jnp.linspace(0.1, 10.0, STEPS)
    (logits, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, adam.init(x)), rising))(start)
    shares = jax.nn.softmax(logits)
    return np.asarray(shares), float(pipeline_s(shares))


def whole_layers(
    model: DenseConfig, plan: Plan, batch: int, usable: float, shares: np.ndarray
) -> Plan:
    """The nearest numbers of layers, and more recomputed where they do not fit."""
    layers, chosen = model.layers // (plan.pipeline * plan.interleave), []
    for stage, (none, selective, _) in enumerate(shares):
        kept = round(none * layers)
        some = min(layers - kept, round(selective * layers))
        while True:
            counts = Counts(layers, layers - kept - some, some)
            fitting = stage_memory(model, plan, batch, stage, counts).peak <= usable
            if fitting or kept == some == 0:
                break
            kept, some = (kept - 1, some + 1) if kept else (0, some - 1)
        chosen.append(counts)
    return dataclasses.replace(plan, recompute=shortest(chosen))


def main(options: Options) -> int:
    """Compare all cases and write the table."""
    machine, rows = load_machine(MACHINE), []
    for name, text, batch in CASES:
        plan = parse_plan(text)
        found = compare(preset(name), plan, batch, machine)
        rows.append((
            name, f"`{text.removesuffix(',overlap=true')}`", f"{found.full_s:.3f}",
            f"{found.exact_s:.3f}", f"`{found.exact.recompute}`", f"{found.rounded_s:.3f}",
            f"{found.exact_pipeline_s / found.relaxed_s - 1:+.1%}", f"{found.boundaries:.1%}",
            f"{1e3 * found.exact_took_s:.0f} ms / {found.relaxed_took_s:.1f} s",
        ))  # fmt: skip
    heads = (
        "model", "plan", "full, s", "exact, s", "exact", "relaxed and rounded, s",
        "exact over relaxed pipeline", "boundaries", "took",
    )  # fmt: skip
    table = markdown(heads, rows)
    print(table)
    tables = options.out / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    replace_text(tables / f"{TABLES[0]}.md", table + "\n")
    return 0


if __name__ == "__main__":
    leave(run_program(main, Options, "python -m studies.recomputation"))
