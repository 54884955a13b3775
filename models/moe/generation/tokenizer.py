"""Text to tokens and back: a checkpoint's tokenizer.json, or bytes where there is none."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import tokenizers

BYTES = 256


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
    """A tokenizer.json of Hugging Face's `tokenizers`."""

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


def open_tokenizer(folder: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of bytes where it has none (or is `None`).

    Raises:
      ValueError: a tokenizer.json that cannot be read or has more tokens than the model; or bytes
        for a model of fewer than 256 tokens.
    """
    file = None if folder is None else folder / "tokenizer.json"
    if file is None or not file.exists():
        if vocab_size < BYTES:
            raise ValueError(
                f"open_tokenizer: no tokenizer.json, and bytes need a vocabulary of {BYTES}; this "
                f"model has {vocab_size} tokens. Give prompts as token numbers"
            )
        return ByteTokenizer()
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer ({error})") from None
    if inner.get_vocab_size() > vocab_size:
        raise ValueError(
            f"{file}: a tokenizer of {inner.get_vocab_size()} tokens, the model has {vocab_size}; "
            "it belongs to another model"
        )
    return FileTokenizer(inner)
