"""Plans priced and searched for: what must hold of every one, and what runs published."""

import dataclasses

import pytest

import cmjax
from cmjax.cost import price
from cmjax.hardware import load_machine, replace_leaf
from cmjax.models.dense import DenseConfig, TensorSplit, preset
from cmjax.parallelism import Plan, Prices, compare, memory_of, pieces, price_plan, search
from cmjax.parallelism.eager import CORE_HBM, Eager
from cmjax.parallelism.layerwise import Counts
from cmjax.parallelism.links import layout, shares
from cmjax.parallelism.memory import USABLE
from cmjax.parallelism.search import MICRO_BATCHES, price_anyway

SMALL = DenseConfig(layers=8, hidden=1024, heads=16, ffn=4096, vocab=32000, sequence=512)
GIB = 2.0**30


def test_a_search_returns_only_plans_that_fit_sorted_by_time():
    machine = replace_leaf(load_machine("ascend910-2048"), "chip.hbm_bytes", 2.5e9)
    found = search(SMALL, machine, 16, 64, top=40)
    assert len(found.plans) == 40
    times = [plan.step_s for plan in found.plans]
    assert times == sorted(times)
    for each in found.plans:
        each.plan.check(SMALL, 64)
        assert each.plan.devices == 16
        assert memory_of(SMALL, each.plan, 64).peak <= USABLE * 2.5e9


def test_pruning_loses_no_plan():
    """The best of a search is the best of a long list that nothing was left out of."""
    machine = load_machine("ascend910-2048")
    best = search(SMALL, machine, 8, 32, top=1).plans[0]
    whole = search(SMALL, machine, 8, 32, top=100_000).plans
    assert best.plan == whole[0].plan
    assert best.step_s == pytest.approx(whole[0].step_s)


def test_the_published_plan_of_pangu_200b_fits_and_needs_what_made_it_fit():
    model, machine = preset("pangu-200b"), load_machine("ascend910-2048")
    plan = Plan(data=16, tensor=8, pipeline=16, optimizer="zero1", overlap=True)
    published = price_plan(model, machine, plan, 512)
    assert published.bubble == pytest.approx(15 / 47)
    assert published.memory.peak < USABLE * 32 * GIB
    for change in ({"optimizer": "none"}, {"recompute": "none"}):
        other = memory_of(model, dataclasses.replace(plan, **change), 512)
        assert other.peak > published.memory.peak + 5 * GIB


def test_tensor_in_the_server_is_the_fastest_order_of_the_published_plan():
    """Section 4.1's rule, without being told."""
    model, machine = preset("pangu-200b"), load_machine("ascend910-2048")
    plan = Plan(data=16, tensor=8, pipeline=16, optimizer="zero1", overlap=True)
    orders = [
        ("tensor", "pipeline", "data"), ("tensor", "data", "pipeline"),
        ("pipeline", "tensor", "data"), ("data", "tensor", "pipeline"),
        ("pipeline", "data", "tensor"), ("data", "pipeline", "tensor"),
    ]  # fmt: skip
    steps = [
        price_plan(model, machine, dataclasses.replace(plan, order=order), 512).step_s
        for order in orders
    ]
    assert max(steps[:2]) < min(steps[2:])
    assert max(steps[2:4]) < min(steps[4:])


def test_memory_of_korthikantis_rows():
    """arXiv 2205.05198, tables 3 and 5: 22B on 8 GPUs, 175B on 64, within 10 %."""
    big = DenseConfig(
        layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200, sequence=2048, dropout=0.1
    )
    middle = dataclasses.replace(big, layers=48, hidden=6144, heads=64, ffn=24576)
    one = Plan(tensor=8, micro_batch=4, recompute="none")
    many = Plan(tensor=8, pipeline=8, schedule="interleaved", interleave=3, recompute="none")
    lean = {"recompute": "selective", "sequence_parallel": True}
    for model, plan, batch, whole, selective in (
        (middle, one, 4, 59.25, 9.56),
        (big, many, 64, 66.84, 12.35),
    ):
        memory = memory_of(model, plan, batch)
        state = memory.parameters + memory.gradients + memory.optimizer
        assert state / GIB == pytest.approx(45.56, rel=0.1)
        assert memory.activations / GIB == pytest.approx(whole, rel=0.1)
        memory = memory_of(model, dataclasses.replace(plan, **lean), batch)
        assert memory.activations / GIB == pytest.approx(selective, rel=0.1)


@pytest.mark.parametrize(
    "leaf", ["fabric.die.bandwidth_bytes_per_s", "fabric.node.bandwidth_bytes_per_s",
             "fabric.supernode.bandwidth_bytes_per_s", "chip.hbm_bytes_per_s",
             "chip.cube_flops_16bit"],
)  # fmt: skip
def test_a_better_machine_is_never_slower(leaf):
    machine = load_machine("ascend910-2048")
    plan = Plan(data=8, tensor=8, pipeline=4, optimizer="zero1")
    head, *rest = leaf.split(".")
    value = getattr(machine, head)
    for name in rest:
        value = getattr(value, name)
    better = replace_leaf(machine, leaf, 1.5 * value)
    steps = [price_plan(SMALL, m, plan, 64).step_s for m in (machine, better)]
    assert steps[1] <= steps[0]


def test_a_ring_over_nodes_sends_as_much_as_one_inside():
    machine = load_machine("selene")
    assert shares((1, 8, 1), machine) == (0.0, 7 / 8, 0.0)
    assert shares((1, 8, 2), machine) == (0.0, 15 / 16, 15 / 16 / 8)
    assert layout(("data", "tensor"), {"data": 4, "tensor": 8}, machine) == {
        "data": (1, 4, 1),
        "tensor": (1, 2, 4),
    }


@pytest.mark.slow
def test_published_rows_are_predicted(data):
    """The errors that docs/parallel.md tells, held from above."""
    folder = data / "measurements_training"
    vtrain = compare(folder / "vtrain_multi_node.csv", load_machine("a100-pod"))
    assert len(vtrain.rows) == 41 and not vtrain.skipped
    assert vtrain.mean_error < 0.075
    assert vtrain.kendall_tau is not None and vtrain.kendall_tau > 0.78
    megatron = compare(folder / "megatron_2021.csv", load_machine("selene"))
    assert len(megatron.rows) == 5 and megatron.mean_error < 0.03
    korthikanti = compare(folder / "korthikanti_2022.csv", load_machine("selene"))
    assert len(korthikanti.rows) == 4 and korthikanti.mean_error < 0.015


def test_a_measured_run_is_priced_as_pytorch_recomputes():
    """The whole forward pass once more: a third of the products of a step without recomputation,
    where JAX leaves out W_2's."""
    machine = replace_leaf(load_machine("a100-pod"), "efficiency.hbm", CORE_HBM)
    plan = Plan(data=8, micro_batch=4)
    jax_s, eager_s = (
        price_anyway(SMALL, machine, plan, 64, eager=eager).step_s for eager in (None, Eager())
    )
    layer = pieces.layer(SMALL, TensorSplit(), "none")
    full = pieces.layer(SMALL, TensorSplit(), "full")

    def seconds(piece, part):
        return float(price(piece.programs[part](), machine, {pieces.BATCH: 4.0}).total_s)

    more = seconds(layer, "both") + seconds(layer, "forward") - seconds(full, "both")
    assert more > 0
    assert eager_s - jax_s == pytest.approx(2 * SMALL.layers * more, rel=1e-4)


def test_the_core_of_attention_in_pytorch_moves_its_bytes_at_the_measured_rate():
    """On a machine that waits for nothing but its memory: the bytes of the scores, over what
    FlashAttention's figure 2 has of standard attention."""
    machine, plan = load_machine("a100-pod"), Plan(micro_batch=4)
    for rate in ("cube_flops_16bit", "cube_flops_32bit", "vector_bytes_per_s"):
        machine = replace_leaf(machine, f"chip.{rate}", 1e30)
    prices = [Prices(SMALL, machine, (4,), eager=eager) for eager in (None, Eager())]
    counts = Counts(1, 0, 0)
    times = [each.stage_s(plan, 0, counts) for each in prices]
    scores = 4 * SMALL.heads * SMALL.sequence**2 * 2
    peak = float(machine.chip.hbm_bytes_per_s)
    passes = (times[1] - times[0]) * peak / (1 / CORE_HBM - 1 / float(machine.efficiency.hbm))
    # Forward: two products, softmax twice; backward: four products, softmax three times. Each of
    # the products has two arrays of the size of the queries as well.
    assert passes / scores == pytest.approx(2 + 2 + 4 + 3 + 6 * 2 * 64 / 512, rel=1e-4)


def test_exchanges_of_the_backward_pass_hide_behind_gradients_of_weights():
    """No longer than either takes; of shared sequences, those of what comes in are waited for."""
    machine, framework = load_machine("selene"), Eager(overlaps=True)
    plan, shared = Plan(tensor=8), Plan(tensor=8, sequence_parallel=True)
    flops = 2 * 512 * 1024 * (3 * 1024 + 4096) / 8
    products = flops / (312e12 * float(machine.efficiency.gemm))
    assert framework.hidden_s(SMALL, plan, machine, 1.0) == pytest.approx(products)
    assert framework.hidden_s(SMALL, plan, machine, 1e-9) == pytest.approx(1e-9)
    assert framework.hidden_s(SMALL, shared, machine, 6e-9) == pytest.approx(4e-9)
    assert framework.hidden_s(SMALL, Plan(), machine, 1.0) == 0.0
    assert Eager().hidden_s(SMALL, plan, machine, 1.0) == 0.0
    waited, hidden = (
        price_anyway(SMALL, machine, plan, 64, eager=Eager(overlaps=overlaps)).step_s
        for overlaps in (False, True)
    )
    assert hidden < waited


def test_the_bound_of_the_search_is_one():
    """No plan is faster than the bound by which it may be left out."""
    machine, batch = load_machine("ascend910-2048"), 64
    machine = replace_leaf(machine, "chip.hbm_bytes", 2.5e9)
    model = dataclasses.replace(SMALL, layers=9)
    found = search(model, machine, 64, batch, top=100_000).plans
    prices = Prices(model, machine, MICRO_BATCHES)
    assert len({each.plan.layers for each in found}) >= 3
    assert len({each.plan.tensor for each in found}) >= 3
    assert len({each.plan.optimizer for each in found}) >= 2
    for each in found:
        assert prices.at_least_s(each.plan, batch) <= each.step_s
        anyhow = dataclasses.replace(each.plan, layers=(), recompute="none")
        assert prices.at_least_s(anyhow, batch, divided=False) <= each.step_s


def test_a_long_sequence_is_shared_by_replicas():
    """One sequence on two devices; bounds hold of such plans too, and each rank keeps half of most
    arrays, but all keys and values."""
    model = dataclasses.replace(SMALL, layers=1, sequence=8192, heads=1, ffn=1024)
    machine = load_machine("ascend910-2048")
    found = search(model, machine, 2, 1).plans
    assert {each.plan.context for each in found} == {2}
    prices = Prices(model, machine, MICRO_BATCHES)
    assert all(prices.at_least_s(each.plan, 1) <= each.step_s for each in found)
    plans = Plan(recompute="none"), Plan(data=2, context=2, recompute="none")
    kept = [memory_of(model, plan, 1).activations for plan in plans]
    assert 0.5 < kept[1] / kept[0] < 0.75


def test_a_stage_sends_its_output_in_parts():
    machine = load_machine("selene")
    base = Plan(tensor=8, pipeline=4, order=("tensor", "data", "pipeline"))
    model = dataclasses.replace(SMALL, hidden=8192, heads=64, ffn=32768, sequence=2048)
    prices = Prices(model, machine, (1,))
    elements = 2048 * 8192
    on = layout(base.order, {"data": 1, "tensor": 8, "pipeline": 4}, machine)
    sent = prices._send(base, elements, on)
    tiers = machine.fabric.supernode, machine.fabric.node
    nbytes = 2 * elements
    expected = nbytes / 8 / tiers[0].bandwidth_bytes_per_s
    expected += nbytes * 7 / 8 / tiers[1].bandwidth_bytes_per_s
    assert expected < sent < expected + 100e-6
    assert sent < 0.6 * nbytes / tiers[0].bandwidth_bytes_per_s


def test_a_row_that_cannot_be_priced_is_named_and_the_rest_is_priced(tmp_path):
    head = "hidden,heads,layers,sequence,tensor,pipeline,gpus,global_batch,iteration_ms\n"
    good, bad = "1024,16,8,512,1,1,2,8,100\n", "1024,16,8,512,3,1,3,9,100\n"
    path = tmp_path / "rows.csv"
    path.write_text(head + bad + good)
    found = compare(path, load_machine("a100-pod"))
    assert [row.line for row in found.rows] == [3]
    assert found.skipped[0].startswith("line 2: plan: tensor=3 must divide")
    path.write_text(head + bad)
    with pytest.raises(ValueError, match="no row can be priced; line 2"):
        compare(path, load_machine("a100-pod"))


@pytest.mark.parametrize(
    "given, says",
    [
        ({"devices": 67}, "no plan divides 67 devices"),
        ({"devices": 4096}, "4096 devices are asked for; ascend910-2048 has 2048"),
        ({"devices": 8, "global_batch": 8}, "GiB are missing.*more devices"),
        ({"plan": "tensor=8,pipeline=16"}, "GiB are missing.*optimizer|GiB are missing.*larger"),
        ({"plan": "tensor=8", "devices": 16}, "its degrees make 8 devices, not 16"),
    ],
)
def test_what_cannot_be_trained_says_why(given, says):
    with pytest.raises(ValueError, match=says):
        cmjax.parallel("pangu-200b", "ascend910-2048", **given)
