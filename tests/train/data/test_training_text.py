"""Text to learn from: the grammar, and windows of it."""

import numpy as np
import pytest

from train.data.text import HELD_OUT, Windows, grammar_text, read_text


def test_the_grammar_is_the_same_for_a_seed_and_has_the_size():
    text = grammar_text(5000, seed=3)
    assert len(text) == 5000
    assert text == grammar_text(5000, seed=3) != grammar_text(5000, seed=4)


def test_its_sums_are_right_and_its_verbs_agree_in_number():
    sums = agreeing = 0
    for line in grammar_text(20_000).decode().splitlines()[:-1]:
        words = line.removesuffix(".").split()
        if words[1] == "and":
            assert int(words[0]) + int(words[2]) == int(words[4])
            sums += 1
        else:
            assert words[2].endswith("s") != words[-3].endswith("s")  # the sailors ... watch
            agreeing += 1
    assert sums > 50
    assert agreeing > 50


def test_batches_depend_on_step_and_seed_alone_and_never_show_what_is_held_out():
    text = bytes(range(250)) * 20
    windows = Windows(text, 10)
    np.testing.assert_array_equal(windows.batch(7, 3), Windows(text, 10).batch(7, 3))
    assert not np.array_equal(windows.batch(7, 3), windows.batch(8, 3))
    assert len(windows.test) == int(HELD_OUT * len(text))
    np.testing.assert_array_equal(np.concatenate([windows.train, windows.test]), list(text))
    held = windows.held_out(4)
    assert held.shape == (4, 11)
    np.testing.assert_array_equal(held[-1], windows.test[-11:])


def test_files_are_read_one_after_the_other(tmp_path):
    (tmp_path / "a").write_bytes(b"one ")
    (tmp_path / "b").write_bytes(b"two")
    assert read_text([tmp_path / "a", tmp_path / "b"]) == b"one two"
    with pytest.raises(ValueError, match="missing: cannot be read"):
        read_text([tmp_path / "missing"])


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match=r"the text has 50 bytes; windows of 11 .* need 120"):
        Windows(bytes(50), 10)
