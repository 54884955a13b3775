"""`cmjax price`: what it takes, what it shows first, what it refuses."""

import json
import re

import pytest

from cmjax.cli import main
from cmjax.commands.price import parse_sizes, parse_static, parse_tiers

MODULE = """
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, BFloat16

MESH = AbstractMesh((4, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def mlp(x: BFloat16[Array, "4*n 1024"], kind, up: BFloat16[Array, "1024 2048"], layers: int = 1):
    for _ in range(layers):
        with jax.named_scope("mlp"):
            x = getattr(jnp, kind)(x @ up)[:, :1024]
    return x


def reduced(x: BFloat16[Array, "4*n 1024"]):
    def local(x):
        return lax.psum(x, "model")

    return jax.shard_map(local, mesh=MESH, in_specs=P("data"), out_specs=P("data"))(x)


def recurrent(x: BFloat16[Array, "steps wide"]):
    return lax.scan(lambda h, row: (jnp.tanh(h + row), None), x[0], x)[0]
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    (tmp_path / "programs_to_price.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "programs_to_price"


def run_json(capsys, *arguments):
    assert main([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flop_and_bytes_come_first_and_older_keys_stay(capsys, programs):
    result = run_json(
        capsys, "price", f"{programs}:mlp", "--size", "n=256", "--static", "kind=tanh"
    )
    assert list(result)[:3] == ["flops", "hbm_bytes", "total_ms"]
    assert set(result) >= {"breakdown", "engines_busy_ms", "work", "machine", "sizes"}
    product = 2 * 1024 * 1024 * 2048
    assert result["flops"] == result["work"]["flops"] == product
    read, written = result["work"]["read_bytes"], result["work"]["write_bytes"]
    assert result["hbm_bytes"] == read + written
    assert sum(result["breakdown_flops"].values()) == pytest.approx(result["flops"])
    assert sum(result["breakdown_hbm_bytes"].values()) == pytest.approx(result["hbm_bytes"])
    assert set(result["breakdown_flops"]) == set(result["breakdown"]) == {"mlp"}


def test_the_table_has_flop_and_bytes_before_time(capsys, programs):
    assert main(["price", f"{programs}:mlp", "--size", "n=256", "--static", "kind=tanh"]) == 0
    shown = capsys.readouterr().out
    head = next(line for line in shown.splitlines() if "scope" in line)
    assert head.split() == ["scope", "GFLOP", "HBM", "MB", "ms", "on", "its", "stream"]
    row = next(line for line in shown.splitlines() if line.split()[:1] == ["mlp"])
    assert row.split()[1] == "4.29"
    assert "4.29 GFLOP" in shown and "MB of HBM traffic, total" in shown


def test_static_arguments_are_literals(capsys, programs):
    given = ["price", f"{programs}:mlp", "--size", "n=256", "--static", "kind=tanh"]
    once = run_json(capsys, *given)
    thrice = run_json(capsys, *given, "--static", "layers=3")
    assert thrice["flops"] == 3 * once["flops"]


def test_tiers_say_which_links_an_axis_uses(capsys, programs):
    given = ["price", f"{programs}:reduced", "--size", "n=100"]
    nbytes = 2 * 100 * 1024 * 2
    for tiers, die, node in (([], 1, 6), (["model=node"], 0, 7), (["model=die:2,node:4"], 1, 6)):
        flags = [word for tier in tiers for word in ("--tier", tier)]
        work = run_json(capsys, *given, *flags)["work"]
        assert work["die_bytes"] == pytest.approx(nbytes * die / 8)
        assert work["node_bytes"] == pytest.approx(nbytes * node / 8)


def test_a_size_that_is_a_loops_length_is_taken_as_it_is(capsys, programs):
    given = ["price", f"{programs}:recurrent", "--size", "wide=64"]
    work = run_json(capsys, *given, "--size", "steps=12")["work"]
    assert work["transcendentals"] == 12 * 64


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mlp", "--size", "n=4"], "parameter 'kind' needs a jaxtyping shape"),
        (["mlp", "--size", "n=4", "--static", "kin=tanh"], "no parameter 'kin' to fix"),
        (["mlp", "--size", "n=4", "--static", "tanh"], "static 'tanh': expected name=value"),
        (["reduced", "--size", "n=4", "--tier", "model=rack"], "cannot lie on 'rack'"),
        (["reduced", "--size", "n=4", "--tier", "modle=node"], "no mesh axis 'modle'"),
        (["recurrent", "--size", "wide=4"], "the length of a loop must be a number"),
        (["recurrent", "--size", "wide=4", "--size", "steps=2.5"], "must be a whole number"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, programs, arguments, words):
    name, *rest = arguments
    assert main(["price", f"{programs}:{name}", *rest]) == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split()) and "Traceback" not in said


BROKEN = """
from __future__ import annotations
import sys
from jaxtyping import Array, BFloat16
def helper(x):
    raise TypeError('mine')
def fails(x: BFloat16[Array, "n 4"]):
    return helper(x)
def clashes(x: BFloat16[Array, "n 4"]):
    return x @ x
def ends(x: BFloat16[Array, "n 4"]):
    sys.exit(0)
def idle(x: BFloat16[Array, "n 4"]):
    return 1
def works(x: BFloat16[Array, "n 4"], w: BFloat16[Array, "4 8"]):
    return x @ w
"""


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (
            BROKEN,
            "fails",
            "raise TypeError('mine') error: program 'broken0:fails': TypeError",
        ),
        (
            BROKEN,
            "clashes",
            "x @ x ~~^~~ error: program 'broken1:clashes': TypeError: dot_g",
        ),
        (BROKEN, "ends", "error: program 'broken2:ends': it ends with sys.exit(0)"),
        (BROKEN, "idle", "error: program 'broken3:idle': it computes nothing that has a price"),
        ("def f(:", "f", "def f(: ^ error: program 'broken4:f': SyntaxError: invalid syntax"),
        ("1/0", "f", "1/0 ~^~ error: program 'broken5:f': ZeroDivisionError: division by zero"),
        ("import sys; sys.exit()", "f", "error: program 'broken6:f': it ends with sys.exit(None)"),
        ("import lacking", "f", "error: program 'broken7:f': broken7 needs 'lacking'"),
    ],
)
def test_what_fails_in_a_users_program_is_shown_by_their_lines(
    capsys, tmp_path, monkeypatch, text, name, said
):
    number = re.findall(r"broken(\d)", said)[0]
    (tmp_path / f"broken{number}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["price", f"broken{number}:{name}", "--size", "n=4"]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert said in shown and "Traceback" not in shown and "/cmjax/" not in shown


def test_annotations_may_be_strings(capsys, tmp_path, monkeypatch):
    (tmp_path / "sound.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["price", "sound:works", "--size", "n=4", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["flops"] == 2 * 4 * 4 * 8


def test_static_values_are_python_literals_or_text():
    given = ("layers=3", "causal=True", "kind=relu", "shape=(1, 2)", "rate=1e-3", "name='x=y'")
    assert parse_static(given) == {
        "layers": 3,
        "causal": True,
        "kind": "relu",
        "shape": (1, 2),
        "rate": 1e-3,
        "name": "x=y",
    }


def test_tiers_are_one_or_several_with_their_ranks():
    assert parse_tiers(("model=node", "data=node:4,supernode:8")) == {
        "model": "node",
        "data": {"node": 4, "supernode": 8},
    }


@pytest.mark.parametrize(
    "parse, given",
    [
        (parse_static, ("layers",)),
        (parse_static, ("a=1", "a=2")),
        (parse_static, ("1a=2",)),
        (parse_tiers, ("model",)),
        (parse_tiers, ("model=",)),
        (parse_tiers, ("a=node", "a=die")),
        (parse_tiers, ("a=node:x",)),
        (parse_sizes, ("n=0",)),
        (parse_sizes, ("n",)),
        (parse_sizes, ("n=1", "n=2")),
    ],
)
def test_malformed_options_are_refused(parse, given):
    with pytest.raises(ValueError, match=r"expected|given twice"):
        parse(given)
