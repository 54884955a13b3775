"""Synthetic traces: Poisson arrivals or Gamma bursts, log-normal lengths, shared prefixes."""

from typing import Literal

import numpy as np

from cmjax.inputs import MOST_SIZE, check_number, check_seed
from cmjax.serving.hashing import mix
from cmjax.serving.traces.trace import Trace, compact, without_blocks

_MOST = {
    "requests": 10**7,
    "prompt": 1e12,
    "output": 1e12,
    "trees": 10**6,
    "branches": 2**31,
    "prompt_cv": 100,
    "output_cv": 100,
}
_MOST_BLOCKS = 1e8
_LEAST_RATE = 1e-4  # of 10**7 requests the last one still comes before `MOST_S`


def generate(
    kind: Literal["poisson", "gamma", "constant"] = "poisson",
    *,
    requests: int = 1000,
    rate: float = 1.0,
    cv: float = 2.0,
    prompt: float = 4096.0,
    prompt_cv: float = 0.0,
    output: float = 256.0,
    output_cv: float = 0.0,
    reuse: float = 0.0,
    trees: int = 1,
    branches: int = 4,
    fork: int = 8,
    block_tokens: int = 512,
    seed: int = 0,
) -> Trace:
    """Draw a trace.

    Args:
      kind: `poisson`; `gamma`: bursts, with gaps of coefficient of variation `cv`; `constant`.
      requests: how many. rate: per second.
      prompt, output: mean tokens. prompt_cv, output_cv: coefficient of variation of the log-normal
        lengths; 0 makes all equal.
      reuse: share of a prompt's blocks that lie on a prefix tree, from its root; 0 leaves blocks
      out. trees: how many there are, the k-th as popular as 1 / k. A path forks into `branches`
        after every `fork` blocks.
      block_tokens: of a block. seed: of the draws.
    Returns: the same trace for the same arguments.
    Raises: ValueError: an argument out of its range, or an unknown kind.

    >>> trace = generate("poisson", requests=100, rate=2.0, reuse=0.5)
    >>> trace.requests, trace.has_blocks, bool(1 < trace.rate < 4)
    (100, True, True)
    """
    for name, value, low in (
        ("requests", requests, 1), ("rate", rate, 0), ("prompt", prompt, 1), ("output", output, 1),
        ("trees", trees, 1), ("branches", branches, 1), ("fork", fork, 1),
        ("block_tokens", block_tokens, 1), ("prompt_cv", prompt_cv, 0), ("output_cv", output_cv, 0),
    ):  # fmt: skip
        check_number(f"generate: {name}", value, least=low, most=_MOST.get(name, MOST_SIZE))
    check_number("generate: rate", rate, above=0, least=_LEAST_RATE)
    if not 0 <= reuse <= 1:
        raise ValueError(f"generate: reuse must lie in 0..1, got {reuse:g}")
    check_seed("generate: seed", seed)
    blocks = requests * (prompt / block_tokens + 1)  # of all prompts, about
    if reuse and max(blocks, blocks / fork) > _MOST_BLOCKS:
        raise ValueError(
            f"generate: {requests} prompts of {prompt:g} tokens are {blocks:.3g} blocks; at most "
            f"{_MOST_BLOCKS:g} are drawn"
        )
    rng = np.random.default_rng(seed)
    lengths = [
        _lengths(rng, mean, v, requests) for mean, v in ((prompt, prompt_cv), (output, output_cv))
    ]
    gaps = _gaps(rng, kind, cv, requests) / rate
    blocks = without_blocks(requests)
    if reuse:
        blocks = _blocks(rng, -(-lengths[0] // block_tokens), reuse, trees, branches, fork)
    return Trace(
        arrival_s=np.cumsum(gaps),
        prompt=lengths[0],
        output=lengths[1],
        block_tokens=block_tokens,
        source=f"{kind} at {rate:g}/s",
        **blocks,
    )


def _gaps(rng, kind: str, cv: float, requests: int) -> np.ndarray:
    if kind == "poisson":
        return rng.exponential(size=requests)
    if kind == "gamma":
        check_number("generate: cv", cv, above=0, least=1e-6, most=100)
        return rng.gamma(1 / cv**2, cv**2, requests)
    if kind == "constant":
        return np.ones(requests)
    raise ValueError(f"generate: kind must be poisson, gamma or constant, got {kind!r}")


def _lengths(rng, mean: float, cv: float, requests: int) -> np.ndarray:
    sigma = np.sqrt(np.log1p(cv**2))
    drawn = mean * np.exp(sigma * rng.standard_normal(requests) - sigma**2 / 2)
    return np.maximum(np.rint(drawn), 1).astype(np.int64)


def _blocks(
    rng, count, reuse: float, trees: int, branches: int, fork: int
) -> dict[str, np.ndarray]:
    """Every block's number: of the path from a root for the first ones, of its own after those."""
    popular = 1 / np.arange(1, trees + 1)
    tree = rng.choice(trees, len(count), p=popular / popular.sum())
    start = np.concatenate([[0], np.cumsum(count)])
    owner = np.repeat(np.arange(len(count)), count)
    depth = np.arange(start[-1]) - start[owner]
    shared = depth < np.rint(reuse * count)[owner]
    levels = int(depth.max()) // fork + 1
    path = mix(tree.astype(np.uint64) + np.uint64(1))
    paths = [path]
    for _ in range(levels - 1):
        paths.append(mix(paths[-1] + rng.integers(branches, size=len(count)).astype(np.uint64)))
    on_tree = mix(np.stack(paths)[depth // fork, owner] ^ mix(depth.astype(np.uint64)))
    own = np.arange(start[-1], dtype=np.uint64)
    ids = np.where(shared, on_tree | np.uint64(1 << 62), own)
    return {"block_start": start, "block": compact(ids.view(np.int64))}
