"""Code blocks of the README and of the manual: found, and run as a reader would run them.

Blocks of a page run in order, in one folder and, if they are Python, in one namespace. A comment in
front of a block says how:

    <!-- slow -->            it takes more than a few seconds
    <!-- own process -->     it needs a JAX of its own (more devices than the tests have)
    <!-- needs: REASON -->   it is not run: it needs data, other libraries, a network or hours

A statement that ends in `# → TEXT` must print this text.
"""

import ast
import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from cmjax.cli import main as cmjax_main

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUN = ("python", "bash")
_FENCE = re.compile(r"^```(\w*)\s*$")
_COMMENT = re.compile(r"^<!--\s*(.*?)\s*-->$")
_SHOWN = re.compile(r"#\s*→\s*(.*)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: `line` is its first line, `notes` what comments before it say."""

    page: Path
    line: int
    language: str
    text: str
    notes: tuple[str, ...]

    @property
    def slow(self) -> bool:
        return "slow" in self.notes

    @property
    def own_process(self) -> bool:
        return "own process" in self.notes

    @property
    def needs(self) -> str | None:
        """Why it is not run."""
        found = [note.removeprefix("needs:").strip() for note in self.notes if "needs:" in note]
        return found[0] if found else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found, notes, language, start, body = [], [], None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if language is not None:
            if line.strip() == "```":
                text = "\n".join(body) + "\n"
                found.append(Block(page, start + 1, language, text, tuple(notes)))
                language, notes = None, []
            else:
                body.append(line)
        elif fence := _FENCE.match(line):
            language, start, body = fence[1], number, []
        elif comment := _COMMENT.match(line):
            notes.append(comment[1])
        elif line.strip():
            notes = []
    assert language is None, f"{page}: a block is not closed"
    return found


def examples(page: Path) -> list[Block]:
    """The blocks that can be run."""
    return [block for block in blocks(page) if block.language in RUN]


def run_page(page: Path, *, slow: bool) -> None:
    """Run the examples of a page in the current folder; slow ones only where asked for."""
    namespace = {"__name__": "__main__"}
    for block in examples(page):
        if block.needs is None and (slow or not block.slow):
            if block.language == "bash":
                for words in commands(block.text):
                    _run_command(block, words)
            elif block.own_process:
                _succeeds(block, [sys.executable, "-c", block.text])
            else:
                _run_python(block, namespace)


def commands(text: str) -> list[list[str]]:
    """Command lines as words; comments and continued lines are understood."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _run_python(block: Block, namespace: dict) -> None:
    """Run a block statement by statement, and hold what it prints against what it says."""
    tree = ast.parse(block.text, str(block))
    ast.increment_lineno(tree, block.line - 1)
    for statement in tree.body:
        code = compile(ast.Module([statement], []), str(block.page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        last = block.text.splitlines()[(statement.end_lineno or 0) - block.line]
        if shown := _SHOWN.search(last):
            assert printed.getvalue().strip() == shown[1].strip(), str(block)


def _run_command(block: Block, words: list[str]) -> None:
    if words[0] == "cmjax" and not block.own_process:
        code = cmjax_main(words[1:])
        assert code == 0, f"{block}: {shlex.join(words)} returned {code}"
        return
    environment = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[0] == "make":  # its targets run elsewhere: that it is one is what is tested
        words = ["make", "--dry-run", "--directory", str(ROOT), *words[1:]]
    elif words[0] in ("cmjax", "python"):
        module = ["-m", "cmjax"] if words[0] == "cmjax" else []
        words = [sys.executable, *module, *words[1:]]
    _succeeds(block, words, environment)


def _succeeds(block: Block, words: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a process, without the devices of the tests."""
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = subprocess.run(
        words,
        env=inherited | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, f"{block}: {shlex.join(words)}\n{found.stdout}{found.stderr}"
