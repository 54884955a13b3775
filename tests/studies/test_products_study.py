"""The study of an H800's matrix products."""

import pytest

from cmjax.deploy.validation import summary
from studies.products import compared, measurements


@pytest.mark.slow
def test_products_that_nothing_was_fitted_to_are_priced_as_well_as_their_intervals_say(data):
    found = {key: summary(rows)["calibrate"] for key, rows in compared(data).items()}
    assert {key: of.rows for key, of in found.items()} == {
        ("dense", True): 20,
        ("dense", False): 90,
        ("experts, decode", True): 16,
        ("experts, decode", False): 78,
        ("experts, prefill", True): 2,
        ("experts, prefill", False): 46,
    }
    unseen = {kind: of for (kind, fitted), of in found.items() if not fitted}
    assert unseen["dense"].mean_error < 0.1
    assert unseen["experts, prefill"].mean_error < 0.1
    assert unseen["experts, decode"].mean_error < 0.13
    assert all(of.coverage > 0.75 for of in unseen.values())


def test_absent_data_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"CMJAX_DATA: .* has no file measurements_public"):
        measurements("dense", tmp_path)
