"""Sizes of dense decoders: PanGu-alpha (arXiv 2104.12369, table 1), GPT, and Llama-like ones.

parameters = L (12 d^2 + 13 d) + V d + 2 s d + 2 d        PanGu-alpha, query layer inside L
"""

import dataclasses
import difflib
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """A dense decoder.

    Fields:
      layers: transformer layers, the query layer among them if there is one.
      hidden, heads, ffn, vocab, sequence: width, query heads, inner width of the feed-forward
        block, tokens of the vocabulary, and positions of a sequence.
      kv_heads: heads of keys and values; `None` has as many as there are query heads.
      query_layer: PanGu-alpha's top layer, whose queries come from the embedding of the next
        position (section 2.2.2, equation 5).
      gated: SwiGLU in place of GELU. norm: layer norm, or RMS norm.
      positions: learned embeddings, or rotary ones. biases: of all linear maps.
      tied: the output matrix is the word embedding.
      dropout: rate after attention's softmax and before both residual sums; 0 for none.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    sequence: int
    kv_heads: int | None = None
    query_layer: bool = False
    gated: bool = False
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["learned", "rotary"] = "learned"
    biases: bool = True
    tied: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        for field in ("layers", "hidden", "heads", "ffn", "vocab", "sequence"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a whole number of at least 1, got {value!r}")
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden ({self.hidden}) must be a multiple of heads ({self.heads}); "
                f"{self.hidden // self.heads * self.heads or self.heads} would be one"
            )
        kv = self.kv_heads
        if kv is not None and (not isinstance(kv, int) or kv < 1 or self.heads % kv):
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads, got {kv!r}")
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, got {self.head_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def blocks(self) -> int:
        """Layers that are no query layer."""
        return self.layers - int(self.query_layer)

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        d, kv = self.hidden, self.key_heads * self.head_size
        matrices = 2 * d * d + 2 * d * kv + (3 if self.gated else 2) * d * self.ffn
        biases = (2 * d + 2 * kv + self.ffn + d) if self.biases else 0
        norms = 4 * d if self.norm == "layer" else 2 * d
        return matrices + biases + norms

    @property
    def parameters(self) -> int:
        """Of the whole model.

        >>> preset("pangu-2.6b").parameters
        2625295360
        """
        d = self.hidden
        words = self.vocab * d * (1 if self.tied else 2)
        tables = int(self.positions == "learned") + int(self.query_layer)
        last_norm = 2 * d if self.norm == "layer" else d
        return self.layers * self.layer_parameters + words + tables * self.sequence * d + last_norm

    def flops_per_token(self) -> float:
        """Matrix FLOP of a training step for one token, recomputation not counted: three times
        those of a forward pass. Scores of all pairs of positions count, as in Megatron's
        formula (arXiv 2104.04473, equation 3)."""
        d, kv = self.hidden, self.key_heads * self.head_size
        matrices = 2 * d * d + 2 * d * kv + (3 if self.gated else 2) * d * self.ffn
        forward = self.layers * (2 * matrices + 4 * self.sequence * d) + 2 * self.vocab * d
        return 3.0 * forward


def _pangu(layers: int, hidden: int, heads: int) -> DenseConfig:
    return DenseConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        ffn=4 * hidden,
        vocab=40_000,
        sequence=1024,
        query_layer=True,
        dropout=0.1,
    )


PRESETS = {
    # PanGu-alpha, arXiv 2104.12369, table 1 and section 5.1
    "pangu-2.6b": _pangu(32, 2560, 32),
    "pangu-13b": _pangu(40, 5120, 40),
    "pangu-200b": _pangu(64, 16384, 128),
    "pangu-tiny": DenseConfig(
        layers=4, hidden=64, heads=4, ffn=256, vocab=256, sequence=64, query_layer=True
    ),
    # Llama 2, arXiv 2307.09288: a dense decoder of today
    "llama-2-7b": DenseConfig(
        layers=32, hidden=4096, heads=32, ffn=11008, vocab=32_000, sequence=4096,
        gated=True, norm="rms", positions="rotary", biases=False, tied=False,
    ),
    "llama-2-70b": DenseConfig(
        layers=80, hidden=8192, heads=64, ffn=28672, vocab=32_000, sequence=4096, kv_heads=8,
        gated=True, norm="rms", positions="rotary", biases=False, tied=False,
    ),
}  # fmt: skip
"""Name -> sizes."""


def preset(name: str) -> DenseConfig:
    """The sizes of a named model.

    Raises: ValueError: unknown name, with the closest ones.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=2) or list(PRESETS)
        raise ValueError(f"unknown model {name!r}; closest: {', '.join(close)}")
    return PRESETS[name]
