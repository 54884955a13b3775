"""The language-model run on a tiny network: meshes, exact resumption, and what stops it."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from cmjax import processes
from cmjax.mesh import RankMesh
from cmjax.processes import ProcessGroup
from tests.together import free_address, run_together
from train.data.text import Windows, grammar_text
from train.metrics import LossNotFinite, read_metrics
from train.moe import run as module
from train.moe.config import LanguageModelConfig
from train.moe.run import start, train, trained_model
from train.moe.train_step import initial, make_gradient, make_step, one_rank_params, parallelism_of
from train.moe_lm import held_out_loss, main

QUIET = Console(quiet=True)


def _config(out: Path = Path("unused"), **changed) -> LanguageModelConfig:
    options = {
        "hidden": 32,
        "layers": 2,
        "heads": 2,
        "experts": 4,
        "expert_ffn": 32,
        "capacity_factor": 0.0,
        "length": 16,
        "batch": 4,
        "steps": 24,
        "learning_rate": 1e-2,
        "checkpoint_every": 12,
        "test_windows": 2,
        "out": out,
    }
    return LanguageModelConfig(**{**options, **changed})


def _lines(out: Path) -> list[dict]:
    return read_metrics(out / "metrics.jsonl")


def _losses(out: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in _lines(out)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from the beginning to the end, on two ranks."""
    run = start(_config(tmp_path_factory.mktemp("whole"), mesh="1x2"), QUIET)
    train(run, QUIET)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["latent", "grouped"])
def test_loss_and_gradient_are_those_of_one_rank_on_every_mesh(attention):
    config = _config(attention=attention)
    tokens = Windows(grammar_text(20_000), config.length).batch(0, config.batch)
    found = {}
    for mesh in ("1x1", "2x2"):
        on_mesh, ranks = dataclasses.replace(config, mesh=mesh), RankMesh.parse(mesh)
        state = initial(on_mesh, ranks)
        loss, grads = jax.jit(make_gradient(on_mesh, ranks))(state.params, tokens)
        found[mesh] = loss, grads
    (want, want_grads), (got, got_grads) = found["1x1"], found["2x2"]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    here, there = (one_rank_params(g, config) for g in (got_grads, want_grads))
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(there))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), here, there
    )


def test_a_run_learns_and_its_model_on_one_rank_has_its_loss(whole):
    losses = [loss for _, loss, _ in _losses(whole.config.out)]
    assert losses[0] == pytest.approx(np.log(256), abs=0.5)  # knows nothing of 256 bytes
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    held = held_out_loss(trained_model(whole), whole.windows.held_out(8))
    assert held == pytest.approx(np.mean(losses[-5:]), abs=0.3)


def test_a_run_that_was_stopped_goes_on_as_if_it_never_was(tmp_path, whole, monkeypatch):
    config = dataclasses.replace(whole.config, out=tmp_path)
    real = module.save

    def stop(*run):
        real(*run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save", stop)
        train(start(config, QUIET), QUIET)
    assert len(_lines(tmp_path)) == config.checkpoint_every
    run = start(config, QUIET)
    assert run.step == config.checkpoint_every
    train(run, QUIET)
    assert _losses(tmp_path) == _losses(whole.config.out)
    jax.tree.map(np.testing.assert_array_equal, run.state.params, whole.state.params)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_one_goes_on_from_them(tmp_path):
    config = _config(tmp_path / "alone", mesh="2x2", steps=6, checkpoint_every=3)
    main(config, QUIET)
    together = dataclasses.replace(config, out=tmp_path / "together")
    options = {
        f"--{field.name.replace('_', '-')}={getattr(together, field.name)}"
        for field in dataclasses.fields(together)
        if field.name not in ("text", "group")
    }
    printed = run_together("train.moe_lm", sorted(options))
    assert "held-out loss" in printed[0] and printed[1] == ""
    np.testing.assert_allclose(_losses(together.out), _losses(config.out), rtol=1e-4)
    shutil.rmtree(max((together.out / "checkpoints").iterdir()))
    main(together, QUIET)
    np.testing.assert_allclose(_losses(together.out), _losses(config.out), rtol=1e-4)


def test_a_finished_run_is_only_tested(whole, capsys):
    before = _lines(whole.config.out)
    main(whole.config, Console(width=200))
    assert "held-out loss" in capsys.readouterr().out
    assert _lines(whole.config.out) == before


def test_the_balancing_bias_steps_against_the_load():
    config, mesh = _config(bias_rate=0.25), RankMesh.parse("1x1")
    tokens = Windows(grammar_text(20_000), config.length).batch(0, config.batch)
    state = initial(config, mesh)
    before = _bias(state.params)
    _, grads = jax.jit(make_gradient(config, mesh))(state.params, tokens)
    load = _bias(grads)
    assert load.sum() == config.batch * config.length * config.experts_per_token
    after, result = make_step(config, mesh)(state, tokens)
    np.testing.assert_array_equal(_bias(after.params), before - 0.25 * np.sign(load - load.mean()))
    assert float(result.load) == pytest.approx(load.max() / load.mean())


def _bias(params):
    return np.asarray(params["main"]["moe"]["layers"]["moe"]["router"]["bias"])


def test_rows_beyond_the_capacity_are_dropped():
    config, mesh = _config(capacity_factor=1.0), RankMesh.parse("1x1")
    mean = config.batch * config.length * config.experts_per_token // config.experts
    assert parallelism_of(config, mesh).capacity == mean
    tokens = Windows(grammar_text(20_000), config.length).batch(0, config.batch)
    state = initial(config, mesh)
    losses = [
        float(
            jax.jit(make_gradient(dataclasses.replace(config, capacity_factor=factor), mesh))(
                state.params, tokens
            )[0]
        )
        for factor in (0.0, 1.0)
    ]
    assert losses[0] != losses[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_batch(tmp_path, whole):
    run = start(dataclasses.replace(whole.config, out=tmp_path), QUIET)
    run.state.params["main"]["embed"] *= np.nan
    with pytest.raises(LossNotFinite, match=r"the batch is in .*bad_batch\.npz"):
        train(run, QUIET)
    with np.load(tmp_path / "bad_batch.npz") as saved:
        np.testing.assert_array_equal(saved["tokens"], run.windows.batch(int(saved["step"]), 4))


def test_a_checkpoint_of_another_configuration_is_refused(whole):
    with pytest.raises(ValueError, match=r"another configuration \(hidden: 32 there, 64 here\)"):
        start(dataclasses.replace(whole.config, hidden=64), QUIET)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"capacity_factor": 0.5}, "--capacity-factor must be 0, or 1 or more: 0.5"),
        ({"mesh": "1x3"}, r"--batch \(4\) and --experts \(4\) must be multiples of the 3 ranks"),
        ({"mesh": "two"}, "mesh must be NODESxNPUS"),
        ({"text": (Path("nowhere.txt"),)}, "--text nowhere.txt: cannot be read"),
        ({"length": 50_000}, "with a tenth held out need"),
    ],
)
def test_bad_input_is_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        start(_config(tmp_path, **changed), QUIET)


def test_a_coordinator_that_nobody_answers_at_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE_S", 0.5)
    group = ProcessGroup(coordinator=free_address(), processes=2, process_id=1)
    with pytest.raises(ValueError, match="nobody answers there after"):
        main(_config(tmp_path, mesh="2x1", group=group), QUIET)
