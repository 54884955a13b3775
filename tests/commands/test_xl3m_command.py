"""The command: an answer and where it came from, and one line for what it cannot do."""

import json

import pytest

from cmjax.cli import main

SENTENCES = "".join(f"The cat sat on mat {n}. " for n in range(40))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES)
    return path


def _run(text, *more):
    return main(
        ["xl3m", "--random", "tiny", "--text", str(text), "--question", "Which mat?", *more]
    )


@pytest.mark.slow
def test_an_answer_comes_with_the_passages_it_was_taken_from(text, tmp_path, capsys):
    out = tmp_path / "answer.json"
    assert _run(text, "--new-tokens", "4", "--mesh", "2x2", "--json", str(out)) == 0
    found = json.loads(out.read_text())
    assert found["evidence"] == [SENTENCES[a:b] for a, b in found["intervals"]]
    assert found["segments"] == sorted(found["segments"])
    assert len(found["entropy_nats"]) == len(found["segments"])
    kept = sum(b - a for a, b in found["intervals"])
    assert kept + len("Which mat?") + 4 <= 256
    shown = capsys.readouterr()
    assert found["answer"] in shown.out
    assert f"{len(SENTENCES):,} tokens in" in shown.err


def test_a_text_that_fits_is_read_whole(text, capsys):
    text.write_text(SENTENCES[:100])
    assert _run(text, "--new-tokens", "2") == 0
    assert "fits into the window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "why? " * 60], "do not fit into the window of 256"),
        (["--question", ""], "--question is empty"),
        (["--window", "300"], "--window 300 is more than the 256 tokens"),
        (["--stride", "65"], "stride 65 is larger than segment 64"),
        (["--segment", "250"], "use a segment of at most 182"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--window", "0"], "window must be at least 1, got 0"),
        (["--mesh", "8*8"], "mesh must be NODESxNPUS"),
        (["--random", "tiny2"], "did you mean 'tiny'"),
        (["--weights", "nowhere"], "give either --weights FOLDER or --random PRESET"),
    ],
)
def test_bad_input_is_one_line_and_code_2(text, arguments, message, capsys):
    assert _run(text, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_missing_or_empty_text_is_named(tmp_path, capsys):
    assert _run(tmp_path / "none.txt") == 2
    assert "none.txt: cannot be read" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert _run(tmp_path / "empty.txt") == 2
    assert "empty.txt: the text is empty" in capsys.readouterr().err
