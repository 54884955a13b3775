"""What another domain may ask for: a hierarchical model of experts' shares over domains.

In domain d the share p of an expert e of a layer is logistic-normal around what domains share,

    log p[d, e] = m[e] + σ[e] · ε      (up to the normalisation),      ε ~ N(0, 1)
    m[e]        = middle + τ · ε

    σ[e]² = (ν · s² + sum over d of (log p[d, e] - a[e])²) / (ν + D - 1)
    s²    = (ν₀ · s₀² + (D - 1) · mean over e of v[e]) / (ν₀ + D - 1)

with D domains recorded, a their mean and v[e] their variance: an expert's spread leans on its
layer's, which leans on the prior s₀ (inverse-gamma priors of ν and ν₀ degrees of freedom; Gelman et
al., "Bayesian Data Analysis", 3rd edition, chapter 5). What is hot by chance is not hot again: m is
a drawn towards the middle of its layer, k = τ² / (τ² + s² / D) of its distance kept, with τ² what
the spread of a over experts exceeds s² / D by. A domain that was not recorded is drawn with
variance σ² (1 + k / D). With one domain the spread is the prior's: one recording says nothing of
the next.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from cmjax.placement.loads import Loads

PRIOR_SPREAD = 0.5
"""s₀: spread of log shares between domains, near the middle of that in public recordings."""
_LAYER_WEIGHT = 2.0  # ν₀
_EXPERT_WEIGHT = 4.0  # ν
_FLOOR = 0.05  # of an even share, so that an idle expert has a logarithm


def domain_of_window(loads: Loads) -> Int[np.ndarray, "windows"]:
    """A number for the domain of each window: windows named alike but for a last number are of one
    domain, and all are where none is named."""
    if loads.window_names is None:
        return np.zeros(len(loads.counts), int)
    names = [name.rpartition(" ")[0] if name.rpartition(" ")[2].isdecimal() else name
             for name in loads.window_names]  # fmt: skip
    known = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return np.array([known[name] for name in names])


def by_domain(loads: Loads) -> Loads:
    """One window per domain: the mean share of its windows, in tokens of the first window."""
    domain = domain_of_window(loads)
    share = loads.counts / loads.counts.sum(-1, keepdims=True)
    mean = np.stack([share[domain == d].mean(0) for d in range(domain.max() + 1)])
    return replace(
        loads, counts=mean * loads.counts[0].sum(-1)[:, None],
        window_names=tuple(f"domain {d}." for d in range(len(mean))),
    )  # fmt: skip


def spread(loads: Loads) -> Float[np.ndarray, "layers experts"]:
    """How far the log share of each expert may lie from m in a domain that was not recorded."""
    return _fit(loads)[1]


def predictive(loads: Loads, samples: int, *, seed: int = 0) -> Loads:
    """Domains that may come, as windows: draws of the model above.

    Args:
      loads: recorded; windows of one domain count together.
      samples: windows to draw.
      seed: of the draw.
    """
    centre, scale = _fit(loads)
    noise = np.random.default_rng(seed).normal(size=(samples, *centre.shape))
    log = centre + scale * noise
    share = np.exp(log - log.max(-1, keepdims=True))
    counts = share / share.sum(-1, keepdims=True) * loads.counts[0].sum(-1)[:, None]
    return replace(loads, counts=counts, window_names=None)


def _fit(loads):
    """m, and σ of a domain that was not recorded."""
    counts = by_domain(loads).counts
    share = counts / counts.sum(-1, keepdims=True)
    log = np.log((1 - _FLOOR) * share + _FLOOR / loads.experts)
    domains = len(log)
    mean = log.mean(0)
    square = np.square(log - mean).sum(0)  # (D - 1) v
    layer = (_LAYER_WEIGHT * PRIOR_SPREAD**2 + square.mean(-1, keepdims=True)) / (
        _LAYER_WEIGHT + domains - 1
    )
    expert = (_EXPERT_WEIGHT * layer + square) / (_EXPERT_WEIGHT + domains - 1)
    middle = mean.mean(-1, keepdims=True)
    between = np.square(mean - middle).mean(-1, keepdims=True) - layer / domains
    kept = np.maximum(between, 0) / (np.maximum(between, 0) + layer / domains)
    return middle + kept * (mean - middle), np.sqrt(expert * (1 + kept / domains))


def without_domain(loads: Loads, left_out: int) -> tuple[Loads, Loads]:
    """The windows of all other domains, and those of one."""
    domain = domain_of_window(loads)
    windows: Sequence[int] = np.flatnonzero(domain != left_out).tolist()
    return loads.of_windows(windows), loads.of_windows(np.flatnonzero(domain == left_out).tolist())
