"""Decode steps that MindStudio Modeling publishes: its simulation and cmjax beside the baseline.

    python -m studies.mindstudio

MindStudio Modeling is Huawei's own simulator (open source, August 2026); the rows are of its tests,
whose baselines are most probably measured. Nothing is fitted to them. What a row does not say is
taken as follows: queries are of the whole instance, an unnamed arithmetic is bfloat16, and the
engine is vLLM's where the machine knows it, as the rows are written in its words (DP, TP, EP).
"""

import dataclasses
from collections.abc import Sequence

from rich.console import Console

from cmjax.console import exit_code, terminal
from cmjax.deploy import Deployment, predict
from cmjax.interrupt import leave


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One decode step of a deployment.

    Fields:
      row: what it is. baseline_ms: what was published for it. simulated_ms: MindStudio's.
      deployment, batch, context: how it is predicted.
    """

    row: str
    baseline_ms: float
    simulated_ms: float
    deployment: Deployment
    on: str
    batch: float
    context: float

    @property
    def simulated_error(self) -> float:
        """Of MindStudio's simulation, relative and signed."""
        return self.simulated_ms / self.baseline_ms - 1

    def predicted_ms(self) -> float:
        """What cmjax says of it."""
        found = predict(self.deployment, self.on, batch=self.batch, context=self.context)
        return float(found.step_s) * 1e3


_KIMI = Deployment(
    phase="decode",
    model="kimi-k2",
    npus=8,
    tp=4,
    quant="w4a8",
    drafts=3,
    microbatches=1,
    engine="vllm-ascend",
)
STEPS = (
    Step(
        row="Kimi-K2.5, W4A8, DP4 TP4 EP16, 3 drafts: 64 queries at 4,250",
        baseline_ms=61.17,
        simulated_ms=64.55,
        deployment=_KIMI,
        on="cloudmatrix384-560t",
        batch=8,
        context=4250,
    ),
    Step(
        row="Kimi-K2.5, W4A8, DP4 TP4 EP16, 3 drafts: 64 queries at 2,851",
        baseline_ms=59.40,
        simulated_ms=62.99,
        deployment=_KIMI,
        on="cloudmatrix384-560t",
        batch=8,
        context=2851,
    ),
    Step(
        row="Qwen3-30B-A3B, TP4: 1 query at 3,450",
        baseline_ms=12.71,
        simulated_ms=12.71,
        deployment=dataclasses.replace(
            _KIMI, model="qwen3-30b-a3b", npus=2, quant="bf16", drafts=1
        ),
        on="cloudmatrix384",
        batch=0.5,
        context=3450,
    ),
    Step(
        row="Qwen3-8B on A2, TP2: 32 queries at 1,536",
        baseline_ms=15.41,
        simulated_ms=12.73,
        deployment=dataclasses.replace(
            _KIMI, model="qwen3-8b", npus=2, tp=2, quant="bf16", drafts=1
        ),
        on="atlas-800-a2",
        batch=16,
        context=1536,
    ),
    Step(
        row="GLM-4.7, W8A8, TP8 DP2 EP16, 3 drafts: 32 queries at 4,352",
        baseline_ms=56.70,
        simulated_ms=53.24,
        deployment=dataclasses.replace(_KIMI, model="glm-4.7", tp=8, quant="int8"),
        on="cloudmatrix384",
        batch=4,
        context=4352,
    ),
)
"""The rows whose architecture is supported: of the six that are known, Qwen3.5-27B's alone (hybrid
attention) is not."""


def cells() -> list[tuple[str, ...]]:
    """A row a step, and the mean of absolute errors."""
    found = [(step, step.predicted_ms()) for step in STEPS]
    rows = [
        (
            step.row,
            f"{step.baseline_ms:.2f}",
            f"{step.simulated_ms:.2f}",
            f"{ms:.2f}",
            f"{100 * step.simulated_error:+.1f}",
            f"{100 * (ms / step.baseline_ms - 1):+.1f}",
        )
        for step, ms in found
    ]
    own = sum(abs(step.simulated_error) for step in STEPS) / len(STEPS)
    ours = sum(abs(ms / step.baseline_ms - 1) for step, ms in found) / len(STEPS)
    return [*rows, ("mean of the errors", "", "", "", f"{100 * own:.1f}", f"{100 * ours:.1f}")]


HEADS = (
    "decode step",
    "baseline, ms",
    "MindStudio, ms",
    "cmjax, ms",
    "MindStudio, %",
    "cmjax, %",
)


def main(console: Console) -> None:
    """Print the table."""
    for row in (HEADS, *cells()):
        console.print(_line(row), highlight=False)


def _line(row: Sequence[str]) -> str:
    first, *numbers = row
    return f"{first:<62}" + "".join(f"{cell:>16}" for cell in numbers)


if __name__ == "__main__":
    leave(exit_code(lambda: main(terminal())))
