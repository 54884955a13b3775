"""Placement methods on every public recording of expert loads, where they planned and elsewhere.

    python -m studies.placement [--full [--seconds 2400]] [--robust] [--out out]
                                [--workers 4 | --scheduler tcp://head:8786]

Each row plans on the first windows (or workloads) of a recording and is judged there, on its later
windows, and on another domain, which are never planned on. Cases run on all cores, or on a Dask
cluster. Rows are kept in `placement.jsonl` in the output folder and not computed again, so a run
that was cut off, or reached its time limit, goes on where it stopped; all of them go to
`placement.csv` too. Without `CMJAX_DATA` a synthetic family stands in. "Over bound" compares, where
planned, with the linear-programming bound of the objective, and elsewhere with what no plan made
for just these loads could beat, each window served by a plan of its own. CPU seconds are those of a
process's first run of a shape, compilation included.

`--robust` plans for the worst of 12 workloads and sets the two searching methods beside greedy on
the mean and on the largest load and beside plain random swaps.
"""

import csv
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from cmjax import placement
from cmjax.console import show_progress, terminal
from cmjax.deploy.layer_price import LayerPrice
from cmjax.hardware import load_machine
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.placement.methods.greedy import greedy_on
from cmjax.placement.methods.search import relative_loads
from cmjax.sweep import WorkerPool, as_done

TOKENS = 96
METHODS = (*placement.BASELINES, "search", "gradient")
SHORT = placement.SearchConfig(starts=1, chunks=4, rounds=10, swaps_per_slot=1.0)
SHRINK = 0.7  # where another domain is judged
SEARCH_S = 20.0  # most that a search may take, besides compiling
ROBUST = ((288, 32), (288, 72), (320, 64), (320, 160))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of this study."""

    out: Path = Path("out")
    """Folder for the rows and tables."""
    full: bool = False
    """All recordings, 8 to 384 ranks, two redundancies; else a selection."""
    seconds: float | None = None
    """Begin no further case after so long."""
    robust: bool = False
    """The worst of 12 workloads instead."""
    pool: tyro.conf.OmitArgPrefixes[WorkerPool] = dataclasses.field(default_factory=WorkerPool)


@dataclasses.dataclass(frozen=True)
class Case:
    """A recording: what is planned on, and what is judged on. Routes are those of `later`."""

    name: str
    train: placement.Loads
    later: placement.Loads | None = None
    other: placement.Loads | None = None
    train_routes: placement.Routes | None = None
    later_routes: placement.Routes | None = None


def cases(full: bool) -> Iterator[Case]:
    """The recordings under `CMJAX_DATA`, or a synthetic family."""
    data = Path(os.environ.get("CMJAX_DATA", "../shared/data"))
    if not data.is_dir():
        yield _of_windows("example family", placement.example_family(layers=8), 8)
        return
    esft = data / "moe_esft_deepseek_v2_lite"
    domains = ("law", "intent", "summary")
    for index, domain in enumerate(domains[: None if full else 1]):
        other = esft / f"{domains[(index + 1) % 3]}.npz"
        yield _of_routes(f"ESFT {domain}", esft / f"{domain}.npz", other)
    loads = {d: placement.read_loads(esft / f"{d}.npz").scaled(1e6) for d in domains}
    two = [loads[d].counts for d in domains[1:]]
    yield Case(
        "ESFT intent + summary, other law",
        placement.Loads(np.concatenate(two), "ESFT"),
        other=loads["law"],
    )
    olmoe = f"{data}/moe_olmoe_counts/olmoe_1b_7b.json"
    texts = [
        placement.read_loads(f"{olmoe}:{d}").scaled(1e6) for d in ("book", "c4", "arxiv", "github")
    ]
    train = np.concatenate([part.counts for part in texts[:3]])
    yield Case("OLMoE 3 domains, other github", placement.Loads(train, "OLMoE"), other=texts[3])
    subjects = placement.read_loads(f"{data}/moe_gptoss20b_tokens/mmlu_test_frequencies.npz:freq")
    counts = subjects.scaled(1e6).counts
    known = np.arange(len(counts)) // 2 % 4 == 0  # subjects come as pairs: thinking, answering
    yield Case(
        "gpt-oss 15 of 57 subjects, other the rest",
        placement.Loads(counts[known], "gpt-oss"),
        other=placement.Loads(counts[~known]),
    )
    if not full:
        return
    yield _of_routes("gpt-oss tokens", data / "moe_gptoss20b_tokens" / "routing.npz", None)
    flash = data / "moe_deepseek_v41_flash" / "v41_flash_q4_profile_hits_4layers.csv"
    yield Case("V4.1-Flash", placement.read_loads(flash))
    folder = data / "moe_mixtral_fiddler" / "mixtral_8x7b_original"
    mixtral = [placement.read_loads(path).scaled(1e6).counts for path in sorted(folder.iterdir())]
    yield Case(
        "Mixtral 6 subjects, other the 7th",
        placement.Loads(np.concatenate(mixtral[:-1]), "Mixtral"),
        other=placement.Loads(mixtral[-1]),
    )
    yield _of_windows("example family", placement.example_family(), 8)


def _of_routes(name, path, other):
    routes = placement.read_routes(path)
    return dataclasses.replace(
        _of_windows(name, routes.loads(8), 4),
        other=None if other is None else placement.read_loads(other),
        train_routes=routes.stretch(8, 0, 4),
        later_routes=routes.stretch(8, 4, 8),
    )


def _of_windows(name, loads, first):
    train, later = loads.counts[:first], loads.counts[first:]
    return Case(name, placement.Loads(train, name), placement.Loads(later, name))


def shapes(experts: int, full: bool) -> Iterator[tuple[int, int]]:
    """Ranks and redundant slots to try for a number of experts."""
    for more in (1, 0) if full else (1,):  # in this order: a time limit cuts off the end
        for ranks in (32, 384, 8, 128) if full else (8, 32):
            yield ranks, (-(-experts // ranks) + more) * ranks - experts


@dataclasses.dataclass(frozen=True)
class Way:
    """What a plan is made for: an objective, and by which methods."""

    methods: tuple[str, ...]
    objective: str = "mean"
    shrink: float = 0.0

    @property
    def label(self) -> str:
        shrunk = f", shrunk {self.shrink:g}" if self.shrink else ""
        return ("" if self.objective == "mean" else f" {self.objective}") + shrunk


def ways(case: Case, ranks: int) -> Iterator[Way]:
    """Everything at 32 ranks; elsewhere without the second method and the second objective."""
    yield Way(METHODS if ranks == 32 else METHODS[:-1])
    if ranks == 32 and len(case.train.counts) > 1:
        yield Way(("search", "gradient"), objective="worst")
    if case.other is not None:
        yield Way(("search",), shrink=SHRINK)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recording and a shape to place it on: all that another process needs."""

    case: Case
    ranks: int
    redundant: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.case.name, self.ranks, self.redundant


def rows_of(cell: Cell) -> list[dict]:
    """Rows of every way for one case and shape."""
    case, ranks = cell.case, cell.ranks
    return [row for way in ways(case, ranks) for row in judge(case, ranks, cell.redundant, way)]


def judge(case: Case, ranks: int, redundant: int, way: Way) -> list[dict]:
    """Rows of some methods for one case and shape."""
    price = LayerPrice(
        "deepseek-r1", load_machine("cloudmatrix384"),
        ranks=ranks, experts=case.train.experts, redundant=redundant, tokens=TOKENS,
    )  # fmt: skip
    nodes = max(1, ranks // 16)
    problem = placement.Problem(
        price.scale(case.train), ranks, redundant, nodes,
        objective=placement.Risk.parse(way.objective),
    )  # fmt: skip
    judge_plan = placement.Judge(
        problem, price, test=None if case.later is None else price.scale(case.later),
        routes=case.later_routes if nodes > 1 else None,
        step_assignments=64 * ranks * price.copies,
    )  # fmt: skip
    found = placement.compare(
        judge_plan, way.methods, shrink=way.shrink, seconds=SEARCH_S, group_by=case.train_routes,
        clock=time.process_time,
    )  # fmt: skip
    rows = []
    for method, score in found.scores.items():
        plan = found.plans[method]
        row = {
            "case": case.name, "ranks": ranks, "redundant": redundant,
            "method": method + way.label,
            "ms": score.mean_time_s * 1e3, "gap": score.gap,
            "objective_gap": score.objective_gap,
            "balance": score.balancedness, "solve_s": score.solve_s,
        }  # fmt: skip
        assert score.step_par is not None
        row["step_par"] = float(score.step_par.mean())
        if score.test is not None:
            row |= {"later_ms": score.test.mean_time_s * 1e3, "later_gap": score.test.gap}
        if case.other is not None:
            other = placement.evaluate(plan, price.scale(case.other), price)
            row |= {"other_ms": other.mean_time_s * 1e3, "other_gap": other.gap}
        reach = score.reach or placement.expected_reach(plan, problem.loads, price.copies)
        row["remote_kib"] = reach.remote_nodes(nodes) * price.row_bytes / 1024
        row["routes"] = score.reach is not None  # else independent experts
        rows.append(row)
    return rows


def run(study: Study, console: Console) -> list[dict]:
    """All rows, computed or read back; prints a table per case."""
    study.out.mkdir(parents=True, exist_ok=True)
    kept = study.out / "placement.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    done: dict[tuple, list[dict]] = {}
    for row in map(json.loads, lines):
        done.setdefault((row["case"], row["ranks"], row["redundant"]), []).append(row)
    every = list(cases(study.full))
    sizes = [list(shapes(case.train.experts, study.full)) for case in every]
    # Shape by shape through all recordings, so that a time limit leaves none out.
    cells = [
        Cell(case, *of_case[at])
        for at in range(len(sizes[0]))
        for case, of_case in zip(every, sizes, strict=True)
    ]
    todo = [cell.key for cell in cells]
    left = [cell for cell in cells if cell.key not in done]
    with study.pool.executor() as executor, show_progress("placing") as progress:
        for at, found in as_done(rows_of, left, executor, progress, seconds=study.seconds):
            done[left[at].key] = found
            with kept.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    rows = [row for key in todo for row in done.get(key, [])]
    for case in every:
        console.print(table(case.name, [row for row in rows if row["case"] == case.name]))
    if missing := sum(key not in done for key in todo):
        console.print(
            f"{missing} of {len(todo)} cases are left: the same command goes on with them"
        )
    if rows:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with (study.out / "placement.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )
    return rows


def table(title: str, rows: list[dict]) -> Table:
    """One case: methods by shape."""
    found = Table(title=title, title_justify="left", box=None)
    columns = {
        "ms": "planned ms", "objective_gap": "over bound", "balance": "balance",
        "later_ms": "later ms", "later_gap": "over bound",
        "other_ms": "other ms", "other_gap": "over bound",
        "step_par": "step PAR", "remote_kib": "KiB to nodes", "solve_s": "CPU s",
    }  # fmt: skip
    columns = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    for name in ("ranks", "slots", "method", *columns.values()):
        found.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        cells = [
            f"{row[key]:+.1%}" if "gap" in key else f"{row[key]:.2f}" if key in row else ""
            for key in columns
        ]
        found.add_row(str(row["ranks"]), f"+{row['redundant']}", row["method"], *cells)
    return found


def robust(console: Console) -> list[dict]:
    """The worst of 12 workloads: mean and worst over workloads of the layers' mean max / mean.

    CPU seconds are those of a first run, compilation included.
    """
    loads = placement.example_family()
    rows = []
    for slots, ranks in ROBUST:
        problem = placement.Problem(
            loads.scaled(TOKENS * 8 * ranks), ranks, slots - loads.experts,
            objective=placement.Risk("worst"),
        )  # fmt: skip
        methods = {
            "greedy on the mean": placement.greedy,
            "greedy on the largest": lambda p: greedy_on(p, relative_loads(p).max(0)),
            "3,000 random swaps": random_swaps,
            "30,000 random swaps": lambda p: random_swaps(p, swaps=30_000),
            "search, one short start": lambda p: placement.search(p, slowest, config=SHORT),
            "search": lambda p: placement.search(p, slowest),
            "gradient, without search": lambda p: p.plan(placement.relax_and_round(p, slowest)[0]),
            "gradient": lambda p: placement.gradient(p, slowest),
        }
        for name, method in methods.items():
            begin = time.process_time()
            plan = method(problem)
            cpu_s = time.process_time() - begin
            tokens = plan.tokens_per_rank(problem.loads.counts)
            par = (tokens.max(-1) / tokens.mean(-1)).mean(1)
            rows.append(
                {"slots": slots, "ranks": ranks, "method": name, "mean": float(par.mean()),
                 "worst": float(par.max()), "cpu_s": cpu_s}
            )  # fmt: skip
    found = Table(title="Worst of 12 workloads, 58 layers of 256 experts", box=None)
    for name in ("slots", "ranks", "method", "mean PAR", "worst PAR", "CPU s"):
        found.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        cells = (f"{row['mean']:.3f}", f"{row['worst']:.3f}", f"{row['cpu_s']:.1f}")
        found.add_row(str(row["slots"]), str(row["ranks"]), row["method"], *cells)
    console.print(found)
    return rows


def slowest(tokens):
    """A price: the tokens of the slowest rank."""
    return tokens.max(-1)


def random_swaps(problem: placement.Problem, *, swaps: int = 3000) -> placement.Plan:
    """Greedy on the mean load, then random swaps kept if the worst window's slowest rank gains."""
    rng = np.random.default_rng(0)
    loads = relative_loads(problem)
    experts = np.array(placement.greedy(problem).expert_of_slot)
    size = problem.slots_per_rank
    for layer in range(problem.layers):
        row = experts[layer]
        copies = np.bincount(row, minlength=problem.experts)
        per_copy = (loads[:, layer] / copies).T  # [experts, windows]
        tokens = per_copy[row].reshape(problem.ranks, size, -1).sum(1)  # [ranks, windows]
        for i, j in rng.integers(0, len(row), (swaps, 2)):
            a, b = i // size, j // size
            if a == b:
                continue
            shift = per_copy[row[i]] - per_copy[row[j]]
            new_a, new_b = tokens[a] - shift, tokens[b] + shift
            before = max(tokens[a].max(), tokens[b].max())
            if max(new_a.max(), new_b.max()) < before:
                tokens[a], tokens[b] = new_a, new_b
                row[i], row[j] = row[j], row[i]
    return problem.plan(experts)


def main(study: Study) -> None:
    if study.robust:
        robust(terminal())
    else:
        run(study, terminal())


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
