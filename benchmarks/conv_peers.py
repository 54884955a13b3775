"""1-D convolution in other libraries, each ready to be called again and again on data of its own.

Every int8 peer gets 8-bit activations and gives 8-bit activations: no quantization is timed, which
favours them over kernels that take and give float32. Activations are unsigned, which is the fast
case of ONNX Runtime; weights are int8 per output channel, random, with ReLU in the clipping.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer: `length` frames go in, `length // stride` come out (the padding sees to that)."""

    batch: int
    length: int
    cin: int
    cout: int
    taps: int
    stride: int = 1

    @property
    def out_length(self) -> int:
        return -(-self.length // self.stride)

    @property
    def padding(self) -> tuple[int, int]:
        """As SAME has it."""
        total = max((self.out_length - 1) * self.stride + self.taps - self.length, 0)
        return total // 2, total - total // 2

    @property
    def macs(self) -> int:
        return self.batch * self.out_length * self.cin * self.cout * self.taps

    def __str__(self) -> str:
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.batch}x{self.length} {self.cin}->{self.cout} k{self.taps}{stride}"


def peers(threads: int) -> dict[str, Callable[[Shape], Run]]:
    """The peers that are installed, by name."""
    table = {
        "ORT f32": ("onnxruntime", _onnxruntime_f32),
        "ORT int8": ("onnxruntime", _onnxruntime_int8),
        "OpenVINO int8": ("openvino", _openvino_int8),
        "torch int8": ("torch", _torch_int8),
    }
    return {
        name: lambda shape, build=build: build(shape, threads)
        for name, (module, build) in table.items()
        if importlib.util.find_spec(module) is not None
        and (module == "torch" or importlib.util.find_spec("onnx") is not None)
    }


def _operands(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Activations [batch, cin, length] and weights [cout, cin, taps], 8-bit."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (shape.batch, shape.cin, shape.length), np.uint8)
    return x, rng.integers(-64, 65, (shape.cout, shape.cin, shape.taps), np.int8)


def _onnx_model(shape: Shape, nodes, kind: int, constants: dict[str, Any]) -> bytes:
    from onnx import helper, numpy_helper  # pyright: ignore[reportMissingImports]

    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    ends = [
        helper.make_tensor_value_info(name, kind, [shape.batch, channels, length])
        for name, channels, length in (
            ("x", shape.cin, shape.length),
            ("y", shape.cout, shape.out_length),
        )
    ]
    graph = helper.make_graph(nodes, "conv", ends[:1], ends[1:], tensors)
    opset = helper.make_opsetid("", 19)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    return model.SerializeToString()


def _attributes(shape: Shape) -> dict[str, Any]:
    return {"kernel_shape": [shape.taps], "strides": [shape.stride], "pads": list(shape.padding)}


def _quantization(shape: Shape, w: np.ndarray) -> dict[str, Any]:
    return {
        "w": w,
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(128),
        "w_scale": np.full(shape.cout, 0.01, np.float32),
        "w_zero": np.zeros(shape.cout, np.int8),
        "y_scale": np.float32(0.5),
        "y_zero": np.uint8(0),  # clips at zero: ReLU
    }


def _onnxruntime(model: bytes, x: np.ndarray, threads: int) -> Run:
    import onnxruntime as ort  # pyright: ignore[reportMissingImports]

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("y")
    return lambda: session.run_with_iobinding(binding)


def _onnxruntime_f32(shape: Shape, threads: int) -> Run:
    from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]

    x, w = (operand.astype(np.float32) for operand in _operands(shape))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], **_attributes(shape)),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    return _onnxruntime(_onnx_model(shape, nodes, TensorProto.FLOAT, {"w": w}), x, threads)


def _onnxruntime_int8(shape: Shape, threads: int) -> Run:
    from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]

    x, w = _operands(shape)
    inputs = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    nodes = [helper.make_node("QLinearConv", inputs, ["y"], **_attributes(shape))]
    model = _onnx_model(shape, nodes, TensorProto.UINT8, _quantization(shape, w))
    return _onnxruntime(model, x, threads)


def _openvino_int8(shape: Shape, threads: int) -> Run:
    import openvino  # pyright: ignore[reportMissingImports]
    from onnx import TensorProto, helper  # pyright: ignore[reportMissingImports]

    x, w = _operands(shape)
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=0),
        helper.make_node("Conv", ["xf", "wf"], ["c"], **_attributes(shape)),
        helper.make_node("QuantizeLinear", ["c", "y_scale", "y_zero"], ["y"]),
    ]
    model = _onnx_model(shape, nodes, TensorProto.UINT8, _quantization(shape, w))
    core = openvino.Core()
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(model), "CPU", config).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x))
    return request.infer


def _torch_int8(shape: Shape, threads: int) -> Run:
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    torch.backends.quantized.engine = "x86"
    x, w = (torch.from_numpy(operand) for operand in _operands(shape))
    low, high = shape.padding
    x = torch.nn.functional.pad(x, (0, high - low), value=128)  # the rest alike on both sides
    qx = torch._make_per_tensor_quantized_tensor(x.contiguous(), 0.02, 128)
    scales, zeros = torch.full((shape.cout,), 0.01, dtype=torch.float64), torch.zeros(shape.cout)
    qw = torch._make_per_channel_quantized_tensor(w, scales, zeros.long(), 0)
    packed = torch.ops.quantized.conv1d_prepack(qw, None, [shape.stride], [low], [1], 1)
    return lambda: torch.ops.quantized.conv1d_relu(qx, packed, 0.5, 0)
