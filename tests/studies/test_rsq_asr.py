"""The study's arithmetic: averages, ratios, sizes, and what its picture says."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from cmjax.models.asr.wav2letter import Wav2letter, Wav2letterConfig
from studies.rsq_asr import (
    VARIANTS,
    Outcome,
    Study,
    half_width,
    model_bytes,
    noise_table,
    results_table,
    rows,
)
from studies.rsq_asr_figure import plot_tradeoff, tradeoff_title


def _outcomes() -> dict[str, list[Outcome]]:
    seconds = {"float32": 4.0, "int8 direct, PTQ": 2.0}
    return {
        name: [
            Outcome(
                wer={"test": 0.0, "test strings": wer + 0.01 * number},
                sqnr_db=[] if name == "float32" else [30.0, 20.0 + number],
                model_bytes=1024,
                end_to_end_s=seconds.get(name, 1.0),
                backbone_s=seconds.get(name, 0.5),
            )
            for wer in (0.01, 0.03)
        ]
        for number, name in enumerate(VARIANTS)
    }


def test_rows_average_over_seeds_and_compare_with_int8_direct():
    found = {row["variant"]: row for row in rows(_outcomes())}
    direct, ours = found["int8 direct, PTQ"], found["RSQ"]
    assert (direct["end_to_end"], direct["backbone"]) == (1.0, 1.0)
    assert (ours["end_to_end"], ours["backbone"]) == (2.0, 4.0)
    assert ours["wer"]["test strings"] == pytest.approx(0.11)
    assert ours["wer_least"]["test strings"] == pytest.approx(0.10)
    assert ours["wer_most"]["test strings"] == pytest.approx(0.12)
    assert ours["wer_loss"]["test strings"] == pytest.approx(0.09)  # the same for both seeds
    assert ours["wer_loss_interval"]["test strings"] == pytest.approx(0.0, abs=1e-12)
    assert ours["least_sqnr_db"] == 29.0 and found["float32"]["least_sqnr_db"] is None


def test_the_interval_of_a_mean_is_that_of_student():
    # t_0.975 with two degrees of freedom is 4.3027, the deviation of 1, 2, 3 is 1
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert half_width([1.0]) == float("inf")


def test_the_picture_states_speed_and_loss(tmp_path):
    found = {"dfsmn": rows(_outcomes()), "wav2letter": rows(_outcomes())}
    title = tradeoff_title(found)
    assert "2.00x int8 direct, word errors +9.00 points from float32 (naive +2.0)" in title
    plot_tradeoff(found, tmp_path / "tradeoff.png", published=1.48)
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000
    assert results_table("dfsmn", found["dfsmn"]).row_count == len(VARIANTS)
    noise = noise_table("dfsmn", found["dfsmn"])
    assert noise.row_count == 2 and list(noise.columns[-1].cells) == ["30.0", "29.0"]


def test_integers_take_a_byte_and_their_scales_four():
    config = Wav2letterConfig(width=8, first_kernel=3, depth=1, kernel=3, wide_kernel=3, wide=8)
    model = Wav2letter(config, inputs=4, outputs=3, rngs=nnx.Rngs(0))
    floats = sum(4 * x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert model_bytes(model) == floats
    conv = model.convolutions()[1]
    conv.prepare_scales("F(2,3)", 127)
    conv.switch("int8-winograd")
    conv.input_step[...] = jnp.asarray(0.5)
    filter_floats, points = 4 * 3 * 8 * 8, 4
    integers = points * 8 * 8 + 4 * (points * 8 + points + 1)  # and steps
    assert model_bytes(model) == floats - filter_floats + integers


def test_every_trained_part_begins_from_the_same_float32_network():
    study = Study()
    for name, variant in VARIANTS.items():
        config = study.config("dfsmn", 1, name)
        assert (config.float_stage.steps > 0) == (name == "float32")
        if name != "float32":
            assert (config.quant.steps > 0) == variant.trained
        assert config.seed == 1 and (config.loss.teacher > 0) == variant.distilled
    assert len({study.config("dfsmn", 0, name).out for name in VARIANTS}) == len(VARIANTS)
