"""The joins: a model on a machine under requests, and a layer's price for a placement."""

from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import MoEStep, build_layer, build_step, decode_step, prefill_step

__all__ = ["Deployment", "MoEStep", "build_layer", "build_step", "decode_step", "prefill_step"]
