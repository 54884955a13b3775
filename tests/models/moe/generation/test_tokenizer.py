"""Tokenizers: the checkpoint's, or bytes."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from cmjax.models.moe.generation.tokenizer import open_tokenizer


def test_without_a_file_every_byte_is_a_token(tmp_path):
    for folder in (None, tmp_path):
        tokenizer = open_tokenizer(folder, 320)
        tokens = tokenizer.encode("naïve 猫")
        assert tokens == list("naïve 猫".encode())
        assert tokenizer.decode(tokens) == "naïve 猫"
        assert tokenizer.decode([72, 300, 105]) == "H<300>i"
        assert tokenizer.decode([0xE7, 0x8C]) == "�"  # a character cut short


def test_a_tokenizer_file_is_used(tmp_path):
    words = {"the": 0, "cat": 1, "sat": 2, "?": 3}
    inner = Tokenizer(WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = Whitespace()  # type: ignore
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path, 4)
    assert tokenizer.encode("the dog sat") == [0, 3, 2]
    assert tokenizer.decode([1, 2]) == "cat sat"
    with pytest.raises(ValueError, match=r"tokenizer of 4 tokens, the model has 3; .* another"):
        open_tokenizer(tmp_path, 3)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bytes need a vocabulary of 256; this model has 100"):
        open_tokenizer(None, 100)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        open_tokenizer(tmp_path, 320)
