"""How a model is spread over the ranks of a mesh, as the program of one rank sees it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from cmjax.models.moe.config import GroupedAttention, LatentAttention, MoEConfig
from cmjax.models.moe.schedule import Schedule
from cmjax.models.moe.slots import SlotTable, one_rank_table
from cmjax.primitives.tensor import gather_group, scatter_sum

MOST_TENSOR = 16
"""Ranks of the largest tensor-parallel group."""
SCOPE = "tensor_parallel"
"""What is inside moves data between the ranks of a group."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Data, expert, tensor, sequence and context parallelism: what a module needs to know. Static.

    Ranks of a tensor-parallel group share their requests: each has a part of the attention's heads,
    of the inner width of dense blocks and shared experts, and of the vocabulary. Between blocks
    (norms, router, dispatch, combine, sampling) a rank goes on with its own requests, so a block
    begins with a gather of the group's tokens and ends with a sum that is scattered again.
    """

    table: SlotTable
    """Slots of the experts (of every layer: tables may differ in content, not in size)."""
    axes: tuple[str, ...] = ()
    """Mesh axes that enumerate the ranks; `()` on one rank."""
    capacity: Any = None
    """Rows reserved per (source rank, slot) in dispatch; `None` never drops."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """Issue order and streams."""
    sequence_parallel: bool = False
    """Prefill attention SP -> TP -> SP: latents are gathered, each rank attends a part of the
    heads for all sequences, and heads are exchanged back for the rank's own sequences."""
    sort_rows: bool = False
    """For inference without a capacity: where all ranks are on one device, copies of tokens are
    sorted by slot, instead of laid out in a block of static size for every source rank and slot."""
    permutes: bool = False
    """Exchanges deliver a token once to a rank: kernels of their own put its rows in the order of
    the experts, and add them up before they return (`cmjax.primitives.permute`)."""
    tensor: int = 1
    """Ranks of a tensor-parallel group."""
    tensor_axes: tuple[str, ...] = ()
    """Of `axes`, the innermost ones that enumerate such a group."""
    context: int = 1
    """In training, ranks that have a part each of every sequence."""
    context_axes: tuple[str, ...] = ()
    """Mesh axes that enumerate them."""
    all_reduces: bool = False
    """A gather follows a sum over the group with nothing but a norm between them, so that one
    kernel is both. Serving engines do so between dense blocks (`tensor_model_parallel_all_reduce`
    of vLLM's `RowParallelLinear`)."""

    def __post_init__(self):
        if self.tensor > 1 and (not self.tensor_axes or self.ranks % self.tensor):
            raise ValueError(
                f"Parallelism: tensor groups of {self.tensor} ranks need the mesh axes that "
                f"enumerate them, and to divide the {self.ranks} ranks; got "
                f"tensor_axes={self.tensor_axes}"
            )
        if self.tensor > 1 and self.sequence_parallel:
            raise ValueError(
                "Parallelism: sequence_parallel splits heads over all ranks and tensor over "
                "neighbours; choose one of them"
            )
        if not self.axes and self.table.ranks != 1:
            raise ValueError(
                f"Parallelism: a table of {self.table.ranks} ranks needs the mesh axes that "
                "enumerate them, got axes=()"
            )

    @property
    def sorts_rows(self) -> bool:
        """Whether `sort_rows` applies, on such a device."""
        return self.sort_rows and self.capacity is None

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.table.ranks

    @property
    def rank(self) -> jax.Array | int:
        """This rank's number, inside the mesh."""
        return lax.axis_index(self.axes) if self.axes else 0

    @property
    def group_rank(self) -> jax.Array | int:
        """This rank's number in its tensor-parallel group."""
        return lax.axis_index(self.tensor_axes) if self.tensor > 1 else 0

    def positions(self, length: int) -> Array:
        """Those of so many tokens, which are this rank's part of a sequence."""
        own = jnp.arange(length, dtype=jnp.int32)
        return own if self.context == 1 else lax.axis_index(self.context_axes) * length + own

    def whole_context(self, x: Num[Array, "sequences part *rest"]) -> Array:
        """The tokens of all parts of a sequence, of which this rank has one."""
        if self.context == 1:
            return x
        return lax.all_gather(x, self.context_axes, axis=1, tiled=True)

    def seen(self, x: Num[Array, "sequences part *rest"]) -> Int[Array, "sequences"] | None:
        """How many tokens of the whole sequences this rank's last ones see; `None` for all."""
        if self.context == 1:
            return None
        return jnp.full(x.shape[0], self.positions(x.shape[1])[-1] + 1)

    def gather(self, x: Num[Array, "own *rest"]) -> Num[Array, "group *rest"]:
        """The group's rows, of which this rank has `x`."""
        with jax.named_scope(SCOPE):
            return gather_group(x, self.tensor_axes, joined=self.all_reduces)

    def scatter(self, x: Float[Array, "group *rest"]) -> Float[Array, "own *rest"]:
        """This rank's rows of the sum over the group's ranks."""
        with jax.named_scope(SCOPE):
            return scatter_sum(x, self.tensor_axes)

    def own_rows(self, x: Float[Array, "group *batch part"]) -> Float[Array, "own *batch whole"]:
        """This rank's rows with the columns of the whole group, which has a part of each row."""
        if self.tensor == 1:
            return x
        with jax.named_scope(SCOPE):
            return lax.all_to_all(x, self.tensor_axes, 0, x.ndim - 1, tiled=True)

    def heads(self, config: MoEConfig) -> int:
        """Attention heads whose up-projections this rank holds.

        Raises: ValueError: the model's do not divide.
        """
        check_tensor(config, self.tensor)
        if not self.sequence_parallel:
            return config.heads // self.tensor
        if not isinstance(config.attention, LatentAttention):
            raise ValueError(
                "Parallelism: sequence_parallel splits the heads of latent attention only; this "
                "model has grouped-query attention, use sequence_parallel=False"
            )
        if config.heads % self.ranks:
            raise ValueError(
                f"Parallelism: sequence_parallel needs heads to divide over the ranks, got "
                f"{config.heads} heads and {self.ranks} ranks"
            )
        return config.heads // self.ranks

    def vocabulary(self, config: MoEConfig) -> int:
        """Tokens whose embedding and scores this rank holds, the last rank's filled up."""
        return -(-config.vocab_size // self.tensor)


def check_tensor(config: MoEConfig, tensor: int) -> None:
    """Refuse a degree of tensor parallelism that a model's widths do not allow.

        >>> from cmjax.models.moe.presets import qwen3_8b
        >>> check_tensor(qwen3_8b(), 12)
        Traceback (most recent call last):
        ValueError: tp 12 does not divide the model's 32 heads; 1, 2, 4, 8 or 16 would do

    Raises: ValueError: what it does not divide, and which degrees would do.
    """
    if (why := _undivided(config, tensor)) is None:
        return
    *fit, last = [t for t in range(1, MOST_TENSOR + 1) if _undivided(config, t) is None]
    would = f"{', '.join(map(str, fit))} or {last}" if fit else f"{last}"
    raise ValueError(f"tp {tensor} {why}; {would} would do")


def _undivided(config: MoEConfig, tensor: int) -> str | None:
    """Why so many ranks cannot share a request; `None` if they can."""
    if not 1 <= tensor <= MOST_TENSOR:
        return f"is outside 1..{MOST_TENSOR}"
    widths = {"heads": config.heads}
    if config.dense_layers:
        widths["columns of ffn_size"] = config.ffn_size
    if config.shared_experts:
        widths["columns of shared experts"] = config.shared_experts * config.expert_ffn_size
    for name, width in widths.items():
        if width % tensor:
            return f"does not divide the model's {width} {name}"
    sizes = config.attention
    if isinstance(sizes, GroupedAttention) and sizes.kv_heads % tensor and tensor % sizes.kv_heads:
        return f"neither divides the model's {sizes.kv_heads} key/value heads nor is a multiple"
    return None


def one_rank(config: MoEConfig, schedule: Schedule | None = None) -> Parallelism:
    """None: every expert on one rank, as a checkpoint has them, and no communication.

    >>> from cmjax.models.moe.presets import tiny
    >>> one_rank(tiny()).ranks
    1
    """
    return Parallelism(table=one_rank_table(config.routed_experts), schedule=schedule or Schedule())
