"""How a program ends: one line, its exit code, and never a traceback on the terminal."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cmjax.console import check_target, exit_code, terminal


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\nlines"), 2, "error: two lines"),
        (OverflowError("int too large"), 2, "error: a number is too large .*: int too large"),
        (RecursionError("maximum"), 2, "error: what is given is nested too deeply"),
        (MemoryError(), 1, "error: not enough memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), 1, "error: not enough memory"),
        (RuntimeError("Unable to initialize backend 'x'"), 2, "error: JAX_PLATFORMS=.*backend 'x'"),
        (OSError(28, "No space left on device"), 1, "error: .*No space left"),
        (FloatingPointError("loss"), 1, "error: loss"),
        (KeyError("name"), 1, r"error: cmjax itself failed \(KeyError: 'name'\); please report"),
    ],
)
def test_every_failure_is_one_line(error, code, line, capsys):
    def run():
        raise error

    assert exit_code(run) == code
    said = capsys.readouterr().err
    assert re.match(line, said) and said.count("\n") == 1


def test_a_fault_of_the_program_is_written_to_a_file_that_only_its_user_reads(capsys):
    def run():
        {}["surprise"]

    assert exit_code(run) == 1
    file = Path(re.findall(r"report it with (\S+\.log)", capsys.readouterr().err)[0])
    assert "KeyError: 'surprise'" in file.read_text() and "Traceback" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    file.unlink()


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")],
)
def test_a_signal_is_one_line_also_where_an_import_turns_it_into_another_error(
    number, code, line, capsys
):
    def run():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ImportError("half a module") from None

    before = signal.getsignal(number)
    assert exit_code(run) == code and capsys.readouterr().err == line
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert exit_code(lambda: signal.raise_signal(signal.SIGTERM)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(code: str, *, out=subprocess.PIPE, shell: str | None = None, **environment: str):
    return subprocess.run(
        [sys.executable, "-c", code]
        if shell is None
        else ["sh", "-c", shell, sys.executable, code],
        stdout=out,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        timeout=60,
    )


PRINTS = """
import sys
from cmjax.console import emit, exit_code, terminal
sys.exit(exit_code(lambda: emit(terminal(), "-", {"a": "x" * 100_000})))
"""


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ('"$0" -c "$1" >&-', 1, b"error: standard output is closed"),
        ('"$0" -c "$1" >/dev/full', 1, b"No space left on device"),
        ('"$0" -c "$1" 2>&1 | head -c 5', 0, b""),
    ],
)
def test_what_was_not_delivered_is_no_success(redirected, code, said):
    ran = _run(PRINTS, shell=f"{redirected.replace('$1', '$CODE')}", CODE=PRINTS)
    assert ran.returncode == code
    assert said in ran.stderr and ran.stderr.count(b"\n") == bool(said)


def test_a_terminal_without_symbols_gets_others():
    code = (
        "import sys\nfrom rich.table import Table\nfrom cmjax.console import exit_code, terminal\n"
        "table = Table('12 µs → ±3', '漢')\ntable.add_row('≤', '…')\n"
        "sys.exit(exit_code(lambda: terminal().print(table)))"
    )
    ran = _run(code, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert ran.returncode == 0 and ran.stderr == b""
    shown = ran.stdout.decode("ascii")
    assert "12 us -> +-3" in shown and "\\u6f22" in shown and "<=" in shown and "..." in shown


def test_what_users_name_is_no_markup(capsys):
    terminal().print("[/b] [red]x[/red] :smile:", highlight=False)
    assert capsys.readouterr().out.strip() == "[/b] [red]x[/red] :smile:"


def test_targets_are_checked_before_the_work(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    for path, said in (
        (tmp_path, "it is a folder"),
        (tmp_path / "none" / "a.json", "none does not exist"),
        (tmp_path / "file" / "a.json", "does not exist"),
        (tmp_path / ("x" * 300), "File name too long"),
        (loop, "Too many levels of symbolic links"),
    ):
        with pytest.raises(ValueError, match=f"^cannot write .*{said}"):
            check_target(None, "-", path)
    with pytest.raises(ValueError, match="two outputs are written there"):
        check_target(tmp_path / "file", link)
    check_target(tmp_path / "a", tmp_path / "b", "-", "-", None, "/dev/stdout")


def test_an_encoding_handler_leaves_a_stream_without_one_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert exit_code(lambda: print("µ")) == 0


def test_ctrl_c_while_modules_are_imported_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "cmjax", "micro", "gemm", "--m", "8"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "tyro" in line:  # of cmjax.cli, long before its main
            break
    process.send_signal(signal.SIGINT)
    said = [line for line in process.communicate(timeout=60)[1].splitlines()
            if not line.startswith("import time:")]  # fmt: skip
    assert process.returncode == 130 and said == ["interrupted"]
