"""Whatever a file holds, a reader gives its object or one line that names the file; never anything
else, and never for long."""

import json
import string
import zipfile
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmjax.cost.measured import COLUMNS, read_measurements
from cmjax.deploy.validation import validate
from cmjax.hardware import load_machine, sources
from cmjax.models.asr.audio import read_audio
from cmjax.models.asr.containers import BadAudio
from cmjax.models.asr.recognizer import load_recognizer
from cmjax.models.moe.checkpoint.hf_config import load_config
from cmjax.models.moe.checkpoint.safetensor_file import list_tensors
from cmjax.placement import read_loads, read_plan, read_routes
from cmjax.serving import read_profile, read_service, read_trace
from train.checkpoint import Damaged, latest
from train.data.folders import load as load_corpus
from train.metrics import read_metrics

fuzzed = settings(settings.get_profile("fuzz"))

NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**40, 2**63, -(2**62), 10**12, 10**30, 10**400]),
    st.floats(),
    st.booleans(),
)
WORDS = st.sampled_from(
    ["", "x", "0", "-1", "nan", "inf", "1e400", "[/b]", "$\\frac$", "../x", "µ"]
)
ODD = st.recursive(
    st.one_of(st.none(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=8,
)
TEXTS = st.text(string.printable + "µ→漢\ufeff", max_size=200)


def _mutated(document):
    """A sound document with some of its values replaced, missing or doubled."""
    names = st.sampled_from(sorted(document))
    return st.dictionaries(names, ODD, max_size=3).flatmap(
        lambda changed: st.sets(names, max_size=1).map(
            lambda lost: {k: v for k, v in (document | changed).items() if k not in lost}
        )
    )


@st.composite
def _bytes_of(draw, sound: bytes):
    """A sound file cut, torn or with some bytes changed; or other bytes."""
    if draw(st.booleans()):
        return draw(st.one_of(st.binary(max_size=200), TEXTS.map(str.encode)))
    data = bytearray(sound[: draw(st.integers(0, len(sound)))])
    for at, value in draw(
        st.dictionaries(st.integers(0, 400), st.integers(0, 255), max_size=5)
    ).items():
        if at < len(data):
            data[at] = value
    return bytes(data)


def _refuses(read, path, *named):
    """Reads, or raises one line that names what is wrong."""
    try:
        read(path)
    except ValueError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 2000, said
        assert any(str(name) in said for name in (path, *named)), said


PLAN = {
    "format": "cmjax-placement", "version": 1, "experts": 4, "ranks": 2, "nodes": 1,
    "slots_per_rank": 2, "routing": "even", "layer_labels": [3], "provenance": {"way": "x"},
    "expert_of_slot": [[0, 1, 2, 3]], "split_of_slot": [[1.0, 1.0, 1.0, 1.0]],
}  # fmt: skip
ASCEND = {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 1, "device_list": [
    {"device_id": 0, "device_expert": [0, 1]}]}]}  # fmt: skip
CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 96,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64, "hidden_act": "silu",
    "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
LOADS = {"layers": [3], "counts": [[1, 2, 3, 4]], "domain": ["a"]}
TRACES = [
    {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]},
    {"arrival_time": 0.0, "input_tokens": 5, "output_tokens": 1, "prompt_token_ids": [1] * 5},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]


@pytest.mark.parametrize(
    ("name", "document", "read"),
    [
        ("plan.json", PLAN, lambda path: read_plan(path, ranks=2)),
        ("ascend.json", ASCEND, lambda path: read_plan(path, ranks=1)),
        ("sglang.json", {"physical_to_logical_map": [[0, 1]]}, lambda p: read_plan(p, ranks=1)),
        ("plan.yaml", {"num_slots": 2, "initial_global_assignments": {3: [0, 1]}},
         lambda path: read_plan(path, ranks=1)),
        ("loads.json", LOADS, read_loads),
        ("loads.jsonl", LOADS, read_loads),
        ("rows.jsonl", {"layer": 0, "expert": 0, "count": 1}, read_loads),
        ("config.json", CONFIG, load_config),
        *((f"trace{n}.jsonl", trace, lambda path: read_trace(path, rate=1.0))
          for n, trace in enumerate(TRACES)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_documents_with_anything_in_their_places_are_read_or_refused(
    tmp_path, name, document, read
):
    path = tmp_path / name

    @fuzzed
    @given(_mutated(document))
    def check(changed):
        try:
            path.write_text(json.dumps(changed))
        except ValueError:  # a number that Python does not write
            return
        _refuses(read, path)

    check()


def _npz(folder, **arrays):
    np.savez(folder / "sound.npz", **arrays)
    return (folder / "sound.npz").read_bytes()


def _npy(folder, array):
    np.save(folder / "sound.npy", array)
    return (folder / "sound.npy").read_bytes()


WAVE = (
    b"RIFF\x34\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0"
    b"data\x10\0\0\0" + bytes(range(16))
)
SOUND = {
    "loads.npy": (lambda folder: _npy(folder, np.arange(1, 9).reshape(2, 4)), read_loads),
    "loads.npz": (lambda folder: _npz(folder, counts=np.ones((2, 4))), read_loads),
    "routes.npz": (
        lambda folder: _npz(
            folder, ids=np.array([[[0, 1]], [[1, 2]]]), seq_lens=np.array([1, 1])
        ),
        read_routes,
    ),
    "loads.csv": (lambda _: b"layer,expert,hits,domain\n0,0,5,a\n0,1,6,a\n", read_loads),
    "table.csv": (lambda _: b"1,2,3\n4,5,6\n", read_loads),
    "loads.json": (lambda _: b'{"counts": {"a": [[1, 2], [3, 4]]}}', read_loads),
    "rows.jsonl": (lambda _: b'{"layer": 0, "expert": 0, "count": 1}\n', read_loads),
    "plan.json": (lambda _: json.dumps(PLAN).encode(), lambda p: read_plan(p, ranks=2)),
    "plan.yaml": (
        lambda _: b"num_slots: 2\ninitial_global_assignments:\n  3: [0, 1]\n",
        lambda path: read_plan(path, ranks=1),
    ),
    "plan.npy": (lambda folder: _npy(folder, np.eye(4, dtype=int)[:, None]), read_plan),
    "azure.csv": (
        lambda _: b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n",
        lambda path: read_trace(path, rate=1.0),
    ),
    "steps.csv": (
        lambda _: b"prefill_tokens,prefill_length,decode_requests,decode_context,step_ms\n"
        b"0,0,1,1,2\n0,0,2,1,3\n",
        read_profile,
    ),
    "service.toml": (
        lambda _: b'model = "deepseek-r1"\n[prefill]\nnpus = 16\n[decode]\nbatch = 96\n',
        read_service,
    ),
    "machine.toml": (
        lambda _: (resources.files("cmjax.hardware") / "catalog" / "cloudmatrix384.toml")
        .read_bytes()[:2000],
        load_machine,
    ),
    "rows.csv": (
        lambda _: ",".join(COLUMNS).encode() + b"\na,predict,micro gemm --m 8 --k 8 --n 8,us,5,x\n",
        lambda path: validate(read_measurements(str(path))),
    ),
    "config.json": (lambda _: json.dumps(CONFIG).encode(), load_config),
    "model.safetensors": (
        lambda _: b"\x48\0\0\0\0\0\0\0"
        + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(0x48) + bytes(8),
        list_tensors,
    ),
    "recognizer.npz": (lambda folder: _npz(folder, a=np.ones(3)), load_recognizer),
    "metrics.jsonl": (lambda _: b'{"step": 0, "loss": 1.0}\n{"step": 1}\n', read_metrics),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_bytes_of_any_kind_are_read_or_refused(tmp_path, name):
    make, read = SOUND[name]
    sound = make(tmp_path)
    path = tmp_path / name

    @fuzzed
    @given(_bytes_of(sound))
    def check(data):
        path.write_bytes(data)
        _refuses(read, path, "row 'a", "a:", "model ")

    check()


@fuzzed
@given(_bytes_of(WAVE))
def test_sounds_are_read_or_refused(data):
    try:
        read_audio(data, 8000)
    except BadAudio as error:
        assert str(error) and "\n" not in str(error)


MANIFEST = {"audio_filepath": "a.wav", "text": "one", "duration": 1.0, "speaker": "s", "offset": 0}


def test_lists_of_recordings_are_read_or_refused(tmp_path):
    path = tmp_path / "list.json"

    @fuzzed
    @given(_mutated(MANIFEST))
    def check(changed):
        try:
            path.write_text(json.dumps(changed) + "\n")
        except ValueError:
            return
        _refuses(lambda p: load_corpus("manifest", p), path, tmp_path, "list.json", "no ", "train")

    check()


def test_records_of_a_checkpoint_are_read_or_refused(tmp_path):
    folder = tmp_path / "00000000"
    (folder / "arrays").mkdir(parents=True)

    @fuzzed
    @given(_bytes_of(b'{"config": {"a": 1}, "progress": {"step": 3}}'))
    def check(data):
        (folder / "run.json").write_bytes(data)
        try:
            found = latest(tmp_path)
            if found is not None:
                found.count("step", 5)
        except Damaged as error:
            assert "run.json" in str(error) and "\n" not in str(error)

    check()


@fuzzed
@given(
    st.lists(st.sampled_from(list('=.[]{}"\n#, ')) | st.sampled_from(["a", "1", "value"])).map(
        "".join
    )
)
def test_machines_of_any_text_are_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("toml") / "m.toml"
    path.write_text(text)
    _refuses(load_machine, path)
    _refuses(sources, path)


def test_archives_whose_directory_lies_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("counts.npy", _npy(tmp_path, np.ones((2, 4))))
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02")

    @fuzzed
    @given(st.dictionaries(st.integers(at, len(whole) - 1), st.integers(0, 255), max_size=4))
    def check(changes):
        data = bytearray(whole)
        for where, value in changes.items():
            data[where] = value
        path.write_bytes(data)
        _refuses(read_loads, path)

    check()
