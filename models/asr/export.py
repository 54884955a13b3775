"""Acoustic models as ONNX, for runtimes elsewhere; integers as pairs of Quantize- and
DequantizeLinear.

    x -> Q(input_step) -> DQ -> Conv(DQ(int8 filter, a step per output channel), bias) -> activation

Runtimes fuse the pairs into integer convolutions. All convolutions are direct: ONNX has no short
algorithms. A layer of "int8" keeps its integers. A layer trained for a short algorithm is quantized
anew: its inputs over the range that its own integers reach (at most 127 steps), its filter over the
largest value of every output channel; direct int8 loses less than any short algorithm does.

Input: features [batch, frames, bands], whole utterances of one length, not normalised. Output:
logits [batch, outputs, labels]. Front end and alphabet are in the metadata. Needs the library onnx,
an extra: `pip install "cmjax[onnx]"`.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np

from cmjax.models.asr.acoustic import AcousticModel
from cmjax.models.asr.conv import Conv
from cmjax.models.asr.dfsmn import Block, Memory
from cmjax.models.asr.recognizer import Recognizer

OPSET = 19
IR_VERSION = 9
_LIMIT = 127


def to_onnx(recognizer: Recognizer, precision: str | None = None) -> bytes:
    """A network of a recognizer as ONNX, with what its front end and labels are.

    Args: precision: of the network, by default the one trained last.
    Raises: ValueError: there is no such network, or the library onnx is not installed.
    """
    metadata = {
        "labels": json.dumps(["<blank>", *recognizer.alphabet.symbols], ensure_ascii=False),
        "units": recognizer.alphabet.units,
        "features": "log-mel, Kaldi compute-fbank-feats, dither 0, 16-bit samples",
        **{name: str(v) for name, v in dataclasses.asdict(recognizer.front).items()},
    }
    return network_to_onnx(recognizer.network(precision), metadata)


def network_to_onnx(
    model: AcousticModel, metadata: dict[str, str] | None = None, *, frames: int | None = None
) -> bytes:
    """A network, in the precision that it is switched to, as ONNX.

    Args:
      model: the network.
      metadata: of the file.
      frames: of the features, where a runtime wants to know; by default any number.
    Raises: ValueError: the library onnx is not installed.
    """
    onnx = _library()
    graph = _Graph(onnx)
    mean, scale = (np.asarray(x[...], np.float32) for x in (model.mean, model.scale))
    value = graph.node("Sub", ["features", graph.constant(mean)])
    value = graph.node("Mul", [value, graph.constant(scale)])
    value = graph.node("Transpose", [value], perm=[0, 2, 1])
    outputs: int | str | None = frames
    for layer in model.layers:
        if isinstance(layer, Block):
            p = graph.conv(graph.conv(value, layer.expand), layer.project)
            value = graph.node("Add", [value, graph.memory(p, layer.memory)])
        else:
            value = graph.conv(value, layer)
            outputs = None if outputs is None else -(-outputs // layer.stride)
    graph.nodes.append(
        onnx.helper.make_node("Transpose", [value], ["logits"], name="logits", perm=[0, 2, 1])
    )
    labels = model.convolutions()[-1].cout
    batch, last = ("batch", "outputs") if frames is None else (1, outputs)
    kind = onnx.TensorProto.FLOAT
    given = [batch, frames or "frames", mean.shape[0]]
    ends = [
        onnx.helper.make_tensor_value_info("features", kind, given),
        onnx.helper.make_tensor_value_info("logits", kind, [batch, last, labels]),
    ]
    made = onnx.helper.make_graph(graph.nodes, "recognizer", ends[:1], ends[1:], graph.tensors)
    opset = onnx.helper.make_opsetid("", OPSET)
    network = onnx.helper.make_model(made, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.helper.set_model_props(network, metadata or {})
    onnx.checker.check_model(network)
    return network.SerializeToString()


class _Graph:
    """Nodes and constants, in the order of computation; values are [batch, channels, frames]."""

    def __init__(self, onnx):
        self.nodes: list = []
        self.tensors: list = []
        self._onnx = onnx

    def node(self, kind: str, inputs: list[str], **attributes) -> str:
        name = f"{kind}_{len(self.nodes)}"
        made = self._onnx.helper.make_node(kind, inputs, [name], name=f"n_{name}", **attributes)
        self.nodes.append(made)
        return name

    def constant(self, value: np.ndarray | np.generic) -> str:
        name = f"constant_{len(self.tensors)}"
        self.tensors.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def conv(self, value: str, conv: Conv) -> str:
        kernel = np.transpose(np.asarray(conv.kernel[...], np.float32), (2, 1, 0))
        bias = np.asarray(conv.bias[...], np.float32)
        if conv.precision == "float32":
            operands = [self.constant(kernel), self.constant(bias)]
        else:
            step, filter_step = direct_steps(conv)
            value = self.through_int8(value, step)
            integers = _integers(kernel, filter_step[:, None, None], np.int8, _LIMIT)
            sums = _integers(bias, step * filter_step, np.int32, 2**31 - 1)
            operands = [self.dequantized(integers, filter_step)]
            operands.append(self.dequantized(sums, np.asarray(step * filter_step, np.float32)))
        out = self.node(
            "Conv",
            [value, *operands],
            kernel_shape=[conv.taps],
            strides=[conv.stride],
            # One frame more than a stride needs, at times: what it adds is never read.
            pads=[conv.low, conv.taps - 1 - conv.low],
        )
        if conv.slope == 1:
            return out
        if conv.slope == 0:
            return self.node("Relu", [out])
        return self.node("LeakyRelu", [out], alpha=conv.slope)

    def through_int8(self, value: str, step: float) -> str:
        """`clip(round(value / step), -127, 127) * step`."""
        if not value.startswith("Relu"):  # int8 alone would reach -128
            limit = np.float32(_LIMIT * step)
            value = self.node("Clip", [value, self.constant(-limit), self.constant(limit)])
        operands = [self.constant(np.float32(step)), self.constant(np.int8(0))]
        integers = self.node("QuantizeLinear", [value, *operands])
        return self.node("DequantizeLinear", [integers, *operands])

    def dequantized(self, integers: np.ndarray, step: np.ndarray) -> str:
        """Constant integers times a step for every output channel."""
        operands = [integers, step, np.zeros(len(step), integers.dtype)]
        return self.node("DequantizeLinear", [self.constant(x) for x in operands], axis=0)

    def memory(self, value: str, memory: Memory) -> str:
        """Per-channel taps as grouped convolutions; the frame itself is one more tap of 1."""
        past, future = np.asarray(memory.past[...]), np.asarray(memory.future[...])
        back, ahead = memory.strides
        behind, before = memory.reach
        taps = np.zeros((behind + 1 + before, past.shape[1]), np.float32)
        taps[behind - back * np.arange(len(past))] += past
        taps[behind + ahead * np.arange(1, len(future) + 1)] += future
        taps[behind] += 1.0
        return self.node(
            "Conv",
            [value, self.constant(np.ascontiguousarray(np.transpose(taps)[:, None, :]))],
            kernel_shape=[len(taps)],
            group=taps.shape[1],
            pads=[behind, before],
        )


def direct_steps(conv: Conv) -> tuple[float, np.ndarray]:
    """(step of the input, step of the filter of every output channel) of a layer in direct int8.

    Those of a layer that is direct are its own; those of a short algorithm follow from the range of
    its inputs and the largest value of its filter.
    """
    scales = conv.scales
    step = float(jnp.max(scales.input_step))
    if conv.algorithm == "direct" and conv.input_limit == _LIMIT:
        return step * float(scales.point_step[0]), np.asarray(scales.filter_step[0], np.float32)
    largest = np.abs(np.asarray(conv.kernel[...], np.float32)).max(axis=(0, 1))
    filter_step = np.maximum(largest, np.finfo(np.float32).tiny) / np.float32(_LIMIT)
    return step * conv.input_limit / _LIMIT, filter_step


def _integers(values: np.ndarray, step: np.ndarray, dtype: type, limit: int) -> np.ndarray:
    return np.clip(np.rint(values * (1 / np.float64(step))), -limit, limit).astype(dtype)


def _library():
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnx.checker  # pyright: ignore[reportMissingImports]
        import onnx.helper  # pyright: ignore[reportMissingImports]
        import onnx.numpy_helper  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('export needs the library onnx: pip install "cmjax[onnx]"') from None
    return onnx
