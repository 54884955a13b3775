"""Token-level routes from a file, for what counts alone do not say."""

from pathlib import Path

import numpy as np
from jaxtyping import Int


def read_ids(path: str | Path) -> Int[np.ndarray, "tokens layers top_k"] | None:
    """Experts of every token and layer, or None where the file has no such record.

    Args:
      path: an `.npz` with integers `ids`, `[layers, tokens, top_k]` or `[tokens, layers, top_k]`;
        the longer axis is the tokens.
    """
    if Path(path).suffix.lower() != ".npz":
        return None
    with np.load(path, allow_pickle=False) as archive:
        if "ids" not in archive.files:
            return None
        ids = archive["ids"]
    return ids if ids.shape[0] > ids.shape[1] else ids.swapaxes(0, 1)
