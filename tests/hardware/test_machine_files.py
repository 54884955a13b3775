"""Machines from the catalog and from a user's own file."""

import re
import tomllib
from importlib import resources

import pytest

from cmjax.hardware import catalog, load_machine, sources

TEXT = (resources.files("cmjax.hardware") / "catalog" / "cloudmatrix384.toml").read_text("utf-8")


def _quantities(tree, prefix=""):
    for key, entry in tree.items():
        if isinstance(entry, dict) and "value" not in entry:
            yield from _quantities(entry, f"{prefix}{key}.")
        elif key != "name":
            yield f"{prefix}{key}"


def _changed(old: str, new: str) -> str:
    """The catalog's CloudMatrix384 with one passage changed."""
    assert TEXT.count(old) == 1, f"{old!r} occurs {TEXT.count(old)} times"
    return TEXT.replace(old, new)


def _without(line_start: str) -> str:
    lines = TEXT.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(line_start)]
    assert len(kept) == len(lines) - 1
    return "".join(kept)


@pytest.mark.parametrize("name", catalog())
def test_every_catalog_machine_loads_and_every_number_has_a_source(name):
    machine = load_machine(name)
    assert machine.name == name
    text = (resources.files("cmjax.hardware") / "catalog" / f"{name}.toml").read_text("utf-8")
    found = sources(name)
    tree = tomllib.loads(text)
    tree.pop("fit", None)  # a covariance, no number of the machine
    assert set(found) == set(_quantities(tree))
    assert all(source.strip() for source in found.values()), found


def test_cloudmatrix384_is_the_published_machine():
    machine = load_machine("cloudmatrix384")
    assert (machine.nodes, machine.npus, machine.ranks) == (48, 384, 768)
    assert (machine.chip.cube_cores, machine.chip.vector_cores) == (24, 48)
    assert machine.chip.hbm_bytes_per_s == pytest.approx(1.6e12)
    assert machine.chip.cube_flops_8bit == pytest.approx(1504e12 / 2)
    assert machine.fabric.rdma.bandwidth_bytes_per_s * 2 * 8 == pytest.approx(400e9)


@pytest.mark.parametrize(
    "key, like",
    [
        ("chip.attention_startup_s", "matrix_startup_s"),
        ("efficiency.grouped", "gemm"),
        ("chip.inner_block_s", None),
        ("efficiency.exposed", None),
        ("efficiency.attention_exposed", None),
    ],
)
def test_a_file_written_before_a_constant_was_there_is_read_as_it_was_meant(tmp_path, key, like):
    path = tmp_path / "mine.toml"
    section, name = key.split(".")
    path.write_text(_without(name), encoding="utf-8")
    found = getattr(load_machine(path), section)
    assert getattr(found, name) == (getattr(found, like) if like else 0.0)
    assert sources(path)[key] == (f"assumed: as {like}" if like else "not given")


def test_a_users_own_file_is_read_by_its_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(_changed('value = "1.6 TB/s"', 'value = "2.5 TB/s"'), encoding="utf-8")
    assert load_machine(path).chip.hbm_bytes_per_s == pytest.approx(2.5e12)
    assert load_machine(str(path)) == load_machine(path)
    assert sources(path) == sources("cloudmatrix384")


BAD_FILES = {
    "unknown key with a close one": (
        _changed("hbm_bytes_per_s =", "hbm_byte_per_s ="),
        'unknown key "chip.hbm_byte_per_s"; did you mean "chip.hbm_bytes_per_s"?',
    ),
    "unknown key like no other": (
        _changed("[efficiency]", "[efficiency]\nzzz = 1"),
        'unknown key "efficiency.zzz"; known: gemm, grouped, attention, hbm',
    ),
    "no engines": (
        TEXT[: TEXT.index("[engines.")],
        "no engine; expected a table such as [engines.my-engine]",
    ),
    "engine without a number": (
        TEXT[: TEXT.index("[engines.")] + "[engines.own]\n",
        'key "engines.own.step_s" is missing; expected a quantity in s',
    ),
    "kernels that are no list": (
        TEXT.replace(
            "[engines.cloudmatrix-infer]",
            '[engines.cloudmatrix-infer]\nunfused = { value = "MLAProlog", source = "mine" }',
        ),
        "key \"engines.cloudmatrix-infer.unfused\" must be a list of names, got 'MLAProlog'",
    ),
    "unknown factor": (
        TEXT.replace("[factors]", "[factors]\nspeed = 2"),
        "[factors] has no 'speed'; known: matrix, attention, vector",
    ),
    "unknown table": (
        TEXT + "\n[fabrik]\n",
        'unknown key "fabrik"; did you mean "fabric"?',
    ),
    "missing quantity": (
        _without("l2_bytes"),
        'key "chip.l2_bytes" is missing; expected a quantity in bytes',
    ),
    "missing count": (_without("nodes"), 'key "nodes" is missing; expected a whole number'),
    "missing flag": (
        _without("bulk_kernels"),
        'key "exchange.bulk_kernels" is missing; expected true or false',
    ),
    "missing table": (
        TEXT[: TEXT.index("[efficiency]")],
        'key "efficiency" is missing; expected a table [efficiency]',
    ),
    "missing nested table": (
        TEXT[: TEXT.index("[fabric.vpc]")] + TEXT[TEXT.index("[exchange]") :],
        'key "fabric.vpc" is missing; expected a table [fabric.vpc]',
    ),
    "missing name": (
        _without("name"),
        'key "name" is missing; expected name = "my-machine"',
    ),
    "negative": (
        _changed('"5 us", source = "Mind', '"-5 us", source = "Mind'),
        "key \"chip.matrix_startup_s\": '-5 us' is negative",
    ),
    "zero where it would divide": (
        _changed('"1.6 TB/s"', '"0 TB/s"'),
        "key \"chip.hbm_bytes_per_s\" must be positive, got '0 TB/s'",
    ),
    "unit-less number": (
        _changed('"1.6 TB/s"', "1.6e12"),
        'key "chip.hbm_bytes_per_s": 1600000000000.0 has no unit; '
        'expected a string like "1.6 TB/s"',
    ),
    "wrong dimension": (
        _changed('"64 GB"', '"64 GB/s"'),
        "key \"chip.hbm_bytes\": '64 GB/s' has unit 'GB/s'; expected bytes, like \"64 GB\"",
    ),
    "no source": (
        _changed('value = "2 us", source', 'value = "2 us", origin'),
        'key "chip.vector_startup_s" has no source; say where the number is from',
    ),
    "empty source": (
        re.sub(r'(gemm = \{ value = "[^"]*", source = )"[^"]*"', r'\1""', TEXT),
        'key "efficiency.gemm" has no source; say where the number is from',
    ),
    "bare value": (
        re.sub(r"gemm = \{.*\}", 'gemm = "84 %"', TEXT),
        "key \"efficiency.gemm\" must be a table with value and source, got '84 %'",
    ),
    "fractional count": (
        _changed("nodes = { value = 48", "nodes = { value = 48.5"),
        'key "nodes" must be a whole number >= 1, got 48.5',
    ),
    "no ranks": (
        _changed("nodes = { value = 48", "nodes = { value = 0"),
        'key "nodes" must be a whole number >= 1, got 0',
    ),
    "more ranks than are priced": (
        _changed("dies_per_npu = { value = 2", "dies_per_npu = { value = 1000000"),
        "384000000 ranks (dies); at most",
    ),
    "count as flag": (
        _changed("nodes = { value = 48", "nodes = { value = true"),
        'key "nodes" must be a whole number >= 1, got True',
    ),
    "flag as number": (
        _changed("bulk_kernels = { value = false", "bulk_kernels = { value = 0"),
        'key "exchange.bulk_kernels" must be true or false, got 0',
    ),
    "not TOML": (TEXT + "\n[chip", "not valid TOML:"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_machine_file_is_refused_with_file_and_key(case, tmp_path):
    text, message = BAD_FILES[case]
    assert text != TEXT
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}"):
        load_machine(path)


@pytest.mark.parametrize(
    "name, closest",
    [("cloudmatrix38", "cloudmatrix384, cloudmatrix384-560t"), ("h800pod", "h800-pod, h200-pod")],
)
def test_an_unknown_machine_is_refused_with_the_closest_names(name, closest):
    message = f"unknown machine '{name}'; closest: {closest} (or give the path of a .toml file)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_machine(name)


def test_a_name_like_no_other_lists_the_catalog():
    with pytest.raises(ValueError, match=re.escape(", ".join(catalog()))):
        load_machine("zzz")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    missing, binary = tmp_path / "none.toml", tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (missing, binary, tmp_path / "folder.toml"):
        if path.stem == "folder":
            path.mkdir()
        with pytest.raises(ValueError, match=f"^machine file {re.escape(str(path))}: cannot be"):
            load_machine(path)
