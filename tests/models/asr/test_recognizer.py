"""A recognizer in a file: what is written is what is read, transcribed, and exported."""

import dataclasses
import io
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

from cmjax.cli import main
from cmjax.models.asr.acoustic import layer_algorithms
from cmjax.models.asr.audio import read_file
from cmjax.models.asr.decoding import Decoding, make_decoder
from cmjax.models.asr.deployed import whole_call
from cmjax.models.asr.dfsmn import ConvDFSMNConfig
from cmjax.models.asr.export import direct_steps, network_to_onnx, to_onnx
from cmjax.models.asr.features import LogMel
from cmjax.models.asr.recognizer import Recognizer, load_recognizer, new_network, save_recognizer
from cmjax.models.asr.text import Alphabet
from cmjax.models.asr.wav2letter import Wav2letterConfig
from cmjax.primitives.convolution import calibrate

SIZES = {
    "dfsmn": ConvDFSMNConfig(
        width=16, hidden=24, kernel=5, blocks=2, lookback_stride=2, lookahead_stride=3
    ),
    "wav2letter": Wav2letterConfig(
        first_kernel=11, stride=2, width=16, kernel=5, depth=1, wide_kernel=5, wide=24
    ),
}
FRONT, RUSSIAN = LogMel(), Alphabet("characters", (" ", *"абвгд"))
FEATURES = np.random.default_rng(0).normal(8, 2, (2, 101, 40)).astype(np.float32)
LENGTHS = jnp.array([101, 101])


def _networks(sizes, *precisions) -> dict:
    """A random network in float32, and calibrated for integers."""
    exact = new_network(sizes, FRONT, RUSSIAN)
    exact.set_statistics(np.full(40, 8.0), np.full(40, 2.0))
    inputs, found = [], {"float32": exact}
    exact(jnp.asarray(FEATURES), LENGTHS, watch=lambda conv, x, y: inputs.append(x.x))
    for precision in precisions:
        found[precision] = model = nnx.clone(exact)
        forms = layer_algorithms(model, precision, "F(2,5)")
        for conv, x, form in zip(model.convolutions(), inputs, forms, strict=True):
            conv.set_scales(
                calibrate(
                    x,
                    conv.kernel[...],
                    algorithm=form,
                    stride=conv.stride,
                    padding=conv.padding(x.shape[1]),
                )
            )
        model.switch(precision)
    return found


def _run(network: bytes, features, **options) -> np.ndarray:
    ort = pytest.importorskip("onnxruntime")
    given = ort.SessionOptions()
    given.log_severity_level = 3
    for name, value in options.items():
        setattr(given, name, value)
    session = ort.InferenceSession(network, given, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"features": np.asarray(features)})[0])


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return Recognizer(
        SIZES["dfsmn"], FRONT, RUSSIAN, _networks(SIZES["dfsmn"], "int8", "int8-winograd")
    )


@pytest.fixture
def saved(recognizer, tmp_path):
    save_recognizer(tmp_path / "recognizer.npz", recognizer)
    return tmp_path


def test_what_is_written_is_what_is_read(recognizer, saved):
    read = load_recognizer(saved)
    assert (read.sizes, read.front, read.alphabet) == (recognizer.sizes, FRONT, RUSSIAN)
    assert list(read.networks) == ["float32", "int8", "int8-winograd"]
    for precision, model in recognizer.networks.items():
        y, _ = model(jnp.asarray(FEATURES), LENGTHS)
        np.testing.assert_array_equal(read.network(precision)(jnp.asarray(FEATURES), LENGTHS)[0], y)
    assert read.precision == "int8-winograd"
    with pytest.raises(ValueError, match="--precision int4: the recognizer has float32, int8"):
        read.network("int4")


def test_the_file_the_run_and_a_checkpoint_of_it_are_the_same_recognizer(saved):
    (saved / "checkpoints" / "00000003").mkdir(parents=True)
    for path in (saved / "recognizer.npz", saved, saved / "checkpoints" / "00000003"):
        assert load_recognizer(path).alphabet == RUSSIAN


def _rewritten(path, change):
    """The same archive but for what `change` makes of its members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members = change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _header(**changed):
    def change(members):
        header = json.loads(members["recognizer.json"])
        return members | {"recognizer.json": json.dumps(header | changed)}

    return change


def _array(value):
    def change(members):
        name = next(name for name in members if name.endswith("mean.npy"))
        file = io.BytesIO()
        np.save(file, value)
        return members | {name: file.getvalue()}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {k: v for k, v in m.items() if "json" not in k}, "no .*recognizer.json"),
        (lambda m: m | {"recognizer.json": "["}, "Expecting value"),
        (lambda m: m | {"recognizer.json": "[" * 100_000}, "nested too deeply"),
        (lambda m: {k: v for k, v in m.items() if "kernel" not in k}, r"no .*kernel\.npy"),
        (_header(format=2), "format 2, and this is 1"),
        (_header(network="rnn"), "no 'rnn'"),
        (_header(plans={}), "no network"),
        (_header(sizes={"width": -1}), "width must be at least [01]"),
        (_header(sizes={"width": 10**9}), "width must be at most 65,536"),
        (_header(sizes={"width": 60_000, "hidden": 60_000}), "a larger network than its arrays"),
        (_header(sizes={"blocks": 60_000}), "a larger network than its arrays"),
        (_header(front={"bands": 4000}), "too narrow"),
        (_array(np.zeros(39, np.float32)), r"float32\[39\], and float32\[40\] is needed"),
        (_array(np.zeros(40)), r"float64\[40\], and float32"),
        (_array(np.zeros(2000, np.float32)), "mean has 8128 bytes, 160 are needed"),
        (_array(np.full(40, np.nan, np.float32)), "not finite"),
        (_array(np.array([None] * 40)), "pickle"),
    ],
)
def test_another_or_a_damaged_file_is_named(saved, change, message):
    _rewritten(saved / "recognizer.npz", change)
    with pytest.raises(ValueError, match=rf"recognizer\.npz is no recognizer.*{message}"):
        load_recognizer(saved)


def test_a_folder_without_a_recognizer_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match=r"no recognizer\.npz in .*--evaluate-only"):
        load_recognizer(tmp_path)
    with pytest.raises(ValueError, match="no file or folder"):
        load_recognizer(tmp_path / "absent")
    (tmp_path / "x.npz").write_bytes(b"PK\3\4 torn")
    with pytest.raises(ValueError, match=r"x\.npz is no recognizer"):
        load_recognizer(tmp_path / "x.npz")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("length", [2, 3, 100, 101])
def test_onnx_runtime_computes_the_exported_integers(name, length):
    """Every convolution has the same integers; what is left is the order of float32 sums."""
    features = FEATURES[:, :length]
    for precision, model in _networks(SIZES[name], "int8").items():
        wanted, _ = model(jnp.asarray(features), jnp.array([length] * 2))
        got = _run(network_to_onnx(model), features)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        fixed = _run(network_to_onnx(model, frames=length), features[:1])
        np.testing.assert_allclose(fixed, got[:1], rtol=0, atol=2e-5 * np.abs(wanted).max())
        assert precision in ("float32", "int8")


@pytest.mark.parametrize("name", SIZES)
def test_a_network_of_a_short_algorithm_is_exported_as_near_to_float32_as_it_was(name):
    networks = _networks(SIZES[name], "int8-winograd")
    exact, _ = networks["float32"](jnp.asarray(FEATURES), LENGTHS)
    ours, _ = networks["int8-winograd"](jnp.asarray(FEATURES), LENGTHS)
    got = _run(network_to_onnx(networks["int8-winograd"]), FEATURES)
    error, own = (float(np.square(y - exact).mean()) for y in (got, ours))
    assert error < 2 * own < 0.05 * float(np.square(exact).mean())


def test_steps_of_a_direct_layer_are_its_own_and_others_follow_from_their_range():
    networks = _networks(SIZES["wav2letter"], "int8", "int8-winograd")
    direct, short = (networks[p].convolutions()[1] for p in ("int8", "int8-winograd"))
    step, filter_step = direct_steps(direct)
    assert step == float(direct.input_step[...])
    np.testing.assert_array_equal(filter_step, direct.filter_step[...][0])
    assert short.algorithm != "direct"
    step, filter_step = direct_steps(short)
    assert step * 127 == pytest.approx(float(short.input_step[...]) * short.input_limit)
    largest = np.abs(np.asarray(short.kernel[...])).max((0, 1))
    np.testing.assert_allclose(filter_step * 127, largest, rtol=1e-6)


def test_the_file_says_what_its_features_and_labels_are(recognizer):
    onnx = pytest.importorskip("onnx")
    network = onnx.load_from_string(to_onnx(recognizer, "int8"))
    properties = {p.key: p.value for p in network.metadata_props}
    assert json.loads(properties["labels"]) == ["<blank>", " ", *"абвгд"]
    assert properties["sample_rate"] == "8000" and properties["bands"] == "40"
    kinds = [node.op_type for node in network.graph.node]
    convolutions = len(recognizer.network("int8").convolutions())
    assert kinds.count("QuantizeLinear") == convolutions
    filters = [t for t in network.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(len(t.dims) == 3 for t in filters) == convolutions


@pytest.fixture
def speech(tmp_path):
    """A noise at another rate, and what is not sound."""
    wave = np.random.default_rng(1).normal(0, 3 / 32768, 16_000)  # about the statistics
    soundfile.write(tmp_path / "a b [x].wav", wave, 16_000)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    return tmp_path


def test_transcribe_prints_what_the_network_hears(recognizer, saved, speech, capsys):
    path = speech / "a b [x].wav"
    assert main(["transcribe", str(saved), str(path), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    transcribe = recognizer.transcriber()
    samples = read_file(path, FRONT.sample_rate)
    wave = jnp.asarray(samples[None] / np.float32(32768))
    call = whole_call(recognizer.network(), FRONT)
    decode = make_decoder(RUSSIAN, Decoding())
    (text,) = decode(*call(wave, jnp.array([len(samples)])))
    assert text and text == transcribe(samples)
    assert found == {
        "precision": "int8-winograd",
        "files": [{"file": str(path), "seconds": 1.0, "text": text}],
    }
    assert main(["transcribe", str(saved), str(path), "--precision", "float32"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_does_not_keep_others_from_it(saved, speech, capsys):
    files = [str(speech / name) for name in ("bad.wav", "a b [x].wav", "absent.wav")]
    assert main(["transcribe", str(saved), *files]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{files[1]}: ")
    lines = printed.err.splitlines()
    assert lines[0].startswith(f"{files[0]}: not readable as audio")
    assert lines[1].startswith(f"{files[2]}: cannot be read: No such file")
    assert lines[2] == "error: 2 of 3 files could not be read"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transcribe", "SAVED", "FILE", "--precision", "int8"], None),
        (["transcribe", "ABSENT", "FILE"], "no file or folder"),
        (
            ["transcribe", "SAVED", "FILE", "--language-model", "ABSENT"],
            "--language-model: no file",
        ),
        (["transcribe", "SAVED", "FILE", "--json", "ABSENT/x/y"], "cannot write"),
        (["export", "SAVED", "ABSENT/x/y.onnx"], "cannot write"),
        (["export", "ABSENT", "x.onnx"], "no file or folder"),
    ],
)
def test_bad_input_is_one_line(saved, speech, arguments, message, capsys):
    places = {"SAVED": saved, "FILE": speech / "a b [x].wav", "ABSENT": saved / "absent"}
    given = [str(places[a]) if a in places else a.replace("ABSENT", "absent") for a in arguments]
    assert main(given) == (0 if message is None else 2)
    if message:
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1


def test_export_writes_what_onnx_runtime_reads(recognizer, saved, capsys):
    assert main(["export", str(saved), str(saved / "net.onnx"), "--float32"]) == 0
    assert "[batch, frames, 40]" in capsys.readouterr().out
    got = _run((saved / "net.onnx").read_bytes(), FEATURES)
    wanted, _ = recognizer.network("float32")(jnp.asarray(FEATURES), LENGTHS)
    np.testing.assert_allclose(got, wanted, atol=2e-5 * float(np.abs(wanted).max()))


def test_a_long_recording_is_heard_as_a_short_one(recognizer):
    """Padding reaches no utterance: 36 s end in another size than 35 s do."""
    wave = np.random.default_rng(2).integers(-4, 5, 36 * 8000).astype(np.int16)
    transcribe = recognizer.transcriber("float32")
    whole, part = transcribe(wave), transcribe(wave[: 30 * 8000])
    assert len(part) > 100 and whole.startswith(part[:-40])  # the last ones see what follows
    assert transcribe(wave[:100]) == ""  # not one frame


def test_options_of_the_search_are_checked():
    for name, value in (("beam", -1), ("language_weight", -0.5), ("word_bonus", float("nan"))):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must"):
            dataclasses.replace(Decoding(), **{name: value})
