"""Text is UTF-8 whatever the locale, and no longer than its budget."""

import os
import subprocess
import sys
import time

import pytest

from cmjax.inputs import parse_csv, read_bytes, read_csv, read_records, read_text


def test_text_is_utf8_in_an_ascii_locale(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("12 µs → 7".encode())
    code = "import sys; from cmjax.inputs import read_text; print(ascii(read_text(sys.argv[1])))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True
    )
    assert ran.stdout.strip() == ascii("12 µs → 7"), ran.stderr


def test_what_cannot_be_read_is_named(tmp_path):
    binary = tmp_path / "b"
    binary.write_bytes(b"one\ntwo \xff")
    for path, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, r"line 2 is not UTF-8 \(byte 0xff\)"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("a\0b", "null"),
    ):
        with pytest.raises(ValueError, match=said):
            read_text(path)


def test_an_endless_file_is_refused_at_its_budget():
    started = time.monotonic()
    with pytest.raises(ValueError, match="more than the 1,000,000 bytes"):
        read_bytes("/dev/zero", most_bytes=1_000_000)
    assert time.monotonic() - started < 2


def test_rows_know_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfrow,value\r\n"a\nb",1\r\n\r\nc,2\r\n')
    assert read_csv(path) == [(1, ["row", "value"]), (3, ["a\nb", "1"]), (5, ["c", "2"])]
    assert read_records(path, ("value", "row"))[1] == (5, {"row": "c", "value": "2"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n1", "no column b, or several; expected a, b, found a"),
        ("", "found nothing"),
        ("a,b", "no rows"),
        ("a,b,b\n1,2,3", "no column b, or several"),
        ("a,b\n1,2\n1", "line 3: expected 2 columns, found 1"),
        ("a,b\n1,2,3", "line 2: expected 2 columns, found 3"),
    ],
)
def test_tables_that_lack_something_say_what(tmp_path, text, said):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"a.csv.*{said}"):
        read_records(path, ("a", "b"))


def test_a_cell_without_end_is_refused():
    with pytest.raises(ValueError, match="line 1: no comma-separated text: field larger"):
        parse_csv('"' + "x" * 200_000, "a.csv")
