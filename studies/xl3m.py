"""XL3M against the other ways to read past the trained length, and what 20M tokens would take.

    python -m studies.xl3m --quick         two models, five lengths
    python -m studies.xl3m                 two models, up to 2048 times the trained length

Small models are trained to recall (`train.passkey`) on texts of at most 64 tokens, or read from
where an earlier run left them. Then every method answers the same questions about longer texts with
the same weights. Every number of the first two tables is measured here; the third is priced by
`studies.xl3m_cost`. Writes xl3m.json and xl3m.png.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from cmjax.console import terminal, track
from cmjax.files import replace_text
from cmjax.interrupt import leave
from cmjax.models.moe.model import MoEModel, parameters
from cmjax.models.moe.xl3m import segment_starts
from cmjax.options import run_program
from studies import xl3m_cost, xl3m_figure
from studies.xl3m_methods import (
    SEGMENT,
    STRIDE,
    Haystack,
    by_xl3m,
    draw_haystack,
    read_whole,
    scorer_of,
    stretched,
    truncated,
)
from train.passkey import Recall, train

QUICK_LENGTHS = (64, 256, 1024, 4096, 8192)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
LONGER = (32768, 131072)  # read segment by segment only
OVERCONFIDENT = "never unsure"
XL3M = {"XL3M, k = 1": 1, "XL3M, window filled": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of this study."""

    out: Path = Path("out")
    """Folder for results, picture and trained models."""
    quick: bool = False
    """Fewer lengths, up to 8,192 tokens."""
    seeds: int = 2
    """Models trained, each with its overconfident twin."""
    questions: int = 48
    """Questions per length, method and model; one haystack answers 16, those beyond 8192 tokens
    are one."""


@dataclasses.dataclass
class Tally:
    """Questions asked and answered rightly."""

    right: int = 0
    asked: int = 0

    def add(self, answers: np.ndarray, haystack: Haystack) -> None:
        """Count the answers to a haystack's questions."""
        self.right += int(np.sum(answers == haystack.answers))
        self.asked += len(answers)

    @property
    def accuracy(self) -> float:
        """Share answered rightly."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        z = 1.96
        scale = 1 + z**2 / self.asked
        middle = (self.accuracy + z**2 / (2 * self.asked)) / scale
        spread = self.accuracy * (1 - self.accuracy) / self.asked + z**2 / (4 * self.asked**2)
        half = z / scale * spread**0.5
        return max(middle - half, 0.0), min(middle + half, 1.0)


@dataclasses.dataclass
class Entropies:
    """Of the segments that hold the pair asked for, and of all others, in nats."""

    holding: list[float] = dataclasses.field(default_factory=list)  # per question the lowest
    lowest_other: float = np.inf
    others: int = 0
    sure_others: int = 0  # below 1 nat

    def add(self, entropies: np.ndarray, holds: np.ndarray) -> None:
        """Count the segments of one haystack, [questions, segments]."""
        other = np.where(holds, np.inf, entropies)
        self.holding += np.min(np.where(holds, entropies, np.inf), axis=1).tolist()
        self.lowest_other = min(self.lowest_other, float(other.min()))
        self.others += int(np.sum(~holds))
        self.sure_others += int(np.sum(other < 1))


Accuracy = dict[str, dict[int, Tally]]
Certainty = dict[str, dict[int, Entropies]]


def models(study: Study) -> list[tuple[MoEModel, MoEModel]]:
    """Per seed, a model that is unsure where it should be, and its overconfident twin."""
    folder = study.out / "passkey"

    def one(seed: int, unanswerable: float, name: str) -> MoEModel:
        out = folder / f"{name}-{seed}"
        return train(Recall(out=out, seed=seed, unanswerable=unanswerable))

    return [(one(s, 0.2, "unsure"), one(s, 0.0, "never-unsure")) for s in range(study.seeds)]


def measure(
    study: Study, trained: Sequence[tuple[MoEModel, MoEModel]]
) -> tuple[Accuracy, Certainty]:
    """Accuracy of every method, and the entropies that XL3M saw, by length."""
    accuracy: Accuracy = {}
    certainty: Certainty = {}
    vocabulary = Recall().vocabulary
    lengths = QUICK_LENGTHS if study.quick else (*LENGTHS, *LONGER)
    scorers = [tuple(map(scorer_of, pair)) for pair in trained]
    work = [(seed, length) for length in lengths for seed in range(len(trained))]
    for seed, length in track(work, "answering"):
        rng = np.random.default_rng((seed, length))
        haystacks: list[Haystack] = []
        wanted = 16 if length in LONGER else study.questions
        while sum(len(h.answers) for h in haystacks) < wanted:
            haystacks.append(draw_haystack(rng, vocabulary, length))
        unsure, never_unsure = scorers[seed]
        config, params = unsure.config, parameters(trained[seed][0])

        def count(method: str, answers: np.ndarray, haystack: Haystack, length=length) -> None:
            accuracy.setdefault(method, {}).setdefault(length, Tally()).add(answers, haystack)

        for haystack in haystacks:
            starts = segment_starts(haystack.content.size, SEGMENT, STRIDE)
            holds = haystack.holds(starts)
            for name, scorer in (("", unsure), (f"{OVERCONFIDENT}: ", never_unsure)):
                found, entropies = by_xl3m(scorer, haystack, list(XL3M.values()))
                for method, answers in zip(XL3M, found, strict=True):
                    count(name + method, answers, haystack)
                by_length = certainty.setdefault(OVERCONFIDENT if name else "unsure", {})
                by_length.setdefault(length, Entropies()).add(entropies, holds)
            if length in LONGER:
                continue
            count("newest 64 tokens", truncated(unsure, haystack), haystack)
            for method, way in stretched(config, length).items():
                count(method, read_whole(way, params, haystack), haystack)
    return accuracy, certainty


def accuracy_table(accuracy: Accuracy) -> Table:
    """Accuracy in % with its interval, by method and length."""
    lengths = sorted({length for row in accuracy.values() for length in row})
    rows = (
        (method, *(_percent(row[n]) if n in row else "" for n in lengths))
        for method, row in accuracy.items()
    )
    trained = Recall().trained_length
    return _table(
        f"Questions answered rightly, % (95 % interval); trained on {trained} tokens",
        ("context, tokens", *(f"{n:,}" for n in lengths)),
        rows,
    )


def certainty_table(certainty: Certainty) -> Table:
    """How far the entropies of segments with and without the answer lie apart."""
    rows = (
        (
            name,
            f"{length:,}",
            f"{np.median(found.holding):.3f}",
            f"{np.max(found.holding):.3f}",
            f"{found.lowest_other:.3f}",
            f"{found.sure_others / max(found.others, 1):.1e}",
            f"{found.others:,}",
        )
        for name, by_length in certainty.items()
        for length, found in by_length.items()
    )
    columns = (
        "model", "context", "with the answer: median", "highest", "without: lowest",
        "share below 1", "segments",
    )  # fmt: skip
    uniform = np.log(Recall().vocabulary.values)
    return _table(f"Entropy of segments, nats (all values alike: {uniform:.3f})", columns, rows)


def as_json(accuracy: Accuracy) -> dict[str, dict[str, dict]]:
    """The accuracies for a file."""
    return {
        method: {
            str(n): {
                "right": t.right,
                "asked": t.asked,
                "low": t.interval[0],
                "high": t.interval[1],
            }
            for n, t in row.items()
        }
        for method, row in accuracy.items()
    }


def _percent(tally: Tally) -> str:
    low, high = tally.interval
    return f"{100 * tally.accuracy:.0f} ({100 * low:.0f}–{100 * high:.0f})"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    made.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def _curves(accuracy: Accuracy) -> Mapping[str, list[tuple[int, float, float, float]]]:
    return {
        method: [(n, t.accuracy, *t.interval) for n, t in row.items()]
        for method, row in accuracy.items()
    }


def main(study: Study) -> None:
    console = terminal()
    if study.seeds < 1 or study.questions < 1:
        raise ValueError("--seeds and --questions must be at least 1")
    study.out.mkdir(parents=True, exist_ok=True)
    accuracy, certainty = measure(study, models(study))
    console.print(accuracy_table(accuracy))
    console.print(certainty_table(certainty))
    replace_text(study.out / "xl3m.json", json.dumps(as_json(accuracy), indent=1))
    xl3m_figure.draw(_curves(accuracy), Recall().trained_length, study.out / "xl3m.png")
    xl3m_cost.show(console)
    console.print(f"wrote {study.out}/xl3m.json and {study.out}/xl3m.png")


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
