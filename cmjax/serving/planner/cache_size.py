"""How small a context cache may be: the best split again, with less and less of it.

A cache takes no NPUs, so more of it never costs requests: where does it cease to matter?
"""

import dataclasses
from collections.abc import Callable, Sequence

from cmjax.serving.planner.judge import Judged
from cmjax.serving.service import Service

_HALVINGS = 7
_ENOUGH = 0.99  # of the goodput with the whole cache: within what the search for a rate resolves


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSize:
    """A cache of a size, at the largest rate that keeps the SLO.

    Fields:
      blocks: that all nodes together hold. gb_per_node: DRAM that they take.
      goodput_requests_per_s: requests within the SLO. hit_tokens: share of prompt tokens found.
    """

    blocks: int
    gb_per_node: float
    goodput_requests_per_s: float
    hit_tokens: float


def cache_sizes(
    best: Judged,
    whole: int,
    block_gb_per_node: float,
    judge_all: Callable[[Sequence[Service]], Sequence[Judged]],
) -> list[CacheSize]:
    """The service with `whole` blocks, then with ever fewer, down to none.

    Args:
      best: with the whole cache. whole: its blocks, or those of the trace if they are fewer.
      block_gb_per_node: DRAM of a block. judge_all: services at their largest rates.
    """
    fewer = sorted({whole >> k for k in range(1, _HALVINGS + 1)} | {0}, reverse=True)
    judged = judge_all([best.service.with_cache_blocks(blocks) for blocks in fewer])
    return [
        CacheSize(
            blocks=blocks,
            gb_per_node=blocks * block_gb_per_node,
            goodput_requests_per_s=found.goodput_requests_per_s,
            hit_tokens=found.cache_hit_tokens,
        )
        for blocks, found in zip((whole, *fewer), (best, *judged), strict=True)
    ]


def smallest_enough(sizes: Sequence[CacheSize]) -> CacheSize:
    """The smallest that serves 99 % of what the whole cache does.

    >>> sizes = [CacheSize(blocks=b, gb_per_node=0, goodput_requests_per_s=g, hit_tokens=0)
    ...          for b, g in ((8, 10.0), (4, 9.95), (2, 9.0), (0, 9.92))]
    >>> smallest_enough(sizes).blocks  # what is larger must be enough, too
    4
    """
    enough = sizes[0]
    for size in sizes:
        if size.goodput_requests_per_s < _ENOUGH * sizes[0].goodput_requests_per_s:
            break
        enough = size
    return enough
