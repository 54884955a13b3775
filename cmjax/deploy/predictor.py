"""A traced deployment, which prices any requests on any machine of its shape."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from cmjax.cost.host import on_host
from cmjax.cost.load import sampling_imbalance
from cmjax.cost.price import price
from cmjax.cost.timeline import LoopTime, Timeline
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import build_step
from cmjax.deploy.prediction import Prediction
from cmjax.deploy.program_cache import kept
from cmjax.deploy.requests import Requests
from cmjax.deploy.step import MoEStep
from cmjax.hardware import Supernode
from cmjax.models.moe.checkpoint.hf_config import load_config
from cmjax.models.moe.slots import SlotTable
from cmjax.program import Program, Size

MOST_REQUESTS = 4096
"""Where the search for a batch per NPU ends."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A traced deployment on a machine, ready to be priced for any requests."""

    deployment: Deployment
    machine: Supernode
    step: MoEStep
    program: Program
    _traced_from: tuple = dataclasses.field(repr=False)

    @staticmethod
    def of(
        deployment: Deployment, machine: Supernode, table: SlotTable | None = None
    ) -> "Predictor":
        """Trace the deployment's step (once per deployment and shape of machine).

        Args:
          deployment: with 1 or 2 microbatches.
          machine: where it runs; its constants may be traced by JAX.
          table: slots of the experts (default: those of the published deployments).
        Raises: ValueError: the deployment makes no sense on the machine.
        """
        # What is built depends on the machine's counts and names, which its shape holds; constants
        # of the program are made in one of JAX's two precisions.
        shape, x64 = jax.tree.structure(machine), jax.config.read("jax_enable_x64")
        origin = deployment, shape, table, x64
        step, program, _ = _traced(*origin)
        return Predictor(deployment, machine, step, program, origin)

    def predict(self, requests: Requests) -> Prediction:
        """The step for these requests.

        Raises: ValueError: a batch that does not divide over dies and microbatches.
        """
        requests = requests.of(self.deployment)
        symbols = self.symbols(requests)
        priced = self._prices(symbols).summary(self.machine, symbols)
        device_s, layer_s, streams_s, scopes_s, engines_s = priced
        return Prediction(
            deployment=self.deployment,
            requests=requests,
            machine=self.machine,
            microbatches=self.step.microbatches,
            step_s=device_s + self.machine.chip.host_step_s,
            tokens_per_step=self.tokens_per_step(requests),
            per_layer_s=layer_s,
            streams_s={k: s / self.step.microbatches for k, s in streams_s.items()},
            breakdown_s={k or "other": s for k, s in scopes_s.items()},
            engines_busy_s=engines_s,
            memory_bytes=self.memory_bytes(requests),
        )

    def steps_s(
        self, batch: Float[np.ndarray, "n"], length: Float[np.ndarray, "n"], acceptance: float = 0.7
    ) -> Float[np.ndarray, "n"]:
        """Seconds of steps, the host's included, for many batches at once.

        Args:
          batch: requests per NPU; need not divide over anything. length: cached tokens of a request
            in decode, prompt tokens in prefill. acceptance: of drafts.
        """
        name = "context" if self.deployment.decoding else "prompt"
        sizes: dict[str, Any] = {"batch": np.asarray(batch, float), name: np.asarray(length, float)}
        symbols = self.symbols(Requests(acceptance=acceptance, **sizes))
        return self._steps_s(symbols)

    def symbols(self, requests: Requests) -> dict[str, Any]:
        """The program's sizes for these requests."""
        given = self._given(requests.batch, requests.length(self.deployment.phase))
        load = requests.load
        if load is None:
            even = self.step.symbols(given | {"load": 1.0})
            rows_per_rank = even["slot_rows"] * self.step.expert_slots
            load = self._prices({}).scatter(rows_per_rank)
        symbols = self.step.symbols(given | {"load": load})
        return {name: _number(value) for name, value in symbols.items()}

    def timeline(self, requests: Requests) -> Timeline:
        """The priced step, operation by operation."""
        symbols = self.symbols(requests.of(self.deployment))
        return self._prices(symbols).timeline(self.machine, symbols)

    def memory_bytes(self, requests: Requests) -> dict[str, Any]:
        """HBM of one die: weights, and caches with inputs at their largest."""
        symbols = self.step.symbols(
            self._given(requests.batch, requests.longest(self.deployment.phase))
        )
        return {
            "weights": Size.of(self.step.weight_bytes).evaluate(symbols),
            "caches": Size.of(self.step.state_bytes).evaluate(symbols),
        }

    def sensitivity(self, requests: Requests) -> dict[str, float]:
        """Elasticity of the step time in each machine constant: percent change per percent."""
        symbols = self.symbols(requests.of(self.deployment))
        total, gradient = self._prices(symbols).slopes(self.machine, symbols)
        leaves = jax.tree_util.tree_leaves_with_path(self.machine)
        names = [jax.tree_util.keystr(path)[1:] for path, _ in leaves]
        values = [float(v) for _, v in leaves]
        slopes = [float(g) for g in jax.tree.leaves(gradient)]
        found = {n: v * g / float(total) for n, v, g in zip(names, values, slopes, strict=True)}
        return dict(sorted(((n, e) for n, e in found.items() if e), key=lambda ne: -abs(ne[1])))

    def largest_batch(self, requests: Requests, slo_tpot_ms: float) -> Requests:
        """The largest batch, up to `MOST_REQUESTS` per NPU, whose TPOT stays within `slo_tpot_ms`
        and whose caches fit HBM.

        Raises: ValueError: not even the smallest batch does.
        """
        step = self.machine.dies_per_npu * self.step.microbatches
        fits = []
        for batch in range(step, MOST_REQUESTS + 1, step):
            candidate = dataclasses.replace(requests, batch=float(batch))
            if sum(self.memory_bytes(candidate).values()) > float(self.machine.chip.hbm_bytes):
                break
            fits.append(candidate)
        if not fits:
            raise ValueError(f"not even a batch of {step} per NPU fits HBM; use more NPUs")
        symbols = [self.symbols(candidate) for candidate in fits]
        stacked = {k: np.stack([s[k] for s in symbols]) for k in symbols[0]}
        tpot_ms = self._steps_s(stacked) * 1e3 / self.tokens_per_step(requests)
        within = [c for c, t in zip(fits, tpot_ms, strict=True) if t <= slo_tpot_ms]
        if not within:
            raise ValueError(
                f"slo-tpot-ms {slo_tpot_ms:g} cannot be met: a batch of {step} per NPU already "
                f"takes {tpot_ms[0]:.1f} ms"
            )
        return within[-1]

    def tokens_per_step(self, requests: Requests):
        """Tokens that a request gains in a step: one, and each draft that is accepted."""
        return 1 + requests.acceptance * self.step.drafts * self.deployment.decoding

    def _steps_s(self, symbols: dict[str, Any]) -> Float[np.ndarray, "n"]:
        """Seconds of steps, the host's included, for a row of every size's values."""
        totals = self._prices({}).totals(self.machine, symbols)
        return np.asarray(totals + self.machine.chip.host_step_s, float)

    def _prices(self, symbols: dict[str, Any]) -> "_Priced":
        """The prices of the program, its kernels chosen at these sizes where they are numbers."""
        known = not any(isinstance(value, Tracer) for value in symbols.values())
        numbers = {name: float(np.mean(value)) for name, value in symbols.items()} if known else {}
        if not numbers or not self.program.broken_assumptions(numbers):
            return _traced(*self._traced_from)[2]
        return _decided(*self._traced_from, tuple(sorted(numbers.items())))

    def _given(self, batch, length) -> dict[str, Any]:
        return {"batch": batch, "context" if self.deployment.decoding else "prompt": length}


class _Priced:
    """The prices of one program: by NumPy where they are numbers, by XLA where JAX traces them."""

    def __init__(self, program: Program, step: MoEStep):
        def summary(machine, symbols):
            timeline = price(program, machine, symbols)
            loop = _layer_loop(timeline, step.layers)
            layer = loop.each_s, loop.streams_s
            return timeline.total_s, *layer, timeline.scopes, timeline.engines

        def total_s(machine, symbols):
            return price(program, machine, symbols).total_s

        self.scatter = on_host(lambda rows: sampling_imbalance(rows, step.ranks))
        self.timeline = on_host(lambda machine, symbols: price(program, machine, symbols))
        self.summary = on_host(summary)
        self.slopes = jax.jit(jax.value_and_grad(total_s))
        self.totals = on_host(jax.vmap(total_s, in_axes=(None, 0)))


@functools.lru_cache(maxsize=64)
def _traced(deployment: Deployment, shape, table: SlotTable | None, x64: bool):
    def trace() -> tuple[MoEStep, Program]:
        step = build_step(deployment, _like(shape), table)
        # A kept step is no longer run or traced: its function would drag the model along.
        program = dataclasses.replace(step.trace(), retrace=None)
        return dataclasses.replace(step, fn=dict, args=()), program

    step, program = kept((deployment, load_config(deployment.model), shape, table, x64), trace)
    return step, program, _Priced(program, step)


@functools.lru_cache(maxsize=16)
def _decided(deployment: Deployment, shape, table: SlotTable | None, x64: bool, numbers: tuple):
    """Prices where the sizes choose other kernels than those that the program was traced for."""
    step = build_step(deployment, _like(shape), table)
    return _Priced(step.trace().decided_at(dict(numbers)), step)


def _like(shape) -> Supernode:
    """A machine of a shape, of no constants."""
    return jax.tree.unflatten(shape, [np.nan] * shape.num_leaves)


def _number(value: Any) -> Any:
    """In JAX's default precision, on the host unless JAX traces it."""
    return jnp.asarray(value, float) if isinstance(value, Tracer) else np.asarray(
        value, jax.dtypes.canonicalize_dtype(float)
    )  # fmt: skip


def _layer_loop(timeline: Timeline, layers: int) -> LoopTime:
    """The loop over MoE layers: of the loops of that length, the one with most operations."""
    sizes = [
        len(op.loop.body.operations)
        for level, _ in timeline.program.levels
        for op in level.operations
        if op.loop is not None
    ]
    loops = zip(sizes, timeline.loops, strict=True)
    return max((found for found in loops if found[1].length == layers), key=lambda f: f[0])[1]
