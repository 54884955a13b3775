"""Text to tokens and back: a checkpoint's tokenizer, or bytes where it has none."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import tokenizers

from cmjax.models.moe.generation.tokenizer_config import read_tokenizer_config
from cmjax.models.moe.generation.vocabulary_files import read_vocabulary

BYTES = 256
_VOCABULARIES = ("tiktoken.model", "tokenizer.model")
_TRACES = (
    "tokenizer*", "vocab.*", "merges.txt", "*.tiktoken", "*.model", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "tokenization_*.py",
)  # fmt: skip
"""Files that only a checkpoint with a tokenizer has."""


@runtime_checkable
class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a prompt; `special`: those that begin a text included."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special ones left out."""
        ...


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`. As in transformers 5, it alone says what is
    put around a text."""

    inner: tokenizers.Tokenizer

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a prompt; `special`: those that begin a text included."""
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special ones left out."""
        return self.inner.decode(list(tokens))


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Each byte of the UTF-8 text is a token; tokens beyond 255 are shown as `<number>`.

    >>> ByteTokenizer().encode("Hi")
    [72, 105]
    >>> ByteTokenizer().decode([72, 105, 300])
    'Hi<300>'
    """

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The bytes of the text; there are no special ones."""
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes; what is no UTF-8 is replaced."""
        parts = (bytes([t]) if t < BYTES else f"<{t}>".encode() for t in tokens)
        return b"".join(parts).decode("utf-8", errors="replace")


def encode_prompt(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a prompt; what begins a text is not put before a text that begins with it.

    >>> encode_prompt(ByteTokenizer(), "Hi")
    [72, 105]
    """
    plain = tokenizer.encode(text, special=False)
    if not special:
        return plain
    whole = tokenizer.encode(text)
    before = whole[: len(whole) - len(plain)]
    added_before = whole[len(before) :] == plain
    return plain if added_before and before and plain[: len(before)] == before else whole


def open_tokenizer(folder: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of bytes where it has none (or is `None`).

    Read are tokenizer.json, tiktoken.model and tokenizer.model, in this order. A tokenizer may know
    more tokens than the model: prompts that use one are refused when they are checked.

    Raises:
      ValueError: a tokenizer that cannot be read, is of another kind, or needs a package that is
        not installed; or bytes for a model of fewer than 256 tokens.
    """
    if folder is not None:
        if (file := folder / "tokenizer.json").exists():
            return _from_json(file)
        for name in _VOCABULARIES:
            if (folder / name).exists():
                return read_vocabulary(folder / name, read_tokenizer_config(folder))
        traces = sorted({path.name for glob in _TRACES for path in folder.glob(glob)})
        if traces:
            raise ValueError(
                f"{folder}: has {', '.join(traces[:3])}, but none of the tokenizers read here "
                f"(tokenizer.json, {', '.join(_VOCABULARIES)}); write a tokenizer.json with "
                "transformers' save_pretrained, or give prompts as token numbers"
            )
    if vocab_size < BYTES:
        raise ValueError(
            f"open_tokenizer: no tokenizer.json, and bytes need a vocabulary of {BYTES}; this "
            f"model has {vocab_size} tokens. Give prompts as token numbers"
        )
    return ByteTokenizer()


def _from_json(file: Path) -> FileTokenizer:
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer ({error})") from None
    return FileTokenizer(inner)
