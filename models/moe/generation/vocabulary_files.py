"""Tokenizers that are a vocabulary only, in OpenAI's or Google's form, as some models publish them.

`tiktoken.model` holds a line per token, its bytes in base64 and its rank; `tokenizer.model` is
either that or a SentencePiece model. Both need a package of the extra `text`.
"""

import base64
import binascii
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmjax.inputs import read_bytes
from cmjax.models.moe.generation.tokenizer_config import TokenizerConfig

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})")
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where text is cut before merging: what transformers takes for such a file."""
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_KIMI = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}*{_LETTERS[1]}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}+{_LETTERS[1]}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""Kimi-K2's own, from the `tokenization_kimi.py` beside its weights."""
_PATTERNS = {"TikTokenTokenizer": _KIMI}
_KIMI_RESERVED = 256


@dataclasses.dataclass(frozen=True)
class VocabularyTokenizer:
    """A vocabulary with special tokens around it."""

    encode_plain: Callable[[str, bool], list[int]]
    """Tokens of a text without special ones; whether the text begins a prompt."""
    decode_plain: Callable[[list[int]], str]
    specials: dict[str, int]
    """Special tokens by their text."""
    hidden: frozenset[int]
    """Tokens that are left out of text."""
    before: tuple[int, ...] = ()
    """What begins a text."""
    after: tuple[int, ...] = ()
    """What ends it."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a prompt; `special`: those that begin a text included. A special token that is
        written out in the text is that token."""
        tokens: list[int] = []
        first = True
        for part in self._parts(text):
            if part in self.specials:
                tokens.append(self.specials[part])
            elif part:
                tokens += self.encode_plain(part, first)
            first = first and not part
        return [*self.before, *tokens, *self.after] if special else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special ones left out."""
        return self.decode_plain([token for token in tokens if token not in self.hidden])

    def _parts(self, text: str) -> list[str]:
        if not self.specials:
            return [text]
        longest_first = sorted(self.specials, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)


def read_vocabulary(path: Path, config: TokenizerConfig) -> VocabularyTokenizer:
    """The tokenizer of a tiktoken.model or tokenizer.model.

    Raises: ValueError: the file is of neither form, or the package that reads it is not installed.
    """
    data = read_bytes(path)
    if _LINE.fullmatch(data.split(b"\n", 1)[0].strip()):
        return _tiktoken(path, data, config)
    return _sentencepiece(path, data, config)


def _tiktoken(path: Path, data: bytes, config: TokenizerConfig) -> VocabularyTokenizer:
    try:
        import tiktoken
    except ImportError:
        raise ValueError(_needs(path, "tiktoken")) from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        match = _LINE.fullmatch(line.strip())
        try:
            if match:
                ranks[base64.b64decode(match[1], validate=True)] = int(match[2])
            elif line.strip():
                raise ValueError("no bytes in base64 and rank")
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{path}: line {number} is no token ({error})") from None
    if len(set(ranks.values())) < len(ranks) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path}: a rank comes twice, or a byte has none")
    specials = {text: number for number, text in config.added.items()}
    if config.tokenizer_class in _PATTERNS:  # reserved tokens follow the vocabulary
        for number in range(len(ranks), len(ranks) + _KIMI_RESERVED):
            if number not in config.added:
                specials[f"<|reserved_token_{number}|>"] = number
    encoding = tiktoken.Encoding(
        path.name,
        pat_str=_PATTERNS.get(config.tokenizer_class or "", _CL100K),
        mergeable_ranks=ranks,
        special_tokens={},
    )
    texts = {number: text.encode() for text, number in specials.items()}
    texts |= {rank: token for token, rank in ranks.items()}

    def decode(tokens: list[int]) -> str:
        parts = (texts.get(token, f"<{token}>".encode()) for token in tokens)
        return b"".join(parts).decode("utf-8", errors="replace")

    return VocabularyTokenizer(
        lambda text, first: encoding.encode_ordinary(text),
        decode,
        specials,
        config.hidden | {n for n in specials.values() if n not in config.added},
        *_ends(config, specials, add_bos=False),
    )


def _sentencepiece(path: Path, data: bytes, config: TokenizerConfig) -> VocabularyTokenizer:
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError(_needs(path, "sentencepiece and protobuf")) from None
    try:
        proto: Any = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore
        begins = sentencepiece.SentencePieceProcessor(model_proto=data)
        proto.normalizer_spec.add_dummy_prefix = config.legacy and (
            proto.normalizer_spec.add_dummy_prefix
        )
        follows = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        size = begins.get_piece_size()
    except Exception as error:  # protobuf's and the library's own, which share no class
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: neither a SentencePiece nor a tiktoken model ({reason})"
        ) from None
    control = {begins.id_to_piece(i): i for i in range(size) if begins.is_control(i)}
    specials = control | {text: number for number, text in config.added.items()}
    beyond = {number: text for number, text in config.added.items() if number >= size}

    def decode(tokens: list[int]) -> str:
        text, run = "", []
        for token in [*tokens, None]:
            if token is not None and token < size:
                run.append(token)
                continue
            text, run = text + begins.decode(run), []
            if token is not None:
                text += beyond.get(token, f"<{token}>")
        return text

    hidden = config.hidden | frozenset(control.values())
    return VocabularyTokenizer(
        lambda text, first: list((begins if first else follows).encode(text)),
        decode,
        specials,
        hidden,
        *_ends(config, specials, add_bos=True, begin=begins.bos_id(), end=begins.eos_id()),
    )


def _ends(
    config: TokenizerConfig,
    specials: dict[str, int],
    *,
    add_bos: bool,
    begin: int = -1,
    end: int = -1,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What begins and what ends a text."""
    first = specials.get(config.special_tokens.get("bos_token", ""), begin)
    last = specials.get(config.special_tokens.get("eos_token", ""), end)
    adds = add_bos if config.add_bos is None else config.add_bos
    return (first,) if adds and first >= 0 else (), (last,) if config.add_eos and last >= 0 else ()


def _needs(path: Path, package: str) -> str:
    return f"{path}: reading it needs {package}: pip install 'cmjax[text]'"
