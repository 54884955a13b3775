"""A whole model as an NNX module: the transformer and, if wanted, its multi-token-prediction head.

model = load("path/of/a/checkpoint")       # or from_config(tiny()), with random parameters
logits = model(tokens)                     # [sequences, length, vocab], float32
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from cmjax.models.moe.arithmetic import Arithmetic
from cmjax.models.moe.calibrate import input_statistics, smooth
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.layers.linear import quantize_params
from cmjax.models.moe.layers.mtp import MTPHead
from cmjax.models.moe.layers.transformer import Transformer
from cmjax.models.moe.parallelism import Parallelism, one_rank


class MoEModel(nnx.Module):
    """The main model and, with `mtp`, its draft module, as one rank holds them."""

    def __init__(
        self,
        config: MoEConfig,
        parallelism: Parallelism,
        *,
        precision: Arithmetic | str,
        mtp: bool = False,
        rngs: nnx.Rngs,
    ):
        arithmetic = Arithmetic.of(precision)
        arithmetic.check(config, parallelism.tensor)
        if mtp and not config.mtp_layers:
            raise ValueError("MoEModel: mtp needs a config with mtp_layers >= 1, got 0; use mtp=0")
        self.config, self.arithmetic = config, arithmetic
        self.main = Transformer(config, parallelism, arithmetic=arithmetic, rngs=rngs)
        self.mtp = MTPHead(config, parallelism, arithmetic=arithmetic, rngs=rngs) if mtp else None

    def __call__(
        self, tokens: Int[Array | np.ndarray, "sequences length"]
    ) -> Float32[Array, "sequences length vocab"]:
        """Scores of the token after each of `tokens`; every sequence starts at position 0."""
        hidden, _ = self.main.prefill((jnp.asarray(tokens),), self.arithmetic.kv_cache)
        return self.main.logits(hidden[0])

    def with_arithmetic(
        self,
        arithmetic: Arithmetic | str,
        *,
        calibration: Int[Array | np.ndarray, "sequences length"] | None = None,
    ) -> "MoEModel":
        """This model computing in `arithmetic`; itself it stays as it is.

            >>> from cmjax.models import moe
            >>> model = moe.from_config(moe.tiny())
            >>> model.with_arithmetic("int8").arithmetic.experts
            'w8a8'

        Args:
          arithmetic: formats of the parts, or a name in `ARITHMETICS`.
          calibration: sample text to choose the steps of INT8 weights on, and for W8A8 to move
            outliers from activations into weights (`cmjax.models.moe.calibrate`); `None`: steps are
            `max|w| / 127` of an output channel.
        Raises:
          ValueError: an unknown name, widths that MXFP4 blocks do not divide, a model whose weights
            are rounded already, or one of several ranks with `calibration`.
        """
        arithmetic = Arithmetic.of(arithmetic)
        parallelism, mtp = self.main.parallelism, self.mtp is not None
        if calibration is not None and parallelism.ranks > 1:
            raise ValueError(
                f"with_arithmetic: calibration runs on a one-rank model, this one has "
                f"{parallelism.ranks} ranks; convert first and shard_params then"
            )
        converted = convert_params(
            parameters(self),
            self.config,
            parallelism,
            self.arithmetic,
            arithmetic,
            calibration,
            mtp=mtp,
        )
        return assemble(abstract_model(self.config, parallelism, arithmetic, mtp=mtp)[0], converted)


def from_config(
    config: MoEConfig, *, precision: Arithmetic | str = "float32", mtp: bool = False, seed: int = 0
) -> MoEModel:
    """A model of random parameters on one rank; `cmjax.models.moe.load` has trained ones.

        >>> import jax.numpy as jnp
        >>> from cmjax.models import moe
        >>> model = moe.from_config(moe.tiny())
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 320)

    Args:
      config: sizes.
      precision: what it computes in: an arithmetic, or its name in `ARITHMETICS`.
      mtp: whether it has a draft module.
      seed: of the parameters.
    Raises: ValueError: widths that the arithmetic does not fit, or `mtp` of a model without it.
    """
    rngs = nnx.Rngs(params=seed)
    return MoEModel(config, one_rank(config), precision=precision, mtp=mtp, rngs=rngs)


def convert_params(
    params: dict[str, Any],
    config: MoEConfig,
    parallelism: Parallelism,
    held: Arithmetic | str,
    wanted: Arithmetic | str,
    calibration: Int[Array | np.ndarray, "sequences length"] | None = None,
    *,
    mtp: bool = False,
) -> dict[str, Any]:
    """Parameters of a float model in another arithmetic.

    Args:
      params: of `parallelism`'s model, sharded ones too (they stay sharded as they are).
      held: their arithmetic; no few-bit one.
      wanted: see `MoEModel.with_arithmetic`, as for `calibration`, which needs one rank.
    Raises: ValueError: see `MoEModel.with_arithmetic`.
    """
    held, wanted = Arithmetic.of(held), Arithmetic.of(wanted)
    if held.quantized:
        raise ValueError(
            "convert_params: the weights are rounded already; convert the float model instead"
        )
    like = abstract_model(config, parallelism, wanted, mtp=mtp)[1]
    importance = None
    if calibration is not None:
        plain, _ = abstract_model(config, parallelism, held, mtp=mtp)
        params, importance = smooth(params, input_statistics(plain, params, calibration), wanted)
    return quantize_params(params, like, importance)


def abstract_model(
    config: MoEConfig, parallelism: Parallelism, precision: Arithmetic | str, *, mtp: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The graph of a model and the shapes of its parameters; nothing is allocated."""
    model = nnx.eval_shape(
        lambda: MoEModel(config, parallelism, precision=precision, mtp=mtp, rngs=nnx.Rngs(params=0))
    )
    graph, state = nnx.split(model)
    return graph, nnx.to_pure_dict(state)


def assemble(graph: Any, params: dict[str, Any]) -> MoEModel:
    """The module of a graph and its parameters."""
    return nnx.merge(graph, params)


def parameters(model: MoEModel) -> dict[str, Any]:
    """A model's parameters as nested dictionaries."""
    return nnx.to_pure_dict(nnx.state(model))
