"""The command: what it prints, and one line for what it cannot do."""

import json

import numpy as np
import pytest

from cmjax.cli import main
from cmjax.placement import Plan, write_plan

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
        ([*RANDOM, "--mesh", "300x8"], "devices must be 1 to 256, got 300"),
        ([*RANDOM, "--new-tokens", "256"], "prompt 1 has 1 tokens and is to get 256 more"),
        ([*RANDOM, "--context", "10"], "prompt 1 has 1 tokens .* the cache holds 10"),
        ([*RANDOM, "--top-p", "2"], "top_p must lie in 0..1, got 2"),
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
        ([*RANDOM, "--json", "no/such/out.json"], "no folder no/such"),
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
    assert found["speed"]["decode_steps"] == 15
    assert "every byte is a token" in output.err
    assert "tokens/s" in output.err
