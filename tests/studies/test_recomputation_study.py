"""What is recomputed: the programme is nowhere slower than the relaxation, as the manual's table
says."""

from pathlib import Path

import pytest

from cmjax.hardware import load_machine
from cmjax.models.dense import preset
from cmjax.parallelism import parse_plan
from studies import recomputation

TABLE = (Path(__file__).parents[2] / "docs/tables/recomputation.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", [recomputation.CASES[0], recomputation.CASES[-1]], ids=str)
def test_rows_of_the_table_are_found_again(case):
    name, text, batch = case
    machine = load_machine(recomputation.MACHINE)
    found = recomputation.compare(preset(name), parse_plan(text), batch, machine)
    assert found.exact_s <= found.rounded_s < found.full_s
    assert found.exact_pipeline_s >= 0.999 * found.relaxed_s
    row = next(
        line for line in TABLE.splitlines() if f"`{text.removesuffix(',overlap=true')}`" in line
    )
    _, _, full, exact, recompute, *_ = (cell.strip() for cell in row.split("|")[1:-1])
    assert recompute == f"`{found.exact.recompute}`"
    assert (float(full), float(exact)) == pytest.approx((found.full_s, found.exact_s), rel=1e-3)
