"""Options are read into a dataclass, and what is wrong with them is one line."""

import dataclasses
import importlib
import runpy
import sys
from pathlib import Path
from typing import Literal

import pytest

from cmjax.options import parsed, run_program

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("studies", "train", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "run_program(" in path.read_text()
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    name: str
    """Its name."""
    ranks: int = 8
    """How many."""
    phase: Literal["decode", "prefill"] = "decode"
    """Which half."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--name", "x", "--rank", "3"], r"unrecognized options: --rank, 3; perhaps --ranks\?"),
        (["--name", "x", "--ranks", "many"], r"--ranks takes INT, got 'many'"),
        (["--name", "x", "--ranks"], r"missing value for argument '--ranks'"),
        (["--name", "x", "--phase", "both"], r"--phase takes one of '.*, got 'both'"),
        (["--ranks", "3"], r"missing from it: --name STR"),
        (["--name", "x", "--ranks", "0"], r"ranks must be at least 1, got 0"),
        (["--name", "x", "left", "over"], r"unrecognized options: left, over"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(arguments, line):
    with pytest.raises(ValueError, match=line) as found:
        parsed(Options, arguments, prog="it")
    said = str(found.value)
    assert "\n" not in said and not set("│╭╰─") & set(said) and "it --help" in said


def test_help_is_printed_and_no_fault(capsys):
    with pytest.raises(SystemExit) as left:
        parsed(Options, ["--help"], prog="it")
    assert not left.value.code and "How many." in capsys.readouterr().out


def test_a_program_runs_with_its_options_and_says_how_it_went(capsys):
    found = []
    assert run_program(found.append, Options, None, ["--name", "x", "--ranks", "2"]) == 0
    assert found == [Options(name="x", ranks=2)]
    assert run_program(found.append, Options, None, ["--name"]) == 2
    assert capsys.readouterr().err.startswith("error: missing value for argument '--name'")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_refuses_an_unknown_option_in_one_line(program, monkeypatch, capsys):
    pytest.importorskip(program, exc_type=ImportError)  # a peer that it measures is not here
    module = importlib.import_module(program)
    monkeypatch.setattr(sys, "argv", [str(module.__file__), "--no-such-option", "1"])
    monkeypatch.delitem(sys.modules, program)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(program, run_name="__main__")
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("error: unrecognized options: --no-such-option", "error: missing from"))
