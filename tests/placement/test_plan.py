"""Plans that hold together, and those that do not."""

import numpy as np
import pytest

from cmjax.placement import (
    Plan,
)


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"shares of expert 0 of layer 0 sum to 0\.9"):
        Plan(np.array([[0, 1, 0, 2]]), 3, 2, split=np.array([[0.5, 1, 0.4, 1]]))
