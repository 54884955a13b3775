"""Plan files: what is written is read back the same, and nothing else is taken for a plan."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmjax.placement import Plan, plan_text, read_plan, read_plans, write_plan

PLAN = Plan(np.array([[0, 1, 2, 0], [2, 1, 0, 1]]), 3, 2)
AGAIN = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def plans(draw, *, full=False, once_per_rank=False):
    """Plans of any shape; `full`: what engines' formats can hold."""
    ranks, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers, slots = draw(st.integers(1, 3)), ranks * size
    experts = draw(st.integers(size if once_per_rank else 1, slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    if once_per_rank:  # dealt round: a rank's `size` slots hold different experts
        table = np.stack([rng.permutation(experts)[np.arange(slots) % experts]
                          for _ in range(layers)])  # fmt: skip
    else:
        extra = rng.integers(0 if full else -1, experts, (layers, slots - experts))
        table = np.concatenate([np.tile(np.arange(experts), (layers, 1)), extra], axis=1)
        table = rng.permuted(table, axis=1)
    labels = tuple(sorted(rng.choice(50, layers, replace=False).tolist()))
    nodes = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    plan = Plan(table, experts, ranks, nodes, labels)
    if full or draw(st.booleans()):
        return plan
    shares = rng.random(table.shape) * (table >= 0)
    total = np.zeros((layers, experts + 1))
    np.add.at(total, (np.arange(layers)[:, None], table), shares)
    split = shares / np.take_along_axis(total, np.where(table < 0, 0, table), axis=1)
    provenance = draw(st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False)))
    labels = labels if draw(st.booleans()) else None
    return replace(plan, split=split, provenance=provenance, layer_labels=labels)


def same(one: Plan, two: Plan) -> None:
    np.testing.assert_array_equal(one.expert_of_slot, two.expert_of_slot)
    assert (one.split is None) == (two.split is None)
    if one.split is not None:
        np.testing.assert_array_equal(one.split, two.split)
    for name in ("experts", "ranks", "nodes", "layer_labels", "provenance"):
        assert getattr(one, name) == getattr(two, name)


@AGAIN
@given(plan=plans())
def test_our_own_format_keeps_everything(plan, tmp_path):
    write_plan(tmp_path / "plan.json", plan)
    same(read_plan(tmp_path / "plan.json"), plan)


@AGAIN
@given(plan=plans(full=True))
def test_sglang_keeps_slots_and_the_models_layers(plan, tmp_path):
    write_plan(tmp_path / "plan.json", plan, "sglang")
    back = read_plan(tmp_path / "plan.json", ranks=plan.ranks, nodes=plan.nodes,
                     layer_labels=plan.layer_labels)  # fmt: skip
    same(back, plan)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document.keys() == {"physical_to_logical_map"}
    assert len(document["physical_to_logical_map"]) == max(plan.layer_labels) + 1


@AGAIN
@given(plan=plans(full=True, once_per_rank=True))
def test_vllm_ascend_keeps_slots_and_layers(plan, tmp_path):
    write_plan(tmp_path / "plan.json", plan, "vllm-ascend")
    same(read_plan(tmp_path / "plan.json", nodes=plan.nodes), plan)


def test_an_engines_own_files_are_read(tmp_path):
    path = tmp_path / "map.json"
    devices = [{"device_id": r, "device_expert": held} for r, held in enumerate(([0, 1], [2, 0]))]
    layer = {"layer_id": 0, "device_count": 2, "device_list": devices}
    path.write_text(json.dumps({"moe_layer_count": 1, "layer_list": [layer]}, indent=4))
    found = read_plan(path)
    np.testing.assert_array_equal(found.expert_of_slot, [[0, 1, 2, 0]])
    assert (found.ranks, found.layer_labels) == (2, None)
    path.write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]}))
    assert read_plan(path, ranks=4).layer_labels == (0, 1)
    with pytest.raises(ValueError, match="does not say the ranks"):
        read_plan(path)


def test_dense_layers_get_the_trivial_row_that_sglang_gives_them():
    text = plan_text(replace(PLAN, layer_labels=(1, 3)), "sglang")
    rows = json.loads(text)["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 1]]


def test_results_may_stand_beside_a_plan(tmp_path):
    (tmp_path / "plan.json").write_text(plan_text(PLAN, evaluation={"greedy": 1.0}))
    same(read_plan(tmp_path / "plan.json"), PLAN)


def test_lists_of_slots_are_one_line_each_and_texts_stay_as_they_are():
    text = plan_text(replace(PLAN, provenance={"note": "[1,  2]"}))
    assert "[ 0, 1, 2, 0 ]" in text and json.loads(text)["provenance"]["note"] == "[1,  2]"


def test_omniplacement_plans_are_read_with_their_empty_slots(tmp_path):
    held = np.zeros((2, 2, 3), np.int32)
    held[0, 0, [0, 2]] = held[1, 0, [1, 2]] = held[0, 1, [0, 2]] = held[1, 1, [1]] = 1
    np.save(tmp_path / "plan.npy", held)
    found = read_plan(tmp_path / "plan.npy")
    np.testing.assert_array_equal(found.expert_of_slot, [[0, 2, 1, 2], [0, 2, 1, -1]])


def test_all_public_plans_of_huawei_are_read(data):
    path = data / "moe_deepseek_v3_placements" / "placements.npz"
    plans = read_plans(path)
    assert len(plans) == 40
    for name, plan in plans.items():
        redundant, dies = (int(part[-2:]) for part in name.rsplit("_", 2)[1:])
        assert plan.ranks == dies and plan.experts == 256 and plan.layers == 58
        slots = plan.filled.sum(-1)
        assert (slots == 256).sum() == 58 - redundant
        assert (slots == (288 if dies == 32 else 320)).sum() == redundant
    one = read_plan(f"{path}:6k_decode_red58_dies64")
    np.testing.assert_array_equal(
        one.expert_of_slot, plans["6k_decode_red58_dies64"].expert_of_slot
    )
    with pytest.raises(ValueError, match="found 40 plans"):
        read_plan(path)
    with pytest.raises(ValueError, match="found no plan 'x'"):
        read_plan(f"{path}:x")


OWN = json.loads(plan_text(PLAN))
ASCEND = json.loads(plan_text(PLAN, "vllm-ascend"))


def ascend(**change):
    return json.dumps(ASCEND | change)


BAD = [
    ("", "not valid JSON"),
    (plan_text(PLAN)[:60], "not valid JSON"),
    ("[1]", "unknown plan format; .* found no object"),
    ('{"phy2log": [[0]]}', "unknown plan format; .* found the keys phy2log"),
    (json.dumps(OWN | {"version": 2}), "expected version 1, found 2"),
    (json.dumps({k: v for k, v in OWN.items() if k != "ranks"}), "the plan lacks ranks"),
    (json.dumps(OWN | {"ranks": 3}), "4 slots do not divide over 3 ranks"),
    (json.dumps(OWN | {"ranks": 2.0}), "expected a whole number ranks, found 2.0"),
    (json.dumps(OWN | {"nodes": 3}), "2 ranks do not divide over 3 nodes"),
    (json.dumps(OWN | {"experts": 4}), "expert 3 of layer 0 has no slot"),
    (json.dumps(OWN | {"experts": 2}), r"expected experts 0 to 1 .*, found 2 in slot 2 of layer 0"),
    (json.dumps(OWN | {"expert_of_slot": [[0, 1], [0]]}), "layers disagree: .* 2 entries"),
    (json.dumps(OWN | {"expert_of_slot": []}), "expected expert_of_slot as a list of lists"),
    (json.dumps(OWN | {"expert_of_slot": [[0.5] * 4]}), "expected whole numbers"),
    (json.dumps(OWN | {"expert_of_slot": [["a"] * 4]}), "expected numbers in expert_of_slot"),
    (json.dumps(OWN | {"layer_labels": [1]}), "expected 2 different layer numbers"),
    (json.dumps(OWN | {"layer_labels": 3}), "expected layer_labels as a list"),
    (json.dumps(OWN | {"split_of_slot": [[1, 1, 1, 1]] * 2}), "sum to 1, found 2 for expert 0"),
    (json.dumps(OWN | {"split_of_slot": [[1, 1]] * 2}), "expected a share for every slot"),
    (json.dumps(OWN | {"split_of_slot": [[float("nan")] * 4] * 2}), "expected finite shares"),
    ('{"physical_to_logical_map": [[0, 1]], "ranks": 2}', "the key .* and no other, found"),
    ('{"physical_to_logical_map": [[0, 2, 0, 2]]}', "expert 1 of layer 0 has no slot"),
    ('{"physical_to_logical_map": [[0, -1]]}', "expert numbers of 0 or more, found -1"),
    ('{"physical_to_logical_map": [[0, 1, 2]]}', "3 slots do not divide over 2 ranks"),
    ('{"physical_to_logical_map": [[0.5, 1]]}', "expected whole expert numbers"),
    (ascend(moe_layer_count=3), "a layer_list of moe_layer_count layers, found 3 and 2"),
    (ascend(layer_list=[{}, {}]), "layer 0: expected layer_id, device_count .* KeyError"),
    (ascend(layer_list=ASCEND["layer_list"][::-1]), "layer 0: expected layer_id 0"),
    (
        ascend(layer_list=[ASCEND["layer_list"][0] | {"device_count": 3}, ASCEND["layer_list"][1]]),
        "device_count 2 devices in order, found layer_id 0, device_count 3",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_plans_are_refused_in_one_line_that_names_the_file(text, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(path, ranks=2)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 1, 3), 2), "expected 0 and 1"),
        (np.ones((2, 3)), "expected 0 and 1"),
        (np.array([[[1, 0, 1]], [[1, 0, 0]]]), "expert 1 of layer 0 has no slot"),
    ],
)
def test_bad_omniplacement_arrays_are_refused(array, message, tmp_path):
    np.save(tmp_path / "plan.npy", array)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.npy")
    np.savez(tmp_path / "plan.npz", array)
    with pytest.raises(ValueError, match="expected packed bits"):
        read_plan(tmp_path / "plan.npz")


def test_other_files_are_no_plans(tmp_path):
    (tmp_path / "plan.txt").write_text("x")
    with pytest.raises(ValueError, match=r"as \.json, \.npy or \.npz, found '\.txt'"):
        read_plan(tmp_path / "plan.txt")
    with pytest.raises(ValueError, match="found no such file"):
        read_plan(tmp_path / "none.json")
    write_plan(tmp_path / "plan.json", PLAN)
    with pytest.raises(ValueError, match="the plan is for 2 ranks, not 4"):
        read_plan(tmp_path / "plan.json", ranks=4)


@pytest.mark.parametrize(
    ("plan", "format", "message"),
    [
        (PLAN, "trtllm", "unknown plan format 'trtllm'; known formats: own, sglang, vllm-ascend"),
        (PLAN, "sglang", "does not number its layers"),
        (
            replace(PLAN, split=PLAN.split_of_slot, layer_labels=(0, 1)),
            "sglang",
            "nor shares per slot",
        ),
        (replace(PLAN, split=PLAN.split_of_slot), "vllm-ascend", "nor shares per slot"),
        (
            Plan(np.array([[0, 1, 2, 2]]), 3, 2),
            "vllm-ascend",
            "rank 1 holds expert 2 of layer 0 twice",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_not_written(plan, format, message, tmp_path):
    (tmp_path / "plan.json").write_text("old")
    with pytest.raises(ValueError, match=message):
        write_plan(tmp_path / "plan.json", plan, format)
    assert (tmp_path / "plan.json").read_text() == "old"
