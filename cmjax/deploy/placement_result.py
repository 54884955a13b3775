"""A placement when it is done: plans, how good each is, and how to look at and keep them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cmjax.console import html_table
from cmjax.deploy.layer_price import LayerPrice
from cmjax.deploy.place_options import Export, Search
from cmjax.files import replace_text
from cmjax.placement import (
    BASELINES,
    ENGINES,
    PLAN_FORMATS,
    Loads,
    Plan,
    Score,
    domain_of_window,
    once_per_rank,
    plan_text,
)

_DRAWN = ("contiguous", "greedy")  # of the rules: the others look like these


class ModelLayers(NamedTuple):
    """Layers of a model: all but those of multi-token prediction, and these."""

    layers: int
    mtp: int = 0


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Placement:
    """Plans by name, the one that was asked for, and how good each is.

    Attributes:
      plans: every plan, by method; `running` is the plan that was started from, `plan` an existing
        one that was judged.
      scores: of every plan, under `loads`.
      loads: token copies of a step, by window, layer and expert; shared experts come last.
      price: the layer's price that plans are judged by.
      method: which of the plans was asked for.
      objective: what was minimised, over the windows.
      shrink: how much nearer to even the loads were that the plan was made for.
      model_layers: layers of the model that the plan is for, where known.
    """

    plans: Mapping[str, Plan]
    scores: Mapping[str, Score]
    loads: Loads
    price: LayerPrice
    method: str
    objective: str = Search.objective
    shrink: float = 0.0
    model_layers: ModelLayers | None = None

    @property
    def plan(self) -> Plan:
        """The plan that was asked for."""
        return self.plans[self.method]

    @property
    def score(self) -> Score:
        """How good it is."""
        return self.scores[self.method]

    @property
    def tokens(self) -> dict[str, Float[np.ndarray, "layers ranks"]]:
        """Tokens per layer and rank in the last window, for the plans worth a picture.

        Averaging windows would hide the imbalance.
        """
        last = self.loads.counts[-1]
        return {
            name: plan.tokens_per_rank(last)
            for name, plan in self.plans.items()
            if name in _DRAWN or name == self.method or name not in BASELINES
        }

    def to_dict(self) -> dict[str, Any]:
        """What `cmjax place --json` writes: the plan and, beside it, how it came about."""
        return self._beside() | PLAN_FORMATS["own"](self.plan)

    def fit(self, format: str = Export.format) -> Plan:
        """The plan as a format can hold it: vLLM-Ascend addresses one copy of an expert per rank.

        Raises: ValueError where it cannot be made so.
        """
        if format == "vllm-ascend" and self.plan.doubles:
            return once_per_rank(self.plan, self.loads)
        return self.plan

    def text(self, format: str = Export.format) -> str:
        """The plan as the text of a file; what stands beside it is kept in cmjax's own only.

        Raises: ValueError for an unknown format, or a plan that the format cannot hold.
        """
        beside = self._beside() if format == Export.format else {}
        if self.model_layers is not None:
            beside |= {
                "model_layers": self.model_layers.layers,
                "mtp_layers": self.model_layers.mtp,
            }
        return plan_text(self.fit(format), format, **beside)

    @property
    def unknown(self) -> str:
        """What the recording cannot say of other texts; "" where it holds several workloads."""
        if domain_of_window(self.loads).any() or self.method == "plan":
            return ""
        windows = len(self.loads.counts)
        seen = "one window" if windows == 1 else f"{windows} windows of one recording"
        gain = ""
        greedy = self.scores.get("greedy")
        if greedy is not None and self.method in ("search", "gradient"):
            share = 1 - self.score.cost_s / greedy.cost_s
            gain = f"; the {share:.1%} that {self.method} gains over greedy here may not be there"
        return (
            f"{seen}: how far other texts differ is not known from it{gain}. Add workloads "
            f"(--family), judge on others (--test), or plan for what may come (--method robust)"
        )

    def told(self, format: str, path: str | Path = "PLAN") -> tuple[str, ...]:
        """What a person should know of the file of an engine: its rows, and the options to give.

        Args:
          format: that of the file.
          path: of the file, as the engine is told it.
        Returns: sentences; none for cmjax's own format.
        """
        engine = ENGINES.get(format)
        if engine is None:
            return ()
        lines = [f"{engine.name} needs: {engine.options(self.plan, str(path))}"]
        labels = self.plan.layer_labels
        if engine.numbered and labels is not None:
            known = self.model_layers
            layers = known.layers if known else max(labels) + 1
            last = layers + (known.mtp if known and format == "tensorrt-llm" else 0)
            first, kept = min(labels), last - len(labels)
            if format == "tensorrt-llm":
                kept = last - layers
            lines.append(
                f"the file has rows for layers {first if format == 'tensorrt-llm' else 0} to "
                f"{last - 1}"
                + (f", {kept} of them as without a plan (dense or not recorded)" if kept else "")
                + ("" if known else "; if the model has more layers, give --model-layers")
            )
        return tuple(lines)

    def save(self, path: str | Path, format: str = Export.format) -> None:
        """Write the plan; an existing file is replaced only once the new one is complete.

        Args:
          path: of the file.
          format: a name in `cmjax.placement.PLAN_FORMATS`.
        Raises: as `text`; OSError if the file cannot be written.
        """
        replace_text(path, self.text(format))

    def __repr__(self) -> str:
        width = max(map(len, self.scores))
        lines = [
            f"  {name:<{width}}  {' '.join(f'{cell:>9}' for cell in cells)}"
            + (" ◀" if name == self.method else "")
            for name, cells in self._rows()
        ]
        heads = " ".join(f"{head:>9}" for head in _HEADS)
        return "\n".join([self._title(), f"  {'':<{width}}  {heads}", *lines])

    def _repr_html_(self) -> str:
        marked = {name: f"{name} ◀" if name == self.method else name for name in self.scores}
        rows = [(marked[name], *cells) for name, cells in self._rows()]
        return html_table(self._title(), [("method", *_HEADS), *rows])

    def _rows(self):
        for name, score in self.scores.items():
            yield (
                name,
                (f"{score.cost_s * 1e3:.4g}", f"{score.cost_gap:+.1%}", f"{score.mean_par:.3f}",
                 f"{score.worst_par:.3f}"),
            )  # fmt: skip

    def _title(self) -> str:
        price = self.price
        return (
            f"{self.loads.layers} layers of {self.loads.experts} experts on {price.ranks} ranks of "
            f"{price.machine.name}, {self.plan.slots} slots, {price.tokens:g} tokens a rank and "
            f"step"
        )

    def _beside(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "objective": self.objective,
            "shrink": self.shrink,
            "routed": self.plan.routing,
            "machine": self.price.machine.name,
            "evaluation": {name: score.to_dict() for name, score in self.scores.items()},
        }


_HEADS = ("ms", "over bound", "mean PAR", "worst PAR")
