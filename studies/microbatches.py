"""One microbatch or two: what each mechanism of the price does to a decode layer and to a step.

    python -m studies.microbatches

CloudMatrix-Infer gains from two microbatches. Each line changes one thing of the machine or the
requests, and says what the layer of DeepSeek-R1 then takes at a batch of 96 per NPU and 4K tokens,
which stream is the longer one, and the time per output token (TPOT) of small batches and of that
one. Nothing is fitted to it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from cmjax.console import exit_code, terminal
from cmjax.deploy import Prediction, predict
from cmjax.hardware import Supernode, load_machine, replace_leaf
from cmjax.interrupt import leave

BATCH = 96


@dataclasses.dataclass(frozen=True)
class Change:
    """Something that could be otherwise.

    Fields:
      what: it is. leaves: constants of the machine, by dotted name. requests: options of `predict`.
    """

    what: str
    leaves: Mapping[str, float] = dataclasses.field(default_factory=dict)
    requests: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, machine: Supernode) -> Supernode:
        """The machine with it."""
        for name, value in self.leaves.items():
            machine = replace_leaf(machine, name, value)
        return machine


CHANGES = (
    Change("as predicted"),
    Change("ranks do not jitter", {"exchange.jitter_s": 0.0}),
    Change("they jitter by the most that was seen in service, 3 µs", {"exchange.jitter_s": 3e-6}),
    Change("contexts differ, by 30 % of their mean", requests={"context_spread": 0.3}),
    Change("the slowest rank has 1.65 times the mean's rows", requests={"load": 1.65}),
    Change("exchanges disturb nobody", {"exchange.interference": 0.0}),
    Change("only all vector cores saturate the links", {"exchange.saturation_cores": 48.0}),
    Change("attention at 60 % of the cube cores' peak", {"efficiency.attention": 0.6}),
    Change("HBM at 92 % of its peak", {"efficiency.hbm": 0.92}),
    Change(
        "kernels are launched in no time",
        {f"chip.{kind}_startup_s": 0.0 for kind in ("matrix", "attention", "vector")},
    ),
)
HEADS = (
    "what is otherwise",
    "layer in one, µs",
    "in two, µs",
    "gain of two, %",
    "attention stream, µs",
    "MoE stream, µs",
    "TPOT at 8 in one, ms",
    "at 24 in one, ms",
    "at 24 in two, ms",
    "at 96 in two, ms",
)


def cells() -> list[tuple[str, ...]]:
    """A row a change. Throughput is compared for the gain."""
    machine = load_machine("cloudmatrix384")
    return [_cells(change, change.of(machine)) for change in CHANGES]


def _cells(change: Change, machine: Supernode) -> tuple[str, ...]:
    def decode(batch: int, microbatches: int) -> Prediction:
        return predict(
            "deepseek-r1",
            machine,
            phase="decode",
            batch=batch,
            prompt=4096,
            output=256,
            microbatches=microbatches,
            **change.requests,
        )

    one, two = decode(BATCH, 1), decode(BATCH, 2)
    gain = float(two.tokens_per_s_per_npu) / float(one.tokens_per_s_per_npu) - 1
    micro = [float(p.per_layer_s) * 1e6 for p in (one, two)]
    micro_streams = [float(two.streams_s[name]) * 1e6 for name in ("attention", "moe")]
    tpot = [float(p.tpot_s) * 1e3 for p in (decode(8, 1), decode(24, 1), decode(24, 2), two)]
    return (
        change.what,
        *(f"{us:,.0f}" for us in micro),
        f"{100 * gain:+.1f}",
        *(f"{us:,.0f}" for us in micro_streams),
        *(f"{ms:.1f}" for ms in tpot),
    )


def main(console: Console) -> None:
    """Print the table."""
    for first, *numbers in (HEADS, *cells()):
        console.print(f"{first:<56}" + "".join(f"{n:>22}" for n in numbers), highlight=False)


if __name__ == "__main__":
    leave(exit_code(lambda: main(terminal())))
