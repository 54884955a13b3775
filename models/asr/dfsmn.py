"""ConvDFSMN: deep feed-forward sequential memory network with dense 1-D convolutions.

A DFSMN block (Zhang et al., "Deep-FSMN for large vocabulary continuous speech recognition",
ICASSP 2018) keeps the past and the future in per-channel taps; Yao et al. (arXiv 2010.14841) add
Conv1D to it for phones. Their table is not public; block and sizes here are this project's:

    u_t = relu(conv_k(x)_t)                                                P -> D, dense
    p_t = conv_1(u)_t                                                      D -> P
    y_t = x_t + p_t + sum_{i < N1} a_i p_{t - s1 i} + sum_{1 <= j <= N2} c_j p_{t + s2 j}

Frames outside the utterance contribute zero.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.conv import Conv, Watch
from cmjax.models.asr.frames import Frames, delay, lookback
from cmjax.primitives.convolution import fsmn_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvDFSMNConfig:
    """Sizes; the defaults are those of a mobile model."""

    strides: tuple[int, ...] = (2, 2)
    """Strides of the convolutions in front of the blocks, `kernel` 3."""
    width: int = 256
    """P: channels between blocks."""
    hidden: int = 512
    """D: channels inside a block."""
    kernel: int = 5
    """Taps of a block's dense convolution. With 3, a third of all products are in layers that no
    short algorithm serves, and int8-Winograd gains less than it can (`benchmarks.asr`)."""
    blocks: int = 8
    """Blocks."""
    lookback: int = 10
    """N1: taps of the memory over this frame and the past."""
    lookahead: int = 5
    """N2: taps of the memory over the future."""
    lookback_stride: int = 1
    """s1: frames between two taps over the past."""
    lookahead_stride: int = 1
    """s2: frames between two taps over the future."""

    def __post_init__(self):
        least = {"lookahead": 0}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if min(value if isinstance(value, tuple) else (value,)) < least.get(field.name, 1):
                raise ValueError(
                    f"ConvDFSMNConfig: {field.name} must be at least {least.get(field.name, 1)}, "
                    f"got {value}"
                )


class Memory(nnx.Module):
    """`x_t + p_t + sum_{i < N1} a_i p_{t - s1 i} + sum_{1 <= j <= N2} c_j p_{t + s2 j}`.

    Parameters: `past [N1, P]` (a) and `future [N2, P]` (c).
    """

    def __init__(self, config: ConvDFSMNConfig, *, rngs: nnx.Rngs):
        c = config
        limit = (6 / (c.lookback + c.width)) ** 0.5
        shapes = ((c.lookback, c.width), (c.lookahead, c.width))
        self.past, self.future = (
            nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit))
            for shape in shapes
        )
        self.strides = (c.lookback_stride, c.lookahead_stride)

    @property
    def reach(self) -> tuple[int, int]:
        """Frames needed before and after the present one."""
        back, ahead = self.strides
        return (self.past.shape[0] - 1) * back, self.future.shape[0] * ahead

    def __call__(
        self,
        x: Float[Array, "batch frames P"],
        p: Float[Array, "batch context P"],
        valid_range: Int[Array, "batch 2"],
        *,
        padding: tuple[int, int] | None = None,
    ) -> Float[Array, "batch frames P"]:
        """The formula, of `p` with these frames of zeros around it, by default all it needs."""
        past, future = self.past[...], self.future[...]
        y = fsmn_memory(x, p, past, future, valid_range, strides=self.strides, padding=padding)
        return lax.optimization_barrier(y)  # as in `masked`


class Block(nnx.Module):
    """One block of the formula at the top."""

    stride = 1

    def __init__(self, config: ConvDFSMNConfig, *, rngs: nnx.Rngs):
        c = config
        self.expand = Conv(c.width, c.hidden, kernel=c.kernel, slope=0.0, rngs=rngs)
        self.project = Conv(c.hidden, c.width, kernel=1, rngs=rngs)
        self.memory = Memory(c, rngs=rngs)

    def __call__(self, frames: Frames, *, watch: Watch | None = None) -> Frames:
        p = self.project(self.expand(frames, watch=watch), watch=watch)
        return p.strided(self.memory(frames.x, p.x, p.valid_range()), 1)

    def convolutions(self) -> list[Conv]:
        return [self.expand, self.project]

    def state(self, batch: int, alignment: int) -> dict:
        width, hidden = self.project.cout, self.project.cin
        expand, memory = self.expand.latency(alignment), self._memory_latency(alignment)
        return {
            "expand": self.expand.state(batch, alignment),
            "project": jnp.zeros((batch, 0, hidden)),
            "skip": jnp.zeros((batch, expand + memory, width)),
            "memory": jnp.zeros((batch, self.memory.reach[0] + memory, width)),
        }

    def latency(self, alignment: int) -> int:
        return self.expand.latency(alignment) + self._memory_latency(alignment)

    def step(self, state: dict, frames: Frames, alignment: int) -> tuple[dict, Frames]:
        expand, u = self.expand.step(state["expand"], frames, alignment)
        project, p = self.project.step(state["project"], u, alignment)
        skip, x = delay(state["skip"], frames.x)
        context = jnp.concatenate([state["memory"], p.x], axis=1)
        latency = self._memory_latency(alignment)
        seen = context[:, : x.shape[1] + sum(self.memory.reach)]
        y = self.memory(x, seen, p.valid_range(1, latency), padding=(0, 0))
        state = {
            "expand": expand,
            "project": project,
            "skip": skip,
            "memory": context[:, p.x.shape[1] :],
        }
        return state, p.strided(y, 1, latency)

    def _memory_latency(self, alignment: int) -> int:
        return lookback(self.memory.reach[1] + 1, 0, 1, alignment)


class ConvDFSMN(AcousticModel):
    """Features to labels; see `AcousticModel` for what it does."""

    def __init__(self, config: ConvDFSMNConfig, *, inputs: int, outputs: int, rngs: nnx.Rngs):
        """Args: config; inputs, bands of the features; outputs, labels with the blank; rngs."""
        c = config
        widths = (inputs, *[c.width] * len(c.strides))
        layers: list = [
            Conv(cin, cout, kernel=3, stride=stride, slope=0.0, rngs=rngs)
            for cin, cout, stride in zip(widths, widths[1:], c.strides, strict=False)
        ]
        layers += [Block(c, rngs=rngs) for _ in range(c.blocks)]
        layers.append(Conv(c.width, outputs, kernel=1, rngs=rngs))
        super().__init__(inputs, layers)
