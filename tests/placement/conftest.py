"""What several of these tests place."""

import pytest

from cmjax.placement import Loads, example_family


@pytest.fixture(scope="session")
def family() -> Loads:
    """Four workloads, three layers of 24 experts."""
    return Loads(example_family(workloads=4, layers=3, experts=24).counts)
