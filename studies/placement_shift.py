"""Plans for a domain that was not recorded: leave one domain out of every public recording.

    python -m studies.placement_shift [--layers 6] [--out docs] [--scheduler tcp://head:8786]

Every domain of every recording is left out in turn; plans are made on the others and judged on it,
on 8, 32, 128 and 384 ranks with a slot a rank more than the experts need. Rows go to
`placement_shift.csv`, written as they are found, and what they say to `placement_shift.png`. The
yardstick is the best of contiguous, greedy and greedy on loads shrunk by 0.4, 0.7 and 0.9 *in that
cell*, which nobody can know beforehand. Needs `CMJAX_DATA`.
"""

import csv
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tyro

from cmjax import placement
from cmjax.console import show_progress
from cmjax.deploy.layer_price import LayerPrice
from cmjax.hardware import load_machine
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.placement import Loads, Problem
from cmjax.placement.methods.greedy import greedy_global
from cmjax.placement.methods.robust import WAYS, held_out, simplest
from cmjax.placement.methods.search import SHORT
from cmjax.report.plots.figure import BLUE, GREY, INK, ORANGE, add_axes, new_figure, save, set_title
from cmjax.sweep import WorkerPool, as_done

RANKS = (8, 32, 128, 384)
RULES = ("contiguous", "greedy", "greedy 0.4", "greedy 0.7", "greedy 0.9")
TOKENS = 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of this study."""

    layers: int = 6
    """Layers of each recording, evenly spaced; 0 is all."""
    ranks: tuple[int, ...] = RANKS
    """Ranks to place on."""
    only: tuple[str, ...] = ()
    """Recordings, by name; all if none is named."""
    out: Path = Path("out")
    """Folder for the rows and the picture."""
    draw: bool = False
    """Draw the rows that are there and do nothing else."""
    pool: tyro.conf.OmitArgPrefixes[WorkerPool] = dataclasses.field(default_factory=WorkerPool)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A domain to leave out of a recording, and ranks: all that another process needs."""

    recording: str
    loads: Loads
    ranks: int
    left_out: int
    domain: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.recording, self.ranks, self.domain

    def row(self) -> dict[str, float | str]:
        """Its row of the file."""
        names = {"recording": self.recording, "ranks": self.ranks, "domain": self.domain}
        return names | cell(self.loads, self.ranks, self.left_out)


def recordings() -> Iterator[tuple[str, dict[str, Loads]]]:
    """Public recordings with several domains, by domain."""
    data = Path(os.environ.get("CMJAX_DATA", "../shared/data"))
    yield "ESFT", placement.read_family(data / "moe_esft_deepseek_v2_lite")
    olmoe = data / "moe_olmoe_counts"
    yield "OLMoE", placement.read_family(olmoe / "olmoe_1b_7b.json")
    yield "Mixtral, texts", placement.read_family(olmoe / "mixtral_8x7b.json")
    mixtral = placement.read_family(data / "moe_mixtral_fiddler")
    yield "Mixtral, MMLU", {name.rpartition("_")[2]: loads for name, loads in mixtral.items()}
    gptoss = data / "moe_gptoss20b_tokens"
    yield "gpt-oss, texts", _by_dataset(gptoss)
    subjects = placement.read_family(gptoss / "mmlu_test_frequencies.npz")
    yield "gpt-oss, subjects", {name: subjects[name] for name in sorted(subjects)[::8]}


def _by_dataset(folder: Path) -> dict[str, Loads]:
    routes = placement.read_routes(folder / "routing.npz")
    with (folder / "docs.csv").open(newline="") as file:
        dataset = {int(row["doc"]): row["dataset"] for row in csv.DictReader(file)}
    assert routes.sequence is not None
    of = np.array([dataset[int(doc)] for doc in routes.sequence])
    return {name: routes.select(of == name).loads() for name in sorted(set(dataset.values()))}


def joined(family: Mapping[str, Loads], layers: int) -> Loads:
    """One window per domain, all of a million tokens a layer, with some of the layers."""
    some = next(iter(family.values()))
    at = np.arange(some.layers)
    if 0 < layers < some.layers:
        at = np.unique(np.linspace(0, some.layers - 1, layers).astype(int))
    windows = [loads.scaled(1e6).counts[:, at].mean(0) for loads in family.values()]
    return Loads(np.stack(windows), "family", None, tuple(f"{name}." for name in family))


def cell(loads: Loads, ranks: int, left_out: int) -> dict[str, float | str]:
    """Milliseconds on the domain left out, by way of planning on the others."""
    experts = loads.experts
    redundant = min((-(-experts // ranks) + 1) * ranks - experts, experts * (ranks - 1))
    price = LayerPrice(
        "deepseek-r1", load_machine("cloudmatrix384"),
        ranks=ranks, experts=experts, redundant=redundant, tokens=TOKENS,
    )  # fmt: skip
    seen, unseen = placement.without_domain(loads, left_out)
    problem, served = Problem(price.scale(seen), ranks, redundant), price.scale(unseen)

    def ms(plan, on=served):
        return placement.evaluate(plan, on, price).mean_time_s * 1e3

    def shrunk(share):
        return dataclasses.replace(problem, loads=problem.loads.shrunk(share))

    plans = {"contiguous": placement.contiguous(problem), "greedy": greedy_global(problem)}
    plans |= {f"greedy {share}": greedy_global(shrunk(share)) for share in (0.4, 0.7, 0.9)}
    plans["search"] = placement.search(problem, price, config=SHORT)
    way = WAYS[simplest(held_out(problem, price))]
    plans["robust"] = way.make(problem, price, 0)
    own = placement.evaluate(plans["robust"], served, price).lower_bound_s.mean() * 1e3
    row: dict[str, float | str] = {name: ms(plan) for name, plan in plans.items()}
    row |= {"bound": float(own), "way": way.name}
    planned = {name: ms(plans[name], problem.loads) for name in ("greedy", "search", "robust")}
    return row | {f"planned {name}": time for name, time in planned.items()}


def run(study: Study) -> list[dict]:
    """All cells; those that the file has already are kept."""
    study.out.mkdir(parents=True, exist_ok=True)
    path = study.out / "placement_shift.csv"
    rows = read_rows(path) if path.exists() else []
    done = {(row["recording"], int(row["ranks"]), row["domain"]) for row in rows}
    cells = [
        Cell(name, loads, ranks, at, domain)
        for name, family in recordings()
        if not study.only or name in study.only
        for loads in [joined(family, study.layers)]
        for ranks in study.ranks
        for at, domain in enumerate(family)
    ]
    order = {cell.key: at for at, cell in enumerate(cells)}
    left = [cell for cell in cells if cell.key not in done]
    with study.pool.executor() as executor, show_progress("placing") as progress:
        for _, row in as_done(Cell.row, left, executor, progress):
            rows.append(row)
            rows.sort(key=lambda row: order.get(
                (row["recording"], int(row["ranks"]), row["domain"]), -1
            ))  # fmt: skip
            write_rows(path, rows)
    return rows


def read_rows(path: Path) -> list[dict]:
    """Rows of the file, numbers as numbers."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    words = {"recording", "domain", "way"}
    return [{k: v if k in words else float(v) for k, v in row.items()} for row in rows]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write all rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def over_best(row: Mapping, method: str) -> float:
    """Percent over the best of the rules in this cell."""
    return 100 * (row[method] / min(row[name] for name in RULES) - 1)


def summary(rows: list[dict]) -> str:
    """What the rows say, in a line per method."""
    lines = []
    for method in (*RULES, "search", "robust"):
        over = np.array([over_best(row, method) for row in rows])
        under = np.array([100 * (row[method] / row["greedy"] - 1) for row in rows])
        lines.append(
            f"{method:<12} {under.mean():+6.1f} % against greedy, {over.mean():+6.1f} % over the "
            f"best rule, {over.max():+6.1f} % at worst, more than 2 % in {(over > 2).sum()} of "
            f"{len(rows)} cells"
        )
    lost = np.array([100 * (row["planned robust"] / row["planned greedy"] - 1) for row in rows])
    lines.append(
        f"robust where it planned: {lost.mean():+.1f} % against greedy, {lost.max():+.1f} % at "
        f"worst, more than 1 % in {(lost > 1).sum()} of {len(rows)} cells"
    )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Percent over the best rule of each cell, by recording and ranks.

    Args:
      rows: of `run`. path: .png or .svg.
    """
    groups = list(dict.fromkeys((row["recording"], int(row["ranks"])) for row in rows))
    figure = new_figure(1.1 + 0.24 * len(groups))
    axes = add_axes(figure, left=2.0, right=0.25, bottom=0.6, top=0.55)
    height = {group: -n for n, group in enumerate(groups)}
    shown = {
        "greedy": (GREY, "|", 45), "search": (ORANGE, "D", 25), "robust": (BLUE, "o", -8)
    }  # fmt: skip
    most = 60.0
    for method, (colour, marker, where) in shown.items():
        over = [min(over_best(row, method), most) for row in rows]
        at = [height[row["recording"], int(row["ranks"])] for row in rows]
        axes.plot(over, at, marker, color=colour, markersize=6, alpha=0.75, linestyle="none")
        axes.text(where, 0.75, method, ha="center", fontsize=9, color=colour, weight="bold")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(2, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yticks([height[g] for g in groups], [f"{name}, {ranks}" for name, ranks in groups])
    axes.set_ylim(-len(groups) + 0.4, 1.2)
    axes.set_xlabel(
        f"time on the domain left out over the best rule's, %  (at most {most:.0f} shown)"
    )
    under = np.mean([100 * (row["robust"] / row["greedy"] - 1) for row in rows])
    within = sum(over_best(row, "robust") <= 2 for row in rows)
    set_title(
        figure,
        f"On a domain left out, robust is {-under:.0f} % under greedy and within 2 % of the best "
        f"rule in {within} of {len(rows)} cells",
        "a point per domain left out; recording, ranks; dotted: 2 %",
    )
    save(figure, path)


def main(study: Study) -> None:
    path = study.out / "placement_shift.csv"
    rows = read_rows(path) if study.draw else run(study)
    plot(rows, study.out / "placement_shift.png")
    print(summary(rows))


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
