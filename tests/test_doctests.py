"""Every example in a docstring of the library and its models runs, and prints what it says."""

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmjax import primitives

ROOT = Path(__file__).parents[1]
FOLDERS = {"cmjax": "cmjax", "models": "cmjax.models"}
"""Where modules lie, and the package that a folder is imported as."""


def _modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str, int]]:
    """Name, docstring and its line of `node` and of all that is defined in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node, clean=False):
            yield name, text, node.body[0].lineno - 1
        for child in node.body:
            yield from _documented(child, f"{name}.{getattr(child, 'name', '')}")


def _examples() -> Iterator[doctest.DocTest]:
    for module, path in _modules():
        source = path.read_text()
        if ">>> " in source:
            for name, text, line in _documented(ast.parse(source), module):
                test = doctest.DocTestParser().get_doctest(
                    text, {"module": module}, name, str(path), line
                )
                if test.examples:
                    yield test


EXAMPLES = list(_examples())


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_an_example_prints_what_it_says(test: doctest.DocTest):
    test.globs = dict(vars(importlib.import_module(test.globs["module"])))
    report: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not outcome.failed, "".join(report)


def test_the_public_operations_have_examples():
    """The names on the face of `cmjax.primitives` that are functions, each with an example."""
    named = {test.name.rpartition(".")[2] for test in EXAMPLES}
    functions = {
        name
        for name in primitives.__all__
        if callable(value := getattr(primitives, name)) and not isinstance(value, type)
    }
    assert functions <= named, f"without an example: {sorted(functions - named)}"
