"""The networks as priced programs: what Winograd moves from the cube to the vector cores."""

import pytest

from cmjax.hardware import load_machine
from cmjax.models.asr import pricing

MACHINE = load_machine("cloudmatrix384")


def _totals(step, frames: float = 1200.0):
    program = step.trace()
    return program.totals(dict(step.symbols({"batch": 8.0, "frames": frames})))


def test_float32_work_is_two_flops_per_mac():
    totals = _totals(pricing.wav2letter_float32(MACHINE))
    macs = 23_588_500 * 8 * 600
    assert totals["cube_flops_32bit"] == pytest.approx(2 * macs, rel=1e-6)


def test_winograd_moves_work_from_the_cube_to_the_vector_cores():
    direct = _totals(pricing.wav2letter_int8(MACHINE))
    short = _totals(pricing.wav2letter_int8_winograd(MACHINE))
    assert direct["cube_flops_8bit"] == pytest.approx(2 * 23_588_500 * 8 * 600, rel=0.03)
    assert short["cube_flops_8bit"] < 0.7 * direct["cube_flops_8bit"]
    assert short["vector_bytes"] > 1.5 * direct["vector_bytes"]


def test_frames_below_one_tile_are_refused():
    step = pricing.dfsmn_int8_winograd(MACHINE)
    with pytest.raises(ValueError, match="frames must be at least"):
        step.symbols({"batch": 1.0, "frames": 1.0})
