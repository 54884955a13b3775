"""Lists as people's programs write them: separators, encodings, marks; faults with their line."""

import codecs

import pytest

from train.data.lists import lines, number, pairs, read_list, table

COLUMNS = ("file", "speaker", "words")


@pytest.mark.parametrize(
    "encoded",
    [
        "é a\nb c".encode(),
        codecs.BOM_UTF8 + "é a\r\nb c".encode(),
        "é a\rb c".encode("utf-16"),
        codecs.BOM_UTF16_BE + "é a\nb c".encode("utf-16-be"),
        "é a\nb c\n".encode("utf-32"),
    ],
)
def test_every_marked_encoding_and_end_of_line_is_read(tmp_path, encoded):
    path = tmp_path / "list"
    path.write_bytes(encoded)
    assert [line.text for line in lines(path)] == ["é a", "b c"]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_what_an_editor_does_not_end_a_line_at_is_text(tmp_path, inside):
    path = tmp_path / "list"
    path.write_text(f"one{inside}two\nthree\n", encoding="utf-8")
    assert [line.text for line in lines(path)] == [f"one{inside}two", "three"]


def test_another_encoding_is_refused_with_its_line_and_read_when_named(tmp_path):
    path = tmp_path / "list"
    path.write_bytes("a un\nb café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list, line 2: byte 0xe9 is not utf-8; .*--encoding"):
        lines(path)
    assert lines(path, "latin-1")[1].text == "b café"
    with pytest.raises(ValueError, match="no encoding is called 'klingon'"):
        read_list(path, "klingon")


def test_names_are_parted_from_the_rest_by_blanks_or_tabs(tmp_path):
    path = tmp_path / "text"
    path.write_text("a\tone two\nb  \t three\nc\n")
    assert {name: line.text for name, line in pairs(path).items()} == {
        "a": "one two",
        "b": "three",
        "c": "",
    }
    path.write_text("a x\nb y\na z\n")
    with pytest.raises(ValueError, match="text, line 3: 'a' for the second time"):
        pairs(path)


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_a_table_has_any_usual_separator(tmp_path, separator):
    path = tmp_path / "t.csv"
    rows = [[" File", "SPEAKER", "words", "note"], ["a.wav", "ann", '"yes, no"', ""]]
    text = "\ufeff" + "\r\n".join(separator.join(row) for row in rows)
    path.write_text(text, encoding="utf-8")
    ((where, row),) = table(path, COLUMNS)
    assert row == {"file": "a.wav", "speaker": "ann", "words": "yes, no", "note": ""}
    assert where == f"{path}, line 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,speaker,words\na.wav,ann\n", "line 2: 2 values in 3 columns"),
        ("file,speaker,words\na.wav,ann,yes\nb.wav,bob,yes, no\n", "line 3: 4 values in 3 columns"),
        ("file,speaker\na.wav,ann\n", "no column words; there are file, speaker"),
        ("", "no rows"),
        ("file,speaker,words\n", "no rows"),
        ('file,speaker,words\na.wav,ann,"yes\n', "line 2: unexpected end of data"),
    ],
)
def test_a_broken_table_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        table(path, COLUMNS)
    assert str(raised.value).startswith(str(path))


def test_numbers_may_be_written_as_fractions_and_absent():
    assert number("16000.0", "here", "num_samples", whole=True) == 16000
    assert number(2, "here", "x") == 2 and number(" 1.5 ", "here", "x") == 1.5
    assert number(None, "here", "x") is None and number(" ", "here", "x") is None


@pytest.mark.parametrize("given", ["x", "nan", float("inf"), -1, True, [], {}, "1.5", 10**400])
def test_what_is_no_number_is_refused_by_line_and_name(given):
    with pytest.raises(ValueError, match="list, line 3: n must be a whole number, at least 0, got"):
        number(given, "list, line 3", "n", whole=True)
