"""Which recordings a network was trained on, so that a test of later knows them by their sound."""

import dataclasses
from pathlib import Path

from rich.console import Console

from cmjax.files import replace_text
from cmjax.inputs import read_text
from train.asr.task import Task
from train.data.corpus import shared

FILE = "trained_on.txt"
"""Digests of the training recordings, one a line, in the run's folder."""


def remember(task: Task, out: Path) -> None:
    """Write the digests of the training utterances down."""
    digests = sorted({utterance.digest() for utterance in task.corpus.train})
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / FILE, "".join(f"{digest}\n" for digest in digests))


def without_trained(task: Task, out: Path, console: Console) -> Task:
    """Other data without the recordings that the network in `out` was trained on.

    Raises: ValueError: none is left.
    """
    if not (out / FILE).is_file():
        console.print(
            f"no {FILE} in {out}: recordings that were trained on may be among those of the test",
            markup=False,
        )
        return task
    known = shared(task.corpus, read_text(out / FILE).split())
    tests = {}
    for name, utterances in task.corpus.tests.items():
        own = set(known.get(name, ()))
        kept = tuple(utterance for utterance in utterances if utterance.name not in own)
        if own:
            console.print(
                f"{name}: {len(own)} of {len(utterances)} recordings are left out, because the "
                "network was trained on them",
                markup=False,
            )
        if kept:
            tests[name] = kept
    if not tests:
        raise ValueError("no test set: the network was trained on all of these recordings")
    return dataclasses.replace(task, corpus=dataclasses.replace(task.corpus, tests=tests))
