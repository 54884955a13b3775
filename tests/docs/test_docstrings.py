"""Docstrings of the house as the manual's reference shows them."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("griffe", reason="griffe comes with the extra `docs`")
FILE = Path(__file__).parents[2] / "docs/docstrings.py"


@pytest.fixture(scope="module")
def markdown():
    spec = importlib.util.spec_from_file_location("docstrings", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.markdown


def test_an_example_becomes_a_block_of_code_with_its_output(markdown):
    text = "Adds.\n\n>>> 1 + 1\n2\n\nMore."
    assert markdown(text) == "Adds.\n\n\n```pycon\n>>> 1 + 1\n2\n```\n\nMore."


def test_an_example_at_the_end_is_closed(markdown):
    assert markdown("  >>> f()\n  3").endswith("  >>> f()\n  3\n  ```")


def test_a_section_of_one_line_is_a_paragraph_and_a_longer_one_stays(markdown):
    text = "Adds.\nArgs:\n  x: a number.\nReturns: the sum.\nRaises: ValueError: never."
    assert markdown(text) == (
        "Adds.\nArgs:\n  x: a number.\n\n**Returns:** the sum.\n\n**Raises:** ValueError: never."
    )


def test_powers_are_not_bold_in_prose_and_stay_as_they_are_in_formulas(markdown):
    assert markdown("up to 2**(b-1)\n\n    y = 2**b") == "up to 2\\*\\*(b-1)\n\n    y = 2**b"
