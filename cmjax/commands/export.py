"""`cmjax export`: a recognizer that `train.rsq_asr` trained, as ONNX, for other runtimes."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console

from cmjax.console import check_target
from cmjax.files import replace_bytes
from cmjax.models.asr.export import to_onnx
from cmjax.models.asr.recognizer import load_recognizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained recognizer as an ONNX network with direct convolutions in int8.

    Its input is log-mel features, as of Kaldi's compute-fbank-feats without dither; the options of
    the front end and the alphabet are in the file's metadata. A recognizer trained in float32 gives
    a float32 network.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a training, or the recognizer.npz in it."""
    target: tyro.conf.Positional[Path]
    """The ONNX file to write."""
    float32: bool = False
    """Export the float32 network of a recognizer that was trained for integers."""

    def run(self, console: Console) -> None:
        """Convert and write.

        Raises: ValueError: no recognizer, or the library onnx is not installed.
        """
        check_target(self.target)
        recognizer = load_recognizer(self.checkpoint)
        precision = "float32" if self.float32 else None
        network = to_onnx(recognizer, precision)
        replace_bytes(self.target, network)
        kind = "float32" if self.float32 else recognizer.precision
        console.print(
            f"{self.target}: {len(network) / 1e6:.1f} MB, from the {kind} network; input features "
            f"[batch, frames, {recognizer.front.bands}], output logits over "
            f"{recognizer.alphabet.size} labels, 0 is the blank",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
