"""What every run of a language model over a text can be told."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from cmjax.inputs import check_count
from cmjax.processes import ProcessGroup
from train.data.text import grammar_text, read_text
from train.options import check_numbers, plain

FREE = ("out", "checkpoint_every", "test_windows", "group")
"""May change between a kill and the resumption: they do not change a number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelOptions:
    """Text, steps, optimizer, folder and processes; a program adds its model's sizes."""

    text: tuple[Path, ...] = ()
    """Files to learn from; without any, sentences of a grammar made in code."""
    length: int = 128
    """Tokens in a window."""
    batch: int = 8
    """Windows per step, over all ranks."""
    steps: int = 200
    """Optimiser steps."""
    learning_rate: float = 2e-3
    """Highest; it warms up over a tenth of the steps and falls as a cosine to a tenth."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW)."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    test_windows: int = 32
    """Held-out windows to test on at the end."""
    seed: int = 0
    """Of the parameters and the order of the data."""
    out: Path = Path("out")
    """Folder of checkpoints and metrics; an unfinished run in it goes on."""
    group: tyro.conf.OmitArgPrefixes[ProcessGroup] = dataclasses.field(default_factory=ProcessGroup)
    """Which processes train together."""

    def __post_init__(self):
        check_numbers(self)
        for field in dataclasses.fields(self):
            if field.type is int and field.name not in ("seed", "steps"):
                check_count(f"--{field.name.replace('_', '-')}", getattr(self, field.name))

    def learned_text(self) -> bytes:
        """The text to learn from.

        Raises: ValueError: a file cannot be read; names it.
        """
        return read_text(self.text) if self.text else grammar_text(seed=self.seed)

    def record(self) -> dict[str, Any]:
        """As plain JSON values: what a checkpoint remembers."""
        return plain(dataclasses.asdict(self))
