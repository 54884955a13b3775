"""The study of published training runs: memory and bubble (times: tests/parallelism)."""

import pytest

from cmjax.parallelism import bubble
from studies.training_rows import PANGU_ULTRA, memories, times


def test_memory_is_within_a_tenth_of_korthikantis(data):
    rows = memories(data)
    assert [row.billions for row in rows] == ["22", "175"]
    for row in rows:
        assert row.worst < 0.10


def test_the_bubble_of_pangu_ultra_is_the_reported_one():
    """30.45 and 6.8 %, as far as they are written out: 7 / 23 is 30.43 %."""
    for chunks, published in PANGU_ULTRA:
        found = bubble("interleaved" if chunks > 1 else "1f1b", 16, 8, chunks)
        assert 100 * found == pytest.approx(published, abs=0.05)


def test_absent_data_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"CMJAX_DATA: .* has no folder measurements_training"):
        times(tmp_path)
