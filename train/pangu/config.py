"""Everything that a run of the dense decoder can be told; the command line is made of it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import tyro

from cmjax.inputs import check_count
from cmjax.models.dense import DenseConfig
from cmjax.processes import ProcessGroup
from train.options import check_numbers

FREE = ("out", "checkpoint_every", "test_windows", "group")
"""May change between a kill and the resumption: they do not change a number."""


def default_text() -> tuple[Path, ...]:
    """Chinese technical prose, where `CMJAX_DATA` names a folder that has it."""
    folder = os.environ.get("CMJAX_DATA")
    file = Path(folder or "/nowhere") / "text_chinese_mindspore_docs" / "zh.txt"
    return (file,) if folder and file.is_file() else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PanguConfig:
    """Train a tiny PanGu-alpha under a plan."""

    text: tuple[Path, ...] = dataclasses.field(default_factory=default_text)
    """Files to learn from; by default the Chinese prose under CMJAX_DATA, or, without it, sentences
    of a grammar made in code."""
    vocabulary: Path | None = None
    """A sentencepiece model (.model); without it the tokens are bytes."""
    plan: str = "data=1"
    """How the step is split, such as data=2,tensor=2,pipeline=2,optimizer=zero1; `search` has it
    found for --devices of --on."""
    devices: int = 1
    """Ranks of a plan that is searched for."""
    on: str = "ascend910-2048"
    """Machine of a search."""
    layers: int = 4
    """Layers, the query layer among them."""
    hidden: int = 128
    """Width of the residual stream; the feed-forward blocks are four times as wide."""
    heads: int = 4
    """Attention heads."""
    length: int = 128
    """Tokens in a window."""
    batch: int = 8
    """Windows per step, over all replicas."""
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
    out: Path = Path("out/pangu")
    """Folder of checkpoints and metrics; an unfinished run in it goes on."""
    group: tyro.conf.OmitArgPrefixes[ProcessGroup] = dataclasses.field(default_factory=ProcessGroup)
    """Which processes train together."""

    def __post_init__(self):
        check_numbers(self)
        for name in ("devices", "layers", "length", "batch", "checkpoint_every", "test_windows"):
            check_count(f"--{name.replace('_', '-')}", getattr(self, name))

    def model(self, vocab: int) -> DenseConfig:
        """Sizes of the network for a vocabulary."""
        return DenseConfig(
            layers=self.layers, hidden=self.hidden, heads=self.heads, ffn=4 * self.hidden,
            vocab=vocab, sequence=self.length, query_layer=True,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """As plain JSON values: what a checkpoint remembers."""
        values = dataclasses.asdict(self)
        vocabulary = None if self.vocabulary is None else str(self.vocabulary)
        paths = {"text": [str(p) for p in self.text], "out": str(self.out)}
        return values | paths | {"vocabulary": vocabulary}
