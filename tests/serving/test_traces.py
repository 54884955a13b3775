"""Traces: every kind of file, plain and packed, and what is refused, with its line."""

import gzip
import json
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.serving import Trace, generate, read_measured, read_trace
from cmjax.serving.cache_curve import cache_hits
from cmjax.serving.hashing import nodes_of_blocks
from cmjax.serving.traces.trace import compact

MOONCAKE = [
    {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [70, 80]},
    {"timestamp": 3000, "input_length": 512, "output_length": 7, "hash_ids": [70]},
]


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def written(folder, text: str, name="trace.jsonl"):
    path = folder / name
    path.write_text(text)
    return path


def test_mooncake_plain_and_packed_are_the_same(tmp_path):
    plain = read_trace(written(tmp_path, lines(*MOONCAKE)))
    packed = tmp_path / "trace.gz"
    packed.write_bytes(gzip.compress(lines(*MOONCAKE).encode()))
    for trace in (plain, read_trace(packed)):
        assert trace.arrival_s.tolist() == [0.0, 3.0]
        assert trace.prompt.tolist() == [600, 512] and trace.output.tolist() == [5, 7]
        assert trace.block.tolist() == [0, 1, 0] and trace.block_start.tolist() == [0, 2, 3]


def test_azure_times_count_from_the_first_request(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
    text += "2023-11-16 18:15:50.9951690,396,109\r\n"
    trace = read_trace(written(tmp_path, text, "azure.csv"))
    np.testing.assert_allclose(trace.arrival_s, [0, 4.314579], atol=1e-9)
    assert trace.prompt.tolist() == [374, 396] and not trace.has_blocks


def test_azure_times_may_say_how_far_east_they_are(tmp_path):
    stamps = "2024-05-10 00:00:00+00:00", "2024-05-10T02:00:01.5+02:00", "2024-05-09 19:00:03-05:00"
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    text += "".join(f"{stamp},374,44\n" for stamp in (*stamps, "2024-05-10 00:00:04Z"))
    found = read_trace(written(tmp_path, text, "azure.csv")).arrival_s
    np.testing.assert_allclose(found, [0, 1.5, 3, 4], atol=1e-9)


def test_a_measured_run_is_read_by_the_clock_of_the_engine(tmp_path):
    record = {"input_toks": 10, "output_toks": 3, "arrival_time": 1e9}
    text = lines(record | {"queued_ts": 27536.5}, record | {"queued_ts": 27537.25})
    assert read_trace(written(tmp_path, text)).arrival_s.tolist() == [0.0, 0.75]


def test_prompt_token_ids_become_prefix_blocks(tmp_path):
    shared = list(range(600))
    records = [
        {
            "arrival_time_ns": i * 10**9,
            "input_tok_ids": ids,
            "input_toks": len(ids),
            "output_toks": 1,
        }
        for i, ids in enumerate((shared, shared, [*shared[:512], 9], [5, *shared[1:]]))
    ]
    trace = read_trace(written(tmp_path, lines(*records)))
    blocks = np.split(trace.block, trace.block_start[1:-1])
    assert blocks[0].tolist() == blocks[1].tolist()
    assert blocks[2][0] == blocks[0][0] and blocks[2][1] != blocks[0][1]
    assert not set(blocks[3]) & set(blocks[0])


def test_every_answer_of_a_chat_is_a_request_that_shares_what_was_said(tmp_path):
    turns = [("human", "a" * 4096), ("gpt", "b" * 400), ("human", "c" * 40), ("gpt", "d" * 8)]
    chat = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    trace = read_trace(written(tmp_path, lines(chat)), rate=2.0)
    assert trace.prompt.tolist() == [1024, 1134] and trace.output.tolist() == [100, 2]
    first, second = np.split(trace.block, trace.block_start[1:-1])
    assert second[:2].tolist() == first.tolist()
    with pytest.raises(ValueError, match="no times; give a rate"):
        read_trace(written(tmp_path, lines(chat)))


HEADERS = {
    "Azure 2024": "TIMESTAMP,ContextTokens,GeneratedTokens",
    "quoted": '"TIMESTAMP","ContextTokens","GeneratedTokens"',
    "other names": "timestamp,context_tokens,generated_tokens",
    "BurstGPT": "Timestamp,Request tokens,Response tokens",
    "semicolons": "TIMESTAMP;ContextTokens;GeneratedTokens",
    "an index": ",TIMESTAMP,ContextTokens,GeneratedTokens",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_columns_are_found_however_a_table_writes_them(tmp_path, header, end):
    first = "7," if header.startswith(",") else ""
    rows = [f"{first}2024-05-10 00:00:0{i}+00:00,{374 + i}.0,44" for i in (1, 3)]
    text = end.join((header, *(r.replace(",", ";") if ";" in header else r for r in rows), ""))
    path = written(tmp_path, "")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    trace = read_trace(path)
    assert trace.arrival_s.tolist() == [0.0, 2.0] and trace.prompt.tolist() == [375, 377]


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
@pytest.mark.parametrize("name", ["timestamp", "arrival_time", "queued_ts"])
def test_a_time_since_1970_says_its_unit_by_its_size(tmp_path, name, unit):
    of = {"input_tokens": 10, "output_tokens": 3}
    known = lines(*({name: (1_787_267_980 + i) * unit} | of for i in (0, 2)))
    assert read_trace(written(tmp_path, known)).arrival_s.tolist() == [0.0, 2.0]
    table = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    table += "".join(f"{(1_787_267_980 + i) * unit},10,3\n" for i in (0, 2))
    assert read_trace(written(tmp_path, table)).arrival_s.tolist() == [0.0, 2.0]
    blocks = lines(*({"timestamp": (1_787_267_980 + i) * unit, "input_length": 10,
                      "output_length": 3, "hash_ids": [0]} for i in (0, 2)))  # fmt: skip
    assert read_trace(written(tmp_path, blocks)).arrival_s.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("name, unit_s", [("timestamp", 1e-3), ("arrival_time_ns", 1e-9)])
def test_any_other_time_is_in_the_unit_of_its_name(tmp_path, name, unit_s):
    of = {"input_tokens": 10, "output_tokens": 3}
    text = lines({name: 0} | of, {name: 4_000_000_000} | of)
    np.testing.assert_allclose(read_trace(written(tmp_path, text)).arrival_s[1], 4e9 * unit_s)


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_item_by_item(tmp_path, monkeypatch, indent):
    monkeypatch.setattr("cmjax.serving.traces.documents._PART", 7)
    packed = tmp_path / "trace.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(MOONCAKE * 1, indent=indent).encode()))
    trace = read_trace(packed)
    assert trace.arrival_s.tolist() == [0.0, 3.0] and trace.block.tolist() == [0, 1, 0]
    text = json.dumps(MOONCAKE, indent=indent)
    with pytest.raises(ValueError, match="item 2 of the array is no JSON, or cut off"):
        read_trace(written(tmp_path, text[:-20]))
    with pytest.raises(ValueError, match="item 2: prompt of 'x' tokens"):
        read_trace(written(tmp_path, text.replace("512", '"x"')))


BENCHMARK = {
    "backend": "vllm", "total_input_tokens": 360, "input_lens": [100, 120, 140],
    "output_lens": [3, 0, 1], "start_times": [50.5, 50.25, 50.0], "ttfts": [0.25, 0.0, 0.5],
    "itls": [[0.125, 0.25], [], []], "errors": ["", "refused", ""],
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 2])
def test_the_answered_requests_of_a_benchmark_are_read_by_their_start(tmp_path, indent):
    path = written(tmp_path, json.dumps(BENCHMARK, indent=indent), "result.json")
    trace = read_trace(path)
    assert trace.arrival_s.tolist() == [0.0, 0.5] and trace.prompt.tolist() == [140, 100]
    run = read_measured(path)
    assert run.ttft_s.tolist() == [0.5, 0.25] and run.e2e_s.tolist() == [0.5, 0.625]


def test_an_older_benchmark_has_lengths_only(tmp_path):
    old = {name: BENCHMARK[name] for name in ("input_lens", "output_lens", "errors")}
    path = written(tmp_path, json.dumps(old), "result.json")
    assert read_trace(path, rate=1.0).output.tolist() == [3, 1]
    with pytest.raises(ValueError, match="no times; give a rate"):
        read_trace(path)
    summary = written(tmp_path, json.dumps({"total_input_tokens": 360}), "summary.json")
    with pytest.raises(ValueError, match="a benchmark's summary, without its requests"):
        read_trace(summary)
    uneven = written(tmp_path, json.dumps(old | {"errors": [""]}), "uneven.json")
    with pytest.raises(ValueError, match="lists of different lengths"):
        read_trace(uneven)


@pytest.mark.parametrize(
    "column, said",
    [
        ({"start_times": ["soon", 1, 2]}, "request 1: start_times must be a number, got 'soon'"),
        ({"ttfts": [0.1, None, None]}, "request 3: ttfts must be a number, got None"),
        ({"itls": [[0.1], [], 0.5]}, "request 3: itls must be a list of times, got 0.5"),
        ({"itls": [[0.1, "x"], [], []]}, "request 1: itls must be a number, got 'x'"),
    ],
)
def test_a_time_of_a_benchmark_that_is_none_is_named(column, said, tmp_path):
    path = written(tmp_path, json.dumps(BENCHMARK | column), "result.json")
    with pytest.raises(ValueError, match=re.escape(said)):
        read_trace(path)


def test_a_chat_may_lack_turns_and_its_text_may_come_in_parts(tmp_path):
    parts = [{"type": "text", "text": "b" * 8}, {"type": "image_url"}]
    text = lines(
        {"conversations": [{"from": "gpt", "value": "an answer to nothing"}]},
        {"conversations": None},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]},
        {"conversations": [{"from": "human"}, {"from": "gpt", "value": ""}]},
    )
    assert read_trace(written(tmp_path, text), rate=1.0).prompt.tolist() == [2]
    with pytest.raises(ValueError, match=r"line 1: nobody says .from, role. a turn"):
        read_trace(written(tmp_path, lines({"conversations": [{"value": "x"}]})), rate=1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"timestamp": -5}, "line 2: time -0.005 s; times start at 0"),
        ({"timestamp": float("nan")}, "line 2: timestamp must be a finite number, got nan"),
        ({"input_length": 0, "hash_ids": []}, "line 2: prompt of 0 tokens"),
        ({"output_length": 0}, "line 2: output of 0 tokens"),
        ({"output_length": 1.5}, "line 2: output of 1.5 tokens"),
        ({"hash_ids": [1, 2, 3]}, "line 2: 3 hash_ids for input_length 512; .* it needs 1"),
        ({"hash_ids": ["x"]}, "line 2: "),
        ({"timestamp": "soon"}, "line 2: "),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_trace(written(tmp_path, lines(MOONCAKE[0], MOONCAKE[1] | change)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no requests"),
        ("\n\n", "no requests"),
        ("hello\n", "neither a JSON object nor Azure's header"),
        ("{broken\n", "line 1: not valid JSON"),
        (lines(*MOONCAKE[::-1]), "line 2: time 0 s is before the one above it .3 s.; sort"),
        (lines(MOONCAKE[0], {"timestamp": 1}), "line 2: no 'input_length'"),
        (lines({"a": 1}), "no prompt tokens"),
        ("TIMESTAMP,Tokens\n", "lacks ContextTokens, GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nx,1\n", "line 2: 2 columns"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46\0,1,1\n",
            r"line 2: TIMESTAMP '2023-11-16 18:15:46\\x00'; a time",
        ),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_trace(written(tmp_path, text))


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere.jsonl", "no such trace file"),
        ("poisson:speed=3", "'speed=3' is none of requests, rate"),
        ("poisson:rate=fast", "rate takes a number, got 'fast'"),
        ("poisson:rate=0", "rate must be positive, got 0"),
        ("poisson:reuse=2", "reuse must lie in 0..1"),
        ("gamma:cv=0", "cv must be positive"),
        ("gamma:cv=1e-300", "cv must .*, got 1e-300"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_trace(source)


def test_a_truncated_archive_is_refused(tmp_path):
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(lines(*MOONCAKE[:1] * 50).encode())[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        read_trace(path)


@pytest.mark.parametrize("spread, per_block", [(1, 20), (2**40, 40)])
def test_reading_holds_a_few_bytes_per_request_and_block_not_the_file(tmp_path, spread, per_block):
    """Numbered ids, and ids of 64 bits: 40 bytes a request, and those of a column twice or thrice
    while blocks are numbered anew."""
    count, blocks = 5000, 40
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(count):
            ids = [spread * (30 * i + k) for k in range(blocks)]
            file.write(lines({"timestamp": 3000 * i, "input_length": 512 * blocks,
                              "output_length": 1, "hash_ids": ids}))  # fmt: skip
    read_trace(path, requests=1)  # what is imported with the first use
    tracemalloc.start()
    try:
        trace = read_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert trace.requests == count and trace.blocks == 30 * (count - 1) + blocks
    assert peak < 100 * count + per_block * count * blocks + 3e5


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9), max_size=40))
def test_blocks_are_numbered_in_the_order_of_their_ids(ids):
    known = sorted(set(ids))
    assert compact(np.array(ids, np.int64)).tolist() == [known.index(i) for i in ids]


def test_only_so_many_requests_are_read(tmp_path):
    path = written(tmp_path, lines(*MOONCAKE) + "nonsense\n")
    assert read_trace(path, requests=2).requests == 2
    assert read_trace(path, requests=1).block.tolist() == [0, 1]


@given(st.sampled_from(["poisson", "gamma", "constant"]), st.integers(0, 5), st.floats(0, 1))
def test_a_generated_trace_is_valid_and_the_same_again(kind, seed, reuse):
    made = [
        generate(kind, requests=50, prompt=3000, prompt_cv=0.5, output_cv=1, reuse=reuse, trees=3,
                 seed=seed) for _ in range(2)
    ]  # fmt: skip
    for name in ("arrival_s", "prompt", "output", "block", "block_start"):
        np.testing.assert_array_equal(getattr(made[0], name), getattr(made[1], name))


def test_generated_arrivals_have_the_rate_and_the_burstiness_asked_for():
    for kind, cv in (("poisson", 1.0), ("gamma", 3.0), ("constant", 0.0)):
        trace = generate(kind, requests=100_000, rate=5.0, cv=3.0, prompt_cv=0.7, seed=1)
        gaps = np.diff(trace.arrival_s)
        assert 1 / gaps.mean() == pytest.approx(5.0, rel=0.03)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03, abs=1e-9)
        assert trace.prompt.mean() == pytest.approx(4096, rel=0.02)
        assert trace.prompt.std() / trace.prompt.mean() == pytest.approx(0.7, rel=0.03)


def test_a_large_cache_finds_the_share_that_a_prefix_tree_was_made_with():
    trace = generate(requests=5000, prompt=8192, reuse=0.75, trees=2, branches=2, fork=6)
    assert cache_hits(trace, 10**6).blocks == pytest.approx(0.75, abs=0.01)


def test_a_repeated_trace_keeps_its_rate_and_shares_no_prefix_between_copies():
    trace = generate(requests=50, rate=3.0, reuse=0.8)
    again = trace.repeated(3)
    assert again.requests == 150 and again.blocks == 3 * trace.blocks
    assert again.rate == pytest.approx(trace.rate, rel=0.02)
    first, last = again.block[: len(trace.block)], again.block[-len(trace.block) :]
    np.testing.assert_array_equal(first, trace.block)
    assert not set(first.tolist()) & set(last.tolist())


def test_ticks_are_spread_without_changing_their_order(tmp_path):
    trace = Trace(
        arrival_s=np.repeat([0.0, 3.0, 6.0], 4), prompt=np.arange(1, 13), output=np.ones(12, int),
        block_start=np.zeros(13, int), block=np.zeros(0, np.int32),
    )  # fmt: skip
    spread = trace.spread(seed=3)
    assert (np.diff(spread.arrival_s) > 0).all()
    np.testing.assert_array_equal(spread.arrival_s // 3 * 3, trace.arrival_s)


@given(st.integers(1, 60))
def test_consistent_hashing_moves_only_what_a_new_node_takes(nodes):
    before, after = nodes_of_blocks(5000, nodes), nodes_of_blocks(5000, nodes + 1)
    moved = before != after
    assert (after[moved] == nodes).all()
    assert np.bincount(after, minlength=nodes + 1).max() < 2 * 5000 / (nodes + 1) + 100


def test_the_hits_of_mooncakes_conversations_are_those_published_with_them(data):
    trace = read_trace(data / "serving_mooncake_conversation/conversation_trace.jsonl.gz")
    assert (trace.requests, len(trace.block), trace.blocks) == (12_031, 288_500, 182_790)
    for blocks, share in (
        (1_000, 4.5), (3_000, 6.5), (10_000, 21.1), (30_000, 32.6), (50_000, 35.5), (10**6, 36.6),
    ):  # fmt: skip
        assert 100 * cache_hits(trace, blocks).blocks == pytest.approx(share, abs=0.06)
    assert 100 * cache_hits(trace, 10**6).tokens == pytest.approx(37.4, abs=0.06)


def test_azures_conversations_are_read_whole(data):
    trace = read_trace(data / "serving_azure2023_conv/AzureLLMInferenceTrace_conv.csv")
    assert trace.requests == 19_366 and round(trace.duration_s) == 3_502
    assert round(trace.prompt.mean()) == 1_155 and round(trace.output.mean()) == 211
