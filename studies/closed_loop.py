"""A measured run of serving on Ascend A3, predicted from the machine file alone.

    python -m studies.closed_loop

SGLang serves DeepSeek-R1 on 64 dies of Ascend A3, the CloudMatrix384's chip: two prefill instances
of 16 dies and a decode instance of 32 (data parallel, EP32). Clients keep at most 832 requests in
it, until 3,328 requests of 3,500 prompt and 1,500 output tokens have been answered. What was
published of the run does not say whether it drafts tokens, nor how a prefill instance shares a
prompt, so that both are shown both ways. Nothing is fitted to it.
"""

import dataclasses
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from cmjax.console import exit_code, terminal
from cmjax.interrupt import leave
from cmjax.report.tables import simple_table
from cmjax.serving import DecodePool, PrefillPool, Service, ServingResult, generate, serve

REQUESTS, CLIENTS, PROMPT, OUTPUT = 3328, 832, 3500, 1500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run.

    Fields:
      what: it is. requests_per_s: answered. ttft_s: mean. ttft_p99_s: its 99th percentile. e2e_s:
        mean from a request to its last token.
    """

    what: str
    requests_per_s: float
    ttft_s: float
    ttft_p99_s: float
    e2e_s: float

    @property
    def tpot_ms(self) -> float:
        """Mean time of an output token after the first one."""
        return (self.e2e_s - self.ttft_s) / (OUTPUT - 1) * 1e3

    @property
    def concurrency(self) -> float:
        """Mean number of requests inside, by Little's law."""
        return self.requests_per_s * self.e2e_s

    @staticmethod
    def of(what: str, found: ServingResult) -> "Run":
        """A simulated run."""
        ms = found.to_dict()
        return Run(
            what=what,
            requests_per_s=ms["completed_requests_per_s"],
            ttft_s=ms["ttft_ms"]["mean"] / 1e3,
            ttft_p99_s=ms["ttft_ms"]["p99"] / 1e3,
            e2e_s=ms["e2e_ms"]["mean"] / 1e3,
        )


PUBLISHED = Run(what="published", requests_per_s=8.465, ttft_s=10.2, ttft_p99_s=29.8, e2e_s=82.32)


def service(tp: int, *, drafts: bool) -> Service:
    """The run's instances, `tp` dies of a prefill instance sharing each prompt."""
    return Service(
        model="deepseek-r1",
        engine="sglang-ascend",
        mtp=drafts,
        memory_fraction=0.98,  # 16 dies hold the model barely
        prefill=PrefillPool(npus=8, instances=2, tp=tp, redundant=0),
        decode=DecodePool(npus=16, batch=CLIENTS // 16),
    )


def predicted() -> Iterator[Run]:
    """The run as predicted, by what its publication leaves open."""
    trace = generate(requests=REQUESTS, prompt=PROMPT, output=OUTPUT, rate=1e6)
    for drafts in (False, True):
        for tp in (1, 16):
            what = f"{'a draft a step' if drafts else 'no drafts'}, prefill TP{tp}"
            found = serve(trace, service(tp, drafts=drafts), clients=CLIENTS, uncertainty=0)
            yield Run.of(what, found)


def table() -> Table:
    """The published run, and the predicted ones below it."""
    found = simple_table(
        "A closed loop on Ascend A3", "run", "requests/s", "mean TTFT, s", "p99", "mean TPOT, ms",
        "end to end, s", "inside",
    )  # fmt: skip
    for run in (PUBLISHED, *predicted()):
        found.add_row(
            run.what, f"{run.requests_per_s:.2f}", f"{run.ttft_s:.1f}", f"{run.ttft_p99_s:.1f}",
            f"{run.tpot_ms:.1f}", f"{run.e2e_s:.1f}", f"{run.concurrency:.0f}",
        )  # fmt: skip
    return found


def main(console: Console) -> None:
    """Print the table."""
    console.print(table())


if __name__ == "__main__":
    leave(exit_code(lambda: main(terminal())))
