"""Ways to answer from a text longer than a model was trained for, each over the same weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from cmjax.mesh import RankMesh
from cmjax.models.moe.config import GroupedAttention, MoEConfig
from cmjax.models.moe.generation.programs import place_params
from cmjax.models.moe.layers.cache import extend_cache
from cmjax.models.moe.model import MoEModel, abstract_model, assemble, parameters
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.positions import LinearScaling, YarnConfig
from cmjax.models.moe.sharding import shard_params
from cmjax.models.moe.xl3m import Scorer, XL3MConfig, chosen_context, score_segments
from train.passkey import Vocabulary

ASKED = 16  # keys of a haystack that are asked for, each in it once
GAP = 16  # a haystack has a pair per so many tokens
SEGMENT, STRIDE, BATCH = 24, 12, 256

Answers = Int[np.ndarray, "questions"]


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A text and what to ask of it.

    Attributes:
      content: tokens; between fillers stand pairs, those that are asked for once each.
      questions: [questions, 2] tokens.
      answers: [questions] tokens.
      places: [questions] where in the content the pairs begin.
    """

    content: Int[np.ndarray, "tokens"]
    questions: Int[np.ndarray, "questions 2"]
    answers: Answers
    places: Int[np.ndarray, "questions"]

    def holds(self, starts: Int[np.ndarray, "segments"]) -> Bool[np.ndarray, "questions segments"]:
        """Which segments hold the whole pair that a question is about."""
        place = self.places[:, None]
        return (starts <= place) & (place + 2 <= starts + SEGMENT)


def draw_haystack(rng: np.random.Generator, vocabulary: Vocabulary, length: int) -> Haystack:
    """A haystack that is `length` tokens with one question. Pairs of other keys are distractors."""
    content = rng.integers(0, vocabulary.fillers, length - 2)
    cells = content.size // GAP
    keys = vocabulary.first_key + rng.permutation(vocabulary.keys)
    asked = rng.permutation(cells)[:ASKED]
    held = rng.choice(keys[ASKED:], cells)
    held[asked] = keys[: asked.size]
    values = vocabulary.first_value + rng.integers(0, vocabulary.values, cells)
    place = np.arange(cells) * GAP + rng.integers(0, GAP - 1, cells)
    content[place], content[place + 1] = held, values
    questions = np.stack([np.full(asked.size, vocabulary.ask), held[asked]], axis=1)
    return Haystack(content, questions, values[asked], place[asked])


def stretched(config: MoEConfig, length: int) -> dict[str, MoEConfig]:
    """The model's configuration for texts of `length` tokens, by each way to read them whole.

    Linear: positions divided by s = length / trained (Chen et al. 2023, arXiv 2306.15595). NTK: the
    base of the frequencies times s^(d / (d - 2)), so that the slowest is divided by s and the
    fastest kept ("NTK-aware scaled RoPE", 2023). YaRN: Peng et al. 2023 (arXiv 2309.00071). Window:
    every query sees the newest tokens, as many as the model was trained on.
    """
    assert isinstance(config.attention, GroupedAttention)
    trained, rope = config.max_position, config.rope
    factor = max(length / trained, 1.0)
    dim = config.rope_dim
    ways = {
        "RoPE linear": dataclasses.replace(rope, scaling=LinearScaling(factor=factor)),
        "RoPE NTK": dataclasses.replace(rope, theta=rope.theta * factor ** (dim / (dim - 2))),
        "RoPE YaRN": dataclasses.replace(
            rope, scaling=YarnConfig(factor=factor, original_max_position=trained)
        ),
    }
    window = dataclasses.replace(config.attention, window=trained)
    return {
        "plain": config,
        "sliding window": dataclasses.replace(config, attention=window),
        **{name: dataclasses.replace(config, rope=way) for name, way in ways.items()},
    }


def read_whole(config: MoEConfig, params: Any, haystack: Haystack) -> Answers:
    """The likeliest answers after the whole text; it is read once for all questions."""
    found = _whole(config)(params, haystack.content, haystack.questions)
    return np.asarray(found)


def truncated(scorer: Scorer, haystack: Haystack) -> Answers:
    """The likeliest answers after the newest tokens, as many as the model was trained on."""
    room = scorer.config.max_position - haystack.questions.shape[1]
    contexts = [np.append(haystack.content[-room:], question) for question in haystack.questions]
    return _likeliest(scorer, contexts)


def by_xl3m(
    scorer: Scorer, haystack: Haystack, keeps: Sequence[int | None]
) -> tuple[list[Answers], Float[np.ndarray, "questions segments"]]:
    """The likeliest answers after the key context, for every way to choose it, from one reading.

    Returns: answers, one array per entry of `keeps`; the entropies of all segments.
    """
    config = XL3MConfig(
        window=scorer.config.max_position, segment=SEGMENT, stride=STRIDE, answer=1, batch=BATCH
    )
    contexts: list[list[np.ndarray]] = [[] for _ in keeps]
    entropies = []
    for question in haystack.questions:
        scores = score_segments([haystack.content], question, scorer, config)
        entropies.append(np.array([h for _, h in scores], np.float32))
        for keep, chosen in zip(keeps, contexts, strict=True):
            how = dataclasses.replace(config, keep=keep)
            chosen.append(chosen_context(haystack.content, question, entropies[-1], how).tokens)
    return [_likeliest(scorer, chosen) for chosen in contexts], np.stack(entropies)


def scorer_of(model: MoEModel) -> Scorer:
    """A scorer of a model, on one rank."""
    mesh = RankMesh(1, 1)
    parallelism = Parallelism(table=one_rank(model.config).table, axes=mesh.axes)
    params = place_params(shard_params(parameters(model), parallelism), parallelism, mesh)
    return Scorer(config=model.config, params=params, parallelism=parallelism, mesh=mesh)


def _likeliest(scorer: Scorer, contexts: Sequence[np.ndarray]) -> Answers:
    """The likeliest next tokens, in one batch of one shape."""
    tokens = np.zeros((ASKED, scorer.config.max_position), np.int32)
    lengths = np.ones(ASKED, np.int32)
    for row, context in enumerate(contexts):
        tokens[row, : context.size], lengths[row] = context, context.size
    return np.asarray(jnp.argmax(scorer(tokens, lengths), axis=-1))[: len(contexts)]


@functools.cache
def _whole(config: MoEConfig) -> Callable:
    graph, _ = abstract_model(config, one_rank(config), "float32")

    def answers(params, content, questions):
        main = assemble(graph, params).main
        _, caches = main.prefill((content[None],), "float32")
        count, new = questions.shape
        cache = jax.tree.map(lambda x: jnp.repeat(x, count, axis=1), caches[0])
        cache = extend_cache(cache, content.size + new)
        lengths = jnp.full((count,), content.size, jnp.int32)
        hidden, _ = main.decode((questions,), (cache,), (lengths,))
        return jnp.argmax(main.logits(hidden[0][:, -1]), axis=-1)

    return jax.jit(answers)
