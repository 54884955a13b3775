"""Reading expert loads: every format to one array, every bad file to one clear line."""

import json

import numpy as np
import pytest

from cmjax.placement import (
    domains,
    read_family,
    read_loads,
    read_pairs,
    read_routes,
)

COUNTS = np.array([[3.0, 1.0, 0.0, 4.0], [2.0, 2.0, 5.0, 1.0]])
LONG = "layer,expert,hits,note\n10,0,3,a\n10,1,1,a\n20,0,2,a\n20,1,7,a\n"


def write(folder, name, content):
    path = folder / name
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", COUNTS),
        ("a.npy", COUNTS.astype(np.int32)[None]),
        ("a.npz", {"anything": COUNTS}),
        ("a.npz", {"counts": COUNTS, "other": np.ones(3)}),
        ("a.csv", "3,1,0,4\n2,2,5,1\n"),
        ("a.json", json.dumps(COUNTS.tolist())),
        ("a.json", json.dumps([COUNTS.tolist()])),
        ("a.json", json.dumps({"expert_popularity": COUNTS.tolist(), "tokens": 9})),
        ("a.json", json.dumps({"weight": COUNTS.tolist()})),
    ],
)
def test_every_format_gives_the_same_counts(tmp_path, name, content):
    loads = read_loads(write(tmp_path, name, content))
    np.testing.assert_array_equal(loads.counts, COUNTS[None])
    assert loads.counts.dtype == np.float64
    assert loads.source.endswith(name)


def test_a_key_chooses_one_array_of_many(tmp_path):
    npz = write(tmp_path, "a.npz", {"x": COUNTS, "y": 2 * COUNTS})
    np.testing.assert_array_equal(read_loads(f"{npz}:y").counts, 2 * COUNTS[None])
    domains = {"counts": {"law": COUNTS.tolist(), "code": (3 * COUNTS).tolist()}}
    path = write(tmp_path, "a.json", json.dumps(domains))
    np.testing.assert_array_equal(read_loads(f"{path}:code").counts, 3 * COUNTS[None])


def test_layers_named_by_number_come_in_numeric_order(tmp_path):
    named = {"shares": {str(n): {"0": float(n), "1": 1.0} for n in range(12, 0, -1)}}
    path = write(tmp_path, "a.json", json.dumps(named))
    np.testing.assert_array_equal(read_loads(f"{path}:shares").counts[0, :, 0], np.arange(1, 13))


def test_long_csv_keeps_layer_order_and_ignores_other_columns(tmp_path):
    loads = read_loads(write(tmp_path, "a.csv", LONG))
    np.testing.assert_array_equal(loads.counts, [[[3, 1], [2, 7]]])


def test_long_csv_with_windows(tmp_path):
    rows = [(w, layer, e, 1 + w + layer + e) for e in (1, 0) for layer in (0, 1) for w in (0, 1, 2)]
    text = "window,layer,expert,count\n" + "\n".join(",".join(map(str, row)) for row in rows)
    counts = read_loads(write(tmp_path, "a.csv", text)).counts
    w, layer, e = np.indices((3, 2, 2))
    np.testing.assert_array_equal(counts, 1 + w + layer + e)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_routes_are_counted_per_window_in_either_layout(tmp_path, tokens_first):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permuted(np.tile(np.arange(8, dtype=np.uint8), (21, 1)), axis=1)[:, :3]
                    for _ in range(4)])  # fmt: skip
    stored = ids.swapaxes(0, 1) if tokens_first else ids
    path = write(tmp_path, "a.npz", {"ids": stored, "doc": np.zeros(3)})
    counts = read_loads(path, windows=2, experts=10).counts
    expected = [[[(part[layer] == e).sum() for e in range(10)] for layer in range(4)]
                for part in (ids[:, :11], ids[:, 11:])]  # fmt: skip
    np.testing.assert_array_equal(counts, expected)


def _with(value):
    counts = COUNTS.copy()
    counts[1, 2] = value
    return counts


BAD = [
    ("a.npy", _with(np.nan), "found 1 NaN (first: window 0, layer 1, expert 2)"),
    ("a.npy", _with(np.inf), "found 1 infinite"),
    ("a.npy", _with(-1), "found 1 negative"),
    ("a.npy", COUNTS[0], "found an array of shape (4,)"),
    ("a.npy", COUNTS[None, None], "found an array of shape (1, 1, 2, 4)"),
    ("a.npy", COUNTS * [[1], [0]], "found layer 1 of window 0 all zero"),
    ("a.npy", np.zeros((0, 4)), "found no counts"),
    ("a.npy", np.array([["a", "b"]]), "expected numbers, found <U1 data"),
    ("a.npy", np.array([[1, None]], object), "expected a numeric .npy array"),
    ("a.npy", b"", "expected a numeric .npy array"),
    ("a.npz", {"x": COUNTS, "y": COUNTS}, "found 2 workloads: x, y; choose one"),
    ("a.npz", {"x": COUNTS, "y": COUNTS[:, :3]}, "found the keys x, y"),
    ("a.npz", {"ids": np.array([[[1, 1]] * 3] * 2)}, "found one twice at token 0, layer 0"),
    (
        "a.npz",
        {"ids": np.ones((1, 3, 1), int), "seq_lens": np.ones(2, int)},
        "seq_lens that sum to 3",
    ),
    ("a.npz", {"freq": np.ones((2, 3)), "category": np.array(["a", "b"])}, "(2, 3) and (2,)"),
    ("a.npz", b"not a zip", "expected an .npz"),
    ("a.npz", {"ids": np.ones((3, 9, 2))}, "found float64 of shape (3, 9, 2)"),
    ("a.npz", {"ids": np.ones((3, 3, 2), int)}, "found shape (3, 3, 2)"),
    ("a.csv", "1,2\n3\n", "found 1 cells in row 2 and 2 in row 1"),
    ("a.csv", "1,2\n3,x\n", "found in row 2: could not convert string to float: 'x'"),
    ("a.csv", "", "found an empty file"),
    ("a.csv", "layer,expert,tokens\n0,0,1\n", "found layer, expert, tokens"),
    ("a.csv", "layer,expert,hits\n", "found only a header"),
    ("a.csv", "layer,expert,hits\n0,0\n", "expected 3 cells per row, found 2 in row 2"),
    ("a.csv", LONG.replace("20,1,7,a\n", ""), "found 0 for layer 20, expert 1"),
    ("a.csv", LONG + "20,1,7,a\n", "found 2 for layer 20, expert 1"),
    (
        "a.csv",
        "layer,expert,hits\n0,0.5,1\n",
        "expected whole numbers of 0 or more as layer, expert",
    ),
    ("a.json", "[[1, 2], [3]]", "found ragged lists"),
    ("a.json", "[]", "found no counts"),
    ("a.json", '[["a"]]', "expected numbers, found <U1 data"),
    ("a.json", "{", "not valid JSON"),
    ("a.json", "3", "found int"),
    ("a.json", '{"counts": {"law": [[1]], "code": [[2]]}}', "found 2 workloads: law, code"),
    ("a.json", '{"counts": {}}', "an object of domains, found it empty"),
    ("a.json", '{"counts": {"law": [[1]], "code": 2}}', "expected nested lists"),
    ("a.json", '{"counts": [[1]], "layers": [3, 4]}', "expected 1 different layer numbers"),
    ("a.json", "[[1, 2], [3", "not valid JSON"),
    ("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr'", "expected a numeric .npy array"),
    ("a.json", '{"model": "x"}', "found the keys model"),
    ("a.txt", "1", "expected a .npy, .npz, .csv or .json file, found '.txt'"),
    ("a", "1", "found no suffix"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, np.ndarray) and content.dtype == object:
        with path.open("wb") as file:
            np.save(file, content, allow_pickle=True)
    else:
        write(tmp_path, name, content)
    with pytest.raises(ValueError) as caught:
        read_loads(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_is_a_family_and_its_other_files_are_passed_over(tmp_path):
    write(tmp_path, "a.npy", COUNTS)
    write(tmp_path, "docs.csv", "doc,category\n0,law\n")
    write(tmp_path, "README.md", "about")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", "b.json", json.dumps({"counts": {"x": (2 * COUNTS).tolist()}}))
    assert domains(tmp_path) == ("a", "more/b/x")
    family = read_family(tmp_path)
    np.testing.assert_array_equal(family["more/b/x"].counts, 2 * COUNTS[None])
    for name in ("a", "more/*", "x"):
        assert read_loads(tmp_path, domain=name).layers == 2
    with pytest.raises(ValueError, match="found 2 workloads: a, more/b/x; choose one by its dom"):
        read_loads(tmp_path)
    with pytest.raises(ValueError, match="found no domain 'c' among a, more/b/x"):
        read_family(tmp_path, domain="c")


def test_a_damaged_file_in_a_folder_is_not_passed_over(tmp_path):
    write(tmp_path, "a.npy", COUNTS)
    whole = write(tmp_path, "b.npz", {"counts": COUNTS}).read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.npz: expected an \.npz of numeric arrays"):
        read_family(tmp_path)


def test_workloads_of_different_models_are_no_family(tmp_path):
    write(tmp_path, "a.npy", COUNTS)
    write(tmp_path, "b.npy", COUNTS[:, :3])
    with pytest.raises(ValueError, match="a has 2 layers x 4 experts; b has 2 layers x 3 experts"):
        read_family(tmp_path)
    assert read_family(tmp_path, domain="b").keys() == {"b"}
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="files of expert loads, found none"):
        read_family(tmp_path / "none")


def test_long_csv_tells_domains_apart_and_keeps_layer_numbers(tmp_path):
    rows = [f"{d},{layer},{e},{e + 1 + n}" for n, d in enumerate("xy")
            for layer in (3, 7) for e in (0, 1)]  # fmt: skip
    path = write(tmp_path, "a.csv", "domain,layer,expert,count\n" + "\n".join(rows))
    family = read_family(path)
    np.testing.assert_array_equal(family["y"].counts, [[[2, 3], [2, 3]]])
    assert family["x"].layer_labels == (3, 7)
    assert read_loads(write(tmp_path, "b.csv", LONG)).layer_labels == (10, 20)


def test_json_gives_the_layer_numbers_it_names(tmp_path):
    both = {"layers": [0, 7], "counts": {"law": COUNTS.tolist(), "art": COUNTS.tolist()}}
    path = write(tmp_path, "a.json", json.dumps(both))
    assert {loads.layer_labels for loads in read_family(path).values()} == {(0, 7)}
    named = {"logical_count": {str(n): COUNTS[0].tolist() for n in (3, 4, 5)}}
    assert read_loads(write(tmp_path, "b.json", json.dumps(named))).layer_labels == (3, 4, 5)


def test_routes_take_their_domains_from_the_documents_beside_them(tmp_path):
    ids = np.array([[[0, 1]], [[1, 2]], [[2, 3]], [[3, 0]]])
    path = write(tmp_path, "r.npz", {"ids": ids, "doc": np.array([5, 5, 9, 7])})
    assert read_routes(path).by_domain() == {}
    write(tmp_path, "docs.csv", "doc,category\n5,law\n7,art\n9,law\n8,unused\n")
    assert domains(path) == ("art", "law")
    np.testing.assert_array_equal(read_loads(path, domain="law").counts, [[[1, 2, 2, 1]]])
    np.testing.assert_array_equal(read_loads(path).counts, [[[2, 2, 2, 2]]])  # whole
    np.testing.assert_array_equal(read_routes(path, domain="law").sequence, [5, 5, 9])
    write(tmp_path, "docs.csv", "doc,category\n5,law\n7,art\n")
    with pytest.raises(ValueError, match=r"docs\.csv beside it has no row for doc 9"):
        read_routes(path)
    write(tmp_path, "docs.csv", "document,kind\n5,law\n")
    with pytest.raises(ValueError, match="expected the columns doc and category"):
        read_routes(path)


def test_a_row_per_category_becomes_its_windows(tmp_path):
    freq = np.arange(1.0, 13).reshape(3, 1, 4)
    path = write(tmp_path, "f.npz", {"freq": freq, "category": np.array(["a", "b", "a"])})
    family = read_family(path)
    np.testing.assert_array_equal(family["a"].counts, freq[[0, 2]])
    np.testing.assert_array_equal(family["b"].counts, freq[[1]])


def test_pairs_are_read_by_domain_and_counts_are_not_pairs(tmp_path):
    pairs = {"x": np.ones((2, 3, 3)), "y": np.ones((1, 2, 2), int)}
    found = read_pairs(write(tmp_path, "p.npz", pairs))
    assert {name: array.shape for name, array in found.items()} == {"x": (2, 3, 3), "y": (1, 2, 2)}
    with pytest.raises(ValueError, match=r"expected arrays \[steps, experts, experts\]"):
        read_pairs(write(tmp_path, "c.npz", {"counts": COUNTS}))
    with pytest.raises(ValueError, match="finite counts of 0 or more in x"):
        read_pairs(write(tmp_path, "n.npz", {"x": -np.ones((2, 3, 3))}))
    with pytest.raises(ValueError, match="no such file"):
        read_pairs(tmp_path / "none.npz")


def test_counts_are_no_routes(tmp_path):
    with pytest.raises(ValueError, match="expected token-level routes"):
        read_routes(write(tmp_path, "a.npy", COUNTS))


def test_a_missing_file_or_key_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.npy: no such file of loads"):
        read_loads(tmp_path / "none.npy")
    npz = write(tmp_path, "a.npz", {"x": COUNTS, "y": COUNTS})
    with pytest.raises(ValueError, match="found no key 'z' among x, y"):
        read_loads(f"{npz}:z")
    path = write(tmp_path, "a.json", json.dumps({"counts": {"law": [[1]]}}))
    with pytest.raises(ValueError, match="found no key 'art' in the keys counts"):
        read_loads(f"{path}:art")


def test_windows_are_for_routes_only(tmp_path):
    path = write(tmp_path, "a.npy", COUNTS)
    with pytest.raises(ValueError, match="apply to token-level routes"):
        read_loads(path, windows=2)
    routes = write(tmp_path, "r.npz", {"ids": np.ones((1, 4, 1), int)})
    with pytest.raises(ValueError, match="at most 4 windows"):
        read_loads(routes, windows=5)
    with pytest.raises(ValueError, match="ids below 1 experts, found 1"):
        read_loads(routes, experts=1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("moe_esft_deepseek_v2_lite/law.npz", (1, 26, 64)),
        ("moe_gptoss20b_tokens/routing.npz", (1, 24, 32)),
        ("moe_gptoss20b_tokens/mmlu_test_frequencies.npz:freq", (114, 24, 32)),
        ("moe_olmoe_counts/olmoe_1b_7b.json:github", (1, 3, 64)),
        ("moe_deepseek_v41_flash/v41_flash_q4_profile_hits_4layers.csv", (1, 4, 384)),
        ("moe_eplb_readme_example/example.json", (1, 2, 12)),
    ],
)
def test_public_recordings_are_read(data, name, shape):
    assert read_loads(f"{data}/{name}").counts.shape == shape


@pytest.mark.parametrize(
    ("name", "domain", "number", "shape"),
    [
        ("moe_esft_deepseek_v2_lite", None, 3, (1, 26, 64)),
        ("moe_gptoss20b_tokens", "routing/*", 59, (1, 24, 32)),
        ("moe_gptoss20b_tokens", "mmlu*", 57, (2, 24, 32)),
        ("moe_olmoe_counts", "olmoe*", 4, (1, 3, 64)),
        ("moe_olmoe_counts", "mixtral*", 5, (1, 3, 8)),
        ("moe_mixtral_fiddler", None, 7, (1, 32, 8)),
    ],
)
def test_public_families_are_read_from_their_folder(data, name, domain, number, shape):
    family = read_family(data / name, domain=domain)
    assert len(family) == number
    assert {loads.counts.shape for loads in family.values()} == {shape}


def test_domains_of_public_routes_add_up_to_the_whole(data):
    path = data / "moe_gptoss20b_tokens" / "routing.npz"
    parts = sum(loads.counts for loads in read_family(path).values())
    np.testing.assert_array_equal(parts, read_loads(path).counts)


def test_public_pair_counts_sum_to_the_public_counts(data):
    folder = data / "moe_olmoe_counts"
    pairs, family = read_pairs(folder / "crosslayer.npz"), read_family(folder / "olmoe_1b_7b.json")
    for name, loads in family.items():
        np.testing.assert_array_equal(pairs[f"olmoe_{name}"].sum(-1), loads.counts[0, :-1])


def test_counted_routes_agree_with_the_recorders_own_shares(data):
    folder = data / "moe_esft_deepseek_v2_lite"
    counts = read_loads(folder / "law.npz").counts
    shares = read_loads(f"{folder}/law_summary.json:token_scores").counts
    # The shares are rounded to four decimals.
    np.testing.assert_allclose(counts / counts.sum(-1, keepdims=True), shares, atol=5.1e-5)
