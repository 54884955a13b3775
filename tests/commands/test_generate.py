"""The command: what it prints, and one line for what it cannot do."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from cmjax import processes
from cmjax.cli import main
from cmjax.models import moe
from cmjax.models.moe.positions import Rope, YarnConfig
from cmjax.placement import Plan, write_plan
from tests.together import free_address, run_together

RANDOM = ["--random", "tiny", "--prompt", "a"]


def _run(arguments):
    return main(["generate", *arguments])


def _plan(experts=16, layers=2, ranks=4, extra=0):
    rows = [[*range(experts), *range(extra)]] * layers
    return Plan(np.array(rows), experts, ranks)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (_plan(experts=8), r"plan\.json: a plan for another .*experts per layer: plan 8, model 16"),
        (_plan(ranks=8), "ranks: plan 8, mesh 4"),
        (_plan(layers=4), "MoE layers: plan 4, model 2"),
        (_plan(experts=8, layers=5), "plan 8, model 16; MoE layers: plan 5, model 2"),
    ],
)
def test_a_plan_for_another_model_is_one_clear_line(tmp_path, capsys, plan, message):
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    assert _run([*RANDOM, "--mesh", "2x2", "--plan", str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --weights FOLDER or --random PRESET"),
        (["--random", "tiny"], "no prompt: give --prompt"),
        (["--random", "tiny", "--prompt", "a", "--weights", "x"], "give either"),
        (["--weights", "no/such", "--prompt", "a"], "no/such: no such folder"),
        (["--random", "tinny", "--prompt", "a"], "did you mean 'tiny'"),
        ([*RANDOM, "--mesh", "4y4"], "mesh must be NODESxNPUS"),
        ([*RANDOM, "--threads", "0"], "--threads must be 1 to .*; got 0"),
        ([*RANDOM, "--threads", "4096"], "the cores that this process may use; got 4096"),
        ([*RANDOM, "--mesh", "300x8"], "devices must be 1 to 256, got 300"),
        ([*RANDOM, "--new-tokens", "256"], "prompt 1 has 1 tokens and is to get 256 more"),
        ([*RANDOM, "--context", "10"], "prompt 1 has 1 tokens .* the cache holds 10"),
        ([*RANDOM, "--top-p", "2"], "top_p must lie in 0..1, got 2"),
        ([*RANDOM, "--top-p", "0"], "top_p must be more than 0, got 0"),
        ([*RANDOM, "--top-p", "nan"], "top_p must lie in 0..1, got nan"),
        ([*RANDOM, "--temperature", "nan"], "temperature must be a finite number, got nan"),
        ([*RANDOM, "--temperature", "inf"], "temperature must be a finite number, got inf"),
        ([*RANDOM, "--top-k", "-1"], "top_k must be at least 0 .* got -1"),
        ([*RANDOM, "--chat"], "--chat needs the chat template of a checkpoint"),
        ([*RANDOM, "--system", "Be kind."], "--system and --chat-option go with --chat"),
        (["--random", "tiny", "--prompt-tokens", "1;2"], "numbers with commas, got '1;2'"),
        (["--random", "tiny", "--prompt-tokens", "1,400"], "holds token 400"),
        ([*RANDOM, "--prompt-file", "no/such.txt"], "no/such.txt: cannot be read"),
        ([*RANDOM, "--plan", "no/such.json"], "no/such.json"),
        ([*RANDOM, "--mesh", "16x1"], "--mesh 16x1: .* runs with 8 device.s., 16 are needed"),
        ([*RANDOM, "--prefill-chunk", "0"], "prefill_chunk must be at least 1 token, got 0"),
        (
            [*RANDOM, "--mesh", "2x3", "--prefill", "sequence-parallel"],
            "heads to divide over the ranks, got 8 heads and 6 ranks",
        ),
        (
            [*RANDOM, "--prefill", "sequence-parallel", "--prefill-chunk", "4"],
            "chunks of 4 tokens .* choose either",
        ),
        ([*RANDOM, "--json", "no/such/out.json"], "no/such does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert _run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    line = output.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)


def test_greedy_tokens_of_a_checkpoint_on_a_mesh_equal_hugging_face(data, capsys):
    folder = data / "hf_fixtures" / "mixtral_tiny"
    reference = np.load(folder / "reference.npz")
    prompt = ",".join(map(str, reference["greedy_prompt"][0]))
    options = ["--new-tokens", "16", "--mesh", "2x2", "--ignore-end", "--json", "-"]
    given = ["--weights", str(folder), "--prompt", "Hi", "--prompt-tokens", prompt]
    assert _run([*given, *options]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    text, tokens = found["requests"]
    assert text["prompt_tokens"] == [72, 105]
    assert text["prompt"] == "Hi"
    assert tokens["tokens"] == reference["greedy_tokens"][0][8:].tolist()
    assert found["speed"]["ranks"] == 4
    assert found["speed"]["load_s"] > 0
    assert found["speed"]["decode_steps"] == 15
    assert "every byte is a token" in output.err
    assert "tokens/s" in output.err


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["float32", "int8"])
def test_two_processes_generate_the_tokens_of_one_and_the_first_prints_them(
    tmp_path, capsys, arithmetic
):
    moe.save(moe.from_config(moe.tiny()), tmp_path)
    options = ["--weights", str(tmp_path), "--prompt-tokens", "1,2,3", "--prompt-tokens", "7"]
    options += ["--mesh", "2x2", "--new-tokens", "6", "--temperature", "0.7", "--json", "-"]
    options += ["--arithmetic", arithmetic]
    assert _run(options) == 0
    alone = json.loads(capsys.readouterr().out)["requests"]
    first, second = run_together("cmjax", ["generate", *options])
    assert json.loads(first)["requests"] == alone
    assert second == ""


def test_a_coordinator_that_nobody_answers_at_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE_S", 0.5)
    where = ["--coordinator", free_address(), "--processes", "2", "--process-id", "1"]
    assert _run([*RANDOM, "--mesh", "2x2", *where]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --coordinator {where[1]}: nobody answers there")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} {{ answer | default('assistant') }}{% endif %}"
)


@pytest.fixture
def checkpoint(tmp_path):
    """A random model with a tokenizer of words that begins texts, a template, and defaults."""
    moe.save(moe.from_config(moe.tiny()), tmp_path)
    words = ["<s>", "</s>", "the", "cat", "user", "system", "assistant", "kind", "?"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = Whitespace()  # type: ignore
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def _found(capsys, folder, *options):
    assert _run(["--weights", str(folder), "--new-tokens", "6", "--json", "-", *options]) == 0
    output = capsys.readouterr()
    return json.loads(output.out)["requests"][0], output.err


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (["--prompt", "the cat"], [0, 2, 3]),
        (["--prompt", "<s> the cat"], [0, 2, 3]),
        (["--prompt", "the cat", "--no-special-tokens"], [2, 3]),
        (["--prompt", "the cat", "--chat"], [0, 4, 2, 3, 6]),
        (["--prompt", "cat", "--chat", "--system", "kind"], [0, 5, 7, 4, 3, 6]),
        (["--prompt", "cat", "--chat", "--chat-option", "answer=kind"], [0, 4, 3, 7]),
    ],
)
def test_a_prompt_begins_once_and_may_be_a_chat(capsys, checkpoint, options, want):
    pytest.importorskip("jinja2", reason="needs jinja2 (extra 'text')")
    assert _found(capsys, checkpoint, *options)[0]["prompt_tokens"] == want


def test_the_checkpoint_says_how_text_is_drawn_and_ends_unless_options_do(capsys, checkpoint):
    prompt = ["--prompt", "the cat"]
    greedy, _ = _found(capsys, checkpoint, *prompt)
    file = checkpoint / "generation_config.json"
    file.write_text('{"do_sample": true, "temperature": 5.0, "repetition_penalty": 1.2}')
    drawn, said = _found(capsys, checkpoint, *prompt)
    assert drawn["tokens"] != greedy["tokens"]
    assert "left out: repetition_penalty 1.2" in said
    assert _found(capsys, checkpoint, *prompt, "--temperature", "0")[0] == greedy
    assert _found(capsys, checkpoint, *prompt, "--top-k", "1")[0] == greedy
    end = greedy["tokens"][2]
    file.write_text(json.dumps({"eos_token_id": [319, end]}))
    ended, _ = _found(capsys, checkpoint, *prompt)
    first = greedy["tokens"].index(end) + 1
    assert (ended["tokens"], ended["stopped_by"]) == (greedy["tokens"][:first], "end token")
    assert _found(capsys, checkpoint, *prompt, "--ignore-end")[0]["tokens"] == greedy["tokens"]


def test_text_in_python_is_the_command_s(capsys, checkpoint):
    pytest.importorskip("jinja2", reason="needs jinja2 (extra 'text')")
    (checkpoint / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 5.0, "num_beams": 4}'
    )
    want = _found(capsys, checkpoint, "--prompt", "the cat", "--chat")[0]["text"]
    with pytest.warns(UserWarning, match="asks for num_beams 4, which is left out"):
        assert moe.generate(checkpoint, ["the cat"], 6, chat=True) == [want]


@pytest.mark.slow
def test_a_context_goes_as_far_as_yarn_stretches_it(capsys, tmp_path):
    yarn = YarnConfig(factor=4.0, original_max_position=16, mscale=1.0, mscale_all_dim=1.0)
    config = dataclasses.replace(moe.tiny(), max_position=16, rope=Rope(scaling=yarn), mtp_layers=0)
    model = moe.from_config(config)
    moe.save(model, tmp_path)
    prompt = [int(token) for token in np.random.default_rng(0).integers(0, 320, 50)]
    given = ["--prompt-tokens", ",".join(map(str, prompt))]
    found, _ = _found(capsys, tmp_path, *given)
    tokens = list(prompt)
    for _ in range(6):
        tokens.append(int(model(np.array([tokens], np.int32))[0, -1].argmax()))
    assert found["tokens"] == tokens[50:]
    assert _run(["--weights", str(tmp_path), *given, "--new-tokens", "15"]) == 2
    assert "has 50 tokens and is to get 15 more, the cache holds 64" in capsys.readouterr().err
