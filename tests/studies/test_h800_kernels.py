"""The study of an H800's kernels."""

import pytest

from cmjax.deploy.validation import summary
from studies.h800_kernels import compared, measurements


@pytest.mark.slow
def test_kernels_that_nothing_was_fitted_to_are_priced_as_well_as_their_intervals_say(data):
    found = {key: summary(rows)["calibrate"] for key, rows in compared(data).items()}
    unseen = {kind: of for (kind, fitted), of in found.items() if not fitted}
    assert {kind: of.rows for kind, of in unseen.items()} == {
        "dense products": 90,
        "experts, decode": 78,
        "experts, prefill": 38,
        "latent attention": 37,
        "grouped-query attention": 279,
    }
    for kind, most in zip(unseen, (0.10, 0.13, 0.06, 0.06, 0.09), strict=True):
        assert unseen[kind].mean_error < most, kind
        assert unseen[kind].coverage > 0.7, kind


def test_absent_data_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"CMJAX_DATA: .* has no file measurements_public"):
        measurements("dense products", tmp_path)
