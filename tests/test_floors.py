"""The floors of the house: who may import whom, read from the source of every file."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = {"cmjax", "models", "train", "studies", "tests", "benchmarks"}
CMJAX_FLOORS = {
    "mesh": 0,
    "files": 0,
    "hardware": 0,
    "native": 0,
    "program": 1,
    "primitives": 2,
    "cost": 3,
    "placement": 4,
    "serving": 4,
    "parallel": 4,
    "report": 5,
    "commands": 6,
    "cli": 7,
}
HOUSE_FLOORS = {"cmjax": 0, "models": 1, "train": 2, "studies": 3}
SOURCES = sorted(
    path
    for package in HOUSE_FLOORS
    if (ROOT / package).is_dir()
    for path in (ROOT / package).rglob("*.py")
)
MOST_LINES = 450


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(tree: ast.AST, path: Path):
    """(line, dotted module) of every absolute import; a name imported from a package too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: relative import"
            yield node, node.module
            if node.module in PROJECT:  # from cmjax import cost
                yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def _may_import(importer: tuple[str, ...], imported: tuple[str, ...]) -> bool:
    """Whether a module at dotted path `importer` may import `imported`, both of the project."""
    if importer[0] != imported[0]:
        floors = HOUSE_FLOORS
        return imported[0] in floors and floors[imported[0]] < floors[importer[0]]
    if importer[0] != "cmjax" or len(imported) == 1 or importer[1] == imported[1]:
        return True
    below, above = CMJAX_FLOORS.get(imported[1]), CMJAX_FLOORS.get(importer[1])
    if below is None or above is None:  # no part of the library: a name such as __version__
        return importer[1] == "__init__" or below is None
    return importer[1] != "mesh" and below < above


def _module(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).with_suffix("").parts


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_import_points_down_the_floors(path):
    wrong = [
        f"{_name(path)}:{node.lineno} imports {imported}"
        for node, imported in _imports(ast.parse(path.read_text()), path)
        if imported.split(".")[0] in PROJECT
        and not _may_import(_module(path), tuple(imported.split(".")))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_function_imports_a_module_of_the_project(path):
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    wrong = [
        f"{_name(path)}:{node.lineno} imports {imported} inside a function"
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, functions)
        for node, imported in _imports(function, path)
        if imported.split(".")[0] in PROJECT
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [p for p in SOURCES if "cmjax" in _module(p)], ids=_name)
def test_every_library_file_is_one_subject_long(path):
    assert len(path.read_text().splitlines()) < MOST_LINES


def test_every_part_of_the_library_has_a_floor():
    parts = {_module(p)[1] for p in SOURCES if _module(p)[0] == "cmjax"} - {"__init__"}
    assert parts <= set(CMJAX_FLOORS), parts - set(CMJAX_FLOORS)


@pytest.mark.parametrize(
    "importer, imported, allowed",
    [
        ("cmjax.cost.price", "cmjax.program", True),
        ("cmjax.cost.price", "cmjax.mesh", True),
        ("cmjax.cost.price", "cmjax.cost.engines", True),
        ("cmjax.program.trace", "cmjax.cost", False),
        ("cmjax.program.trace", "cmjax.primitives", False),
        ("cmjax.hardware.load", "cmjax.mesh", False),
        ("cmjax.mesh", "cmjax.hardware", False),
        ("cmjax.serving.simulate", "cmjax.placement", False),
        ("cmjax.report.html", "cmjax.serving", True),
        ("cmjax.cost.deployment", "models.moe.deployment", False),
        ("models.moe.deepseek", "cmjax.cost", True),
        ("models.moe.deepseek", "train.rsq_asr", False),
        ("studies.pasa", "train.rsq_asr", True),
        ("train.rsq_asr", "tests.conftest", False),
    ],
)
def test_the_rule_itself_tells_allowed_from_forbidden(importer, imported, allowed):
    assert _may_import(tuple(importer.split(".")), tuple(imported.split("."))) is allowed


def test_no_two_test_files_share_a_name():
    """pytest imports a test file under its bare name, so a second one of that name is an error."""
    names = sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, next_ in itertools.pairwise(names) if name == next_]
