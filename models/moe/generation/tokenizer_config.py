"""What a checkpoint's tokenizer_config.json says beside the tokenizer itself."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from cmjax.models.moe.checkpoint.json_file import convert, read_object

FILE = "tokenizer_config.json"


class _AddedToken(Struct):
    content: str
    special: bool = False


class _Named(Struct):
    name: str
    template: str


class _Keys(Struct):
    added_tokens_decoder: dict[str, _AddedToken] = {}
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    legacy: bool | None = None
    tokenizer_class: str | None = None
    chat_template: str | list[_Named] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The keys that are read; all of them may be absent."""

    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By role: `bos_token`, `eos_token` and the like."""
    added: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Tokens beyond the vocabulary's file, by number."""
    hidden: frozenset[int] = frozenset()
    """Those of them that are left out of text."""
    add_bos: bool | None = None
    add_eos: bool | None = None
    legacy: bool = False
    """Whether a space is put before the text after a special token, too (Llama's first way)."""
    tokenizer_class: str | None = None
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Chat templates by name."""


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Of a checkpoint folder; an empty one where it has no such file.

    Raises: ValueError: the file cannot be read, or a key is of the wrong type.
    """
    path = folder / FILE
    if not path.exists():
        return TokenizerConfig()
    raw = read_object(path)
    keys = convert(raw, _Keys, path)
    try:
        added = {int(number): token for number, token in keys.added_tokens_decoder.items()}
    except ValueError:
        raise ValueError(
            f"{path}: the keys of 'added_tokens_decoder' must be token numbers"
        ) from None
    named = keys.chat_template
    templates = {} if named is None else {"default": named} if isinstance(named, str) else {
        entry.name: entry.template for entry in named
    }  # fmt: skip
    return TokenizerConfig(
        special_tokens=_special_tokens(raw),
        added={number: token.content for number, token in added.items()},
        hidden=frozenset(number for number, token in added.items() if token.special),
        add_bos=keys.add_bos_token,
        add_eos=keys.add_eos_token,
        legacy=bool(keys.legacy),
        tokenizer_class=keys.tokenizer_class,
        templates=templates,
    )


def _special_tokens(raw: dict[str, Any]) -> dict[str, str]:
    """Values of the keys `..._token`: strings, or objects with the string as `content`."""
    found = {}
    for key, value in raw.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found
