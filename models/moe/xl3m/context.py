"""XL3M: read a text far longer than the trained window, segment by segment, without training.

Source: Wang et al., "XL3M: A Training-free Framework for LLM Length Extension Based on Segment-wise
Inference" (arXiv 2405.17755). The content is cut into overlapping segments; each is read together
with the question; the entropy of the model's next-token distribution says how much it helps,

    h_i = - sum_v p_i(v) log p_i(v),      p_i = model([segment_i, question])

and the segments of the lowest entropy, back in the order of the text, followed by the question,
are the *key context* from which the answer is generated. Segments are independent: they are scored
in batches of one static shape, over a mesh (`cmjax.models.moe.xl3m.scorer`), and a text can be fed
piece by piece in constant memory. Segment and question lengths are not the paper's, whose
settings could not be had; defaults follow the constraints in `XL3MConfig`.
"""

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from cmjax.console import Progress

# next_logits(tokens [batch, length] int32, lengths [batch] int32) -> logits [batch, vocab] of the
# token that follows position lengths - 1
NextLogits = Callable[[np.ndarray, np.ndarray], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class XL3MConfig:
    """How a text is cut and how much of it is kept. Lengths in tokens."""

    window: int
    """Longest input the model was trained for: what key context, question and answer must fit."""
    segment: int = 1024
    """Length of one segment."""
    stride: int = 512
    """Distance between segment starts. A span of evidence is never cut in two if it is at most
    `segment - stride + 1` long."""
    keep: int | None = None
    """Segments kept; `None` takes the best until the window is full (overlaps counted once)."""
    answer: int = 64
    """Tokens of the window reserved for the answer."""
    batch: int = 16
    """Segments scored at a time."""
    prefix: tuple[int, ...] = ()
    """Tokens in front of every segment and of the key context: a beginning-of-text token, or the
    head of a chat template."""

    def __post_init__(self):
        for name in ("window", "segment", "stride", "answer", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"XL3MConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        if self.stride > self.segment:
            raise ValueError(
                f"XL3MConfig: stride {self.stride} is larger than segment {self.segment}, which "
                "would leave tokens unread"
            )
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"XL3MConfig: keep must be at least 1, or None, got {self.keep}")

    def room(self, question: int) -> int:
        """Content tokens that fit into the window beside the question, the prefix and the answer.

        Raises: ValueError if not even one segment fits.
        """
        room = self.window - question - self.answer - len(self.prefix)
        if room < self.segment:
            raise ValueError(
                f"XL3M: a segment of {self.segment} tokens, a question of {question}, an answer of "
                f"{self.answer} and a prefix of {len(self.prefix)} do not fit into the window of "
                f"{self.window}; use a segment of at most {max(room, 0)}"
            )
        return room


@dataclasses.dataclass(frozen=True)
class KeyContext:
    """What the answer is generated from."""

    tokens: np.ndarray  # [length] int32: prefix, kept content in the text's order, question
    intervals: tuple[tuple[int, int], ...]  # kept content, merged, as [start, end) of the text
    kept: tuple[int, ...]  # numbers of the kept segments, ascending
    entropy: np.ndarray  # [segments] float32, nats


def entropy(logits: Float[Array, "*batch vocab"]) -> Float32[Array, "*batch"]:
    """Entropy of `softmax(logits)` in nats; logits of -inf contribute 0.

    >>> round(float(entropy(jnp.zeros(8))), 4)  # log 8
    2.0794
    """
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(log_p == -jnp.inf, 0, jnp.exp(log_p) * log_p), axis=-1)


def segment_starts(content: int, segment: int, stride: int) -> np.ndarray:
    """Starts of the segments of a text of `content` tokens; the last one is right-aligned.

    >>> segment_starts(13, 4, 2).tolist()
    [0, 2, 4, 6, 8, 9]
    """
    if content <= segment:
        return np.zeros(1, np.int64)
    starts = np.arange(0, content - segment + 1, stride)
    if starts[-1] + segment < content:
        starts = np.append(starts, content - segment)
    return starts


def select(
    entropies: Sequence[float] | np.ndarray,
    starts: Sequence[int] | np.ndarray,
    length: int,
    *,
    room: int,
    keep: int | None = None,
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The segments to keep, and the intervals of the text they cover.

        >>> select([0.9, 0.2, 0.1, 0.8], [0, 2, 4, 6], 4, room=6)
        ((1, 2), ((2, 8),))

    Segments are taken in order of entropy (equal ones in the text's order) while the union of
    their intervals, of `length` tokens each, stays within `room`; at most `keep` of them.
    Returns: numbers of the kept segments, ascending; merged intervals, ascending.
    """
    kept: list[int] = []
    intervals: tuple[tuple[int, int], ...] = ()
    for number in np.argsort(np.asarray(entropies), kind="stable"):
        start = int(starts[number])
        merged = _merge([*intervals, (start, start + length)])
        if sum(end - begin for begin, end in merged) > room:
            continue
        kept.append(int(number))
        intervals = merged
        if len(kept) == keep:
            break
    return tuple(sorted(kept)), intervals


def key_context(
    content: Int[np.ndarray, "tokens"],
    question: Int[np.ndarray, "question"],
    next_logits: NextLogits,
    config: XL3MConfig,
    *,
    progress: Progress | None = None,
) -> KeyContext:
    """Read `content` segment by segment, and keep what makes the model certain of its answer.

    Args:
      content: the long text, int token ids.
      question: the tokens that every segment is read with, at its end.
      next_logits: the model; called with batches `[config.batch, prefix + segment + question]`.
      config: lengths.
      progress: called as segments are read with their number, that of all, and what is being done.
    Returns: the key context; if everything fits into the window it is the whole input, and nothing
      is scored.
    Raises: ValueError if the question is empty or leaves no room for a segment.
    """
    content, question = _token_row("content", content), _token_row("question", question)
    room = config.room(question.size)
    if content.size <= room:
        starts = segment_starts(content.size, config.segment, config.stride)
        return KeyContext(
            _joined(config.prefix, [content], question),
            ((0, content.size),),
            tuple(range(starts.size)),
            np.zeros(starts.size, np.float32),
        )
    starts = segment_starts(content.size, config.segment, config.stride)
    entropies = np.zeros(starts.size, np.float32)
    scores = score_segments([content], question, next_logits, config)
    for number, (_, entropies[number]) in enumerate(scores):
        if progress is not None:
            progress(number + 1, starts.size, "reading")
    return chosen_context(content, question, entropies, config)


def chosen_context(
    content: Int[np.ndarray, "tokens"],
    question: Int[np.ndarray, "question"],
    entropies: Float[np.ndarray, "segments"],
    config: XL3MConfig,
) -> KeyContext:
    """The key context, from the entropies of all segments (`score_segments`).

    Raises: ValueError: another number of entropies than `content` has segments.
    """
    content, question = _token_row("content", content), _token_row("question", question)
    starts = segment_starts(content.size, config.segment, config.stride)
    if len(entropies) != starts.size:
        raise ValueError(
            f"XL3M: {len(entropies)} entropies for a text of {starts.size} segments of "
            f"{config.segment} tokens, one every {config.stride}"
        )
    room = config.room(question.size)
    kept, intervals = select(entropies, starts, config.segment, room=room, keep=config.keep)
    pieces = [content[begin:end] for begin, end in intervals]
    tokens = _joined(config.prefix, pieces, question)
    return KeyContext(tokens, intervals, kept, np.asarray(entropies, np.float32))


def score_segments(
    chunks: Iterable[Int[np.ndarray, "_"]],
    question: Int[np.ndarray, "question"],
    next_logits: NextLogits,
    config: XL3MConfig,
) -> Iterator[tuple[int, float]]:
    """(start, entropy) of every segment of a text that arrives in pieces of any length.

    Memory does not grow with the text: one batch of segments and one stride of overlap are held.
    """
    question = _token_row("question", question)
    config.room(question.size)
    head = np.asarray(config.prefix, np.int32)
    waiting: list[tuple[int, np.ndarray]] = []
    for start, piece in _windows(chunks, config.segment, config.stride):
        waiting.append((start, np.concatenate([head, piece, question])))
        if len(waiting) == config.batch:
            yield from _scored(waiting, next_logits, config, head.size + question.size)
            waiting = []
    if waiting:
        yield from _scored(waiting, next_logits, config, head.size + question.size)


def best_segments(scores: Iterable[tuple[int, float]], count: int) -> list[tuple[int, float]]:
    """The `count` lowest entropies of a stream of scores, lowest first, in constant memory."""
    return heapq.nsmallest(count, scores, key=lambda scored: (scored[1], scored[0]))


def _scored(waiting, next_logits, config, extra):
    """Entropies of one batch, padded to the static shape by repeating its last row."""
    length = config.segment + extra
    tokens = np.zeros((config.batch, length), np.int32)
    lengths = np.full(config.batch, waiting[-1][1].size, np.int32)
    for row, (_, sequence) in enumerate(waiting):
        tokens[row, : sequence.size] = sequence
        lengths[row] = sequence.size
    tokens[len(waiting) :] = tokens[len(waiting) - 1]
    found = np.asarray(entropy(next_logits(tokens, lengths)))
    if not np.isfinite(found[: len(waiting)]).all():
        bad = waiting[int(np.argmin(np.isfinite(found)))][0]
        raise ValueError(f"XL3M: the model's logits for the segment at token {bad} are not finite")
    return [(start, float(h)) for (start, _), h in zip(waiting, found, strict=False)]


def _windows(chunks, segment, stride):
    """(start, tokens) of the segments of a text in pieces, as `segment_starts` has them."""
    held, origin, start, total = np.zeros(0, np.int32), 0, 0, 0
    for chunk in chunks:
        held = np.concatenate([held, _token_row("content", chunk, empty=True)])
        total = origin + held.size
        while start + segment <= total:
            yield start, held[start - origin : start - origin + segment]
            start += stride
        # what a right-aligned last segment may still need
        drop = max(0, min(start, total - segment) - origin)
        held, origin = held[drop:], origin + drop
    last = start - stride  # the last segment that was handed out, if any
    if start == 0:
        yield 0, held
    elif last + segment < total:
        yield total - segment, held[total - segment - origin :]


def _merge(intervals):
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)


def _joined(prefix, pieces, question):
    return np.concatenate([np.asarray(prefix, np.int32), *pieces, question])


def _token_row(name, tokens, *, empty=False):
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(
            f"XL3M: {name} must be one row of integer token ids, got {tokens.dtype} of shape "
            f"{tokens.shape}"
        )
    if not tokens.size and not empty:
        raise ValueError(f"XL3M: {name} is empty")
    return tokens.astype(np.int32)


__all__ = [
    "KeyContext",
    "NextLogits",
    "XL3MConfig",
    "best_segments",
    "chosen_context",
    "entropy",
    "key_context",
    "score_segments",
    "segment_starts",
    "select",
]
