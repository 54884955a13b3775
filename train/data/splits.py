"""Which part of a data set a name says: what to train on, and what never.

People name the parts in many ways: `train_manifest.json` beside `valid_manifest.json`, `dev-clean`,
`eval92`, `train_dev` (of Kaldi, held out of the training data), `testset`, a column `split`. What
is held out by any of these is never trained on.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Literal

Split = Literal["train", "dev", "test"]

_ENDS = r"(?:set|sets|split|list|data|manifest|clean|other|part|files?|utts?|audio|wavs?)*"
_NAMES: tuple[tuple[Split, str], ...] = (
    ("dev", "dev|devel|develop|development|traindev|val|vali|valid|validate|validation"),
    (
        "test",
        "test|tests|testing|tst|devtest|testdev|eval|evals|evl|evaluate|evaluation|"
        "heldout|holdout|unseen",
    ),
    ("train", "train|training|trn|trainval"),
)
_WORDS: tuple[tuple[Split, re.Pattern[str]], ...] = tuple(
    (split, re.compile(rf"(?:{names}){_ENDS}")) for split, names in _NAMES
)


def named_split(name: str) -> Split | None:
    """What one name says, or None; what is held out wins, as in `train_dev`.

    Example:

      >>> [named_split(name) for name in ("trainManifest", "train_dev", "eval92", "recordings")]
      ['train', 'dev', 'test', None]
    """
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[a-z]+", parted.lower())
    joined = [a + b for a, b in itertools.pairwise(words) if a in ("held", "hold")]
    for split, word in _WORDS:
        if any(word.fullmatch(one) for one in (*words, *joined)):
            return split
    return None


def path_split(parts: Iterable[str]) -> Split | None:
    """What the folders of a path say, the nearest to the file first."""
    for part in reversed(list(parts)):
        if split := named_split(part):
            return split
    return None


def stated_split(value: object, where: str) -> Split | None:
    """What a field of a list says; None where it is empty.

    Raises: ValueError: it says something else; names the line.
    """
    if value is None or value == "":
        return None
    split = named_split(value) if isinstance(value, str) else None
    if split is None:
        raise ValueError(
            f"{where}: split must be train, or what is held out (dev, valid, test, eval), got "
            f"{str(value)[:40]!r}"
        )
    return split


SPLIT_COLUMNS = ("split", "subset", "partition", "set")
"""Fields of a list that say it."""
