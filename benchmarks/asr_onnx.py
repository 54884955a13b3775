"""Acoustic models in ONNX Runtime, in its own int8 too: the peer of `benchmarks.asr`.

The exported network takes the same features and has the same weights. int8 is made by
`onnxruntime.quantization.quantize_static`: weights per output channel, activations as unsigned
8 bits with ranges from samples, every operator that it has in integers.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

Features = Float[np.ndarray, "batch frames inputs"]


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
    return lambda features: np.asarray(session.run(None, {"features": features})[0])
