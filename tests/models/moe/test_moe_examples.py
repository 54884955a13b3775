"""The examples in the docstrings of `cmjax.models.moe` give what they say."""

import doctest
import importlib
import pkgutil

import pytest

from cmjax.models import moe

MODULES = sorted(module.name for module in pkgutil.walk_packages(moe.__path__, f"{moe.__name__}."))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name, capsys):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0, capsys.readouterr().out


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
