"""Tokens of a text: its bytes, or the pieces of a sentencepiece model."""

from pathlib import Path

import numpy as np
from jaxtyping import Integer


def read_tokens(text: bytes, model: Path | None) -> tuple[Integer[np.ndarray, " tokens"], int]:
    """The tokens of UTF-8 text, and how many different ones there are.

    Args: model: a sentencepiece model; `None` takes bytes, of which there are 256.
    Raises: ValueError: sentencepiece is not installed, or cannot read the model.
    """
    if model is None:
        return np.frombuffer(text, np.uint8), 256
    try:
        import sentencepiece
    except ImportError:
        raise ValueError("--vocabulary needs sentencepiece: pip install 'cmjax[text]'") from None
    if not model.is_file():
        raise ValueError(f"--vocabulary {model}: there is no such file")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        said = str(error).splitlines()[0][:120]
        raise ValueError(f"--vocabulary {model}: is no sentencepiece model ({said})") from None
    found = pieces.encode(text.decode("utf-8", errors="replace"))
    return np.asarray(found, np.int32), pieces.vocab_size()
