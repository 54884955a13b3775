"""int8 Winograd convolution: what each way of quantizing costs, and what range scaling buys.

    python -m studies.winograd [--out out]

Prints the signal-to-noise ratio of ten pipelines, the closed form of noise amplification beside
what is measured, and layers whose steps are learned; draws accuracy against multiplications saved.

What is Yao et al.'s (RSQ, arXiv:2010.14841): int8 Winograd loses accuracy as it stands, and
training with an expanded integer range and high-precision values wins it back. What is derived
here: pipelines, closed form, and the form of range scaling (the paper's text does not say it).
What is measured here: every number that is printed.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax import lax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cmjax.console import terminal, track
from cmjax.files import replace_text
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.primitives.convolution import ConvScales, calibrate, least_error_step
from cmjax.primitives.convolution.choice import BASE_SQNR_DB, expected_sqnr_db
from cmjax.primitives.convolution.packed import prepack
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, supported
from cmjax.primitives.convolution.winograd import winograd_conv1d
from cmjax.report.plots.figure import (
    BLUE,
    FAINT,
    INK,
    VERMILION,
    add_axes,
    new_figure,
    save,
    set_title,
)
from studies.winograd_pipelines import (
    PIPELINES,
    SIGNALS,
    Sizes,
    exact,
    pipeline_sqnr_db,
    random_filter,
    signal,
    sqnr_db,
)

TABLED = ("F(2,3)", "F(4,3)-lavin", "F(2,5)-lavin", "F(2,5)", "F(4,5)", "F(2,7)")
MEASURED = Sizes()
LEARNED = Sizes(cin=48, cout=48, length=386)
LAYERS = (  # algorithm, range (None: the finest) of layers whose steps are learned
    ("F(2,3)", 63),
    ("F(2,3)", 90),
    ("F(2,3)", 110),
    ("F(2,3)", None),
    ("F(2,5)-lavin", 12),
    ("F(2,5)-lavin", 20),
    ("F(2,5)", None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of this study."""

    out: Path = Path("out")
    """Folder for the picture and the numbers."""
    steps: int = 400
    """Optimiser steps of each learned layer."""
    algorithms: tuple[str, ...] = TABLED
    """Algorithms in the table of pipelines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """One layer before and after its steps were learned, on signals that it was not fitted to."""

    algorithm: str
    signal: str
    input_limit: int
    calibrated_db: float
    learned_db: float
    input_step_ratio: float


def pipelines(algorithms: tuple[str, ...]) -> list[dict]:
    """SQNR in dB of every pipeline, one row per algorithm and kind of signal."""
    rows = []
    for algorithm in track(algorithms, "pipelines"):
        w = random_filter(ALGORITHMS[algorithm].r, MEASURED)
        for kind in SIGNALS:
            x = signal(kind, MEASURED)
            row = {name: pipeline_sqnr_db(name, algorithm, x, w) for name in PIPELINES}
            rows.append({"algorithm": algorithm, "signal": kind, **row})
    return rows


def losses(rows: list[dict]) -> list[dict]:
    """The closed form 10 log10(amplification) beside the measured P0 - P3 on Gaussian signals."""
    return [
        {
            "algorithm": row["algorithm"],
            "saving": form.saving(form.r),
            "closed_form_db": 10 * math.log10(form.amplification(form.r)),
            "measured_db": row["P0"] - row["P3"],
        }
        for row in rows
        if row["signal"] == "Gaussian"
        for form in [ALGORITHMS[row["algorithm"]]]
    ]


def learn_steps(
    algorithm: str,
    input_limit: int | None,
    *,
    kind: str = "Gaussian",
    steps: int = 400,
    sizes: Sizes = LEARNED,
) -> Learned:
    """Fit the steps of one layer to its float32 output by gradient; the filter stays.

    The loss is the relative squared error of the output of the deployed integer convolution (its
    value is exactly that), by Adam on the logarithms of the steps with a cosine schedule, over four
    signals; two others are held out.
    """
    train, held_out = signal(kind, sizes, batch=4), signal(kind, sizes, batch=2, seed=1)
    w = random_filter(ALGORITHMS[algorithm].r, sizes)
    scales = _start(train, w, algorithm, input_limit)
    target = jnp.asarray(exact(train, w), jnp.float32)
    want = exact(held_out, w)

    def loss(logs: ConvScales):
        if input_limit is not None:  # integers are passed on as they are
            logs = dataclasses.replace(logs, point_step=lax.stop_gradient(logs.point_step))
        y = winograd_conv1d(train, w, scales=jax.tree.map(jnp.exp, logs))
        return jnp.sum((y - target) ** 2) / jnp.sum(target**2)

    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def step(logs, state):
        updates, state = optimizer.update(jax.grad(loss)(logs), state)
        return optax.apply_updates(logs, updates), state

    logs = jax.tree.map(jnp.log, scales)
    state = optimizer.init(logs)
    for _ in range(steps):
        logs, state = step(logs, state)
    learned = jax.tree.map(jnp.exp, logs)

    def reached(scales):
        return sqnr_db(want, winograd_conv1d(held_out, prepack(w, scales)))

    return Learned(
        algorithm=algorithm,
        signal=kind,
        input_limit=scales.input_limit,
        calibrated_db=reached(scales),
        learned_db=reached(learned),
        input_step_ratio=float(learned.input_step / scales.input_step),
    )


def _start(x, w, algorithm: str, input_limit: int | None) -> ConvScales:
    """Calibrated steps; with a range, transforms of integers in it are passed on as they are."""
    if input_limit is None:
        return calibrate(x, w, algorithm=algorithm, pair_rule=False)
    scales = calibrate(
        x, w, algorithm=algorithm, input_limit=input_limit, requantize="none", pair_rule=False
    )
    step = least_error_step(x, (0, 1, 2), input_limit).reshape(())
    return dataclasses.replace(scales, input_step=step)


def plot_accuracy(path: Path) -> None:
    """Expected accuracy against multiplications saved, of what none beats in both."""
    figure, taps = new_figure(4.4), (3, 5, 7)
    width = (8.0 - 0.6 - 0.1) / len(taps)
    for panel, length in enumerate(taps):
        left = 0.6 + panel * width
        axes = add_axes(figure, left=left, right=8.0 - left - width + 0.15, top=1.0)
        axes.axhline(BASE_SQNR_DB["int8"], color=FAINT, linewidth=0.8)
        for domain, colour in (("int16", BLUE), ("int8", VERMILION)):
            front = _front(length, domain)
            axes.plot(
                [p[0] for p in front], [p[1] for p in front], "o-", color=colour, markersize=4.5
            )
            for saving, accuracy, name in front[1:]:
                if domain == "int8":
                    above = name.startswith("N")
                    axes.annotate(
                        name,
                        (saving, accuracy),
                        xytext=(3, 5 if above else -5),
                        textcoords="offset points",
                        size=7.5,
                        rotation=0 if above else 50,
                        rotation_mode="anchor",
                        ha="left" if above else "right",
                        va="bottom" if above else "top",
                        color=FAINT,
                    )
        axes.set(xlim=(0.9, 2.8), ylim=(13, 66), xlabel="multiplications saved, times")
        axes.text(2.75, 63, f"{length} taps", size=10, weight="bold", color=INK, ha="right")
        axes.text(2.75, BASE_SQNR_DB["int8"] + 0.7, "direct int8", size=8, color=FAINT, ha="right")
        if panel == 0:
            axes.set_ylabel("expected SQNR, dB")
            axes.text(1.0, 53, "int16 operands,\n12 bits used", size=9, color=BLUE, va="top")
            axes.text(1.0, 22, "int8\noperands", size=9, color=VERMILION, va="top")
        else:
            axes.set_yticklabels([])
    set_title(
        figure,
        "int8 Winograd pays for speed in accuracy; 12-bit operands stay above direct int8",
        "Algorithms that no other beats in both; closed form below direct convolution's ratio",
    )
    save(figure, path)


def _front(taps: int, domain: str) -> list[tuple[float, float, str]]:
    """(saving, expected SQNR, name) of algorithms that no other beats in both, by saving."""
    points = [
        (ALGORITHMS[name].saving(taps), expected_sqnr_db(name, taps, domain), name)
        for name in supported(taps)
    ]
    return sorted(p for p in points if not any(q[0] >= p[0] and q[1] > p[1] for q in points))


def _table(title: str, rows: list[dict]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in rows[0]:
        words = isinstance(rows[0][column], str)
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def run(study: Study, console: Console) -> dict[str, list[dict]]:
    """Print the tables, draw the picture, write the numbers; returns them."""
    unknown = set(study.algorithms) - set(ALGORITHMS)
    if unknown:
        names = ", ".join(ALGORITHMS)
        raise ValueError(f"studies.winograd: no algorithm {', '.join(unknown)}; there are {names}")
    if study.steps < 1:
        raise ValueError(f"studies.winograd: steps must be at least 1, got {study.steps}")
    study.out.mkdir(parents=True, exist_ok=True)
    rows = pipelines(study.algorithms)
    cases = [(layer, kind) for layer in LAYERS for kind in SIGNALS]
    layers = [
        learn_steps(*layer, kind=kind, steps=study.steps)
        for layer, kind in track(cases, "learned steps")
    ]
    learned = [dataclasses.asdict(layer) for layer in layers]
    found = {"pipelines": rows, "losses": losses(rows), "learned": learned}
    titles = {
        "pipelines": "SQNR of pipelines, dB, 256 to 64 channels (measured)",
        "losses": "Loss of P3 against direct int8, dB (closed form: derived; then measured)",
        "learned": "Steps learned in integer ranges (idea: the paper's; form: derived; measured)",
    }
    for name, table in found.items():
        console.print(_table(titles[name], table))
    replace_text(study.out / "winograd.json", json.dumps(found, indent=1) + "\n")
    plot_accuracy(study.out / "winograd_accuracy.png")
    scaled = next(layer for layer in layers if layer.input_limit == 110)
    console.print(
        f"F(2,3) on integers up to 110, where transforms saturate: learning makes the input's step "
        f"{scaled.input_step_ratio:.2f} times larger and gains "
        f"{scaled.learned_db - scaled.calibrated_db:.1f} dB on signals not trained on."
    )
    return found


if __name__ == "__main__":
    leave(run_program(lambda study: run(study, terminal()), Study, __doc__))
