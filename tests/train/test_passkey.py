"""The recall task, and a run that goes on where it was stopped."""

import dataclasses

import jax
import numpy as np
import pytest

from cmjax.models.moe.model import parameters
from train import checkpoint
from train.metrics import read_metrics
from train.passkey import Recall, Stage, Vocabulary, draw_texts, train

VOCABULARY = Vocabulary()
STAGE = Stage(steps=1, length=40, questions=8, batch=200)
SHORT = (Stage(steps=6, length=8, questions=2, batch=4),)


def _drawn(unanswerable=0.2, stage=STAGE):
    texts = draw_texts(jax.random.key(0), stage, VOCABULARY, unanswerable)
    return jax.tree.map(np.asarray, texts)


def test_an_answerable_key_is_in_the_text_once_with_its_value_behind_it():
    texts = _drawn()
    for tokens, answers, answerable in zip(
        texts.tokens, texts.answers, texts.answerable, strict=True
    ):
        content = tokens[: STAGE.length]
        asked = tokens[texts.asked_at]
        assert len(set(asked)) == len(asked)
        np.testing.assert_array_equal(tokens[texts.asked_at - 1], VOCABULARY.ask)
        np.testing.assert_array_equal(tokens[texts.asked_at + 1], answers)
        for key, answer, there in zip(asked, answers, answerable, strict=True):
            (place,) = np.nonzero(content == key)
            assert len(place) == there
            if there:
                assert content[place[0] + 1] == answer


def test_as_many_questions_have_no_answer_as_wanted():
    share = 1 - _drawn().answerable.mean()
    count = STAGE.batch * STAGE.questions
    assert abs(share - 0.2) < 4 * np.sqrt(0.2 * 0.8 / count)
    assert _drawn(unanswerable=0.0).answerable.all()


def test_answers_that_are_not_in_the_text_are_any_value_alike():
    texts = _drawn(stage=dataclasses.replace(STAGE, batch=2000))
    values = texts.answers[~texts.answerable] - VOCABULARY.first_value
    counts = np.bincount(values, minlength=VOCABULARY.values)
    expected = len(values) / VOCABULARY.values
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_a_run_goes_on_to_the_same_parameters_where_it_was_stopped(tmp_path, monkeypatch):
    whole = train(Recall(out=tmp_path / "whole", stages=SHORT, save_every=2))
    stopped = Recall(out=tmp_path / "stopped", stages=SHORT, save_every=2)
    saves = []

    def killed_after_four(*args, **kwargs):
        saves.append(save(*args, **kwargs))
        if kwargs["progress"]["step"] == 4:
            raise KeyboardInterrupt

    save = checkpoint.save
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", killed_after_four)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    again = train(stopped)
    for a, b in zip(
        jax.tree.leaves(parameters(again)), jax.tree.leaves(parameters(whole)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    steps = [line["step"] for line in read_metrics(tmp_path / "stopped" / "metrics.jsonl")]
    assert steps == [5]


def test_a_folder_of_another_configuration_is_refused(tmp_path):
    recall = Recall(out=tmp_path, stages=(dataclasses.replace(SHORT[0], steps=1),))
    train(recall)
    with pytest.raises(ValueError, match=r"another configuration \(seed: 0 there, 1 here\)"):
        train(dataclasses.replace(recall, seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unanswerable": 1.0}, r"unanswerable must lie in \[0, 1\), got 1.0"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        (
            {"stages": (Stage(steps=1, length=8, questions=6, batch=1),)},
            "length 8 with 6 questions has up to 6 pairs, which need 12 tokens",
        ),
        (
            {"stages": (Stage(steps=1, length=800, questions=6, batch=1),)},
            r"100 keys \(there are 32\)",
        ),
    ],
)
def test_sizes_that_contradict_each_other_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        Recall(**changes)
