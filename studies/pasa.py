"""Where half-precision attention overflows, and how wrong each arithmetic is: PASA's benchmark.

    python -m studies.pasa [--out out]
    python -m studies.pasa --q q.npy --k k.npy --v v.npy [--is-causal]
    python -m studies.pasa --qkv tensors.safetensors         (or .npz; tensors q, k and v)

The distributions are those of the verification script of Chen et al. 2025 (arXiv 2503.01873), drawn
by another generator; every error printed is measured here, by emulation, against float64. With
operands of your own, [batch, length, heads, d] or [length, heads, d], only those are examined.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

from cmjax import report
from cmjax.console import terminal, track
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.primitives import AttentionNumerics, attention_numerics
from cmjax.primitives.attention.numerics import FP16_OVERFLOW, VARIANTS
from cmjax.report import Section
from cmjax.report.plots import figure as fig
from cmjax.report.units import number, percent

SEED = 2024724  # of the authors' script
MEANS, AMPLITUDES = (0, 10, 20, 30), (0.5, 5, 10, 20)  # the grid of their README
HYBRID_AMPLITUDE, HYBRID_SHARE = 10, 0.001
RESONANCE, CYCLES = 60, 8  # amplitude, and periods of the wave along d


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of this study."""

    out: Path = Path("out")
    """Folder for pictures and the page."""
    q: Path | None = None
    """Your queries, .npy."""
    k: Path | None = None
    """Your keys, .npy."""
    v: Path | None = None
    """Your values, .npy."""
    qkv: Path | None = None
    """All three in one .npz or .safetensors file, named q, k and v."""
    causal: bool = False
    """Your operands are causal."""
    block_size: int = 128
    """Keys per block."""
    heads: int = 2
    """Heads drawn per case of the benchmark."""
    length: int = 1280
    """Queries and keys of the benchmark."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """q, k, v [length, heads, d]."""

    q: Float[np.ndarray, "*batch length heads d"]
    k: Float[np.ndarray, "*batch length heads d"]
    v: Float[np.ndarray, "*batch length heads dv"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One distribution of the benchmark.

    `common_v` draws V like Q and K, with their mean, as the authors do. A common mean of V passes
    through any set of weights unchanged, so it hides wrong weights: else V has zero mean.
    """

    kind: str  # uniform, hybrid or resonance
    mean: float
    amplitude: float
    common_v: bool

    @property
    def name(self) -> str:
        if self.kind == "resonance":
            return f"resonance {self.mean:g}°"
        return f"{self.kind} {self.mean:g} ± {self.amplitude:g}"

    def draw(self, length: int, heads: int, d: int = 128) -> Operands:
        rng = np.random.default_rng(SEED)
        shape = (length, heads, d)

        def like(mean: float) -> np.ndarray:
            if self.kind == "uniform":
                return rng.uniform(mean - self.amplitude, mean + self.amplitude, shape)
            if self.kind == "hybrid":
                rare = rng.random(shape) < HYBRID_SHARE
                return rng.normal(mean, 1, shape) + rng.normal(0, self.amplitude, shape) * rare
            return rng.normal(0, 1, shape)

        if self.kind == "resonance":
            angle = 2 * np.pi * CYCLES * np.arange(d) / d
            q = self.amplitude * np.cos(angle) + like(0)
            k = self.amplitude * np.cos(angle + np.deg2rad(self.mean)) + like(0)
            v = like(0)
        else:
            q, k = like(self.mean), like(self.mean)
            v = like(self.mean if self.common_v else 0)
        return Operands(*(x.astype(np.float16) for x in (q, k, v)))


RECIPE = (
    *(Case("uniform", mean, amplitude, True) for mean in MEANS for amplitude in AMPLITUDES),
    *(Case("hybrid", mean, HYBRID_AMPLITUDE, True) for mean in MEANS),
)
ZERO_MEAN_V = tuple(dataclasses.replace(case, common_v=False) for case in RECIPE) + tuple(
    Case("resonance", phase, RESONANCE, False) for phase in (0, 60, 90, 180)
)
DRAWN = tuple(
    case
    for case in ZERO_MEAN_V
    if (case.kind, case.mean, case.amplitude)
    in {
        ("uniform", 0, 5), ("uniform", 10, 0.5), ("uniform", 10, 5), ("uniform", 20, 5),
        ("uniform", 20, 20), ("uniform", 30, 0.5), ("uniform", 30, 5),
        ("hybrid", 30, HYBRID_AMPLITUDE), ("resonance", 0, RESONANCE),
        ("resonance", 180, RESONANCE),
    }
)  # fmt: skip
MARKERS = {
    "FA fp32": (fig.GREY, "s"),
    "FA fp16-fp32": (fig.ORANGE, "^"),
    "FA fp16": (fig.PURPLE, "v"),
    "PASA fp16 published": (fig.VERMILION, "D"),
    "PASA fp16": (fig.BLUE, "o"),
    "PASA exact offset": (fig.GREEN, "P"),
}

PUBLISHED = (
    "From the paper and its authors' script: the algorithm; the distributions and their grid; the "
    "arithmetic of FA fp32, FA fp16, PASA fp16-fp32 and PASA fp16 published; that scores overflow "
    "float16 from a bias along the sequence, or from waves of Q and K along the head dimension "
    "that coincide. None of the paper's error figures is repeated here."
)
DERIVED = (
    "Derived, not the paper's: a common mean x centres q k^T at d x², which leaves float16 at "
    "x = {limit:.1f} for d = 128; waves of amplitude A, φ apart, centre it at A² d / 2 cos φ = "
    "{wave:,.0f} cos φ here; PASA leaves scale (1 − β) of the centre, {left:,.0f} at mean 30 with "
    "β = 0.9375. FA fp16-fp32 is a reading of a variant that the paper names. PASA fp16 (float32 "
    "row statistics and accumulator) and PASA exact offset are remedies that are not the paper's."
)
MEASURED = (
    "Measured here: relative RMSE against float64 on float16 operands, {heads} heads of {length:,} "
    "queries and keys, d = 128. NaN p %: that share of the rows is not finite. Overflow and rows: "
    "shares of the scores, and of the rows with such a score, beyond float16."
)


def examine(case: Case, length: int, heads: int, block_size: int) -> AttentionNumerics:
    """Numerics of one case."""
    drawn = case.draw(length, heads)
    return attention_numerics(drawn.q, drawn.k, drawn.v, block_size=block_size)


def columns() -> tuple[str, ...]:
    """Heads of the table of cases."""
    return ("case", "max |qk^T|", "overflow", "rows", *VARIANTS)


def cells(name: str, found: AttentionNumerics) -> tuple[str, ...]:
    """One row of the table of cases."""
    largest = max(abs(found.scores.smallest), abs(found.scores.largest))
    return (
        name,
        f"{largest:,.0f}",
        _share(found.scores.overflowing),
        _share(found.scores.overflowing_rows),
        *(
            f"{error.relative_rmse:.1e}" if error.bad_rows == 0 else f"NaN {_share(error.bad_rows)}"
            for error in found.errors.values()
        ),
    )


def _share(value: float) -> str:
    return "0" if value == 0 else percent(value, digits=0 if value > 0.995 else 2)


def table(title: str, rows: Iterable[tuple[str, ...]]) -> Table:
    """The rows as a terminal table."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    made.add_column(columns()[0], no_wrap=True)
    for name in columns()[1:]:
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def plot_overflow(path: Path) -> None:
    """Share of scores beyond float16 against the common mean of Q and K, by amplitude."""
    means = np.arange(16, 30.25, 0.5)
    limit = np.sqrt(FP16_OVERFLOW / 128)
    figure = fig.new_figure(4.2)
    fig.set_title(
        figure,
        f"Scores leave float16 once the common mean of Q and K passes {limit:.0f}",
        "Uniform Q and K, d = 128, 512 × 512 scores before scaling. Dashed: d · mean² = 65,520.",
    )
    axes = fig.add_axes(figure, left=0.85, right=1.35, top=0.9)
    colours = (fig.SKY, fig.BLUE, fig.GREEN, fig.VERMILION)
    for row, (amplitude, colour) in enumerate(zip(AMPLITUDES, colours, strict=True)):
        axes.plot(means, [_overflowing(mean, amplitude) for mean in means], color=colour, lw=1.8)
        axes.annotate(
            f"mean ± {amplitude:g}", (1.02, 0.92 - 0.09 * row), xycoords="axes fraction",
            color=colour, weight="bold", size=10, va="center",
        )  # fmt: skip
    axes.axvline(float(limit), color=fig.GREY, ls="--", lw=1.2, zorder=0)
    axes.set(
        xlim=(means[0], means[-1]), ylim=(-0.02, 1.02), xlabel="common mean of Q and K",
        ylabel="share of scores beyond 65,504",
    )  # fmt: skip
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
    axes.grid(axis="y", color=fig.PALE)
    fig.save(figure, path)


def _overflowing(mean: float, amplitude: float) -> float:
    drawn = Case("uniform", mean, amplitude, True).draw(512, 1)
    q, k = (x[:, 0].astype(np.float32) for x in (drawn.q, drawn.k))
    return float(np.mean(np.abs(q @ k.T) >= FP16_OVERFLOW))


def plot_errors(found: Mapping[Case, AttentionNumerics], path: Path) -> None:
    """Relative RMSE of every variant in the drawn cases; NaN in a column of its own."""
    figure = fig.new_figure(1.7 + 0.36 * len(found))
    worst = {
        name: max(f.errors[name].relative_rmse for f in found.values())
        for name in ("PASA fp16 published", "PASA fp16", "PASA exact offset")
    }
    fig.set_title(
        figure,
        "PASA is finite everywhere; float32 row statistics cut its worst error from "
        f"{percent(worst['PASA fp16 published'], digits=0)} to "
        f"{percent(worst['PASA fp16'], digits=0)}",
        "Relative RMSE, zero-mean V. PASA fp16: float32 row statistics. Grey: rows are NaN.",
    )
    axes = fig.add_axes(figure, left=1.45, right=0.3, top=1.05)
    low, nan_at, high = 1e-5, 8.0, 20.0
    axes.set_xscale("log")
    axes.axvspan(3.0, high, color=fig.PALE, zorder=0)
    for row, (_, numerics) in enumerate(found.items()):
        axes.axhline(row, color=fig.PALE, lw=1, zorder=0)
        broken = [n for n in MARKERS if numerics.errors[n].bad_rows > 0]
        for name, (colour, marker) in MARKERS.items():
            x = numerics.errors[name].relative_rmse
            if name in broken:  # side by side
                x = nan_at * 1.35 ** (2 * broken.index(name) - (len(broken) - 1))
            axes.plot(
                [x], [row], marker=marker, color=colour, ms=7, mec="white", mew=0.7, ls="",
                label=name if row == 0 else None, zorder=3,
            )  # fmt: skip
    ticks = [10.0**e for e in range(-5, 1)]
    axes.set(xlim=(low, high), ylim=(len(found) - 0.5, -0.5), xlabel="relative RMSE")
    axes.set_xticks([*ticks, nan_at], [*(f"{t:g}" for t in ticks), "NaN"])
    axes.minorticks_off()
    axes.grid(axis="x", color=fig.PALE)
    axes.set_yticks(range(len(found)), [case.name for case in found])
    figure.legend(
        *axes.get_legend_handles_labels(), loc="upper left", ncols=6, frameon=False, fontsize=8.5,
        bbox_to_anchor=(0.0, 1 - 0.6 / figure.get_figheight()), handletextpad=0.1,
        columnspacing=1.0,
    )  # fmt: skip
    fig.save(figure, path)


def benchmark(study: Study, console: Console) -> list[Section]:
    """Run every case, print the tables, draw the pictures, return the page's sections."""
    study.out.mkdir(parents=True, exist_ok=True)
    arguments = (study.length, study.heads, study.block_size)
    groups = {
        "V like Q and K, as in the authors' recipe": RECIPE,
        "V with zero mean, which hides nothing": ZERO_MEAN_V,
    }
    found = {
        title: {case: examine(case, *arguments) for case in track(list(cases), title)}
        for title, cases in groups.items()
    }
    derived = DERIVED.format(
        limit=np.sqrt(FP16_OVERFLOW / 128),
        wave=RESONANCE**2 * 64,
        left=(1 - 0.9375) * 128 * 30**2 / np.sqrt(128),
    )
    measured = MEASURED.format(heads=study.heads, length=study.length)
    for block in (PUBLISHED, derived, measured):
        console.print(block + "\n")
    sections = [Section("What is whose", "\n\n".join((PUBLISHED, derived, measured)))]
    for title, cases in found.items():
        rows = tuple(cells(case.name, numerics) for case, numerics in cases.items())
        console.print(table(title, rows))
        sections.append(Section(title, columns=columns(), rows=rows))
    drawn = found["V with zero mean, which hides nothing"]
    plot_overflow(study.out / "pasa_overflow.png")
    plot_errors({case: drawn[case] for case in DRAWN}, study.out / "pasa_error.png")
    sections[1:1] = [
        Section("Overflow", image=study.out / "pasa_overflow.png"),
        Section("Error", image=study.out / "pasa_error.png"),
    ]
    return sections


def read_operands(study: Study) -> Operands | None:
    """The user's q, k, v, if any were named.

    Raises: ValueError for an incomplete set, an unknown format or a missing tensor.
    """
    single = {name: getattr(study, name) for name in ("q", "k", "v")}
    if study.qkv is None and not any(single.values()):
        return None
    if study.qkv is not None and any(single.values()):
        raise ValueError("give either --qkv or --q, --k and --v")
    if study.qkv is not None:
        tensors = _read(study.qkv)
        missing = [name for name in single if name not in tensors]
        if missing:
            raise ValueError(
                f"{study.qkv}: no tensor {', '.join(missing)}; it has {', '.join(sorted(tensors))}"
            )
        return Operands(*(np.asarray(tensors[name]) for name in single))
    missing = [f"--{name}" for name, path in single.items() if path is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: all of --q, --k and --v are needed")
    return Operands(*(np.asarray(_read(path)) for path in single.values()))


def _read(path: Path):
    """The array of an .npy file, or the named tensors of an .npz or .safetensors file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix in (".npy", ".npz"):
        loaded = np.load(path, allow_pickle=False)
        return loaded if path.suffix == ".npy" else dict(loaded)
    if path.suffix == ".safetensors":
        from safetensors.flax import load_file  # optional; knows bfloat16

        return load_file(path)
    raise ValueError(f"{path}: expected .npy for one operand, .npz or .safetensors for all three")


def show(operands: Operands, study: Study, console: Console) -> None:
    """Print what was found on the user's operands, and a verdict."""
    found = attention_numerics(
        operands.q, operands.k, operands.v, block_size=study.block_size, causal=study.causal
    )
    ranges = Table("", "smallest", "largest", "beyond float16", "rows with overflow")
    for name, span in (("q k^T", found.scores), ("S' of PASA", found.shifted)):
        ranges.add_row(
            name, number(span.smallest), number(span.largest),
            _share(span.overflowing), _share(span.overflowing_rows),
        )  # fmt: skip
    console.print(ranges)
    errors = Table("arithmetic", "RMSE", "relative RMSE", "rows not finite")
    rows = [*found.errors.items(), ("rounding q, k, v to float16", found.input_rounding)]
    for name, error in rows:
        errors.add_row(
            name, f"{error.rmse:.2e}", f"{error.relative_rmse:.2e}", _share(error.bad_rows)
        )
    console.print(errors)
    console.print(verdict(found))


def verdict(found: AttentionNumerics) -> str:
    """One sentence: does plain half precision hold?"""
    if found.scores.overflowing:
        held = "PASA keeps them in range." if not found.shifted.overflowing else (
            "PASA does not keep all of them in range either: try a larger beta."
        )  # fmt: skip
        return (
            f"{_share(found.scores.overflowing)} of the scores overflow float16, in "
            f"{_share(found.scores.overflowing_rows)} of the rows. {held}"
        )
    largest = max(abs(found.scores.smallest), abs(found.scores.largest))
    return f"No score overflows: the largest is {largest / FP16_OVERFLOW:.1%} of float16's range."


def main(study: Study) -> None:
    console = terminal()
    operands = read_operands(study)
    if operands is not None:
        show(operands, study, console)
        return
    sections = benchmark(study, console)
    page = study.out / "pasa.html"
    report.write_page(page, "Half-precision attention: overflow and error", sections)
    print(f"wrote {page}")


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
