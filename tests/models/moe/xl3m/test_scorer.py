"""Scores of rows: equal to the model's, and alike on any mesh and in any batch."""

import dataclasses

import jax
import numpy as np
import pytest

from cmjax.mesh import RankMesh
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.programs import place_params
from cmjax.models.moe.model import abstract_model, assemble
from cmjax.models.moe.parallelism import Parallelism, one_rank
from cmjax.models.moe.presets import tiny
from cmjax.models.moe.sharding import shard_params
from cmjax.models.moe.slots import ep_table
from cmjax.models.moe.steps import init_params
from cmjax.models.moe.xl3m.context import XL3MConfig, score_segments
from cmjax.models.moe.xl3m.scorer import Scorer, next_logits

CONFIG = dataclasses.replace(tiny(), mtp_layers=0)
PARAMS = init_params(CONFIG, "float32")
LENGTHS = np.array([12, 5, 1, 12, 9])
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (5, 12))
SEGMENTS = XL3MConfig(window=64, segment=12, stride=7, answer=4, batch=5)
TEXT = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 100)
# what float32 sums in another order may differ by, for logits of this model (of size 3)
CLOSE = 1e-5


def _scorer(mesh: RankMesh, config: MoEConfig = CONFIG) -> Scorer:
    parallelism = Parallelism(table=ep_table(config.routed_experts, mesh.ranks), axes=mesh.axes)
    params = place_params(shard_params(PARAMS, parallelism), parallelism, mesh)
    return Scorer(config=config, params=params, parallelism=parallelism, mesh=mesh)


ALONE = _scorer(RankMesh(1, 1))


def _entropies(scorer: Scorer, config: XL3MConfig = SEGMENTS) -> np.ndarray:
    return np.array([h for _, h in score_segments([TEXT], np.array([3, 4]), scorer, config)])


def test_scores_are_the_models_own_at_the_last_token_of_each_row():
    graph, _ = abstract_model(CONFIG, one_rank(CONFIG), "float32")
    model = assemble(graph, PARAMS)
    found = np.asarray(ALONE(TOKENS, LENGTHS))
    for row, length in enumerate(LENGTHS):
        whole = model(TOKENS[row : row + 1, :length].astype(np.int32))
        np.testing.assert_allclose(found[row], whole[0, -1], atol=CLOSE)


def test_padding_behind_a_row_changes_nothing():
    other = TOKENS.copy()
    for row, length in enumerate(LENGTHS):
        other[row, length:] = 7
    np.testing.assert_array_equal(ALONE(TOKENS, LENGTHS), ALONE(other, LENGTHS))


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_entropies_are_the_same_on_any_number_of_devices(nodes):
    spread = _scorer(RankMesh(nodes, 1))
    np.testing.assert_allclose(_entropies(spread), _entropies(ALONE), atol=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_entropies_do_not_depend_on_the_batch(batch):
    config = dataclasses.replace(SEGMENTS, batch=batch)
    np.testing.assert_allclose(_entropies(ALONE, config), _entropies(ALONE), atol=CLOSE)


def test_memory_holds_neither_caches_nor_scores_of_other_positions():
    """Compiled, eight times the layers need no more memory beyond parameters; a cache would."""

    def temporary_bytes(layers: int) -> int:
        config = dataclasses.replace(CONFIG, layers=layers, dense_layers=tuple(range(layers - 1)))
        graph, shapes = abstract_model(config, one_rank(config), "float32")
        lowered = jax.jit(lambda *args: next_logits(assemble(graph, args[0]), *args[1:])).lower(
            shapes, jax.ShapeDtypeStruct((8, 64), np.int32), jax.ShapeDtypeStruct((8,), np.int32)
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(3), temporary_bytes(17)
    cache = 14 * 8 * 64 * (16 + 8) * 4  # of the layers that are more
    scores = 8 * 64 * CONFIG.vocab_size * 4
    assert many - few < cache / 4
    assert few < 20 * scores


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (TOKENS[0], LENGTHS, r"must be \[rows, length\] and lengths \[rows\].*got \(12,\)"),
        (TOKENS[:0], LENGTHS[:0], r"neither empty; got \(0, 12\)"),
        (TOKENS + 310, LENGTHS, r"token \d+ is outside the model's vocabulary, 0..319"),
        (TOKENS - 320, LENGTHS, r"token -\d+ is outside the model's vocabulary"),
        (TOKENS, LENGTHS + 1, "lengths must lie in 1..12, got 2 to 13"),
        (TOKENS, LENGTHS - 1, "lengths must lie in 1..12, got 0 to 11"),
        (np.zeros((1, 257), int), [3], "rows of 257 tokens are longer than the 256 the model"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(tokens, lengths, message):
    with pytest.raises(ValueError, match=f"^Scorer: .*{message}"):
        ALONE(tokens, lengths)
