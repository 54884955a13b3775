"""Steps of the two networks for `cmjax price`, at the published sizes, in each arithmetic.

    cmjax price cmjax.models.asr.pricing:wav2letter_int8_winograd --size batch=8 --size frames=1000

The traced step is the network that runs: features in, logits out, filters packed beforehand.
"""

from collections.abc import Callable

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx

from cmjax.hardware import Supernode
from cmjax.models.asr.acoustic import AcousticModel, layer_algorithms
from cmjax.models.asr.conv import Precision
from cmjax.models.asr.dfsmn import ConvDFSMN, ConvDFSMNConfig
from cmjax.models.asr.wav2letter import Wav2letter, Wav2letterConfig
from cmjax.program.step import Step


def wav2letter_float32(machine: Supernode) -> Step:
    """Wav2letter in float32."""
    return network_step(wav2letter, "float32")


def wav2letter_int8(machine: Supernode) -> Step:
    """Wav2letter with direct int8 convolutions."""
    return network_step(wav2letter, "int8")


def wav2letter_int8_winograd(machine: Supernode) -> Step:
    """Wav2letter with int8-Winograd convolutions where the kernel has taps."""
    return network_step(wav2letter, "int8-winograd")


def dfsmn_float32(machine: Supernode) -> Step:
    """ConvDFSMN in float32."""
    return network_step(dfsmn, "float32")


def dfsmn_int8(machine: Supernode) -> Step:
    """ConvDFSMN with direct int8 convolutions."""
    return network_step(dfsmn, "int8")


def dfsmn_int8_winograd(machine: Supernode) -> Step:
    """ConvDFSMN with int8-Winograd convolutions where the kernel has taps."""
    return network_step(dfsmn, "int8-winograd")


def network_step(build: Callable[[], AcousticModel], precision: Precision) -> Step:
    """The forward pass of a network as a step of sizes `batch` and `frames` (of features).

    Args:
      build: makes the network; only shapes are computed.
      precision: arithmetic.
    """

    def make() -> AcousticModel:
        model = build()
        if precision != "float32":
            for conv, form in zip(
                model.convolutions(), layer_algorithms(model, precision, "auto"), strict=True
            ):
                conv.prepare_scales(form, 127)
                conv.switch(precision)
            for conv in model.convolutions():
                conv.pack(for_kernels=False)
        return model

    graph, state = nnx.split(nnx.eval_shape(make))
    model = nnx.merge(graph, state)
    bands = model.mean.shape[0]
    chunk = model.chunk_multiple  # whole tiles: no layer pads its last one
    batch, chunks = jax.export.symbolic_shape("batch, chunks")

    def forward(state, features, lengths):
        return nnx.merge(graph, state)(features, lengths)

    def sizes(batch: float, frames: float):
        if frames < chunk:
            raise ValueError(f"frames must be at least {chunk}, got {frames:g}")
        return {"batch": batch, "chunks": frames / chunk}

    return Step(
        fn=forward,
        args=(
            state,
            jax.ShapeDtypeStruct((batch, chunks * chunk, bands), jnp.float32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        ),
        sizes=sizes,
        weight_bytes=float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))),
    )


def wav2letter() -> AcousticModel:
    """Wav2letter at its published sizes."""
    return Wav2letter(Wav2letterConfig(), inputs=39, outputs=29, rngs=nnx.Rngs(0))


def dfsmn() -> AcousticModel:
    """ConvDFSMN at its default sizes, for the 29 labels of Wav2letter."""
    return ConvDFSMN(ConvDFSMNConfig(), inputs=80, outputs=29, rngs=nnx.Rngs(0))
