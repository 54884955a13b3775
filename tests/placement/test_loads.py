"""Reading expert loads: every format to one array, every bad file to one clear line."""

import json

import numpy as np
import pytest

from cmjax.placement import Loads, read_loads

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


def test_scaled_keeps_the_shares_and_sets_the_total():
    loads = Loads(COUNTS).scaled(1000.0)
    np.testing.assert_allclose(loads.counts.sum(-1), 1000.0)
    np.testing.assert_allclose(loads.counts[0] / 1000, COUNTS / COUNTS.sum(-1, keepdims=True))


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
    ("a.npz", {"x": COUNTS, "y": COUNTS}, "found the keys x, y"),
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
    ("a.csv", "layer,expert,hits\n0,0.5,1\n", "expected whole expert numbers"),
    ("a.json", "[[1, 2], [3]]", "found ragged lists"),
    ("a.json", "[]", "found no counts"),
    ("a.json", '[["a"]]', "expected numbers, found <U1 data"),
    ("a.json", "{", "expected JSON, found"),
    ("a.json", "3", "found int"),
    ("a.json", '{"counts": {"law": [[1]], "code": [[2]]}}', "found the keys law, code"),
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


def test_a_missing_file_or_key_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.npy: .*found no such file"):
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


def test_counted_routes_agree_with_the_recorders_own_shares(data):
    folder = data / "moe_esft_deepseek_v2_lite"
    counts = read_loads(folder / "law.npz").counts
    shares = read_loads(f"{folder}/law_summary.json:token_scores").counts
    # The shares are rounded to four decimals.
    np.testing.assert_allclose(counts / counts.sum(-1, keepdims=True), shares, atol=5.1e-5)
