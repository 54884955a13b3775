"""What is recomputed: the programme is nowhere slower than the relaxation, as the manual's table
says."""

from pathlib import Path

import pytest

from cmjax.hardware import load_machine
from cmjax.parallelism import parse_plan
from studies import recomputation

TABLE = (Path(__file__).parents[2] / "docs/tables/recomputation.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", [recomputation.CASES[0], recomputation.CASES[4]], ids=str)
def test_rows_of_the_table_are_found_again(case):
    name, text, batch = case
    machine = load_machine(recomputation.MACHINE)
    found = recomputation.compare(recomputation.model_of(name), parse_plan(text), batch, machine)
    assert found.exact_s <= found.even_s < found.full_s
    assert found.exact_s <= found.rounded_s < found.full_s
    assert found.exact_pipeline_s >= 0.999 * found.relaxed_s
    row = next(
        line for line in TABLE.splitlines() if f"`{text.removesuffix(',overlap=true')}`" in line
    )
    _, _, full, even, exact, layers, recompute, *_ = (cell.strip() for cell in row.split("|")[1:-1])
    said = found.exact.to_dict()
    assert (layers, recompute) == (f"`{said['layers']}`", f"`{said['recompute']}`")
    assert (float(full), float(even), float(exact)) == pytest.approx(
        (found.full_s, found.even_s, found.exact_s), rel=1e-3
    )
