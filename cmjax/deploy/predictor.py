"""A traced deployment, which prices any requests on any machine of its shape."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from cmjax.cost.host import on_host
from cmjax.cost.interval import Interval, interval
from cmjax.cost.load import sampling_imbalance
from cmjax.cost.price import price
from cmjax.cost.timeline import LoopTime, Timeline
from cmjax.cost.waiting import Differences
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import build_step
from cmjax.deploy.prediction import Prediction
from cmjax.deploy.program_cache import kept
from cmjax.deploy.requests import Gain, Requests
from cmjax.deploy.step import MoEStep
from cmjax.hardware import (
    Engine,
    Supernode,
    Uncertainty,
    catalog,
    leaf_names,
    relative_slopes,
    uncertainty,
)
from cmjax.models.moe.checkpoint.hf_config import load_config
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.slots import SlotTable
from cmjax.program import Program, Size

MOST_REQUESTS = 4096
"""Where the search for a batch per NPU ends."""
_DIFFERENCE = 0.01  # of a logarithm: small to a price, large to rounding


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
        running = machine.under(deployment.engine)
        shape, x64 = (
            jax.tree.structure(_of_same_kernels(dataclasses.replace(running, origin=""))),
            jax.config.read("jax_enable_x64"),
        )
        config = load_config(deployment.model)  # of a file, as it is now
        origin = dataclasses.replace(deployment, engine=None), config, shape, table, x64
        step, program, _ = _traced(*origin)
        return Predictor(deployment, running, step, program, origin)

    def predict(self, requests: Requests) -> Prediction:
        """The step for these requests.

        Raises: ValueError: a batch that does not divide over dies and microbatches.
        """
        requests = requests.of(self.deployment)
        symbols = self.symbols(requests)
        differences = self.differences(requests)
        priced = self._prices(symbols).summary(self.machine, symbols, differences)
        device_s, layer_s, streams_s, scopes_s, engines_s = priced
        return Prediction(
            deployment=self.deployment,
            requests=requests,
            machine=self.machine,
            microbatches=self.step.microbatches,
            step_s=device_s + self.host_s,
            tokens_per_step=self.tokens_per_step(requests),
            per_layer_s=layer_s,
            streams_s={k: s / self.step.microbatches for k, s in streams_s.items()},
            waiting_s=self._waiting_s(requests, symbols, differences, device_s),
            breakdown_s={k or "other": s for k, s in scopes_s.items()},
            engines_busy_s=engines_s,
            memory_bytes=self.memory_bytes(requests),
        )

    def intervals(self, predicted: Prediction) -> dict[str, Interval]:
        """How sure the numbers of `predicted.headlines()` are.

        Elasticities are central differences over machines whose constants differ by 1 %, all priced
        at once: that takes one trace of the price where its gradient takes several. Empty where the
        machine is in no catalog and no file, or JAX traces it.
        """
        known = known_uncertainty(self.machine)
        if known is None:
            return {}
        symbols, differences = (
            self.symbols(predicted.requests),
            self.differences(predicted.requests),
        )
        leaves, tree = jax.tree.flatten(self.machine)
        names = leaf_names(self.machine)
        logs = np.zeros((len(known.keys), len(leaves)))
        logs[np.arange(len(known.keys)), [names.index(key) for key in known.keys]] = _DIFFERENCE
        scales = np.exp(np.concatenate([logs, -logs]))
        machines = jax.tree.unflatten(tree, list((scales * np.array(leaves, float)).T))
        seconds = self._prices(symbols).of_machines(
            machines, symbols, differences, _number(self.step.drafts)
        )
        above, below = np.split(np.log(np.asarray(seconds, float)), 2)
        step, layer, *streams = ((above - below) / (2 * _DIFFERENCE)).T
        of_stream = zip(sorted(predicted.streams_s), streams, strict=True)
        by_key = {f"{name}_stream_us": elasticity for name, elasticity in of_stream}
        by_key |= {"tokens_per_s_per_npu": -step, "per_layer_us": layer}
        return {
            key: interval(float(value), by_key.get(key, step), known)
            for key, value in predicted.headlines().items()
        }

    def steps_s(
        self,
        batch: Float[np.ndarray, "n"],
        length: Float[np.ndarray, "n"],
        load: float | None = None,
    ) -> Float[np.ndarray, "n"]:
        """Seconds of steps, the host's included, for many batches at once.

        Args:
          batch: requests per NPU; need not divide over anything. length: cached tokens of a request
            in decode, prompt tokens in prefill. load: of experts, as in `Requests`.
        """
        name = "context" if self.deployment.decoding else "prompt"
        lengths: dict[str, Any] = {name: np.asarray(length, float)}
        return self.step_times_s(Requests(load=load, **lengths), np.asarray(batch, float))

    def symbols(self, requests: Requests) -> dict[str, Any]:
        """The program's sizes for these requests."""
        given = self._given(requests.batch, requests.length(self.deployment.phase))
        symbols = self.step.symbols(given | {"load": self._load(requests)})
        return {name: _number(value) for name, value in symbols.items()}

    def differences(self, requests: Requests) -> Differences:
        """How the work of ranks differs under these requests, beyond jitter."""
        assert requests.batch is not None
        sharing = self.step.sharing
        each = requests.batch * sharing / (self.machine.dies_per_npu * self.step.microbatches)
        # where all ranks attend to the same requests, lengths make none of them slower
        spread = requests.length_spread(self.deployment.phase) * (sharing < self.step.ranks)
        load = self._load(requests)
        if requests.load is not None:  # one number, or one per layer
            load = jnp.mean(load) if isinstance(load, Tracer) else np.mean(load)
        return jax.tree.map(_number, Differences(spread / each**0.5, load))

    def _load(self, requests: Requests) -> Any:
        """Rows on the slowest rank over the mean: as given, or what routing a finite batch does."""
        if not self.step.copies:
            return 1.0
        if requests.load is not None:
            return requests.load
        given = self._given(requests.batch, requests.length(self.deployment.phase))
        even = self.step.symbols(given | {"load": 1.0})
        return self._prices({}).scatter(even["slot_rows"] * self.step.expert_slots)

    def _waiting_s(self, requests, symbols, differences, device_s) -> dict[str, Any]:
        """How much longer a step takes for each reason that ranks wait for the slowest one."""
        even = dataclasses.replace(requests, load=1.0)
        level = {k: v + 0 * symbols[k] for k, v in self.symbols(even).items()}
        steady = _number(0.0)
        exchange = dataclasses.replace(self.machine.exchange, jitter_s=steady)
        alike = dataclasses.replace(differences, attention=steady)
        evenly = dataclasses.replace(differences, load=1.0 + 0 * differences.load)
        without = {
            "jitter": (dataclasses.replace(self.machine, exchange=exchange), symbols, differences),
            "contexts": (self.machine, symbols, alike),
            "expert load": (self.machine, level, evenly),
        }
        summary = self._prices(symbols).summary
        return {name: device_s - summary(*sizes)[0] for name, sizes in without.items()}

    def timeline(self, requests: Requests) -> Timeline:
        """The priced step, operation by operation."""
        symbols = self.symbols(requests.of(self.deployment))
        differences = self.differences(requests.of(self.deployment))
        return self._prices(symbols).timeline(self.machine, symbols, differences)

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
        requests = requests.of(self.deployment)
        symbols, differences = self.symbols(requests), self.differences(requests)
        slopes = self._prices(symbols).slopes(self.machine, symbols, differences)
        return relative_slopes(self.machine, *slopes)

    def batches_that_fit(self, requests: Requests) -> Float[np.ndarray, "batches"]:
        """Every batch per NPU, up to `MOST_REQUESTS`, with which weights and caches fit HBM.

        Raises: ValueError: not even the smallest batch does.
        """
        parts = self.machine.dies_per_npu * self.step.microbatches
        step = parts // math.gcd(parts, self.deployment.tp)
        batches = np.arange(step, MOST_REQUESTS + 1, step, dtype=float)
        memory = self.memory_bytes(dataclasses.replace(requests, batch=batches))
        fits = batches[sum(memory.values()) <= float(self.machine.chip.hbm_bytes)]
        if not len(fits):
            raise ValueError(f"not even a batch of {step} per NPU fits HBM; use more NPUs")
        return fits

    def step_times_s(
        self, requests: Requests, batches: Float[np.ndarray, "batches"]
    ) -> Float[np.ndarray, "batches"]:
        """Seconds of the steps of these requests at many batches, the host's included."""
        if requests.load is None or not jnp.ndim(requests.load):
            at_once = dataclasses.replace(requests, batch=batches)
            sizes = self.symbols(at_once), self.differences(at_once)
            return self._steps_s(
                *jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), batches.shape), sizes)
            )
        each = [dataclasses.replace(requests, batch=float(batch)) for batch in batches]
        symbols = _stacked([self.symbols(one) for one in each])
        return self._steps_s(symbols, _stacked([self.differences(one) for one in each]))

    def largest_batch(self, requests: Requests, slo_tpot_ms: float) -> Requests:
        """The largest batch, up to `MOST_REQUESTS` per NPU, whose TPOT stays within `slo_tpot_ms`
        and whose caches fit HBM.

        Raises: ValueError: not even the smallest batch does.
        """
        batches = self.batches_that_fit(requests)
        tpot_ms = self.step_times_s(requests, batches) * 1e3 / self.tokens_per_step(requests)
        within = batches[tpot_ms <= slo_tpot_ms]
        if not len(within):
            raise ValueError(
                f"slo-tpot-ms {slo_tpot_ms:g} cannot be met: a batch of {batches[0]:g} per NPU "
                f"already takes {tpot_ms[0]:.1f} ms"
            )
        return dataclasses.replace(requests, batch=float(within[-1]))

    def tokens_per_step(self, requests: Requests):
        """Tokens that a request gains in a step: one, and each draft that is accepted."""
        return self.gain(requests).mean

    def gain(self, requests: Requests) -> Gain:
        """How many tokens a request gains in a step, and how much that varies."""
        return requests.gain(self.step.drafts * self.deployment.decoding)

    @property
    def host_s(self):
        """Host time of a step that the NPU waits for, as the serving engine leaves it."""
        return self.machine.running().host_s(self.step.drafts)

    def _steps_s(self, symbols: dict[str, Any], differences: Any) -> Float[np.ndarray, "n"]:
        """Seconds of steps, the host's included, for a row of every size's values."""
        totals = self._prices({}).totals(self.machine, symbols, differences)
        return np.asarray(totals + self.host_s, float)

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

    def __init__(self, program: Program, step: MoEStep, key: tuple):
        def host(fn):
            """By NumPy; what it does is kept for the next run."""
            return on_host(fn, keep=lambda shapes, make: kept((key, fn.__name__, shapes), make))

        def summary(machine, symbols, differences):
            timeline = price(program, machine, symbols, differences=differences)
            loop = _layer_loop(timeline, step.layers)
            layer = loop.each_s, loop.streams_s
            return timeline.total_s, *layer, timeline.scopes, timeline.engines

        def total_s(machine, symbols, differences):
            return price(program, machine, symbols, differences=differences).total_s

        def scatter(rows):
            return sampling_imbalance(rows, step.ranks)

        self.scatter = host(scatter)
        self.timeline = on_host(
            lambda machine, symbols, differences: price(
                program, machine, symbols, differences=differences
            )
        )
        self.summary = host(summary)
        self.slopes = jax.jit(jax.value_and_grad(total_s))
        self.totals = host(jax.vmap(total_s, in_axes=(None, 0, 0)))

        def seconds(machine, symbols, differences, drafts):
            timeline = price(program, machine, symbols, differences=differences)
            step_s = timeline.total_s + machine.running().host_s(drafts)
            layer = _layer_loop(timeline, step.layers)
            return jnp.stack(
                [step_s, layer.each_s, *(layer.streams_s[name] for name in sorted(layer.streams_s))]
            )

        self.of_machines = host(jax.vmap(seconds, in_axes=(0, None, None, None)))


@functools.lru_cache(maxsize=64)
def _traced(deployment: Deployment, config: MoEConfig, shape, table: SlotTable | None, x64: bool):
    def trace() -> tuple[MoEStep, Program]:
        machine = _like(shape)
        step = build_step(deployment, machine, table)
        return _without_model(step, step.trace(machine=machine))

    key = deployment, config, shape, table, x64
    step, program = kept(key, trace)
    return step, program, _Priced(program, step, key)


@functools.lru_cache(maxsize=16)
def _decided(
    deployment: Deployment,
    config: MoEConfig,
    shape,
    table: SlotTable | None,
    x64: bool,
    numbers: tuple,
):
    """Prices where the sizes choose other kernels than those that the program was traced for."""
    key = deployment, config, shape, table, x64, numbers

    def trace() -> tuple[MoEStep, Program]:
        machine = _like(shape)
        step = build_step(deployment, machine, table)
        return _without_model(step, step.trace(machine=machine).decided_at(dict(numbers)))

    step, program = kept(key, trace)
    return _Priced(program, step, key)


def _without_model(step: MoEStep, program: Program) -> tuple[MoEStep, Program]:
    """What is kept is no longer run or traced: its functions would drag the model along."""
    return dataclasses.replace(step, fn=dict, args=()), dataclasses.replace(program, retrace=None)


def _of_same_kernels(machine: Supernode) -> Supernode:
    """The machine under the first of the engines for which a program is the same."""

    def program_of(engine: Engine) -> tuple[tuple[str, ...], bool]:
        return engine.unfused, engine.prefill_by_heads

    mine = program_of(machine.running())
    return machine.under(next(e.name for e in machine.engines if program_of(e) == mine))


def _like(shape) -> Supernode:
    """A machine of a shape, of no constants."""
    return jax.tree.unflatten(shape, [np.nan] * shape.num_leaves)


def _number(value: Any) -> Any:
    """In JAX's default precision, on the host unless JAX traces it."""
    return jnp.asarray(value, float) if isinstance(value, Tracer) else np.asarray(
        value, jax.dtypes.canonicalize_dtype(float)
    )  # fmt: skip


def known_uncertainty(machine: Supernode) -> Uncertainty | None:
    """How sure a machine's constants are, where a file says so and JAX does not trace them."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(machine)):
        return None
    if not machine.origin:
        return None
    # a user's file may have changed since
    return (_in_catalog if machine.origin in catalog() else uncertainty)(machine.origin)


_in_catalog = functools.lru_cache(uncertainty)


def _stacked(trees: Sequence[Any]) -> Any:
    """Pytrees of one structure as one, with an axis in front."""
    stack = jnp.stack if any(isinstance(x, Tracer) for x in jax.tree.leaves(trees)) else np.stack
    return jax.tree.map(lambda *leaves: stack(leaves), *trees)


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
