"""A whole model as an NNX module: the transformer and, if wanted, its multi-token-prediction head.

model = load("path/of/a/checkpoint")
logits = model(tokens)                     # [sequences, length, vocab], float32
"""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float32, Int

from models.moe.config import MoEConfig
from models.moe.layout import Layout
from models.moe.linear import Precision, check_precision
from models.moe.mtp import MTPHead
from models.moe.transformer import Transformer


class MoEModel(nnx.Module):
    """The main model and, with `mtp`, its draft module, as one rank holds them."""

    def __init__(
        self,
        config: MoEConfig,
        layout: Layout,
        *,
        precision: Precision,
        mtp: bool = False,
        rngs: nnx.Rngs,
    ):
        check_precision(precision)
        if mtp and not config.mtp_layers:
            raise ValueError("MoEModel: mtp needs a config with mtp_layers >= 1, got 0; use mtp=0")
        self.config, self.precision = config, precision
        self.main = Transformer(config, layout, precision=precision, rngs=rngs)
        self.mtp = MTPHead(config, layout, precision=precision, rngs=rngs) if mtp else None

    def __call__(
        self, tokens: Int[Array, "sequences length"]
    ) -> Float32[Array, "sequences length vocab"]:
        """Scores of the token after each of `tokens`; every sequence starts at position 0."""
        kind = "float32" if self.precision == "float32" else "bfloat16"
        hidden, _ = self.main.prefill((tokens,), kind)
        return self.main.logits(hidden[0])


def abstract_model(
    config: MoEConfig, layout: Layout, precision: Precision, *, mtp: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The graph of a model and the shapes of its parameters; nothing is allocated."""
    model = nnx.eval_shape(
        lambda: MoEModel(config, layout, precision=precision, mtp=mtp, rngs=nnx.Rngs(params=0))
    )
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def assemble(graph: Any, params: dict[str, Any]) -> MoEModel:
    """The module of a graph and its parameters."""
    return nnx.merge(graph, params)


def parameters(model: MoEModel) -> dict[str, Any]:
    """A model's parameters as nested dictionaries."""
    return nnx.to_pure_dict(nnx.state(model))
