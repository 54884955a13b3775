"""Whatever an option holds, a command ends in time with exit code 0, 1 or 2, and says in one line
what is wrong."""

import contextlib
import io
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.cli import main

fuzzed = settings(settings.get_profile("fuzz"), deadline=None)
REFUSED_WITHIN_S = 10.0  # of the processor; imports are within
PARSER = "For full helptext"  # how the parser of options ends its frame
BEFORE = "no tokenizer: every byte is a token"


def _ran(*arguments: str) -> tuple[int, str, float]:
    """Exit code, standard error and processor seconds of a command."""
    said = io.StringIO()
    begin = time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as left:  # the parser of options
            code = int(left.code or 0)
    return code, said.getvalue(), time.process_time() - begin


def _check(arguments, *, refused: bool) -> None:
    code, said, seconds = _ran(*arguments)
    assert code in ((2,) if refused else (0, 1, 2)), said
    assert "Traceback" not in said and "cmjax itself failed" not in said, said
    if code == 2 and PARSER not in said:
        lines = [line for line in said.splitlines() if line != BEFORE]
        assert len(lines) == 1 and lines[0].startswith("error: "), said
    if code == 2:
        assert seconds < REFUSED_WITHIN_S


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    np.save(folder / "loads.npy", np.arange(1, 33).reshape(2, 16))
    (folder / "loop").symlink_to(folder / "loop")
    return folder


HUGE, WIDE = "1" + "0" * 20, "9" * 400
REFUSED = """
predict decode --npus 0
predict decode --npus 99999999999999999999
predict decode --ep -1
predict decode --ep 1000000000000
predict decode --batch 1e300
predict decode --batch 1000000000
predict decode --batch inf
predict decode --batch nan
predict decode --batch 0
predict decode --prompt 1e30
predict decode --output inf
predict prefill --prompt 0
predict prefill --prompt 1e-9
predict decode --slo-tpot-ms nan
predict decode --slo-tpot-ms -1
predict decode --mtp-acceptance nan
predict decode --load
predict decode --plot x.gif
predict decode --json /
predict decode --json LOOP
predict decode --json a.json --trace a.json
micro dispatch --ep 8 --tokens 128 --quant fp8
micro dispatch --ep 8 --tokens 1000000000 --hidden 1000000000
micro dispatch --ep 0 --tokens 1
micro dispatch --ep 8 --tokens 8 --copies 257
micro gemm --m 0 --k 128 --n 128
micro gemm --m 1000000000 --k 1000000000 --n 1000000000 --groups 1000000000
micro attention --batch 1000000000 --heads 128 --length 1000000000
micro decode-attention --batch 1 --heads 3 --kv-heads 2 --context 1
micro latent-attention --batch 1 --heads 1 --q-len 1 --context 1 --kv-cache x
micro [/b]
place LOADS --ranks 4 --tokens 10000000000000000000000000000000
place LOADS --ranks 4 --redundant 4000000000
place LOADS --ranks 4 --nodes 0
place LOADS --ranks 4 --seed 100000000000000000000
place LOADS --ranks 4 --memory-gib inf
place LOADS --ranks 4 --seconds nan
place LOADS --ranks 4 --objective cvar:nan
place LOADS --ranks 4 --first-layer 1000000000
place LOADS --ranks 4 --model-layers 0
place LOADS --ranks 4 --step-tokens -1
place LOADS --ranks 4 --method [/b]
place LOADS --ranks 4 --domain [/b]
place LOADS --ranks 4 --without-ranks 99999999999999999999
place LOADS --ranks 4 --train-windows 99999999999999999999:1
place LOADS --ranks 4 --plot x.gif
serve poisson:rate=nan
serve poisson:requests=1000000000
serve poisson:prompt=1e30
serve poisson:reuse=0.5,prompt=1e9
serve constant:requests=3,rate=1e-300
serve poisson:requests=3 --npus 1000000000000
serve poisson:requests=3 --seed 100000000000000000000
serve poisson:requests=3 --first 0
serve poisson:requests=3 --rate inf
serve poisson:requests=3 --rate-scale nan
serve poisson:requests=3 --think-s nan
serve poisson:requests=3 --cache-blocks -1
serve poisson:requests=3 --uncertainty nan
plan poisson:requests=3 --slo-tpot-ms inf
plan poisson:requests=3 --slo-tpot-ms 50 --target nan
plan poisson:requests=3 --slo-tpot-ms 50 --workers 0
generate --random tiny --prompt a --mesh 1x99999999
generate --random tiny --prompt a --mesh 1x1000000
generate --random tiny --prompt a --seed 100000000000000000000
generate --random tiny --prompt a --temperature nan
generate --random tiny --prompt a --temperature -1
generate --random tiny --prompt a --top-p 0
generate --random tiny --prompt a --top-p nan
generate --random tiny --prompt a --top-k 99999999999999999999
generate --random tiny --prompt a --new-tokens 1000000000000
generate --random tiny --prompt a --context 1000000000000
generate --random tiny --prompt a --drafts 100000000000
generate --random tiny --prompt-tokens 99999999999999999999
price json:dumps --size n=1e300
price ..x:f
validate LOADS
fit --rows nowhere.csv
machines [/b]
""".strip().splitlines()  # fmt: skip
NAMELESS = [
    ("place", ""), ("validate", ""), ("serve", ""), ("machines", ""), ("fit", "--rows", ""),
    ("predict", "decode", "--on", ""), ("predict", "decode", "--load", ""),
    ("generate", "--weights", "", "--prompt", "a"), ("transcribe", "", "a.wav"),
    ("generate", "--weights=", "--prompt", "a"),
]  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_what_no_computation_can_come_of_is_refused_at_once(folder, line):
    names = {"LOADS": str(folder / "loads.npy"), "LOOP": str(folder / "loop")}
    _check([names.get(word, word) for word in line.split()], refused=True)


@pytest.mark.parametrize("arguments", NAMELESS, ids=" ".join)
def test_a_name_without_a_letter_is_no_folder(arguments, monkeypatch, folder):
    monkeypatch.chdir(folder)
    _check(arguments, refused=True)
    assert "is empty; give it a value" in _ran(*arguments)[1]


VALUES = st.sampled_from(
    ["0", "-1", "1", "2", "nan", "inf", "-inf", "1e300", "1e-300", HUGE, WIDE, "x", "[/b]", "0.5",
     "int8", "bf16", "$\\frac$", "../x", "µ", "a\nb", "1,2", "None", "True", "{}", "("]
)  # fmt: skip
MICRO = st.tuples(
    st.sampled_from(
        ["dispatch", "combine", "gemm", "latent-attention", "decode-attention", "attention"]
    ),
    st.dictionaries(
        st.sampled_from(
            ["ep", "tokens", "copies", "hidden", "experts", "quant", "m", "k", "n", "groups",
             "batch", "heads", "kv-heads", "q-len", "context", "kv-cache", "length", "on"]
        ),
        VALUES,
        max_size=5,
    ),
)  # fmt: skip


@fuzzed
@given(MICRO)
def test_any_options_of_micro_end_in_a_line(drawn):
    operator, options = drawn
    _check(
        ["micro", operator, *(w for name, value in options.items() for w in (f"--{name}", value))],
        refused=False,
    )


PLACE = ["ranks", "redundant", "nodes", "tokens", "groups", "shared", "memory-gib", "windows",
         "objective", "seconds", "seed", "shrink", "moves", "step-tokens", "train-windows",
         "test-windows", "first-layer", "without-ranks", "domain", "model", "format",
         "model-layers", "routing", "method"]  # fmt: skip


@settings(fuzzed, max_examples=max(1, fuzzed.max_examples // 3))
@given(st.sampled_from(PLACE), VALUES)
def test_any_option_of_place_ends_in_a_line(folder, name, value):
    loads = str(folder / "loads.npy")
    options = {"ranks": "4", "method": "contiguous", "step-tokens": "0"} | {name: value}
    words = (word for pair in options.items() for word in (f"--{pair[0]}={pair[1]}",))
    _check(["place", loads, *words], refused=False)


TRACE = ["requests", "rate", "cv", "prompt", "prompt_cv", "output", "output_cv", "reuse", "trees",
         "branches", "fork", "block_tokens", "seed", "x"]  # fmt: skip


@fuzzed
@given(st.dictionaries(st.sampled_from(TRACE), VALUES, min_size=1, max_size=3))
def test_any_synthetic_trace_is_drawn_or_refused(options):
    given = {"requests": "5", "reuse": "0.5"} | options
    text = "gamma:" + ",".join(f"{name}={value}" for name, value in given.items())
    _check(["serve", text, "--npus", "1"], refused=True)  # and 1 NPU serves nothing
