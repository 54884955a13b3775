"""What engines' recorders write is read as it is: dense layers, ranks apart, rows left out."""

import json
import sys
import types

import numpy as np
import pytest

from cmjax.placement import read_family, read_loads

STEPS = np.zeros((3, 5, 4), int)  # layers 0 and 1 are dense
STEPS[:, 2:] = np.arange(1, 37).reshape(3, 3, 4)


def dump(folder, name, counts):
    path = folder / name
    path.write_text(json.dumps({"rank": 0, "logical_count": counts.tolist()}))
    return path


def test_dense_layers_of_sglangs_dump_are_left_out_and_the_others_keep_their_numbers(tmp_path):
    found = read_loads(dump(tmp_path, "dump.json", STEPS))
    np.testing.assert_array_equal(found.counts, STEPS[:, 2:])
    assert found.layer_labels == (2, 3, 4)


def test_a_layer_without_tokens_in_one_step_is_there_as_in_the_others(tmp_path):
    counts = STEPS.copy()
    counts[1, 3] = 0
    found = read_loads(dump(tmp_path, "dump.json", counts))
    share = counts[:, 3].sum(0) / counts[:, 3].sum()
    usual = counts[1, [2, 4]].sum(-1).mean()
    np.testing.assert_allclose(found.counts[1, 1], usual * share)
    np.testing.assert_array_equal(found.counts[[0, 2]], counts[[0, 2], 2:])


def test_a_step_without_tokens_is_left_out(tmp_path):
    counts = np.concatenate([STEPS, np.zeros((1, 5, 4), int)])
    np.testing.assert_array_equal(read_loads(dump(tmp_path, "a.json", counts)).counts, STEPS[:, 2:])
    with pytest.raises(ValueError, match="expected tokens in every layer"):
        read_loads(dump(tmp_path, "b.json", 0 * STEPS))


def test_steps_are_added_up_to_the_windows_asked_for(tmp_path):
    found = read_loads(dump(tmp_path, "dump.json", STEPS), windows=2)
    np.testing.assert_array_equal(found.counts, [STEPS[:2, 2:].sum(0), STEPS[2, 2:]])


def test_rows_that_sglangs_older_csv_leaves_out_are_zero(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("layer_id,expert_id,count\n3,0,7\n3,2,5\n4,1,9\n")
    found = read_loads(path)
    np.testing.assert_array_equal(found.counts, [[[7, 0, 5], [0, 9, 0]]])
    assert found.layer_labels == (3, 4)
    path.write_text("layer_id,expert_id,count\n3,0,7\n3,0,5\n")
    with pytest.raises(ValueError, match="found 2 for layer 3, expert 0"):
        read_loads(path)


def test_files_of_one_run_by_rank_are_added(tmp_path):
    for rank, rows in enumerate(["3,0,7\n3,1,1\n", "3,1,2\n4,3,9\n", "4,0,4\n"]):
        name = f"expert_distribution_rank{rank}_timestamp1742{rank}.5.csv"
        (tmp_path / name).write_text(f"layer_id,expert_id,count\n{rows}")
    found = read_loads(tmp_path)
    np.testing.assert_array_equal(found.counts, [[[7, 3, 0, 0], [4, 0, 0, 9]]])
    assert found.layer_labels == (3, 4) and "3 files added" in found.source


def test_ranks_of_two_runs_stay_two_workloads(tmp_path):
    for run in ("law", "art"):
        for rank in (0, 1):
            np.save(tmp_path / f"{run}_rank_{rank}.npy", [[1 + rank, 5], [2, 3]])
    family = read_family(tmp_path)
    assert family.keys() == {"law", "art"}
    np.testing.assert_array_equal(family["law"].counts, [[[3, 10], [4, 6]]])


def test_one_array_of_counts_is_found_under_any_name_with_what_is_beside_it(tmp_path):
    path = tmp_path / "a.npz"
    names = np.array(["law", "art", "code"])
    np.savez(path, hits=STEPS[:, 2:], layer_ids=[5, 6, 9], workload=names, rank=0, time=1.5)
    found = read_loads(path)
    np.testing.assert_array_equal(found.counts, STEPS[:, 2:])
    assert found.layer_labels == (5, 6, 9)
    assert found.window_names == ("law", "art", "code")


@pytest.mark.parametrize("rows", [True, False])
def test_json_lines_are_windows_or_rows(rows, tmp_path):
    path = tmp_path / "a.jsonl"
    if rows:
        lines = [
            {"layer_id": 3, "expert_id": 0, "count": 4},
            {"layer_id": 3, "expert_id": 2, "count": 6},
        ]
        expected, labels = [[[4, 0, 6]]], (3,)
    else:
        lines = [{"logical_count": step.tolist()} for step in STEPS]
        expected, labels = STEPS[:, 2:], (2, 3, 4)
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = read_loads(path)
    np.testing.assert_array_equal(found.counts, expected)
    assert found.layer_labels == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file"),
        ("[[1, 2]]\n{", "line 2: not valid JSON"),
        ('[[1, 2]]\n{"layer": 1}', "expected lines of one kind"),
        ("[[1, 2]]\n[[1]]", "found ragged lists"),
        ('{"model": "x"}', "found model"),
        ('{"layer": 0, "expert": 0, "count": "many"}', "found in row 2: could not convert"),
    ],
)
def test_bad_json_lines_are_one_line(text, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_loads(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_pt_file_without_pytorch_says_how_to_convert_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "dump.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"PyTorch, which is not installed; .* weights_only=True"):
        read_loads(tmp_path / "dump.pt")


@pytest.mark.parametrize("mode", ["stat", "per_pass", "objects"])
def test_a_pt_file_is_read_by_weights_only(mode, tmp_path, monkeypatch):
    slots = np.array([[0, 1, 2, 3, 0]] * 5)
    passes = [np.concatenate([step, step[:, :1]], axis=1) for step in STEPS]
    saved = {"logical_count": STEPS, "rank": 0}
    if mode == "per_pass":
        records = [
            {"forward_pass_id": n, "rank": rank, "global_physical_count": passes[n]}
            for n in range(3)
            for rank in range(2)
        ]
        saved = {"records": records, "last_physical_to_logical_map": slots}

    def load(path, *, weights_only, map_location):
        assert weights_only is True
        if mode == "objects":
            raise RuntimeError("Weights only load failed.\nUnsupported global")
        return saved

    torch = types.SimpleNamespace(load=load, Tensor=type("Tensor", (), {}))
    monkeypatch.setitem(sys.modules, "torch", torch)
    path = tmp_path / "expert_distribution_recorder_1749.25.pt"
    path.write_bytes(b"x")
    if mode == "objects":
        with pytest.raises(
            ValueError, match=r"found: Weights only load failed\. Unsupported global"
        ):
            read_loads(path)
        return
    twice = 2 * STEPS[:, 2:] * np.array([2, 1, 1, 1])  # two ranks, and two slots of expert 0
    np.testing.assert_array_equal(
        read_loads(path).counts, twice if mode == "per_pass" else STEPS[:, 2:]
    )


def test_a_folder_of_other_things_says_why_each_was_passed_over(tmp_path):
    (tmp_path / "notes.csv").write_text("a,b\nx,y\n")
    (tmp_path / "about.json").write_text('{"model": "x"}')
    with pytest.raises(ValueError) as caught:
        read_loads(tmp_path)
    said = str(caught.value)
    assert "found none" in said and "notes.csv: expected the columns layer" in said
    assert "about.json: expected nested lists" in said and "\n" not in said


def test_a_domain_is_chosen_behind_the_path_slashes_and_all(tmp_path):
    (tmp_path / "more").mkdir()
    both = {"counts": {"law/en": [[1, 2]], "art": [[3, 4]]}}
    (tmp_path / "more" / "b.json").write_text(json.dumps(both))
    for name in (f"{tmp_path}/more/b.json:law/en", f"{tmp_path}:more/b/law/en"):
        np.testing.assert_array_equal(read_loads(name).counts, [[[1, 2]]])
    with pytest.raises(ValueError, match="found no key 'x/y'"):
        read_loads(f"{tmp_path}/more/b.json:x/y")
