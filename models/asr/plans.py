"""What calibration fixed of a network's convolutions, as plain JSON values."""

from collections.abc import Sequence
from typing import Any

from cmjax.models.asr.acoustic import AcousticModel


def saved_plans(model: AcousticModel) -> list[dict[str, Any]]:
    """Of every convolution: precision, algorithm, input range and how operands are requantized."""
    return [
        {
            "precision": conv.precision,
            "algorithm": conv.algorithm,
            "input_limit": conv.input_limit,
            "requantize": conv.requantize,
        }
        for conv in model.convolutions()
    ]


def restore_plans(model: AcousticModel, plans: Sequence[dict[str, Any]]) -> None:
    """Make a new model as `saved_plans` says, with steps of the right shapes to be filled."""
    for conv, plan in zip(model.convolutions(), plans, strict=True):
        if plan["algorithm"] is not None:
            conv.prepare_scales(
                plan["algorithm"], plan["input_limit"], requantize=plan["requantize"]
            )
        conv.switch(plan["precision"])
