"""How much a cache of a size finds in a trace, whatever the timing."""

from typing import NamedTuple

import numpy as np

from cmjax.serving.engine.inputs import CacheInputs, EngineInputs, Inputs, WorkerInputs
from cmjax.serving.engine.run import hits
from cmjax.serving.hashing import nodes_of_blocks
from cmjax.serving.traces import Trace


class Hits(NamedTuple):
    """Shares of what was looked up."""

    blocks: float
    tokens: float


def cache_hits(trace: Trace, blocks: int, nodes: int = 1) -> Hits:
    """Leading blocks that requests find in a least-recently-used cache, each looked up and held
    before the next one comes.

    Args:
      trace: whose prefixes are known. blocks: that it holds in all. nodes: that it is spread over.
    Raises: ValueError: a trace of which no prefixes are known.
    """
    if not trace.has_blocks:
        raise ValueError(f"{trace.source}: nothing is known of its prefixes")
    count, none = trace.requests, np.zeros(0)
    fields = WorkerInputs.__dataclass_fields__
    whole = np.zeros(count, np.int64)
    given = EngineInputs(
        requests=Inputs(
            arrival_s=np.ascontiguousarray(trace.arrival_s), prompt=trace.prompt, output=whole,
            steps=whole, growth=whole, block_start=np.ascontiguousarray(trace.block_start),
            block=np.ascontiguousarray(trace.block),
        ),
        workers=WorkerInputs(**dict.fromkeys(fields, none)),
        cache=CacheInputs(
            stores=1, blocks=trace.blocks, block_tokens=trace.block_tokens,
            node=nodes_of_blocks(trace.blocks, nodes),
            memory=np.array([blocks // nodes + (i < blocks % nodes) for i in range(nodes)]),
            disk=np.zeros(nodes, np.int64),
        ),
        tables=(), loss_s=none, loss_worker=none.astype(np.int32), back_s=none,
    )  # fmt: skip
    found = hits(given)
    tokens = np.minimum(found * trace.block_tokens, trace.prompt)
    return Hits(float(found.sum() / len(trace.block)), float(tokens.sum() / trace.prompt.sum()))
