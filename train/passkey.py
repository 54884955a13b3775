"""Train a small transformer to recall: among filler are pairs "key value"; asked for a key, it
answers with the value.

    python -m train.passkey --out out/passkey          well under a minute; run again, it goes on

A text is `length` tokens of filler and pairs, then questions "ASK key value". A fifth of the
questions ask for a key that is not in the text. Their answers are drawn at random, so that what the
model learns to say there is: any value, equally likely. That calibration is what XL3M lives on.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Int, Int32

from cmjax.console import bar
from cmjax.interrupt import leave
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.layers.transformer import DenseLayer, MoELayer
from cmjax.models.moe.model import MoEModel, from_config
from cmjax.options import run_program
from train import checkpoint
from train.induction import plant
from train.metrics import LossNotFinite, MetricsLog
from train.only_run import only_run
from train.options import check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens in order: fillers, the one that asks, keys, values."""

    fillers: int = 31
    keys: int = 32
    values: int = 32

    @property
    def ask(self) -> int:
        """The token in front of the key that is asked for."""
        return self.fillers

    @property
    def first_key(self) -> int:
        """The token of key 0; the others follow."""
        return self.fillers + 1

    @property
    def first_value(self) -> int:
        """The token of value 0; the others follow."""
        return self.first_key + self.keys

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.first_value + self.values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Some steps on texts of one length."""

    steps: int
    length: int
    """Tokens before the questions."""
    questions: int
    """Questions after them, each of three tokens."""
    batch: int
    """Texts per step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """Options of a training run."""

    out: Path = Path("out/passkey")
    """Folder for checkpoints and metrics.jsonl."""
    unanswerable: float = 0.2
    """Share of questions whose key is not in the text; 0 makes an overconfident model."""
    vocabulary: Vocabulary = Vocabulary()
    """Tokens of the task."""
    stages: tuple[Stage, ...] = (
        Stage(steps=100, length=16, questions=4, batch=32),
        Stage(steps=300, length=40, questions=8, batch=24),
    )
    """Short texts first: their steps are cheap, and recall is found within a hundred."""
    learning_rate: float = 5e-3
    """Its peak; 30 steps of warm-up, then a cosine down to a tenth."""
    seed: int = 0
    """Of parameters and texts."""
    save_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self):
        check_numbers(self)
        if not 0 <= self.unanswerable < 1:
            raise ValueError(f"Recall: unanswerable must lie in [0, 1), got {self.unanswerable}")
        if self.save_every < 1:
            raise ValueError(f"Recall: save_every must be at least 1, got {self.save_every}")
        for stage in self.stages:
            pairs = _pairs(stage.length, stage.questions)
            if stage.length < 2 * pairs or pairs > self.vocabulary.keys:
                raise ValueError(
                    f"Recall: a stage of length {stage.length} with {stage.questions} questions "
                    f"has up to {pairs} pairs, which need {2 * pairs} tokens and {pairs} keys "
                    f"(there are {self.vocabulary.keys})"
                )

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def trained_length(self) -> int:
        """Tokens of the longest texts, questions included."""
        return max(stage.length + 3 * stage.questions for stage in self.stages)

    def model_config(self) -> MoEConfig:
        """Two layers, 64 wide: attention of two heads, then a dense block or four experts."""
        return MoEConfig(
            vocab_size=self.vocabulary.size,
            hidden_size=64,
            layers=2,
            dense_layers=(0,),
            heads=2,
            attention=GroupedAttention(kv_heads=2, head_dim=32),
            ffn_size=32,
            expert_ffn_size=16,
            routed_experts=4,
            shared_experts=0,
            experts_per_token=2,
            expert_groups=1,
            groups_per_token=1,
            scoring="softmax",
            score_bias=False,
            max_position=self.trained_length,
            family="mixtral",
        )

    def record(self) -> dict[str, Any]:
        """What a checkpoint must agree in: everything but the folder and when to save."""
        fields = dataclasses.asdict(self)
        return {name: fields[name] for name in fields if name not in ("out", "save_every")} | {
            "stages": [dataclasses.asdict(stage) for stage in self.stages]
        }


class Texts(NamedTuple):
    """A batch of texts and what is asked about them."""

    tokens: Int32[Array, "batch length"]
    asked_at: Int32[np.ndarray, "questions"]  # where the asked keys stand; the answers follow
    answers: Int32[Array, "batch questions"]  # tokens
    answerable: Bool[Array, "batch questions"]


def draw_texts(key: Array, stage: Stage, vocabulary: Vocabulary, unanswerable: float) -> Texts:
    """A batch of a stage's texts; every key is in a text once at most."""
    pairs = _pairs(stage.length, stage.questions)
    room = stage.length // pairs
    keys = jax.random.split(key, 6)
    lead = (stage.batch, pairs)

    def some_of(key: Array, count: int, chosen: int) -> Int[Array, "batch chosen"]:
        """Different numbers below `count`, for every text."""
        texts = jax.random.split(key, stage.batch)
        return jax.vmap(lambda key: jax.random.permutation(key, count)[:chosen])(texts)

    held = vocabulary.first_key + some_of(keys[0], vocabulary.keys, pairs)
    value = vocabulary.first_value + jax.random.randint(keys[1], lead, 0, vocabulary.values)
    there = jax.random.uniform(keys[2], lead) >= unanswerable
    text = jax.random.randint(keys[3], (stage.batch, stage.length), 0, vocabulary.fillers)
    place = jnp.arange(pairs) * room + jax.random.randint(keys[4], lead, 0, room - 1)
    row = jnp.arange(stage.batch)[:, None]
    text = text.at[row, place].set(jnp.where(there, held, text[row, place]))
    text = text.at[row, place + 1].set(jnp.where(there, value, text[row, place + 1]))
    asked = some_of(keys[5], pairs, stage.questions)
    held, value, there = (jnp.take_along_axis(x, asked, 1) for x in (held, value, there))
    questions = jnp.stack([jnp.full_like(held, vocabulary.ask), held, value], axis=-1)
    tokens = jnp.concatenate([text, questions.reshape(stage.batch, -1)], axis=1)
    return Texts(tokens, stage.length + 1 + 3 * np.arange(stage.questions), value, there)


def train(recall: Recall) -> MoEModel:
    """The trained model: from the folder's last checkpoint if there is one, trained on if needed.

    Raises:
      ValueError: the folder holds a run of another configuration, or another run writes there.
      LossNotFinite: names the step.
    """
    with only_run(recall.out):
        return _train(recall)


def _train(recall: Recall) -> MoEModel:
    model = initial_model(recall)
    graph, params, fixed = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    optimiser = _optimiser(recall)
    state = (params, optimiser.init(params))
    # folders do not matter to the compiled step: runs of one process share it
    anywhere = dataclasses.replace(recall, out=Path(), save_every=1)
    step, found = 0, checkpoint.latest(recall.out / "checkpoints")
    if found is not None:
        found.check_config(recall.record())
        state, step = found.arrays(state), found.count("step", recall.steps)
    log = MetricsLog(recall.out / "metrics.jsonl", keep=step)
    key = jax.random.key(recall.seed)
    with bar(quiet=False) as progress:
        task = progress.add_task("training", total=recall.steps, completed=step)
        while step < recall.steps:
            stage = _stage_at(recall, step)
            state, measured = _step(
                state,
                jax.random.fold_in(key, step),
                graph=graph,
                fixed=fixed,
                stage=stage,
                recall=anywhere,
            )
            step += 1
            if step % 50 == 0 or step == recall.steps:
                loss, accuracy = map(float, measured)
                if not np.isfinite(loss):
                    raise LossNotFinite(f"passkey: the loss of step {step} is {loss}")
                log.write(step=step - 1, loss=loss, accuracy=accuracy)
                progress.update(task, completed=step)
            if step % recall.save_every == 0 or step == recall.steps:
                checkpoint.save(
                    recall.out / "checkpoints",
                    state,
                    config=recall.record(),
                    progress={"step": step},
                )
    nnx.update(model, nnx.State(state[0]))
    return model


def initial_model(recall: Recall) -> MoEModel:
    """Random, but for the pair of heads that recall takes (`train.induction`)."""
    config = recall.model_config()
    model = from_config(config, seed=recall.seed)
    embed = model.main.embed[...]
    model.main.embed[...] = embed.at[:, 0].set(2.0) * 0.5  # width 0 is the same for all tokens
    lower, upper = (stack and stack.layers for stack in (model.main.dense, model.main.moe))
    assert isinstance(lower, DenseLayer) and isinstance(upper, MoELayer)  # see the config
    plant(lower.attention, upper.attention, config, seed=recall.seed)
    return model


@functools.partial(jax.jit, static_argnames=("graph", "stage", "recall"), donate_argnums=0)
def _step(state, key, *, graph, fixed, stage: Stage, recall: Recall):
    texts = draw_texts(key, stage, recall.vocabulary, recall.unanswerable)

    def loss(params):
        model = nnx.merge(graph, nnx.State(params), fixed)
        hidden, _ = model.main.prefill((texts.tokens,), "float32")
        logits = model.main.logits(hidden[0][:, texts.asked_at])
        right = (jnp.argmax(logits, axis=-1) == texts.answers) & texts.answerable
        accuracy = jnp.sum(right) / jnp.sum(texts.answerable)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, texts.answers)
        return jnp.mean(losses), accuracy

    params, memory = state
    (value, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, memory = _optimiser(recall).update(gradient, memory, params)
    return (optax.apply_updates(params, updates), memory), (value, accuracy)


def _optimiser(recall: Recall) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0, recall.learning_rate, 30, max(recall.steps, 31), recall.learning_rate / 10
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01)
    )


def _stage_at(recall: Recall, step: int) -> Stage:
    for stage in recall.stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise AssertionError("the caller stops at the last step")


def _pairs(length: int, questions: int) -> int:
    """Places for pairs in a text: one per eight tokens, or one per question."""
    return max(questions, length // 8)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_program(train, Recall, __doc__, arguments)


if __name__ == "__main__":
    leave(main())
