"""PanGu-alpha's plans in the manual are those that are priced now, and its rule holds as told."""

import dataclasses
from pathlib import Path

import pytest

from cmjax.hardware import load_machine
from cmjax.parallelism import parallel, parse_plan, price_plan
from studies import pangu, pangu_figure

DOCS = Path(__file__).parents[2] / "docs"
PLANS = (DOCS / "tables/pangu_plans.md").read_text()


def _columns(table: str) -> dict[str, dict[str, str]]:
    """Cells of a Markdown table by its heads, then by the first cell of their row."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    head, _, *rows = rows
    return {
        name: {row[0]: row[number] for row in rows} for number, name in enumerate(head) if number
    }


@pytest.mark.parametrize(
    "training",
    [
        pangu.TRAININGS[0],
        *(pytest.param(t, marks=pytest.mark.slow) for t in pangu.TRAININGS[1:]),
    ],
    ids=lambda training: training.name,
)
def test_plans_of_the_table_are_priced_as_it_says(training):
    machine = load_machine(pangu.MACHINE)
    for kind in ("published", "found"):
        said = _columns(PLANS)[f"{training.name}, {kind}"]
        names = set(parse_plan("").to_dict()) - {"expert"}
        plan = parse_plan(",".join(f"{n}={said[n.replace('_', ' ')]}" for n in names))
        if kind == "published":
            assert plan == parse_plan(training.published)
        priced = price_plan(training.model, machine, plan, training.global_batch)
        fresh = _columns(pangu.plans_table([(kind, priced)]))[kind]
        assert fresh.keys() == said.keys()
        for what, cell in fresh.items():
            if cell.replace(".", "").isdecimal():
                assert float(cell) == pytest.approx(float(said[what]), rel=5e-3), what
            else:
                assert cell == said[what]


@pytest.mark.slow
def test_the_topology_rule_wins_once_gradients_are_never_waited_for():
    """Section 4.1: tensor in the server, pipeline in the rack, data across, because reductions can
    be hidden. Where they are waited for, replicas in the rack are faster."""
    largest = pangu.TRAININGS[-1]
    rows = pangu.orders(largest, largest.published, load_machine(pangu.MACHINE))
    assert pangu.orders_table(rows) == (DOCS / "tables/pangu_orders.md").read_text()
    rule = ("tensor", "pipeline", "data")
    assert min(rows, key=lambda row: row.hidden_s).dimensions == rule
    assert min(rows, key=lambda row: row.waited_s).dimensions == ("tensor", "data", "pipeline")
    by_rule = next(row for row in rows if row.dimensions == rule)
    assert list(by_rule.tiers.values()) == ["server", "rack", "spine"]


def test_the_title_of_the_picture_adds_up_the_links():
    rows = [
        ("chip.cube_flops_16bit", [-0.5, -0.25]),
        ("fabric.die.bandwidth_bytes_per_s", [-0.1, -0.2]),
        ("fabric.node.bandwidth_bytes_per_s", [-0.2, 0.0]),
        ("fabric.node.latency_s", [0.3, 0.3]),
    ]
    assert "a plan 50% and 30%; b plan 25% and 20%" in pangu_figure.finding(["a", "b"], rows)


@pytest.mark.parametrize("text", ["", "name,a\nx,1\n", "constant,a\nx,much\n"])
def test_another_table_is_refused(text, tmp_path):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.csv"):
        pangu_figure.read_rows(path)


@pytest.mark.slow
def test_deepseek_v3_as_it_was_trained_is_priced_as_the_table_says():
    """Slower than reported by less than a third: products were of 8 bits there, and DualPipe idles
    less than 1F1B."""
    cluster = dataclasses.replace(load_machine("h800-pod"), nodes=pangu.NODES)
    priced = parallel(
        pangu.MIXTURE, cluster, plan=pangu.AS_TRAINED, global_batch=pangu.MIXTURE_BATCH
    ).best
    table = _columns((DOCS / "tables/deepseek_training.md").read_text())
    said = table["tokens/s per device"]["2,048 H800, as trained"]
    assert priced.tokens_per_s_per_device == pytest.approx(float(said), rel=5e-3)
    assert 0.7 < priced.tokens_per_s_per_device / pangu.REPORTED_TOKENS_PER_S < 1
