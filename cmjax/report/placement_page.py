"""The page that `cmjax place` writes: how evenly each plan loads ranks and nodes, at what price."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cmjax.deploy.placement_result import Placement
from cmjax.placement import Reach, Routes, Score, node_bytes, reach
from cmjax.report.html import Section, write_page
from cmjax.report.plots import (
    load_curve_title,
    node_bytes_title,
    placement_title,
    plot_load_curve,
    plot_node_bytes,
    plot_placement,
    plot_rank_curve,
    rank_curve_title,
)
from cmjax.report.units import number, percent


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementPage:
    """What the page shows; plans are named the same in all mappings.

    Attributes:
      title: of the page.
      setting: what was placed, on what, in a sentence or two.
      loads: tokens of one window by layer and expert.
      tokens: of the same window by layer and rank, for each plan.
      scores: of each plan.
      nodes: nodes the ranks are spread over; 1 leaves traffic between nodes out.
      row_bytes: of one row's dispatch and combine.
      reach: ranks and nodes a token is sent to, by plan, where routes are known.
    """

    title: str
    setting: str
    loads: Float[np.ndarray, "layers experts"]
    tokens: Mapping[str, Float[np.ndarray, "layers ranks"]]
    scores: Mapping[str, Score]
    nodes: int
    row_bytes: float
    reach: Mapping[str, Reach] | None = None

    @classmethod
    def of(cls, placed: Placement, routes: Routes | None = None) -> "PlacementPage":
        """The page of a placement; with token-level routes, also where a token goes."""
        loads, price = placed.loads, placed.price
        shown = placed.tokens
        return cls(
            title=f"Where {loads.experts} experts live on {price.ranks} dies",
            setting=(
                f"Loads: {loads.source}, {loads.layers} layers. Price: the MoE layers of "
                f"{price.model} on {price.machine.name}, {loads.counts[-1, 0].sum():,.0f} token "
                f"copies a layer and step. Time is the {placed.objective} over "
                f"windows; the pictures show the last one."
            ),
            loads=loads.counts[-1],
            tokens=shown,
            scores=placed.scores,
            nodes=price.spread,
            row_bytes=price.row_bytes,
            reach=None if routes is None else {
                name: reach(replace(placed.plans[name], nodes=price.spread), routes)
                for name in shown
            },
        )  # fmt: skip

    def write(self, path: str | Path) -> None:
        """Write the page; an existing one is replaced only when the new one is complete.

        Raises: ValueError if `path` does not end in .html or its folder does not exist.
        """
        with tempfile.TemporaryDirectory() as folder:
            write_page(path, self.title, self._sections(Path(folder)))

    def _sections(self, folder):
        sections = [_score_section(self.setting, self.scores)]
        tested = {name: score.test for name, score in self.scores.items() if score.test}
        if tested:
            sections.append(_score_section(
                "The same plans on loads they were not made for. Over bound: what plans made for "
                "these very loads could not beat.",
                tested, elsewhere=True,
            ))  # fmt: skip
        heat, ranks, experts = (folder / f"{name}.svg" for name in ("heat", "ranks", "experts"))
        plot_placement(self.tokens, heat)
        plot_rank_curve(self.tokens, ranks)
        plot_load_curve(self.loads, experts)
        sections += [
            Section("Tokens on every rank", image=heat, alt=placement_title(self.tokens)),
            Section("Ranks, busiest first", image=ranks, alt=rank_curve_title(self.tokens)),
            Section("What had to be placed", image=experts, alt=load_curve_title(self.loads)),
        ]
        if self.nodes > 1:
            received = {
                name: node_bytes(tokens, self.nodes, self.row_bytes).sum(0)
                for name, tokens in self.tokens.items()
            }
            image = folder / "bytes.svg"
            plot_node_bytes(received, image)
            sections.append(
                Section(
                    "Between nodes",
                    f"Dispatch and combine of a step, {number(self.row_bytes)} bytes a row, over "
                    f"{self.nodes} nodes; sources are spread evenly over the ranks.",
                    image=image,
                    alt=node_bytes_title(received),
                )
            )
        if self.reach:
            sections.append(_reach_section(self.reach))
        return sections


def _score_section(text, scores, *, elsewhere=False):
    best = min(scores, key=lambda name: scores[name].cost_s)
    where = " elsewhere" * elsewhere
    return Section(
        f"{best} is fastest{where}" if len(scores) > 1 else f"{best}{where}",
        text,
        columns=("plan", "time, ms", "over bound", "mean PAR", "worst PAR", "balance"),
        rows=tuple(
            (
                name,
                number(score.cost_s * 1e3),
                percent(score.cost_gap, sign=True),
                f"{score.mean_par:.3f}",
                f"{score.worst_par:.3f}",
                percent(score.balancedness),
            )
            for name, score in scores.items()
        ),
    )


def _reach_section(reach: Mapping[str, Reach]) -> Section:
    return Section(
        "Where a token goes",
        "Different ranks and nodes that hold one of a token's experts, mean over tokens and "
        "layers. A kernel that sends a token once to a rank, or once to a node, sends so many "
        "copies.",
        columns=("plan", "ranks per token", "nodes per token"),
        rows=tuple(
            (name, f"{found.ranks.mean():.2f}", f"{found.nodes.mean():.2f}")
            for name, found in reach.items()
        ),
    )
