"""The console that programs print on."""

from rich.table import Table

from cmjax.console import terminal


def test_a_wide_table_is_whole_where_output_is_no_terminal(capsys):
    table = Table(*(f"column {i}" for i in range(12)))
    table.add_row(*(f"value {i}" for i in range(12)))
    terminal().print(table)
    printed = capsys.readouterr().out
    assert all(f"column {i}" in printed and f"value {i}" in printed for i in range(12))
