"""The table of one and two microbatches: its changes are made, its first row is the prediction."""

import jax
import pytest

from cmjax.deploy import predict
from cmjax.hardware import leaf_names, load_machine, replace_leaf
from studies.microbatches import CHANGES, HEADS, cells


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.what)
def test_a_change_is_of_the_constants_that_it_names_and_of_no_other(change):
    machine = load_machine("cloudmatrix384")
    values = [jax.tree.leaves(m) for m in (machine, change.of(machine))]
    names = leaf_names(machine)
    assert {n for n, a, b in zip(names, *values, strict=True) if a != b} == set(change.leaves)


@pytest.mark.slow
def test_a_row_is_what_predict_says_and_every_change_says_something_else():
    rows = cells()
    assert {len(row) for row in rows} == {len(HEADS)}
    found = predict(phase="decode", model="deepseek-r1", batch=96, microbatches=2)
    assert float(rows[0][HEADS.index("at 96 in two, ms")]) == round(float(found.tpot_s) * 1e3, 1)
    assert len({row[1:] for row in rows}) == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "pays"), [(8, False), (96, True), (128, True)])
def test_two_microbatches_pay_where_batches_are_large(batch, pays):
    """As the published system finds. Were all cores needed to send, they would pay nowhere."""

    def rate(machine, microbatches):
        options = {"phase": "decode", "batch": batch, "context": 4096}
        found = predict("deepseek-r1", machine, microbatches=microbatches, **options)
        return float(found.tokens_per_s_per_npu)

    machine = load_machine("cloudmatrix384")
    assert (rate(machine, 2) > rate(machine, 1)) == pays
    all_needed = replace_leaf(machine, "exchange.saturation_cores", 48.0)
    assert rate(all_needed, 2) < rate(all_needed, 1)
