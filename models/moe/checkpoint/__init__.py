"""Hugging Face checkpoints in and out."""

from cmjax.models.moe.checkpoint.hf_config import config_json, load_config, read_config
from cmjax.models.moe.checkpoint.load import Checkpoint, load, load_params, open_checkpoint
from cmjax.models.moe.checkpoint.save import save

__all__ = [
    "Checkpoint",
    "config_json",
    "load",
    "load_config",
    "load_params",
    "open_checkpoint",
    "read_config",
    "save",
]
