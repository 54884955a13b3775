"""Word and character error rates over a set of utterances, counted by jiwer.

WER = (substitutions + deletions + insertions) / words of the references
"""

import dataclasses
from collections.abc import Sequence

import jiwer


@dataclasses.dataclass(frozen=True)
class ErrorRate:
    """Edits of a set against its reference length.

    Attributes:
      substitutions, deletions, insertions: how many.
      length: words (or characters) in the references.
      utterances: how many utterances.
      correct: utterances without an edit.
    """

    substitutions: int
    deletions: int
    insertions: int
    length: int
    utterances: int
    correct: int

    @property
    def rate(self) -> float:
        """Edits per reference word (or character)."""
        return (self.substitutions + self.deletions + self.insertions) / self.length

    @property
    def exact(self) -> float:
        """Share of utterances that are right as a whole."""
        return self.correct / self.utterances


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Edits over words. Raises ValueError for unequal counts or references without words."""
    _check("word_error_rate", references, hypotheses)
    return _rate(jiwer.process_words(list(references), list(hypotheses)), references, hypotheses)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRate:
    """Edits over characters, spaces among them. Raises as `word_error_rate` does."""
    _check("character_error_rate", references, hypotheses)
    out = jiwer.process_characters(list(references), list(hypotheses))
    return _rate(out, references, hypotheses)


def _rate(out, references, hypotheses) -> ErrorRate:
    return ErrorRate(
        substitutions=out.substitutions,
        deletions=out.deletions,
        insertions=out.insertions,
        length=out.hits + out.substitutions + out.deletions,
        utterances=len(references),
        correct=sum(a == b for a, b in zip(references, hypotheses, strict=True)),
    )


def _check(name: str, references: Sequence[str], hypotheses: Sequence[str]) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{name}: as many hypotheses as references are needed, got {len(hypotheses)} and "
            f"{len(references)}"
        )
    empty = [i for i, text in enumerate(references) if not text.split()]
    if empty or not references:
        raise ValueError(
            f"{name}: every reference needs at least one word, "
            + (f"number {empty[0]} has none" if empty else "got no reference")
        )
