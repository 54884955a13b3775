"""The README and the manual: short, whole, and naming only what there is."""

import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import re
import runpy
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from markdown_examples import PAGES, ROOT, blocks, commands, examples

from cmjax import cli
from cmjax.cost.fit import fitted_keys

MANUAL = sorted((ROOT / "docs").rglob("*.md"))
PARTS = ("cmjax", "studies", "train", "benchmarks")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_OPTION = re.compile(r"--[a-z][\w.-]*")
_DOTTED = re.compile(rf"\b(?:{'|'.join(PARTS)})(?:\.[A-Za-z_]\w*)+")
_FILE = re.compile(r"(?:cmjax|models|train|studies|tests|benchmarks|docs)/[\w./-]+\.\w+")
_INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_block_of_code_is_fenced(page):
    """What is indented would be shown as code and run by nothing."""
    lines = _prose(page).splitlines()
    indented = [
        line
        for before, line in itertools.pairwise(lines)
        if line.startswith("    ") and not before.strip()
    ]
    assert not indented


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_picture_and_included_table_is_there(page):
    targets = [link for link in _LINK.findall(_prose(page)) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link.partition("#")[0]).exists()]
    included = _INCLUDED.findall(page.read_text(encoding="utf-8"))
    missing += [name for name in included if not (ROOT / "docs" / name).is_file()]
    assert not missing


def test_every_page_of_the_manual_is_in_its_contents():
    contents = re.findall(r"[\w./]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {page.relative_to(ROOT / "docs") for page in MANUAL}
    assert {Path(name) for name in contents} == {p for p in pages if p.parts[0] != "tables"}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_and_option_shown_exists(page):
    wrong = []
    for block in examples(page):
        if block.language == "bash":
            for words in commands(block.text):
                wrong += [f"{block}: {problem}" for problem in _problems(words)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_option_module_and_file_named_in_prose_exists(page):
    wrong = []
    for code in _CODE.findall(_prose(page)):
        wrong += [option for option in _OPTION.findall(code) if option not in _known_options()]
        wrong += [name for name in _DOTTED.findall(code) if not _exists(name)]
        wrong += [name for name in _FILE.findall(code) if not (ROOT / name).exists()]
        words = code.split()
        if words[0] == "cmjax" and len(words) > 1:
            wrong += [] if words[1] in _COMMANDS or words[1] == "COMMAND" else [code]
        if words[0] == "make" and len(words) == 2:
            wrong += [] if words[1] in _targets() else [code]
    assert not wrong


def test_a_wrong_command_option_module_or_target_is_found():
    assert _problems(["cmjax", "predict", "decode", "--batches", "1"])
    assert _problems(["cmjax", "forecast"])
    assert _problems(["python", "-m", "studies.atlantis"])
    assert _problems(["make", "coffee"])
    assert not _problems(["cmjax", "predict", "decode", "--batch", "1"])
    assert not _exists("cmjax.models.moe.atlantis") and _exists("cmjax.models.moe.load")


def _problems(words: list[str]) -> list[str]:
    """What a command line names that there is not."""
    while "=" in words[0]:
        words = words[1:]
    program, *rest = words
    if program == "cmjax":
        if rest[0] not in _COMMANDS:
            return [f"no command {rest[0]}"]
        known = _help_of_command(rest[0])
    elif program == "python":
        assert rest[0] == "-m", words
        if importlib.util.find_spec(rest[1].split(".")[0]) is None or not _is_program(rest[1]):
            return [f"no module {rest[1]}"]
        known = _help_of_module(rest[1])
    elif program == "make":
        return [f"no target {target}" for target in rest if target not in _targets()]
    else:
        return [] if program == "pip" else [f"unknown program {program}"]
    given = (word.partition("=")[0] for word in rest)
    return [f"no option {w}" for w in given if w.startswith("--") and w not in known]


_COMMANDS = set(cli._COMMANDS)


@functools.cache
def _help_of_command(name: str) -> frozenset[str]:
    return _options_printed(lambda: cli.main([name, "--help"]))


@functools.cache
def _help_of_module(name: str) -> frozenset[str]:
    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # runpy: the module may be imported already
            runpy.run_module(name, run_name="__main__", alter_sys=True)

    if name == "cmjax.native":  # it takes none
        return frozenset()
    before, sys.argv = sys.argv, [name, "--help"]
    try:
        return _options_printed(run)
    finally:
        sys.argv = before


def _options_printed(run) -> frozenset[str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run()
    return frozenset(_OPTION.findall(printed.getvalue()))


@functools.cache
def _known_options() -> frozenset[str]:
    """Those of every command, and of every program that a page shows."""
    shown = {
        words[words.index("-m") + 1]
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash"
        for words in commands(block.text)
        if "python" in words
    }
    found = [_help_of_command(name) for name in _COMMANDS]
    return frozenset().union(*found, *map(_help_of_module, sorted(shown)), {"--help"})


def _is_program(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _exists(dotted: str) -> bool:
    """Whether a dotted name is a module of the project, or an attribute of one."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        module = ".".join(parts[:split])
        if _is_program(module):
            found = importlib.import_module(module)
            for attribute in parts[split:]:
                if not hasattr(found, attribute):
                    return False
                found = getattr(found, attribute)
            return True
    return False


@functools.cache
def _targets() -> frozenset[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^([\w-]+):", text, flags=re.MULTILINE))


def test_the_reference_has_every_name_of_the_face():
    face = (ROOT / "cmjax/__init__.pyi").read_text(encoding="utf-8")
    page = (ROOT / "docs/reference/cmjax.md").read_text(encoding="utf-8")
    names = re.findall(r"import \w+ as (\w+)$", face, flags=re.MULTILINE)
    assert len(names) > 20
    assert not [name for name in names if not re.search(rf"\.{name}\b|`{name}`", page)]


@pytest.mark.parametrize("name", ["README.md", "docs/how_it_works.md", "docs/validation.md"])
def test_as_many_constants_are_fitted_as_a_page_says(name):
    said = re.search(
        r"(\w+) constants of the CloudMatrix384,? and (\w+) of the H800", (ROOT / name).read_text()
    )
    assert said is not None
    words = {
        "seven": 7,
        "eight": 8,
        "nine": 9,
        "ten": 10,
        "eleven": 11,
        "twelve": 12,
        "thirteen": 13,
    }
    machines = ("cloudmatrix384", "h800-pod")
    assert [words[word.lower()] for word in said.groups()] == [
        len(fitted_keys(machine)) for machine in machines
    ]


@pytest.mark.slow
def test_the_manual_builds_without_a_warning(tmp_path):
    """mkdocs is an extra: skipped where it is not installed."""
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    found = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    page = (tmp_path / "reference/cmjax.html").read_text(encoding="utf-8")
    assert 'id="cmjax.deploy.predict.predict"' in page


def test_the_manual_is_an_extra_and_not_in_the_default_installation():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any("mkdocs" in wanted for wanted in project["optional-dependencies"]["docs"])
    assert not any("mkdocs" in wanted for wanted in project["dependencies"])
