"""Predict a deployment: step time, TPOT or TTFT, throughput, and what they are made of."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.cost.fit import fitted_keys
from cmjax.cost.load import sampling_imbalance
from cmjax.cost.price import price
from cmjax.cost.timeline import Timeline
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import MoEStep, build_step
from cmjax.hardware import Supernode
from cmjax.program import Program, Size

MOST_REQUESTS = 4096
"""Where the search for a batch per NPU ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """What the instance serves.

    Fields:
      batch: concurrent requests per NPU.
      prompt, output: tokens per request; decode is priced at the middle of the output.
      acceptance: probability that the MTP draft is accepted (ignored without MTP).
      load: rows on the slowest rank over the mean, one number or one per MoE layer; `None` is a
        load of equal expectation on all ranks, with the scatter of a finite batch.
    """

    batch: float
    prompt: float
    output: float = 0.0
    acceptance: float = 0.0
    load: np.ndarray | float | None = None

    def __post_init__(self):
        for name, least in (("batch", 0), ("prompt", 0)):
            if not getattr(self, name) > least:
                raise ValueError(f"{name} must be positive, got {getattr(self, name):g}")
        if self.output < 0:
            raise ValueError(f"output must not be negative, got {self.output:g}")
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"mtp-acceptance must lie in 0..1, got {self.acceptance:g}")


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A traced deployment, ready to be priced for any requests."""

    deployment: Deployment
    machine: Supernode
    step: MoEStep
    program: Program

    @staticmethod
    def of(deployment: Deployment, machine: Supernode) -> "Predictor":
        """Trace the deployment's step (once; a few seconds at most)."""
        step = build_step(deployment, machine)
        return Predictor(deployment, machine, step, step.trace())

    @property
    def decoding(self) -> bool:
        return self.deployment.phase == "decode"

    def symbols(self, requests: Requests) -> dict:
        """The program's sizes for these requests."""
        length = requests.prompt + requests.output / 2 if self.decoding else requests.prompt
        given = {"batch": requests.batch, "context" if self.decoding else "prompt": length}
        load = requests.load
        if load is None:
            even = self.step.symbols(given | {"load": 1.0})
            rows_per_rank = even["slot_rows"] * self.step.expert_slots
            load = sampling_imbalance(rows_per_rank, self.step.ranks)
        symbols = self.step.symbols(given | {"load": load})
        return {name: jnp.asarray(value, float) for name, value in symbols.items()}

    def tokens_per_step(self, requests: Requests) -> float:
        """Tokens a request gains per step: one, and each draft that is accepted."""
        return 1 + requests.acceptance * (self.deployment.mtp and self.decoding)

    def timeline(self, requests: Requests, machine: Supernode | None = None) -> Timeline:
        """The priced step."""
        return self._price(machine or self.machine, self.symbols(requests))

    @functools.cached_property
    def _price(self):
        return jax.jit(lambda machine, symbols: price(self.program, machine, symbols))

    def step_s(self, timeline: Timeline):
        """Seconds from one step's start to the next: the NPU's time and the host's."""
        return timeline.total_s + self.machine.chip.host_step_s

    def predict(self, requests: Requests) -> dict:
        """The result as plain numbers; its keys are the JSON output of `cmjax predict`."""
        return self.report(requests, self.timeline(requests))

    def report(self, requests: Requests, timeline: Timeline) -> dict:
        """What `predict` returns, from a timeline already priced."""
        step_s = float(self.step_s(timeline))
        tokens_per_step = self.tokens_per_step(requests)
        # The stack of MoE layers; a dense stack or a draft module may be as long, but not as slow.
        layers = max(
            (loop for loop in timeline.loops if loop.length == self.step.layers),
            key=lambda loop: float(loop.each_s),
        )
        memory = self.memory_bytes(requests)
        result: dict = {"step_ms": step_s * 1e3}
        if self.decoding:
            result["tpot_ms"] = step_s * 1e3 / tokens_per_step
            result["tokens_per_s_per_npu"] = requests.batch * tokens_per_step / step_s
        else:
            result["ttft_ms"] = step_s * 1e3
            result["tokens_per_s_per_npu"] = requests.batch * requests.prompt / step_s
        return result | {
            "per_layer_us": float(layers.each_s) * 1e6,
            **{
                f"{name}_stream_us": float(s) * 1e6 / self.step.microbatches
                for name, s in layers.streams_s.items()
            },
            "breakdown": {k or "other": float(v) * 1e3 for k, v in timeline.scopes.items()},
            "engines_busy_ms": {k: float(v) * 1e3 for k, v in timeline.engines.items()},
            "hbm_gb_per_die": {k: v / 1e9 for k, v in memory.items()},
            "hbm_capacity_gb_per_die": float(self.machine.chip.hbm_bytes) / 1e9,
            "fits_hbm": sum(memory.values()) <= float(self.machine.chip.hbm_bytes),
            "machine": self.machine.name,
            "deployment": dataclasses.asdict(self.deployment),
            "requests": {
                k: np.asarray(v).tolist() for k, v in dataclasses.asdict(requests).items()
            },
            "calibration": calibration(self.machine),
        }

    def memory_bytes(self, requests: Requests) -> dict[str, float]:
        """HBM of one die: weights, and caches with inputs at their largest."""
        length = requests.prompt + (requests.output if self.decoding else 0)
        given = {"batch": requests.batch, "context" if self.decoding else "prompt": length}
        symbols = self.step.symbols(given)
        weights = float(Size.of(self.step.weight_bytes).evaluate(symbols))
        return {
            "weights": weights,
            "caches": float(Size.of(self.step.state_bytes).evaluate(symbols)),
        }

    def sensitivity(self, requests: Requests) -> dict[str, float]:
        """Elasticity of the step time in each machine constant: percent change per percent."""
        symbols = self.symbols(requests)
        total, gradient = jax.jit(
            jax.value_and_grad(lambda m: price(self.program, m, symbols).total_s)
        )(self.machine)
        names = [jax.tree_util.keystr(path)[1:] for path, _ in _leaves(self.machine)]
        values = [float(v) for _, v in _leaves(self.machine)]
        slopes = [float(g) for _, g in _leaves(gradient)]
        found = {n: v * g / float(total) for n, v, g in zip(names, values, slopes, strict=True)}
        return dict(sorted(((n, e) for n, e in found.items() if e), key=lambda ne: -abs(ne[1])))

    def largest_batch(self, requests: Requests, slo_tpot_ms: float) -> Requests:
        """The largest batch, up to `MOST_REQUESTS` per NPU, whose TPOT stays within `slo_tpot_ms`
        and whose caches fit HBM.

        Raises: ValueError: not even the smallest batch does.
        """
        step = self.machine.dies_per_npu * self.deployment.microbatches
        fits = []
        for batch in range(step, MOST_REQUESTS + 1, step):
            candidate = dataclasses.replace(requests, batch=float(batch))
            if sum(self.memory_bytes(candidate).values()) > float(self.machine.chip.hbm_bytes):
                break
            fits.append(candidate)
        if not fits:
            raise ValueError(f"not even a batch of {step} per NPU fits HBM; use more NPUs")
        symbols = [self.symbols(candidate) for candidate in fits]
        stacked = {k: jnp.stack([s[k] for s in symbols]) for k in symbols[0]}
        total = jax.vmap(lambda s: self._price(self.machine, s).total_s)(stacked)
        step_ms = np.asarray(total + self.machine.chip.host_step_s) * 1e3
        tpot_ms = step_ms / self.tokens_per_step(requests)
        within = [c for c, t in zip(fits, tpot_ms, strict=True) if t <= slo_tpot_ms]
        if not within:
            raise ValueError(
                f"slo-tpot-ms {slo_tpot_ms:g} cannot be met: a batch of {step} per NPU already "
                f"takes {tpot_ms[0]:.1f} ms"
            )
        return within[-1]


def fastest(
    predictors: Sequence[Predictor], requests: Requests, slo_tpot_ms: float | None = None
) -> tuple[Predictor, Requests]:
    """The deployment that gives most tokens per second, and the requests it does so with.

    Deployments that the requests do not divide over are left out. With `slo_tpot_ms`, each is taken
    at the largest batch that keeps it.
    Raises: ValueError: none of them can serve the requests.
    """
    found, reasons = [], []
    for predictor in predictors:
        try:
            served = requests
            if slo_tpot_ms is not None:
                served = predictor.largest_batch(requests, slo_tpot_ms)
            rate = served.batch / float(predictor.step_s(predictor.timeline(served)))
            found.append((rate, predictor, served))
        except ValueError as error:
            reasons.append(error)
    if not found:
        raise reasons[0]
    _, predictor, served = max(found, key=lambda entry: entry[0])
    return predictor, served


def calibration(machine: Supernode) -> dict[str, float]:
    """The fitted constants that a prediction rests on, SI units."""
    try:
        keys = fitted_keys(machine.name)
    except ValueError:  # a user's own file: nothing in it was fitted by cmjax
        return {}
    flat = {jax.tree_util.keystr(path)[1:]: float(v) for path, v in _leaves(machine)}
    return {key: flat[key] for key in keys}


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)
