"""JSON and TOML that no reader gets past the door."""

import re

import pytest

from cmjax.inputs import parse_json, parse_toml, read_json, read_json_lines, read_toml


def test_a_byte_order_mark_is_skipped_in_every_reader(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert read_json(path) == {"a": 1}
    assert list(read_json_lines(path)) == [(1, {"a": 1})]
    assert parse_json(path.read_bytes(), "a") == {"a": 1}
    path.write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert read_toml(path) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: not valid JSON (Expecting value in column 1)"),
        ("[1,\n2", "line 2: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON (nested too deeply)"),
        ('{"a":' * 100_000, "line 1: not valid JSON (nested too deeply)"),
        ("[" * 65 + "]" * 65, "line 1: not valid JSON (nested too deeply)"),
        ('{"a": 1, "a": 2}', "line 1: not valid JSON (named twice: a)"),
        ("1" * 5000, "line 1: not valid JSON (Exceeds the limit"),
        (b"\xff\xfe", "line 1: not valid JSON ('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_is_no_json_is_one_line_with_its_place(text, said):
    with pytest.raises(ValueError, match=re.escape(f"plan.json {said}")) as caught:
        parse_json(text, "plan.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_documents_as_deep_as_the_bound_are_read():
    text = "[" * 64 + "]" * 64
    assert parse_json(text, "a") is not None


def test_a_bad_line_of_many_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 3: not valid JSON"):
        list(read_json_lines(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = ", "not valid TOML"),
        ("a." * 100_000 + "b = 1", "line 1: not valid TOML: a key of more than 64 parts"),
        ("\n[" + "a." * 100_000 + "b]", "line 2: not valid TOML: a key of more than 64 parts"),
        ("x = {" + "a." * 100_000 + "b = 1}", "a key of more than 64 parts"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "{a = " * 1_000, "not valid TOML"),
        ("a = 1\na = 2", "not valid TOML"),
    ],
)
def test_what_is_no_toml_is_one_line(text, said):
    with pytest.raises(ValueError, match=f"^m.toml.*{said}") as caught:
        parse_toml(text, "m.toml")
    assert "\n" not in str(caught.value)


def test_dots_in_a_value_are_no_key():
    assert parse_toml('source = "' + "a." * 500 + '"', "m.toml")["source"].count(".") == 500
