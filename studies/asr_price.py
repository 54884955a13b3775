"""Where int8 Winograd pays on the supernode, and which algorithm each layer should take there.

    python -m studies.asr_price [--on cloudmatrix384] [--out out/asr_price.json]

Prices Wav2letter and ConvDFSMN (`cmjax.models.asr.pricing`) on one die. Winograd has fewer products
for the cube cores, and transforms that the vector cores must do: it pays where the cube is what
takes longest. Algorithms are chosen by gradient: layer l takes algorithm a with probability p,

    minimise  sum_l,a p_l,a t_l,a / T_direct + w max(0, sum_l,a p_l,a n_l,a / N - 1)
    p = softmax(theta / temperature),   temperature falling from 1 to 0.02

with t the priced time, n the noise amplification over direct int8 (`Algorithm.amplification`), and
N what the layers may make together: their number times the amplification of `--sqnr-db`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from cmjax.console import terminal
from cmjax.cost import price
from cmjax.files import replace_text
from cmjax.hardware import Supernode, load_machine
from cmjax.interrupt import leave
from cmjax.models.asr import pricing
from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.conv import Conv
from cmjax.models.asr.deployed import backbone
from cmjax.models.asr.frames import Frames
from cmjax.options import run_program
from cmjax.primitives.convolution.choice import BASE_SQNR_DB
from cmjax.primitives.convolution.toom_cook import ALGORITHMS, supported
from cmjax.program.step import Step

NETWORKS = {"wav2letter": pricing.wav2letter, "dfsmn": pricing.dfsmn}
_STEPS = 400
_PENALTY = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is priced."""

    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Utterances at a time."""
    frames: tuple[int, ...] = (300, 1500)
    """Feature frames of an utterance."""
    sqnr_db: float = 24.0
    """Mean signal-to-noise ratio that layers may fall to, in dB; training makes up for this one."""
    out: Path = Path("out/asr_price.json")
    """Everything printed, as JSON."""

    def __post_init__(self):
        if not self.batches or not self.frames or min(*self.batches, *self.frames) < 1:
            raise ValueError(
                f"--batches and --frames must be at least 1, got {self.batches} and {self.frames}"
            )
        if not 0 < self.sqnr_db <= BASE_SQNR_DB["int8"]:
            raise ValueError(
                f"--sqnr-db must lie in (0, {BASE_SQNR_DB['int8']:g}], what direct int8 gives, got "
                f"{self.sqnr_db:g}"
            )


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What a layer could take.

    Attributes:
      names: algorithms.
      time_s: priced time of each.
      noise: amplification of quantization noise of each; 1 for direct.
    """

    names: tuple[str, ...]
    time_s: Float[np.ndarray, "algorithms"]
    noise: Float[np.ndarray, "algorithms"]


def network_times(
    network: str, machine: Supernode, batch: int, frames: int
) -> dict[str, tuple[float, dict[str, float]]]:
    """(seconds, seconds that each engine is busy) of a forward pass, by arithmetic."""
    found = {}
    for precision in ("float32", "int8", "int8-winograd"):
        step = pricing.network_step(NETWORKS[network], precision)
        symbols = step.symbols({"batch": float(batch), "frames": float(frames)})
        timeline = price(step.trace(), machine, dict(symbols))
        engines = {name: float(busy) for name, busy in timeline.engines.items()}
        found[precision] = float(timeline.total_s), engines
    return found


def layer_candidates(
    model: AcousticModel, machine: Supernode, batch: int, frames: int
) -> list[Candidates]:
    """Every algorithm that serves a layer of the backbone, priced on whole utterances."""
    rates = _output_rates(model)
    found, known = [], {}
    for i in backbone(model):
        conv = model.convolutions()[i]
        shape = (conv.taps, conv.cin, conv.cout, -(-frames // rates[i]))
        if shape not in known:
            names = tuple(supported(conv.taps))
            times = [_layer_time_s(conv, name, machine, batch, shape[-1]) for name in names]
            noise = [ALGORITHMS[name].amplification(conv.taps) for name in names]
            known[shape] = Candidates(names, np.array(times), np.array(noise))
        found.append(known[shape])
    return found


def choose(layers: Sequence[Candidates], sqnr_db: float) -> list[int]:
    """The candidate of each layer, by gradient (the module's formula), then rounded.

    Rounding takes the likeliest; while that is too noisy, the layer is made quieter that pays least
    time for the noise it saves; then layers are made faster as far as the noise allows.
    """
    budget = len(layers) * 10 ** ((BASE_SQNR_DB["int8"] - sqnr_db) / 10)
    width = max(len(layer.names) for layer in layers)
    time_s, noise = (
        np.stack([_padded(getattr(layer, field), width) for layer in layers])
        for field in ("time_s", "noise")
    )
    allowed = np.stack([np.arange(width) < len(layer.names) for layer in layers])
    direct = sum(layer.time_s[layer.names.index("direct")] for layer in layers)

    def loss(theta, temperature):
        p = jax.nn.softmax(jnp.where(allowed, theta / temperature, -jnp.inf), axis=-1)
        excess = (p * noise).sum() / budget - 1
        return (p * time_s).sum() / direct + _PENALTY * jnp.maximum(excess, 0.0)

    optimiser = optax.adam(0.05)

    def step(state, temperature):
        theta, inner = state
        updates, inner = optimiser.update(jax.grad(loss)(theta, temperature), inner)
        return (optax.apply_updates(theta, updates), inner), None

    theta = jnp.zeros(time_s.shape)
    temperatures = jnp.geomspace(1.0, 0.02, _STEPS)
    (theta, _), _ = jax.lax.scan(step, (theta, optimiser.init(theta)), temperatures)
    chosen = np.argmax(np.where(allowed, np.asarray(theta), -np.inf), axis=-1)
    return _repaired(chosen, time_s, noise, budget).tolist()


def rows(options: Options, console: Console) -> list[dict]:
    """One row for every network, batch and length."""
    machine = load_machine(options.on)
    out = []
    for network, build in NETWORKS.items():
        model = nnx.eval_shape(build)
        names = [f"{model.convolutions()[i].taps} taps" for i in backbone(model)]
        for batch in options.batches:
            for frames in options.frames:
                with console.status(f"{network}, batch {batch}, {frames} frames"):
                    priced = network_times(network, machine, batch, frames)
                    layers = layer_candidates(model, machine, batch, frames)
                    chosen = choose(layers, options.sqnr_db)
                pairs = list(zip(layers, chosen, strict=True))
                direct = sum(c.time_s[c.names.index("direct")] for c in layers)
                total, busy = priced["int8"]
                out.append(
                    {
                        "network": network,
                        "batch": batch,
                        "frames": frames,
                        "seconds": {name: seconds for name, (seconds, _) in priced.items()},
                        "engines_busy": {k: v / total for k, v in busy.items()},
                        "backbone_direct_s": float(direct),
                        "backbone_chosen_s": float(sum(c.time_s[i] for c, i in pairs)),
                        "layers": names,
                        "chosen": [c.names[i] for c, i in pairs],
                    }
                )
    return out


def table(found: Sequence[dict], machine: str) -> Table:
    """What people read."""
    out = Table(
        title=f"One die of {machine}: gain of int8-winograd over int8, above 1 Winograd pays",
        caption="busy: share of the time of int8; backbone: gain of the algorithms chosen for it",
    )
    out.add_column("network, batch x frames")
    for column in ("int8, ms", "gain", "cube busy", "vector busy", "backbone"):
        out.add_column(column, justify="right")
    for row in found:
        s, busy = row["seconds"], row["engines_busy"]
        out.add_row(
            _case(row),
            f"{1e3 * s['int8']:.3f}",
            f"{s['int8'] / s['int8-winograd']:.2f}x",
            *(f"{busy[name]:.0%}" for name in ("cube", "vector")),
            f"{row['backbone_direct_s'] / row['backbone_chosen_s']:.2f}x",
        )
    return out


def choices(found: Sequence[dict]) -> list[str]:
    """A line for every row: how many layers of the backbone take which algorithm."""
    lines = []
    for row in found:
        pairs = list(zip(row["layers"], row["chosen"], strict=True))
        counted = [f"{pairs.count(p)} of {p[1]} ({p[0]})" for p in dict.fromkeys(pairs)]
        lines.append(f"{_case(row)}: {', '.join(counted)}")
    return lines


def main(options: Options, console: Console) -> None:
    found = rows(options, console)
    console.print(table(found, options.on))
    console.print("chosen by gradient, layer by layer:", *choices(found), sep="\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.out, json.dumps(found, indent=1) + "\n")
    console.print(f"wrote {options.out}")


def _layer_time_s(conv: Conv, algorithm: str, machine: Supernode, batch: int, frames: int) -> float:
    """Priced seconds of one layer by itself, filter packed beforehand."""

    def make() -> Conv:
        made = Conv(conv.cin, conv.cout, kernel=conv.taps, slope=conv.slope, rngs=nnx.Rngs(0))
        made.prepare_scales(algorithm, 127)
        made.switch("int8-winograd")
        made.pack(for_kernels=False)
        return made

    graph, state = nnx.split(nnx.eval_shape(make))

    def forward(state, x: Array):
        lengths = jnp.full(x.shape[:1], x.shape[1])
        return nnx.merge(graph, state)(Frames(x, lengths, jnp.zeros((), jnp.int32))).x

    x = jax.ShapeDtypeStruct((batch, frames, conv.cin), jnp.float32)
    step = Step(fn=forward, args=(state, x), sizes=dict)
    return float(price(step.trace(), machine, {}).total_s)


def _output_rates(model: AcousticModel) -> list[int]:
    """Feature frames per output frame of every convolution."""
    rates, stride = [], 1
    for conv in model.convolutions():
        stride *= conv.stride
        rates.append(stride)
    return rates


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, (0, width - len(values)))


def _repaired(
    chosen: np.ndarray, time_s: np.ndarray, noise: np.ndarray, budget: float
) -> np.ndarray:
    """Within the budget, and no single change that is faster left; padding has no noise."""
    layers = np.arange(len(chosen))

    def moves():
        base_t, base_n = time_s[layers, chosen, None], noise[layers, chosen, None]
        return time_s - base_t, np.where(noise > 0, noise - base_n, np.inf)

    while noise[layers, chosen].sum() > budget:
        slower, noisier = moves()
        paid = np.where(noisier < 0, slower / np.where(noisier < 0, -noisier, 1.0), np.inf)
        layer, to = np.unravel_index(np.argmin(paid), paid.shape)
        chosen[layer] = to
    while True:
        slower, noisier = moves()
        left = budget - noise[layers, chosen].sum()
        gain = np.where((noisier <= left) & (slower < 0), -slower, 0.0)
        if not gain.any():
            return chosen
        layer, to = np.unravel_index(np.argmax(gain), gain.shape)
        chosen[layer] = to


def _case(row: dict) -> str:
    return f"{row['network']} {row['batch']} x {row['frames']}"


if __name__ == "__main__":
    leave(run_program(lambda options: main(options, terminal()), Options, __doc__))
