"""The floors of the house: who may import whom, read from the source of every file."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = {"cmjax", "models", "train", "studies", "tests", "benchmarks"}
FOLDERS = ("cmjax", "models", "train", "studies", "benchmarks")
FLOORS = {
    "inputs": -1,
    "cores": 0,
    "files": 0,
    "executables": 1,
    "interrupt": 0,
    "version": 0,
    "occupancy": 0,
    "console": 1,
    "options": 2,
    "sweep": 2,
    "hardware": 0,
    "native": 0,
    "mesh": 1,
    "processes": 2,
    "program": 2,
    "primitives": 3,
    "placement": 3,
    "cost": 4,
    "verify": 5,
    "models": 5,
    "deploy": 6,
    "serving": 7,
    "parallelism": 7,
    "codesign": 7,
    "report": 8,
    "commands": 9,
    "cli": 10,
    "__main__": 11,
}
"""Parts of `cmjax`, which may import what lies lower, and their own."""
HOUSE_FLOORS = {"cmjax": 0, "train": 1, "studies": 2, "benchmarks": 2}
SOURCES = sorted(
    path for folder in FOLDERS if (ROOT / folder).is_dir() for path in (ROOT / folder).rglob("*.py")
)
MOST_LINES = 450
A_MODULE = re.compile(r"(cmjax|models|train|studies|tests|benchmarks)(\.[a-z_]\w*)+(:\w+)?")
"""A string that is a dotted name of the project: an import, if anything ever imports it."""


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(tree: ast.AST, path: Path):
    """(node, dotted module) of every absolute import; a name imported from a package too, and a
    string that names a module, docstrings aside."""
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # docstrings and strings under a field
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: relative import"
            yield node, node.module
            if node.module in PROJECT:  # from cmjax import cost
                yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and id(node) not in prose and _names_module(node.value):
            yield node, node.value.partition(":")[0]


def _names_module(value: object) -> bool:
    return isinstance(value, str) and A_MODULE.fullmatch(value) is not None


def _may_import(importer: tuple[str, ...], imported: tuple[str, ...]) -> bool:
    """Whether a module at dotted path `importer` may import `imported`, both of the project."""
    if importer[0] != imported[0]:
        floors = HOUSE_FLOORS
        return imported[0] in floors and floors[imported[0]] < floors[importer[0]]
    if importer[0] != "cmjax" or len(imported) == 1 or importer[1] == imported[1]:
        return True
    below, above = FLOORS.get(imported[1]), FLOORS.get(importer[1])
    if below is None or above is None:  # the face, or a name of it
        return importer[1] == "__init__" or below is None
    return below < above


def _module(path: Path) -> tuple[str, ...]:
    """Of a file, as it is imported: `models/` is `cmjax.models`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ("cmjax", *parts) if parts[0] == "models" else parts


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_import_points_down_the_floors(path):
    wrong = [
        f"{_name(path)}:{node.lineno} imports {imported}"
        for node, imported in _imports(ast.parse(path.read_text()), path)
        if imported.split(".")[0] in PROJECT
        and not _may_import(_module(path), tuple(imported.split(".")))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [p for p in SOURCES if "benchmarks" not in p.parts], ids=_name)
def test_no_function_imports_a_module_of_the_project(path):
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    wrong = [
        f"{_name(path)}:{node.lineno} imports {imported} inside a function"
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, functions)
        for node, imported in _imports(function, path)
        if imported.split(".")[0] in PROJECT and not isinstance(node, ast.Constant)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [p for p in SOURCES if _module(p)[0] == "cmjax"], ids=_name)
def test_every_library_file_is_one_subject_long(path):
    assert len(path.read_text().splitlines()) < MOST_LINES


def test_every_part_of_the_library_has_a_floor():
    parts = {_module(p)[1] for p in SOURCES if _module(p)[0] == "cmjax"} - {"__init__"}
    assert parts <= set(FLOORS), parts - set(FLOORS)


@pytest.mark.parametrize(
    "importer, imported, allowed",
    [
        ("cmjax.cost.price", "cmjax.program", True),
        ("cmjax.cost.price", "cmjax.mesh", True),
        ("cmjax.cost.price", "cmjax.cost.engines", True),
        ("cmjax.program.trace", "cmjax.cost", False),
        ("cmjax.program.trace", "cmjax.primitives", False),
        ("cmjax.hardware.load", "cmjax.mesh", False),
        ("cmjax.files", "cmjax.hardware", False),
        ("cmjax.placement.problem", "cmjax.cost", False),
        ("cmjax.serving.simulate", "cmjax.deploy", True),
        ("cmjax.deploy.predictor", "cmjax.report", False),
        ("cmjax.report.html", "cmjax.serving", True),
        ("cmjax.cost.price", "cmjax.models.moe", False),
        ("cmjax.deploy.moe_step", "cmjax.models.moe", True),
        ("cmjax.models.moe.steps", "cmjax.deploy.moe_step", False),
        ("cmjax.models.moe.steps", "models.moe.config", False),
        ("cmjax.models.moe.steps", "train.rsq_asr", False),
        ("studies.pasa", "train.rsq_asr", True),
        ("train.rsq_asr", "tests.conftest", False),
    ],
)
def test_the_rule_itself_tells_allowed_from_forbidden(importer, imported, allowed):
    assert _may_import(tuple(importer.split(".")), tuple(imported.split("."))) is allowed


def test_a_string_that_names_a_module_counts_as_an_import():
    tree = ast.parse('"""cmjax.deploy: prose."""\nPROVIDER = "cmjax.deploy.moe_step:build"\n')
    assert [name for _, name in _imports(tree, ROOT / "cmjax/x.py")] == ["cmjax.deploy.moe_step"]


def test_no_two_test_files_share_a_name():
    """pytest imports a test file under its bare name, so a second one of that name is an error."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, next_ in itertools.pairwise(names) if name == next_]


def test_the_longest_tests_are_there():
    for name in (ROOT / "tests/longest.txt").read_text(encoding="utf-8").splitlines():
        path, _, function = name.partition("[")[0].partition("::")
        assert f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), name
