"""The acoustic models as ONNX, and as ONNX Runtime's own int8 of it: the peer of `benchmarks.asr`.

The exported network takes the same normalised features and has the same weights. int8 is made by
`onnxruntime.quantization.quantize_static`: weights per output channel, activations as unsigned
8 bits with ranges from samples, every operator that it has in integers.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.conv import Conv
from cmjax.models.asr.dfsmn import Block, Memory

Features = Float[np.ndarray, "batch frames inputs"]


def to_onnx(model: AcousticModel, length: int) -> bytes:
    """A float32 network for features [1, length, inputs] of a whole utterance, as ONNX.

    Normalisation of the features is left out: inputs are normalised.
    """
    from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]

    graph = _Graph()
    value, frames = graph.node("Transpose", ["features"], perm=[0, 2, 1]), length
    for layer in model.layers:
        if isinstance(layer, Block):
            p = graph.conv(graph.conv(value, layer.expand, frames), layer.project, frames)
            value = graph.node("Add", [value, graph.memory(p, layer.memory)])
        else:
            value = graph.conv(value, layer, frames)
            frames = -(-frames // layer.stride)
    logits = graph.node("Transpose", [value], perm=[0, 2, 1])
    inputs, outputs = model.mean.shape[0], model.convolutions()[-1].cout
    ends = [
        helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, length, inputs]),
        helper.make_tensor_value_info(logits, TensorProto.FLOAT, [1, frames, outputs]),
    ]
    made = helper.make_graph(graph.nodes, "network", ends[:1], ends[1:], graph.tensors)
    opset = helper.make_opsetid("", 19)
    return helper.make_model(made, opset_imports=[opset], ir_version=9).SerializeToString()


def quantized(network: bytes, samples: Sequence[Features]) -> bytes:
    """An ONNX network in int8, its ranges from samples of the features."""
    from onnxruntime.quantization import (  # pyright: ignore[reportMissingImports]
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import (  # pyright: ignore[reportMissingImports]
        quant_pre_process,
    )

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(samples)

        def get_next(self):
            sample = next(self.rest, None)
            return None if sample is None else {"features": sample}

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("float.onnx", "ready.onnx", "int8.onnx")]
        Path(paths[0]).write_bytes(network)
        quant_pre_process(paths[0], paths[1])
        quantize_static(
            paths[1],
            paths[2],
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return Path(paths[2]).read_bytes()


def session_call(network: bytes, threads: int) -> Callable[[Features], np.ndarray]:
    """features -> logits by ONNX Runtime."""
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    return lambda features: session.run(None, {"features": features})[0]


class _Graph:
    """Nodes and constants, in the order of computation; values are [1, channels, frames]."""

    def __init__(self):
        self.nodes: list = []
        self.tensors: list = []

    def node(self, kind: str, inputs: list[str], **attributes) -> str:
        from onnx import helper  # pyright: ignore[reportMissingImports]

        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def constant(self, value: np.ndarray) -> str:
        from onnx import numpy_helper  # pyright: ignore[reportMissingImports]

        name = f"constant_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def conv(self, value: str, conv: Conv, frames: int) -> str:
        kernel = np.transpose(np.asarray(conv.kernel[...]), (2, 1, 0))
        operands = [value, self.constant(kernel), self.constant(np.asarray(conv.bias[...]))]
        out = self.node(
            "Conv",
            operands,
            kernel_shape=[conv.taps],
            strides=[conv.stride],
            pads=list(conv.padding(frames)),
        )
        if conv.slope == 1:
            return out
        if conv.slope == 0:
            return self.node("Relu", [out])
        return self.node("LeakyRelu", [out], alpha=conv.slope)

    def memory(self, value: str, memory: Memory) -> str:
        """Per-channel taps as a grouped convolution; the frame itself is one more tap of 1."""
        if memory.strides != (1, 1):
            raise ValueError(f"to_onnx: memory strides must be 1, got {memory.strides}")
        past, future = np.asarray(memory.past[...]), np.asarray(memory.future[...])
        taps = np.concatenate([past[::-1], future])
        taps[len(past) - 1] += 1.0
        kernel = self.constant(np.transpose(taps)[:, None, :])
        return self.node(
            "Conv",
            [value, kernel],
            kernel_shape=[len(taps)],
            group=taps.shape[1],
            pads=list(memory.reach),
        )
