"""What `--help` shows: every command, on 80 columns, without starting what it does not need."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import cmjax
from cmjax.cli import _COMMANDS, main


def shown(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_every_command_is_listed_with_what_it_gives(capsys):
    text = shown(capsys)
    for name, (_, gives) in _COMMANDS.items():
        assert f"{name} " in text and gives in text


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_page_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, command)
    assert text.startswith(f"usage: cmjax {command}")
    assert max(map(len, text.splitlines())) <= 80
    assert "{None}" not in text and ">>>" not in text


def test_versions_are_one_line_for_a_report(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"cmjax {version('cmjax')} (jax {version('jax')}, ")
    assert said.count("\n") == 1 and cmjax.__version__ == version("cmjax")


def test_the_list_of_commands_starts_without_jax():
    code = "import sys; sys.argv[1:] = ['--help']\nfrom cmjax.cli import main\n"
    code += "try: main()\nexcept SystemExit: assert not {'jax', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m cmjax machines cloudmatrix384 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout and not done.stderr


def test_an_unknown_command_is_refused_with_one_like_it(capsys):
    assert main(["predcit"]) == 2
    said = capsys.readouterr().err
    assert "no command 'predcit'; perhaps predict? (cmjax --help)" in said
    assert main(["xyzzy"]) == 2
    assert "no command 'xyzzy' (cmjax --help)" in capsys.readouterr().err
