"""The study of arithmetics: what it measures, prices, draws and refuses."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from studies.arithmetic import PRICED, Study, main, plot, priced, table
from train.moe.config import LanguageModelConfig
from train.moe.run import start, train

QUIET = Console(quiet=True)
TINY = {
    "hidden": 64,
    "layers": 2,
    "experts": 4,
    "expert_ffn": 64,
    "length": 16,
    "batch": 2,
    "steps": 2,
}


def test_few_bits_are_priced_as_faster_decode_steps_and_float32_not_at_all():
    assert priced("bfloat16")["decode_ms"] > priced("msd_w8a16")["decode_ms"] > 0
    assert priced("float32") == {}


def test_the_table_has_every_row_and_the_picture_is_written(tmp_path):
    measured = {"loss": 1.0, "divergence": 1e-4, "agreement": 0.99}
    rows = [{"name": "float32", **measured, "divergence": 0.0}]
    for number, name in enumerate(PRICED):
        rows.append({"name": name, **measured, "decode_ms": 80.0 - number, "prefill_ms": 2e3})
    console = Console(width=120, file=io.StringIO())
    with console.capture() as shown:
        console.print(table(rows))
    assert all(name in shown.get() for name in PRICED)
    plot(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_checkpoint_is_measured_in_every_arithmetic(tmp_path):
    config = LanguageModelConfig(out=tmp_path / "run", **TINY)
    train(start(config, QUIET), QUIET)
    main(Study(checkpoint=config.out, out=tmp_path / "study", windows=2), QUIET)
    rows = json.loads((tmp_path / "study/results.json").read_text())
    assert [row["name"] for row in rows[:2]] == ["float32", "bfloat16"]
    assert {row["name"].removesuffix(", calibrated") for row in rows} == {"float32", *PRICED}
    assert rows[0]["divergence"] == 0
    assert all(0 < row["divergence"] < 0.05 for row in rows[1:])


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in this folder"):
        main(Study(checkpoint=tmp_path, out=tmp_path), QUIET)
    with pytest.raises(ValueError, match="--windows and --steps must be at least 1"):
        Study(windows=0, out=Path("unused"))
