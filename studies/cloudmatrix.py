"""The end-to-end results of the CloudMatrix384 paper (arXiv 2506.12708), predicted.

    python -m studies.cloudmatrix [--out out]

Compares every published row that cmjax knows with what it predicts from micro-measurements alone,
and draws the decode step and its two streams. Nothing here is fitted to an end-to-end number.
"""

import dataclasses
from pathlib import Path

from rich.console import Console

from cmjax import report
from cmjax.console import terminal, track
from cmjax.cost.measured import measured_machines, read_measurements
from cmjax.deploy import predict, predictor_of
from cmjax.deploy.validation import ValidationRow, validate
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.report import Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of this study."""

    out: Path = Path("out")
    """Folder for pictures and the page."""


def validate_all() -> dict[str, list[ValidationRow]]:
    """Every built-in row of every machine: predicted beside measured."""
    return {
        name: validate(track(read_measurements(name), name), name) for name in measured_machines()
    }


def run(out: Path, console: Console) -> list[Section]:
    """Print the tables, draw the pictures into `out`, return the page's sections."""
    out.mkdir(parents=True, exist_ok=True)
    decode = predict("deepseek-r1", phase="decode", microbatches=2)
    timeline = predictor_of(decode).timeline(decode.requests)
    result = decode.to_dict()
    console.print(report.prediction_table(result))
    report.plot_step(result, out / "decode_step.png", timeline)
    report.plot_timeline(timeline, out / "decode_layer.png")
    prefilled = predict("deepseek-r1", phase="prefill")
    prefill_timeline = predictor_of(prefilled).timeline(prefilled.requests)
    prefill = prefilled.to_dict()
    report.plot_step(prefill, out / "prefill_step.png", prefill_timeline)

    found = validate_all()
    for name, rows in found.items():
        console.rule(name)
        console.print(report.validation_table([row for row in rows if row.role == "predict"]))
    console.print("the rows that constants were fitted to: on the page, or `cmjax validate`")
    end_to_end = [
        row
        for name, rows in found.items()
        for measurement, row in zip(read_measurements(name), rows, strict=True)
        if measurement.command[0] == "predict"
    ]
    report.plot_steps_compare(end_to_end, out / "predicted_and_published.png")

    sections = [
        Section(
            "A decode step of DeepSeek-R1",
            "160 NPUs (EP320), 96 requests per NPU, 4,096 prompt tokens, two microbatches on an "
            f"attention and a MoE stream: {result['step_ms']:.1f} ms a step, "
            f"{result['tpot_ms']:.1f} ms per output token with one draft accepted at 70 %.",
            image=out / "decode_step.png",
        ),
        Section(
            "One layer of it in steady state",
            "Two microbatches swap streams: while one is in attention, the other is in the MoE.",
            image=out / "decode_layer.png",
        ),
        Section(
            "A prefill step",
            f"16 NPUs (EP32), 16,384 tokens per NPU: {prefill['tokens_per_s_per_npu']:,.0f} tokens "
            "per second and NPU.",
            image=out / "prefill_step.png",
        ),
        Section(
            "Predicted and published",
            "Calibrated on micro-measurements only; the rows below are predictions.",
            image=out / "predicted_and_published.png",
        ),
    ]
    sections += [
        Section(
            f"Every row known for {name}",
            "Role `calibrate`: a micro-measurement the constants were fitted to. "
            "Role `predict`: only compared.",
            columns=("row", "role", "measured", "predicted", "error", "source"),
            rows=tuple(
                (
                    row.row,
                    row.role,
                    f"{row.measured:,.4g}",
                    f"{row.predicted:,.4g}",
                    f"{row.error:+.1%}",
                    row.source,
                )
                for row in rows
            ),
        )
        for name, rows in found.items()
    ]
    return sections


def main(study: Study) -> None:
    report.write_page(
        study.out / "cloudmatrix.html",
        "CloudMatrix384: predicted and published",
        run(study.out, terminal()),
    )
    print(f"wrote {study.out}/cloudmatrix.html")


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
