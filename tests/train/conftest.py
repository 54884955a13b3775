"""What tests of training runs share."""

import jax
import pytest


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Runs of a file share compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
