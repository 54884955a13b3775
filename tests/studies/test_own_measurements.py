"""Three measured points put a machine right."""

import pytest

from studies.own_measurements import study


@pytest.mark.slow
def test_three_measurements_bring_predictions_within_five_per_cent():
    found = study()
    assert found.before > 0.20
    assert found.after < 0.05
