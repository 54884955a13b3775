"""What generation_config.json says, what options say over it, and values that make no sense."""

import json

import pytest

from cmjax.models.moe.checkpoint.generation_config import (
    GenerationDefaults,
    read_generation_config,
)
from cmjax.models.moe.checkpoint.load import open_checkpoint
from cmjax.models.moe.checkpoint.save import save
from cmjax.models.moe.generation.batch import Sampler
from cmjax.models.moe.model import from_config
from cmjax.models.moe.presets import tiny

QWEN3 = {  # the form of Qwen3-30B-A3B's own
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


def _written(folder, raw):
    (folder / "generation_config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


def test_a_file_that_samples(tmp_path):
    defaults = read_generation_config(_written(tmp_path, QWEN3))
    assert defaults.end_tokens == (151645, 151643)
    assert defaults.left_out == ()
    assert Sampler.of(defaults, seed=3) == Sampler(temperature=0.6, top_p=0.95, top_k=20, seed=3)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"temperature": 0.0}, Sampler(temperature=0.0, top_p=0.95, top_k=20)),
        ({"top_p": 1.0}, Sampler(temperature=0.6, top_p=1.0, top_k=20)),
        ({"top_k": 0}, Sampler(temperature=0.6, top_p=0.95, top_k=0)),
    ],
)
def test_what_the_caller_says_wins(tmp_path, options, want):
    assert Sampler.of(read_generation_config(_written(tmp_path, QWEN3)), **options) == want


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, Sampler(temperature=0.0, top_p=0.9)),
        ({"do_sample": False, "temperature": 0.6}, Sampler()),
        ({"do_sample": True}, Sampler(temperature=1.0, top_k=50)),  # as in transformers
        ({"do_sample": True, "top_k": 0}, Sampler(temperature=1.0)),
        ({}, Sampler()),
    ],
)
def test_a_file_that_says_less(tmp_path, raw, want):
    assert Sampler.of(read_generation_config(_written(tmp_path, raw))) == want


def test_a_file_that_samples_means_what_transformers_means(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'test')")
    for raw in (QWEN3, {"do_sample": True}, {"do_sample": True, "top_p": 0.5}):
        theirs = transformers.GenerationConfig.from_pretrained(_written(tmp_path, raw))
        ours = read_generation_config(tmp_path)
        fallback = theirs._get_default_generation_params()
        for key in ("temperature", "top_p", "top_k"):
            value = getattr(theirs, key)
            assert getattr(ours, key) == (fallback[key] if value is None else value)


def test_what_is_not_done_here_is_told(tmp_path):
    raw = QWEN3 | {"repetition_penalty": 1.05, "num_beams": 1, "min_p": 0.1, "typical_p": None}
    left_out = read_generation_config(_written(tmp_path, raw)).left_out
    assert left_out == ("repetition_penalty 1.05", "min_p 0.1")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"temperature": -1}, "key 'temperature' must be at least 0, got -1"),
        ({"temperature": float("nan")}, "key 'temperature' must be at least 0, got nan"),
        ({"top_p": 0}, "key 'top_p' must be more than 0, got 0"),
        ({"top_p": 1.5}, "key 'top_p' must be at most 1, got 1.5"),
        ({"top_k": -3}, "key 'top_k' must be at least 0, got -3"),
        ({"top_k": "5"}, "key 'top_k' must be a number, got '5'"),
        ({"eos_token_id": "end"}, "key 'eos_token_id' must hold token numbers, got 'end'"),
        ({"do_sample": "yes"}, "key 'do_sample' must be true or false, got 'yes'"),
        ("[1]", "must hold a JSON object"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_their_key(tmp_path, raw, message):
    with pytest.raises(ValueError, match=message) as error:
        read_generation_config(_written(tmp_path, raw))
    assert "generation_config.json: " in str(error.value)


def test_a_checkpoint_ends_its_texts_as_the_file_says(tmp_path):
    save(from_config(tiny()), tmp_path)
    assert open_checkpoint(tmp_path).config.end_tokens == ()
    assert open_checkpoint(tmp_path).defaults == GenerationDefaults()
    _written(tmp_path, {"eos_token_id": [7, 9]})
    assert open_checkpoint(tmp_path).config.end_tokens == (7, 9)
    _written(tmp_path, {"do_sample": True})
    assert open_checkpoint(tmp_path).config.end_tokens == ()
