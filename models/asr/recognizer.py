"""A trained recognizer: front end, alphabet and networks in one file, and speech to text with it.

The file is a NumPy archive (`.npz`): an array for every parameter, and `recognizer.json`, which
says what they are parameters of. Reading it runs no code.
"""

import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int16

from cmjax.files import replace_bytes
from cmjax.inputs import check_archive, check_count, parse_json, read_member
from cmjax.models.asr.acoustic import AcousticModel, Statistics
from cmjax.models.asr.conv import PRECISIONS
from cmjax.models.asr.decoding import Decoder, Decoding, make_decoder
from cmjax.models.asr.deployed import whole_call
from cmjax.models.asr.dfsmn import ConvDFSMN, ConvDFSMNConfig
from cmjax.models.asr.features import LogMel
from cmjax.models.asr.plans import restore_plans, saved_plans
from cmjax.models.asr.text import Alphabet
from cmjax.models.asr.wav2letter import Wav2letter, Wav2letterConfig

FILE = "recognizer.npz"
"""Its name in the folder of a training."""
FORMAT = 1
_HEADER = "recognizer.json"
_KINDS = {ConvDFSMNConfig: "dfsmn", Wav2letterConfig: "wav2letter"}
_SIZES_S = (2.0, 4.0, 8.0, 16.0, 35.0)
_MOST_HEADER_BYTES = 1 << 24
Sizes = ConvDFSMNConfig | Wav2letterConfig


@dataclasses.dataclass(frozen=True)
class Recognizer:
    """What a training gives.

    Attributes:
      sizes: of the networks.
      front: front end.
      alphabet: labels.
      networks: by precision; of those trained for integers, the float32 one is there too.
    """

    sizes: Sizes
    front: LogMel
    alphabet: Alphabet
    networks: Mapping[str, AcousticModel]

    @property
    def precision(self) -> str:
        """That of the network trained last."""
        return list(self.networks)[-1]

    def network(self, precision: str | None = None) -> AcousticModel:
        """One of the networks, by default the one trained last.

        Raises: ValueError: there is none of this precision.
        """
        precision = precision or self.precision
        if precision not in self.networks:
            raise ValueError(
                f"--precision {precision}: the recognizer has {', '.join(self.networks)}"
            )
        return self.networks[precision]

    def transcriber(self, precision: str | None = None, options: Decoding | None = None):
        """`transcribe` of one utterance: 16-bit samples at `front.sample_rate` -> text.

        Args: precision: of the network; options: of the search.
        Raises: ValueError: see `network` and `make_decoder`.
        """
        call = whole_call(self.network(precision), self.front)
        decode: Decoder = make_decoder(self.alphabet, options or Decoding())

        def transcribe(samples: Int16[np.ndarray, "time"]) -> str:
            seconds = len(samples) / self.front.sample_rate
            padded = next((s for s in _SIZES_S if s >= seconds), 0.0)
            padded = padded or math.ceil(seconds / _SIZES_S[-1]) * _SIZES_S[-1]
            wave = np.zeros((1, round(padded * self.front.sample_rate)), np.float32)
            wave[0, : len(samples)] = samples / np.float32(32768)
            return decode(*call(jnp.asarray(wave), jnp.asarray([len(samples)], jnp.int32)))[0]

        return transcribe


def new_network(sizes: Sizes, front: LogMel, alphabet: Alphabet, seed: int = 0) -> AcousticModel:
    """An untrained network for a front end and an alphabet."""
    rngs, ends = nnx.Rngs(seed), {"inputs": front.bands, "outputs": alphabet.size}
    if isinstance(sizes, ConvDFSMNConfig):
        return ConvDFSMN(sizes, **ends, rngs=rngs)
    return Wav2letter(sizes, **ends, rngs=rngs)


def save_recognizer(path: Path, recognizer: Recognizer) -> None:
    """Write a recognizer; an existing file is replaced by a complete one.

    Raises: OSError: the disk is full or not writable.
    """
    header = {
        "format": FORMAT,
        "network": _KINDS[type(recognizer.sizes)],
        "sizes": dataclasses.asdict(recognizer.sizes),
        "front": dataclasses.asdict(recognizer.front),
        "alphabet": dataclasses.asdict(recognizer.alphabet),
        "plans": {name: saved_plans(model) for name, model in recognizer.networks.items()},
    }
    arrays = {
        f"{precision}/{name}": value
        for precision, model in recognizer.networks.items()
        for name, value in _flat(model).items()
    }
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **{name: np.asarray(x) for name, x in arrays.items()})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(_HEADER, json.dumps(header))
    replace_bytes(path, file.getvalue())


def load_recognizer(path: Path) -> Recognizer:
    """Read what `save_recognizer` wrote.

    Args: path: the file, or the folder of a training (or of its checkpoints) with one in it.
    Raises: ValueError: no such file, or another, or a damaged one; says which.
    """
    path = _found(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(_HEADER).file_size > _MOST_HEADER_BYTES:
                raise ValueError("its header is too long")
            check_archive(archive)
            header = parse_json(archive.read(_HEADER), _HEADER)
            if header["format"] != FORMAT:
                raise ValueError(f"it has format {header['format']}, and this is {FORMAT}")
            kinds = {kind: sizes for sizes, kind in _KINDS.items()}
            _check_sizes(header["sizes"], archive)
            sizes = _options(kinds[header["network"]], header["sizes"])
            front = _options(LogMel, header["front"])
            alphabet = Alphabet(
                header["alphabet"]["units"], tuple(map(str, header["alphabet"]["symbols"]))
            )
            networks = {}
            for precision, plans in header["plans"].items():
                if precision not in PRECISIONS:
                    raise ValueError(f"unknown precision {precision!r}")
                networks[precision] = new_network(sizes, front, alphabet)
                restore_plans(networks[precision], plans)
                _fill(networks[precision], precision, archive)
            if not networks:
                raise ValueError("it has no network")
    except (
        zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, TypeError, ValueError,
        AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no recognizer, or a damaged one: {said}") from None
    return Recognizer(sizes, front, alphabet, networks)


def _found(path: Path) -> Path:
    if path.is_file():
        return path
    for folder in (path, path.parent, path.parent.parent):
        if path.is_dir() and (folder / FILE).is_file():
            return folder / FILE
    if not path.exists():
        raise ValueError(f"no file or folder {path}")
    raise ValueError(
        f"no {FILE} in {path}; a training writes it behind each of its stages, and "
        "`python -m train.rsq_asr --evaluate-only --out FOLDER` for one that is done"
    )


def _flat(model: AcousticModel) -> dict[str, Any]:
    """Name -> array of every parameter and constant."""
    state = nnx.state(model, nnx.Any(nnx.Param, Statistics))
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _fill(model: AcousticModel, precision: str, archive: zipfile.ZipFile) -> None:
    """Put the arrays of the file into a network of their shapes."""
    state = nnx.state(model, nnx.Any(nnx.Param, Statistics))
    for path, leaf in nnx.to_flat_state(state):
        name = f"{precision}/{'/'.join(map(str, path))}"
        wanted = leaf[...]
        info = archive.getinfo(f"{name}.npy")
        if info.file_size > wanted.nbytes + 4096:  # before anything is inflated
            raise ValueError(f"{name} has {info.file_size} bytes, {wanted.nbytes} are needed")
        value = read_member(archive, info)
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise ValueError(
                f"{name} is {value.dtype}{list(value.shape)}, and {wanted.dtype}"
                f"{list(wanted.shape)} is needed"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        leaf[...] = jnp.asarray(value)
    nnx.update(model, state)


def _check_sizes(sizes: Mapping[str, Any], archive: zipfile.ZipFile) -> None:
    """Raise ValueError for a network larger than the arrays of its file, before it is made."""
    numbers = [value for value in sizes.values() if isinstance(value, int)]
    for name, value in sizes.items():
        if isinstance(value, int):
            check_count(name, value, least=0, most=2**16)
    layers = max((sizes[name] for name in ("blocks", "depth") if name in sizes), default=0)
    there = sum(info.file_size for info in archive.infolist())
    largest = math.prod(sorted(numbers)[-2:]) * 4  # bytes of a matrix of them
    if layers > len(archive.namelist()) or largest > 16 * there + 2**26:
        raise ValueError("its sizes are of a larger network than its arrays")


def _options(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of options from JSON values, which have lists for tuples."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
