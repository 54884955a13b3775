"""What SGLang's recorder saves: `expert_distribution_recorder_*.pt`.

    {"logical_count": tensor [steps, layers, experts], ...}                      mode stat
    {"records": [{"forward_pass_id": n, "rank": r, "global_physical_count": tensor [layers, slots]},
                 ...], "last_physical_to_logical_map": tensor [layers, slots]}   mode per_pass

Tensors are read by PyTorch with `weights_only=True`; nothing is unpickled otherwise.
"""

from pathlib import Path

import numpy as np

from cmjax.placement.files.readers.scenario import SGLANG_KEY, Counts, NoRecordingError, Scenarios


def read_pt(file: Path, key: str | None, experts: int | None) -> Scenarios:
    """The counts of every step.

    Raises: ValueError, one line: PyTorch is missing, or the file is damaged or holds objects;
      NoRecordingError for other tensors.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an optional peer
    except ImportError:
        raise ValueError(
            f"{file}: .pt files are read by PyTorch, which is not installed; install torch, or "
            f'convert where it is: np.savez("counts.npz", {SGLANG_KEY}=torch.load("{file.name}", '
            f'weights_only=True, map_location="cpu")["{SGLANG_KEY}"].numpy())'
        ) from None
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a damaged file
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: expected tensors saved by PyTorch, found: {said}") from None
    if isinstance(found, torch.Tensor):
        return {"": Counts(_array(found), str(file), idle=True)}
    if isinstance(found, dict) and key is not None and key not in found:
        raise ValueError(f"{file}: found no key {key!r} among {', '.join(map(str, found))}")
    if isinstance(found, dict) and (key or SGLANG_KEY) in found:
        return {"": Counts(_array(found[key or SGLANG_KEY]), str(file), idle=True)}
    if isinstance(found, dict) and {"records", "last_physical_to_logical_map"} <= set(found):
        return {"": Counts(_per_pass(found, file), str(file), idle=True)}
    keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
    raise NoRecordingError(f"{file}: expected {SGLANG_KEY} or records, found {keys}")


def _array(value):
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def _per_pass(found, file):
    """Passes by number, ranks of a pass added, slots counted to their experts."""
    held = _array(found["last_physical_to_logical_map"])
    passes: dict[int, np.ndarray] = {}
    try:
        for record in found["records"]:
            slots = _array(record["global_physical_count"])
            counts = np.zeros((len(held), int(held.max()) + 1))
            np.add.at(counts, (np.arange(len(held))[:, None], held), slots)
            number = int(record["forward_pass_id"])
            passes[number] = passes.get(number, 0) + counts
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{file}: expected records of forward_pass_id and global_physical_count "
            f"[layers, slots]: {type(error).__name__} {error}"
        ) from None
    if not passes:
        raise ValueError(f"{file}: expected records of forward passes, found none")
    return np.stack([passes[number] for number in sorted(passes)])
