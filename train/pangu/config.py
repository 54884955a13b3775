"""Everything that a run of the dense decoder can be told; the command line is made of it."""

import dataclasses
import os
from pathlib import Path

from cmjax.models.dense import DenseConfig
from train.language_model import LanguageModelOptions


def default_text() -> tuple[Path, ...]:
    """Chinese technical prose, where `CMJAX_DATA` names a folder that has it."""
    folder = os.environ.get("CMJAX_DATA")
    file = Path(folder or "/nowhere") / "text_chinese_mindspore_docs" / "zh.txt"
    return (file,) if folder and file.is_file() else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PanguConfig(LanguageModelOptions):
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
    out: Path = Path("out/pangu")
    """Folder of checkpoints and metrics; an unfinished run in it goes on."""

    def model(self, vocab: int) -> DenseConfig:
        """Sizes of the network for a vocabulary."""
        return DenseConfig(
            layers=self.layers, hidden=self.hidden, heads=self.heads, ffn=4 * self.hidden,
            vocab=vocab, sequence=self.length, query_layer=True,
        )  # fmt: skip
