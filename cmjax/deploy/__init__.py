"""The joins: a model on a machine under requests, and a layer's price for a placement."""

from cmjax.deploy.comparison import Comparison, compare
from cmjax.deploy.deployment import Deployment, Phase
from cmjax.deploy.layer_price import LayerPrice
from cmjax.deploy.moe_step import build_layer, build_step, decode_step, prefill_step
from cmjax.deploy.placed import evaluate, place
from cmjax.deploy.placement_result import Placement
from cmjax.deploy.predict import predict, predictor_of
from cmjax.deploy.prediction import Prediction, calibration
from cmjax.deploy.predictor import Predictor
from cmjax.deploy.price import price
from cmjax.deploy.requests import Requests
from cmjax.deploy.search import DeploymentSearch, search
from cmjax.deploy.step import MoEStep

__all__ = [
    "Comparison",
    "Deployment",
    "DeploymentSearch",
    "LayerPrice",
    "MoEStep",
    "Phase",
    "Placement",
    "Prediction",
    "Predictor",
    "Requests",
    "build_layer",
    "build_step",
    "calibration",
    "compare",
    "decode_step",
    "evaluate",
    "place",
    "predict",
    "predictor_of",
    "prefill_step",
    "price",
    "search",
]
