"""Search over deployments: what size, batch and arithmetic give most tokens per NPU within limits.

A candidate is one expert-parallel group: an instance of several groups has the numbers of one of
them, so NPUs follow from the EP degree. Structure (EP, microbatches, formats) is traced once a
choice, and all batches of a choice are priced at once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cmjax.console import Progress
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.predict import check_options, predict, split_options
from cmjax.deploy.prediction import Prediction
from cmjax.deploy.predictor import Predictor
from cmjax.deploy.requests import Requests
from cmjax.hardware import Supernode, as_machine
from cmjax.sweep import run_all

VARIED = (
    "ep", "tp", "redundant", "microbatches", "quant", "kv_cache", "attention", "drafts", "engine",
)  # fmt: skip
"""Options of a deployment that may be lists of values."""
_LEAST_EP = 8


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One structure, priced: a row per batch that fits; or why there is none."""

    deployment: Deployment
    batch: Float[np.ndarray, "n"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    latency_s: Float[np.ndarray, "n"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    tokens_per_s_per_npu: Float[np.ndarray, "n"] = dataclasses.field(
        default_factory=lambda: np.zeros(0)
    )
    memory_bytes: Float[np.ndarray, "n"] = dataclasses.field(default_factory=lambda: np.zeros(0))
    refused: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeploymentSearch:
    """Every candidate of a search, a row each, and the best within the limit.

    Fields:
      deployments: the structures. choice: which of them a row is of. batch: requests per NPU.
      latency_s: TPOT in decode, TTFT in prefill. tokens_per_s_per_npu: throughput.
      memory_bytes: HBM of a die. limit_s: that the latency may not exceed.
      best: prediction of the row with most tokens per second and NPU within the limit.
      refused: structures that the model or the machine does not allow, and why.
    """

    machine: Supernode
    requests: Requests
    deployments: tuple[Deployment, ...]
    choice: Int[np.ndarray, "rows"]
    batch: Float[np.ndarray, "rows"]
    latency_s: Float[np.ndarray, "rows"]
    tokens_per_s_per_npu: Float[np.ndarray, "rows"]
    memory_bytes: Float[np.ndarray, "rows"]
    limit_s: float
    best: Prediction
    refused: tuple[tuple[Deployment, str], ...]

    @property
    def decoding(self) -> bool:
        """Whether latency is TPOT; else it is TTFT."""
        return self.deployments[0].decoding

    @property
    def within(self) -> Bool[np.ndarray, "rows"]:
        """Rows that keep the limit."""
        return self.latency_s <= self.limit_s

    def pareto(self) -> Int[np.ndarray, "front"]:
        """Rows that no other row beats in both latency and throughput, fastest first."""
        order = np.lexsort((-self.tokens_per_s_per_npu, self.latency_s))
        throughput = self.tokens_per_s_per_npu[order]
        before = np.concatenate([[-np.inf], np.maximum.accumulate(throughput)[:-1]])
        return order[throughput > before]

    def row(self, index: int) -> dict[str, Any]:
        """A row as plain numbers, by the names of options and of the JSON of `cmjax predict`."""
        deployment = self.deployments[self.choice[index]]
        latency = "tpot_ms" if self.decoding else "ttft_ms"
        return {
            "npus": deployment.instance_npus,
            "ep": deployment.instance_npus * self.machine.dies_per_npu,
            **{name: getattr(deployment, name) for name in VARIED if name != "ep"},
            "batch": float(self.batch[index]),
            latency: float(self.latency_s[index]) * 1e3,
            "tokens_per_s_per_npu": float(self.tokens_per_s_per_npu[index]),
            "hbm_gb_per_die": float(self.memory_bytes[index]) / 1e9,
        }

    def to_dict(self) -> dict[str, Any]:
        """The search as plain numbers: the JSON of `cmjax predict --search`."""
        return {
            "best": self.best.to_dict(),
            "pareto": [self.row(index) for index in self.pareto()],
            "candidates": len(self.batch),
            "within_limit": int(self.within.sum()),
            "refused": [
                {"ep": one.instance_npus * self.machine.dies_per_npu, "why": why}
                for one, why in self.refused
            ],
        }


def search(
    model: str | Deployment,
    machine: Supernode | str | Path = "cloudmatrix384",
    requests: Requests | None = None,
    *,
    slo_tpot_ms: float | None = None,
    slo_ttft_ms: float | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> DeploymentSearch:
    """The deployment with most tokens per second and NPU, within a limit on latency.

    Args:
      model, machine, requests: as `predict` takes them; every batch that fits HBM is a candidate.
      slo_tpot_ms, slo_ttft_ms: limit on time per output token (decode) or to first token (prefill).
      executor: where structures are traced and priced (default: here, one after another).
      progress: called as structures are done.
      **options: as `predict` takes them, those of `VARIED` also as lists of values. By default `ep`
        is every power of two that the machine holds and the published degree, and `microbatches`
        1 and 2; other options have their defaults, as formats change what a model answers.
    Raises: ValueError: as `predict`; a limit that no candidate keeps (says what the best reaches);
      no candidate that fits HBM.

    >>> import cmjax
    >>> found = cmjax.search("tiny", phase="decode", ep=[8, 16], context=4096, slo_tpot_ms=50)
    >>> sorted({int(found.deployments[i].npus) for i in found.choice}), bool(found.within.any())
    ([4, 8], True)
    """
    machine = as_machine(machine)
    lists = {
        name: tuple(value)
        for name, value in options.items()
        if isinstance(value, Sequence) and not isinstance(value, str) and name in VARIED
    }
    single = {name: value for name, value in options.items() if name not in lists}
    check_options(options)
    if (requests is not None and requests.batch is not None) or single.get("batch") is not None:
        raise ValueError("search: every batch is tried; leave batch out")
    deployment, requests = split_options(model, requests, single)
    requests.of(deployment)  # what makes no sense is refused before a model is traced
    deployments = _structures(deployment, machine, lists)
    limit_s = _limit_s(deployment, slo_tpot_ms, slo_ttft_ms)
    work = functools.partial(_priced, machine=machine, requests=requests)
    if executor is None:
        choices = []
        for done, one in enumerate(deployments, 1):
            choices.append(work(one))
            if progress is not None:
                progress(done, len(deployments), "")
    else:
        choices = run_all(work, deployments, executor, progress)
    return _collected(choices, machine, requests, limit_s)


def _structures(
    deployment: Deployment, machine: Supernode, lists: Mapping[str, tuple]
) -> list[Deployment]:
    """Deployments of one EP group each, for every combination of the values to try."""
    largest = machine.npus * machine.dies_per_npu
    if "ep" in lists:
        degrees: Sequence[int] = lists["ep"]
    elif deployment.ep:
        degrees = (deployment.ep,)
    else:
        published = deployment.instance_npus * machine.dies_per_npu
        powers = {2**k for k in range(_LEAST_EP.bit_length() - 1, largest.bit_length())}
        degrees = sorted(e for e in powers | {published} if e <= largest)
    for ep in degrees:
        if not 1 <= ep <= largest or ep % machine.dies_per_npu:
            raise ValueError(
                f"ep must be a multiple of {machine.dies_per_npu} (the dies of an NPU of "
                f"{machine.name}) up to {largest}, got {ep}"
            )
    names = [name for name in lists if name != "ep"]
    found = []
    for ep, *values in itertools.product(degrees, *(lists[name] for name in names)):
        changes = dict(zip(names, values, strict=True))
        changes |= {"npus": ep // machine.dies_per_npu, "ep": 0}
        found += dataclasses.replace(deployment, **changes).choices()
    return found


def _limit_s(deployment: Deployment, tpot_ms: float | None, ttft_ms: float | None) -> float:
    own, other = (tpot_ms, ttft_ms) if deployment.decoding else (ttft_ms, tpot_ms)
    if other is not None:
        name = "ttft" if deployment.decoding else "tpot"
        raise ValueError(f"slo-{name}-ms does not apply to {deployment.phase}")
    if own is None:
        return float("inf")
    if not own > 0:
        raise ValueError(f"the limit on latency must be positive, got {own:g} ms")
    return own / 1e3


def _priced(deployment: Deployment, *, machine: Supernode, requests: Requests) -> _Choice:
    """All batches of one structure that fit HBM."""
    try:
        predictor = Predictor.of(deployment, machine)
        batches = predictor.batches_that_fit(requests)
    except ValueError as error:
        return _Choice(deployment, refused=str(error))
    step_s = predictor.step_times_s(requests, batches)
    tokens = predictor.tokens_per_step(requests)
    gained = tokens if deployment.decoding else requests.prompt
    memory = predictor.memory_bytes(dataclasses.replace(requests, batch=batches))
    latency_s = step_s / tokens if deployment.decoding else step_s
    return _Choice(
        deployment,
        batches,
        latency_s,
        batches * gained / step_s,
        sum(memory.values()) + 0 * batches,
    )


def _collected(
    choices: Sequence[_Choice], machine: Supernode, requests: Requests, limit_s: float
) -> DeploymentSearch:
    kept = [one for one in choices if not one.refused]
    if not kept:
        raise ValueError(f"search: no candidate is possible; the first: {choices[0].refused}")
    latency_s = np.concatenate([one.latency_s for one in kept])
    throughput = np.concatenate([one.tokens_per_s_per_npu for one in kept])
    batch = np.concatenate([one.batch for one in kept])
    choice = np.repeat(np.arange(len(kept)), [len(one.batch) for one in kept])
    within = latency_s <= limit_s
    if not within.any():
        fastest = int(latency_s.argmin())
        of = kept[choice[fastest]].deployment
        raise ValueError(
            f"no deployment keeps {limit_s * 1e3:g} ms: the fastest takes "
            f"{latency_s[fastest] * 1e3:.1f} ms (npus {of.instance_npus}, "
            f"batch {batch[fastest]:g}, quant {of.quant})"
        )
    best = int(np.where(within, throughput, -np.inf).argmax())
    served = dataclasses.replace(requests, batch=float(batch[best]))
    return DeploymentSearch(
        machine=machine,
        requests=requests,
        deployments=tuple(one.deployment for one in kept),
        choice=choice,
        batch=batch,
        latency_s=latency_s,
        tokens_per_s_per_npu=throughput,
        memory_bytes=np.concatenate([one.memory_bytes for one in kept]),
        limit_s=limit_s,
        best=predict(kept[choice[best]].deployment, machine, served),
        refused=tuple((one.deployment, one.refused) for one in choices if one.refused),
    )
