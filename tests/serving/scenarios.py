"""Small services for the event loop, drawn by hypothesis, and ones that queueing theory knows."""

import numpy as np
from hypothesis import strategies as st

from cmjax.serving.engine import (
    COLOCATED,
    DECODE,
    FIXED,
    PREFILL,
    CacheInputs,
    EngineInputs,
    Inputs,
    WorkerInputs,
)
from cmjax.serving.engine.table import Table
from cmjax.serving.hashing import nodes_of_blocks

MANY = 1 << 40


def table(base=0.01, per_token=1e-4, per_request=1e-3, per_context=1e-6, constant=0.0) -> Table:
    """Step times that are linear in everything but the product of requests and context."""
    tokens, length = np.array([0.0, 1000.0]), np.array([1.0, 1000.0])
    requests, context = np.array([0.0, 100.0]), np.array([0.0, 10000.0])
    t, q, n, c = np.meshgrid(tokens, length, requests, context, indexing="ij")
    return Table(
        tokens=tokens, length=length, requests=requests, context=context,
        batch_s=base + per_token * t + per_token * 1e-3 * t * q + per_request * n + per_context * n
        * c, constant_s=constant,
    )  # fmt: skip


def requests(arrival_s, prompt, output, tokens_per_step=1.0, blocks=None) -> Inputs:
    prompt, output = np.asarray(prompt, np.int64), np.asarray(output, np.int64)
    steps = np.ceil((output - 1) / tokens_per_step).astype(np.int64)
    start, block = (np.zeros(len(prompt) + 1, np.int64), np.zeros(0, np.int32))
    if blocks is not None:
        start = np.concatenate([[0], np.cumsum([len(b) for b in blocks])]).astype(np.int64)
        block = np.concatenate([*map(np.asarray, blocks), np.zeros(0)]).astype(np.int32)
    return Inputs(
        arrival_s=np.asarray(arrival_s, float), prompt=prompt, output=output, steps=steps,
        growth=((output - 1) << FIXED) // np.maximum(steps, 1), block_start=start, block=block,
    )  # fmt: skip


def workers(*rows: dict) -> WorkerInputs:
    base = {
        "role": PREFILL, "table": 0, "ranks": 1, "max_requests": MANY, "max_tokens": MANY,
        "chunk": 0, "capacity": 0, "waste": 0, "keeps": 0, "start_s": 0.0, "pause_every_s": 0.0,
    "pause_s": 0.0, }  # fmt: skip
    types = {"role": np.int32, "table": np.int32, "ranks": np.int32}
    types |= dict.fromkeys(("start_s", "pause_every_s", "pause_s"), float)
    full = [base | row for row in rows]
    return WorkerInputs(
        **{name: np.array([row[name] for row in full], types.get(name, np.int64)) for name in base}
    )


def no_cache() -> CacheInputs:
    return CacheInputs(
        node=np.zeros(0, np.int32), memory=np.zeros(1, np.int64), disk=np.zeros(1, np.int64)
    )


def inputs(of: Inputs, by: WorkerInputs, tables, **fields) -> EngineInputs:
    given = {
        "cache": no_cache(), "loss_s": np.zeros(0), "loss_worker": np.zeros(0, np.int32),
        "back_s": np.zeros(0),
    }  # fmt: skip
    return EngineInputs(requests=of, workers=by, tables=tuple(tables), **(given | fields))


@st.composite
def services(draw) -> EngineInputs:
    """Any service that can hold its longest request, under any trace."""
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    together = draw(st.booleans())
    spacing = draw(st.sampled_from([0.0, 0.01, 0.1, 1.0, 1e4]))
    arrival = np.cumsum(rng.exponential(spacing, count)) if spacing else np.zeros(count)
    arrival = np.round(arrival, 1) if together else arrival
    prompt, output = rng.integers(1, 200, count), rng.integers(1, 60, count)
    size = draw(st.sampled_from([16, 64]))
    pieces = draw(st.integers(1, 30))
    blocks = [np.sort(rng.integers(0, pieces, -(-p // size))) for p in prompt]
    per_step = draw(st.sampled_from([1.0, 1.7, 2.0]))
    holds = draw(st.sampled_from([0, 300, 600, 2000]))
    waste = draw(st.sampled_from([0, 7 << FIXED]))
    shared = {"capacity": holds << FIXED, "waste": waste,
              "max_requests": draw(st.sampled_from([1, 3, 200]))}  # fmt: skip
    starts = draw(st.sampled_from([0.0, 0.5]))
    first = draw(st.integers(1, 3))
    if draw(st.booleans()):
        row = {
            "role": COLOCATED,
            "max_tokens": draw(st.sampled_from([200, 512])),
            "start_s": starts,
            # Fmt: skip.
            "keeps": draw(st.sampled_from([0, 1])),
            "chunk": draw(st.sampled_from([0, 40])),
        }
        rows = [row | shared] * first
    else:
        row = {"role": PREFILL, "max_tokens": draw(st.sampled_from([64, 512])), "start_s": starts,
               "chunk": draw(st.sampled_from([0, 40]))}  # fmt: skip
        pause = draw(st.sampled_from([0.0, 0.2]))
        last = {"role": DECODE, "ranks": draw(st.sampled_from([1, 4])), "table": 1,
                "pause_s": pause, "pause_every_s": 0.7}  # fmt: skip
        rows = [row] * first + [last | shared] * draw(st.integers(1, 2))
    losses = draw(st.integers(0, 2))
    lost = np.sort(rng.uniform(0, 3, losses))
    stores = draw(st.sampled_from([0, 1, len(rows)]))
    shelves = draw(st.sampled_from([1, 3])) if stores == 1 else 1
    cache = CacheInputs(
        stores=stores, blocks=pieces, block_tokens=size, node=nodes_of_blocks(pieces, shelves),
        memory=rng.integers(0, 8, shelves), disk=rng.integers(0, 4, shelves),
        memory_s=1e-5, disk_s=1e-4, latency_s=1e-3,
    )  # fmt: skip
    return inputs(
        requests(arrival, prompt, output, per_step, blocks),
        workers(*rows),
        (table(), table(base=0.005, constant=1e-3)),
        cache=cache,
        router=draw(st.integers(0, 3)),
        admission=draw(st.integers(0, 3)),
        slo_ttft_s=draw(st.sampled_from([0.5, float("inf")])),
        decode_limit=draw(st.sampled_from([2, 100])),
        prefill_tokens_per_s=5e3,
        handover_s=draw(st.sampled_from([0.0, 1e-4])),
        handover_latency_s=1e-3,
        links=draw(st.sampled_from([1, 3])),
        clients=draw(st.sampled_from([0, 0, 3])),
        think_s=0.1,
        loss_s=lost,
        loss_worker=rng.integers(0, len(rows), losses).astype(np.int32),
        back_s=lost + rng.uniform(0.1, 2, losses),
        bin_s=0.25,
        record=50,
    )
