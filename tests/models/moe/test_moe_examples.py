"""The main functions of `cmjax.models.moe` have examples, which `tests/test_doctests.py` runs."""

import doctest

from cmjax.models import moe


def test_the_main_functions_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for function in (
        moe.load,
        moe.save,
        moe.load_config,
        moe.from_config,
        moe.generate,
        moe.open_generator,
        moe.published_table,
        moe.ep_table,
    ):
        assert any(test.examples for test in finder.find(function)), function.__name__
