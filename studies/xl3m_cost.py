"""What XL3M costs on 8 Ascend 910B cards: the scorer's own program, traced at Llama-2-7B's sizes.

    python -m studies.xl3m_cost
    cmjax price studies.xl3m_cost:reading --on ascend-910b-x8 --size segments=32 --size length=1152

    FLOPs of reading n tokens, scoring one = 2 P n + 2 L d n^2 + 2 V d         (causal attention)
    XL3M(N) = m FLOPs(S + q) + FLOPs(k S + q),   m = ceil((N - q - S) / stride) + 1 segments

P counts the matrices that every token is multiplied with: 6.48e9, embedding and head not among
them. The paper (Wang et al. 2024, arXiv 2405.17755) names the machine and the 20M tokens, not the
segments; S, stride and q are chosen here. Cards share no data but one entropy per segment.
"""

import dataclasses
import math
import sys

import jax
import jax.export
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from cmjax.console import terminal
from cmjax.cost import price
from cmjax.cost.ranks import mesh_for
from cmjax.hardware import Supernode, load_machine
from cmjax.mesh import RANKED, REPLICATED, on_every_rank
from cmjax.models.moe.config import GroupedAttention, MoEConfig, dense_config
from cmjax.models.moe.model import abstract_model, assemble
from cmjax.models.moe.parallelism import one_rank
from cmjax.models.moe.positions import Rope
from cmjax.models.moe.xl3m import entropy, next_logits, segment_starts
from cmjax.program import Program
from cmjax.program.step import Step

MACHINE = "ascend-910b-x8"
QUESTION, BATCH, BYTES = 128, 32, 2  # tokens; segments at a time on a card; per bfloat16
SHARE_OF_PEAK = 0.4  # for the seconds that FLOPs alone would give


def llama2_7b() -> MoEConfig:
    """Sizes of Llama-2-7B (Touvron et al. 2023), a dense model."""
    return dense_config(
        vocab_size=32000,
        hidden_size=4096,
        layers=32,
        heads=32,
        attention=GroupedAttention(kv_heads=32, head_dim=128),
        ffn_size=11008,
        norm_eps=1e-5,
        rope=Rope(interleave=False),
        max_position=4096,
        family="llama",
    )


@dataclasses.dataclass(frozen=True)
class ReadingPlan:
    """How a text is read; all in tokens but `kept`, the segments of the key context."""

    tokens: int
    segment: int = 1024
    stride: int = 512
    kept: int = 3

    @property
    def segments(self) -> int:
        """Segments of the text."""
        return len(segment_starts(self.tokens - QUESTION, self.segment, self.stride))


PLANS = (
    ReadingPlan(32_000),
    ReadingPlan(128_000),
    ReadingPlan(1_000_000),
    ReadingPlan(20_000_000),
    ReadingPlan(20_000_000, stride=1024),
    ReadingPlan(20_000_000, segment=512, stride=256, kept=6),
)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of reading one text. FLOPs of all cards; seconds of the slowest."""

    counted_flops: float  # by the trace
    formula_flops: float
    whole_flops: float  # of reading the text as one
    priced_s: float
    peak_share_s: float  # if `SHARE_OF_PEAK` were reached


def reading(machine: Supernode) -> Step:
    """One batch on every card of `machine`: `segments` texts of `length` tokens to entropies."""
    config = llama2_7b()
    mesh = mesh_for(machine.ranks, machine)
    graph, params = abstract_model(config, one_rank(config), "bfloat16")
    segments, length = jax.export.symbolic_shape("segments, length")

    def score(params, tokens, lengths):
        return entropy(next_logits(assemble(graph, params), tokens, lengths))

    def ranked(*shape):
        return jax.ShapeDtypeStruct((mesh.ranks, *shape), jnp.int32)

    return Step(
        fn=on_every_rank(score, mesh, (REPLICATED, RANKED, RANKED), RANKED, abstract=True),
        args=(params, ranked(segments, length), ranked(segments)),
        sizes=lambda segments, length: {"segments": segments, "length": length},
        weight_bytes=float(sum(math.prod(x.shape) * BYTES for x in jax.tree.leaves(params))),
    )


def flops(config: MoEConfig, tokens: float) -> float:
    """Closed form: read `tokens` tokens with causal attention, score the token after the last."""
    hidden, vocab = config.hidden_size, config.vocab_size
    linear = 2 * layer_parameters(config) * config.layers * tokens
    return linear + 2 * config.layers * hidden * tokens**2 + 2 * vocab * hidden


def layer_parameters(config: MoEConfig) -> int:
    """Entries of the matrices of one dense layer."""
    assert isinstance(config.attention, GroupedAttention)
    heads = 2 * config.heads + 2 * config.attention.kv_heads
    attention = heads * config.attention.head_dim * config.hidden_size
    return attention + 3 * config.hidden_size * config.ffn_size


def cache_bytes(config: MoEConfig, tokens: int) -> int:
    """Keys and values of a text in bfloat16, all layers."""
    assert isinstance(config.attention, GroupedAttention)
    per_token = 2 * config.attention.kv_heads * config.attention.head_dim * config.layers
    return per_token * tokens * BYTES


def activation_bytes(config: MoEConfig, tokens: int) -> int:
    """The most that lives at once while a text is scored, no cache being kept: the residual stream,
    its norm, gate and up projections and their product, in bfloat16."""
    return (2 * config.hidden_size + 3 * config.ffn_size) * tokens * BYTES


def cost(plan: ReadingPlan, program: Program, machine: Supernode) -> Costs:
    """Costs of reading a text by `plan`, the key context included."""
    config = llama2_7b()
    row, key = plan.segment + QUESTION, plan.kept * plan.segment + QUESTION
    batch = min(BATCH, math.ceil(plan.segments / machine.ranks))
    batches = math.ceil(plan.segments / (batch * machine.ranks))

    def step_s(segments: int, length: int) -> float:
        sizes = {"segments": float(segments), "length": float(length)}
        return float(price(program, machine, sizes).total_s)

    def step_flops(length: int) -> float:
        return program.totals({"segments": 1.0, "length": float(length)})["flops"]

    formula = plan.segments * flops(config, row) + flops(config, key)
    peak = machine.ranks * float(machine.chip.cube_flops_16bit)
    return Costs(
        counted_flops=plan.segments * step_flops(row) + step_flops(key),
        formula_flops=formula,
        whole_flops=flops(config, plan.tokens),
        priced_s=batches * step_s(batch, row) + step_s(1, key),
        peak_share_s=formula / (SHARE_OF_PEAK * peak),
    )


def show(console: Console) -> None:
    """Print the table, and what stands in memory."""
    machine = load_machine(MACHINE)
    step = reading(machine)
    program = step.trace()
    table = Table(
        title=f"XL3M with Llama-2-7B on {machine.ranks} Ascend 910B ({QUESTION}-token question)",
        title_justify="left",
        box=box.SIMPLE,
    )
    for name in (
        "tokens", "segment / stride", "segments", "FLOPs, traced", "formula", "read whole / XL3M",
        "priced, s", f"at {SHARE_OF_PEAK:.0%} of peak, s",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for plan in PLANS:
        found = cost(plan, program, machine)
        table.add_row(
            f"{plan.tokens:,}",
            f"{plan.segment} / {plan.stride}",
            f"{plan.segments:,}",
            f"{found.counted_flops:.2e}",
            f"{found.formula_flops:.2e}",
            f"{found.whole_flops / found.formula_flops:.2f}",
            f"{found.priced_s:,.1f}",
            f"{found.peak_share_s:,.1f}",
        )
    console.print(table)
    console.print(memory_text(machine, float(step.weight_bytes)), highlight=False)  # type: ignore


def memory_text(machine: Supernode, weights: float) -> str:
    """What a card holds, and what a cache of the whole text would need."""
    config = llama2_7b()
    row = PLANS[3].segment + QUESTION
    free = float(machine.chip.hbm_bytes) - weights
    used = BATCH * activation_bytes(config, row)
    whole = cache_bytes(config, PLANS[3].tokens)
    there = machine.ranks * float(machine.chip.hbm_bytes)
    return (
        f"A card holds {weights / 1e9:.1f} GB of weights and {used / 1e9:.1f} GB of activations "
        f"({BATCH} segments at a time, no cache), whatever the text's length; if their caches were "
        f"kept, at most {free // cache_bytes(config, row):.0f} segments would fit. The cache of "
        f"{PLANS[3].tokens:,} tokens is {whole / 2**40:.1f} TiB, the {machine.ranks} cards have "
        f"{there / 1e12:.2f} TB."
    )


if __name__ == "__main__":
    show(terminal())
    sys.exit(0)
