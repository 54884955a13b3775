"""Dense decoders: PanGu-alpha with its query layer, GPT, and Llama-like ones."""

from cmjax.models.dense.config import PRESETS, DenseConfig, preset
from cmjax.models.dense.layers import CORE, Block, Recompute
from cmjax.models.dense.model import DenseModel, Embedding, Output, own_words, run_blocks
from cmjax.models.dense.tensor import TensorSplit

__all__ = [
    "CORE",
    "PRESETS",
    "Block",
    "DenseConfig",
    "DenseModel",
    "Embedding",
    "Output",
    "Recompute",
    "TensorSplit",
    "own_words",
    "preset",
    "run_blocks",
]
