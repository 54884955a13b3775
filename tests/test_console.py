"""The console that programs print on."""

import io

from rich.console import Console
from rich.table import Table

from cmjax import console
from cmjax.console import terminal


def test_a_wide_table_is_whole_where_output_is_no_terminal(capsys):
    table = Table(*(f"column {i}" for i in range(12)))
    table.add_row(*(f"value {i}" for i in range(12)))
    terminal().print(table)
    printed = capsys.readouterr().out
    assert all(f"column {i}" in printed and f"value {i}" in printed for i in range(12))


def test_a_bar_shows_how_far_work_is_and_its_note(monkeypatch):
    screen = io.StringIO()
    wide = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(console, "Console", lambda **_: wide)
    for note, shown in (("1.234 ms", "1.234 ms"), ("", "placing")):
        screen.seek(0)
        screen.truncate()
        with console.show_progress("placing") as progress:
            progress(1, 4, note)
        last = screen.getvalue().rpartition("━")[0].splitlines()[-1]  # the bar as it ended
        assert shown in last
    with console.show_progress("placing", quiet=True) as progress:
        before = screen.getvalue()
        progress(4, 4, "done")
    assert screen.getvalue() == before


def test_a_log_file_gets_no_bar(capfd):
    with console.show_progress("placing") as progress:
        progress(1, 2, "note")
    assert capfd.readouterr().err == ""
