"""What a prediction says: a typed pytree, through which `jit`, `grad` and `vmap` go."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Num

from cmjax.console import html_table
from cmjax.cost.fit import fitted_keys
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.requests import Requests
from cmjax.hardware import Supernode, leaf_names

Number = float | np.number | Num[Array, "*_batch"]
Seconds = Number


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "requests", "machine", "microbatches", "step_s", "tokens_per_step", "per_layer_s",
        "interval", "streams_s", "waiting_s", "breakdown_s", "engines_busy_s", "memory_bytes",
        "elasticities",
    ],
    meta_fields=["deployment", "width_from"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A deployment on a machine under requests.

    Fields (seconds are of one step unless the name says otherwise):
      deployment: what was asked for. microbatches: 1 or 2, the faster one where it says "auto".
      requests, machine: what it was predicted for.
      step_s: from one step's start to the next, the NPU's time and the host's.
      tokens_per_step: tokens that a request gains in a step of decode.
      per_layer_s: one MoE layer; streams_s: of it, how long a microbatch keeps each stream busy.
      waiting_s: how much longer the step takes because ranks wait for the slowest one, by what
        makes it slow: jitter, contexts of other lengths, expert load.
      breakdown_s: on its stream, by scope. engines_busy_s: by engine.
      memory_bytes: HBM of one die by what fills it, caches at their largest.
      interval: 90 % of what the numbers of `headlines` may be, low and high, as far as the
        machine's constants are known; empty where the prediction is traced or no file says how
        sure they are. width_from: what most of that width comes from, and which measurement would
        narrow it. elasticities: percent that a number changes per percent of each uncertain
        constant (`compare` needs them).
    """

    deployment: Deployment
    requests: Requests
    machine: Supernode
    microbatches: Number
    step_s: Seconds
    tokens_per_step: Number
    per_layer_s: Seconds
    streams_s: dict[str, Seconds]
    waiting_s: dict[str, Seconds]
    breakdown_s: dict[str, Seconds]
    engines_busy_s: dict[str, Seconds]
    memory_bytes: dict[str, Number]
    interval: dict[str, tuple[Number, Number]] = dataclasses.field(default_factory=dict)
    elasticities: dict[str, Num[ArrayLike, "keys"]] = dataclasses.field(default_factory=dict)
    width_from: str = ""

    @property
    def tpot_s(self) -> Seconds:
        """Time per output token of a request.

        Raises: AttributeError for a prefill.
        """
        if not self.deployment.decoding:
            raise AttributeError("a prefill has no tpot_s; it has ttft_s")
        return self.step_s / self.tokens_per_step

    @property
    def ttft_s(self) -> Seconds:
        """Time to first token, without waiting for a batch.

        Raises: AttributeError for a decode.
        """
        if self.deployment.decoding:
            raise AttributeError("a decode has no ttft_s; it has tpot_s")
        return self.step_s

    @property
    def tokens_per_s_per_npu(self) -> Number:
        """Output tokens per second and NPU in decode, prompt tokens in prefill."""
        assert self.requests.batch is not None
        tokens = self.tokens_per_step if self.deployment.decoding else self.requests.prompt
        return self.requests.batch * tokens / self.step_s

    @property
    def fits_hbm(self) -> Bool[ArrayLike, "*_batch"]:
        """Whether weights and caches fit the die."""
        return sum(self.memory_bytes.values()) <= self.machine.chip.hbm_bytes

    def headlines(self) -> dict[str, Number]:
        """The numbers that a prediction is asked for, by the keys of its JSON; may be traced."""
        latency = {"tpot_ms": self.tpot_s} if self.deployment.decoding else {"ttft_ms": self.ttft_s}
        return {
            "step_ms": self.step_s * 1e3,
            **{key: seconds * 1e3 for key, seconds in latency.items()},
            "tokens_per_s_per_npu": self.tokens_per_s_per_npu,
            "per_layer_us": self.per_layer_s * 1e6,
            **{f"{name}_stream_us": s * 1e6 for name, s in self.streams_s.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain numbers: the JSON of `cmjax predict`.

        Raises: ValueError if it is traced or batched.
        """
        _check_plain(self)
        chosen = dataclasses.replace(self.deployment, microbatches=int(self.microbatches))
        return {
            **{key: float(value) for key, value in self.headlines().items()},
            "interval": {k: [float(v[0]), float(v[1])] for k, v in self.interval.items()},
            "width_from": self.width_from,
            "waiting_ms": {k: float(v) * 1e3 for k, v in self.waiting_s.items()},
            "breakdown": {k: float(v) * 1e3 for k, v in self.breakdown_s.items()},
            "engines_busy_ms": {k: float(v) * 1e3 for k, v in self.engines_busy_s.items()},
            "hbm_gb_per_die": {k: float(v) / 1e9 for k, v in self.memory_bytes.items()},
            "hbm_capacity_gb_per_die": float(self.machine.chip.hbm_bytes) / 1e9,
            "fits_hbm": bool(self.fits_hbm),
            "machine": self.machine.name,
            "deployment": dataclasses.asdict(chosen),
            "requests": {
                k: None if v is None else np.asarray(v).tolist()
                for k, v in dataclasses.asdict(self.requests).items()
            },
            "calibration": calibration(self.machine),
        }

    def __repr__(self) -> str:
        name = f"{self.deployment.phase} of {self.deployment.model} on {self.machine.name}"
        try:
            _check_plain(self)
        except ValueError:
            return f"Prediction({name}, traced or batched: {jnp.shape(self.step_s)})"
        return f"Prediction({name}: {', '.join(' '.join(row) for row in self._headlines())})"

    def _repr_html_(self) -> str:
        """The picture of a notebook."""
        _check_plain(self)
        blocks = sorted(self.breakdown_s.items(), key=lambda entry: -float(entry[1]))
        rows = [(k, f"{float(v) * 1e3:.3g} ms") for k, v in blocks[:12]]
        return html_table(repr(self), self._headlines()) + html_table("on its stream", rows)

    def _headlines(self) -> list[tuple[str, str]]:
        latency = (
            ("TPOT", f"{float(self.tpot_s) * 1e3:.1f} ms")
            if self.deployment.decoding
            else ("TTFT", f"{float(self.ttft_s) * 1e3:.0f} ms")
        )
        fits = "" if self.fits_hbm else ", more than it has"
        return [
            latency,
            ("throughput", f"{float(self.tokens_per_s_per_npu):,.0f} tokens/s per NPU"),
            ("batch", f"{float(self.requests.batch or 0):g} per NPU"),
            ("HBM", f"{float(sum(self.memory_bytes.values())) / 1e9:.1f} GB per die{fits}"),
        ]


def fastest(predictions: Sequence[Prediction]) -> Prediction:
    """Of predictions for one deployment and machine, the one with most tokens per second.

    Where they are traced or batched, the choice is made number by number, and is as differentiable
    as the maximum of their rates.
    """
    best, *others = predictions
    for other in others:
        faster = jnp.asarray(other.tokens_per_s_per_npu) > best.tokens_per_s_per_npu
        if isinstance(faster, Tracer) or faster.ndim:
            best = _select(faster, other, best)
        elif faster:
            best = other
    return best


def calibration(machine: Supernode) -> dict[str, float]:
    """The fitted constants that a prediction rests on, SI units."""
    try:
        keys = fitted_keys(machine.name)
    except ValueError:  # a user's own file: nothing in it was fitted by cmjax
        return {}
    flat = dict(zip(leaf_names(machine), jax.tree.leaves(machine), strict=True))
    return {key: float(flat[key]) for key in keys}


def _select(condition: Array, one: Prediction, other: Prediction) -> Prediction:
    """`one` where `condition` holds, else `other`; a scope that only one has is 0 in the other."""

    def chosen(a, b):
        if isinstance(a, dict):
            return {k: chosen(a.get(k, 0.0), b.get(k, 0.0)) for k in {**a, **b}}
        shape = jnp.broadcast_shapes(jnp.shape(condition), jnp.shape(a), jnp.shape(b))
        return jnp.where(condition, jnp.broadcast_to(a, shape), b)

    priced = ("microbatches", "step_s", "per_layer_s", "streams_s", "waiting_s",
              "breakdown_s", "engines_busy_s", "memory_bytes")  # fmt: skip
    return dataclasses.replace(
        one, **{name: chosen(getattr(one, name), getattr(other, name)) for name in priced}
    )


def _check_plain(prediction: Prediction) -> None:
    if isinstance(prediction.step_s, Tracer) or jnp.ndim(prediction.step_s):
        raise ValueError(
            "this prediction is traced or batched by JAX and has no single numbers; index it by "
            "jax.tree.map, or read its fields"
        )
