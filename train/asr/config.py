"""Everything that a speech recognition run can be told; the command line is made of it."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import tyro

from cmjax.models.asr.augment import SpecAugment
from cmjax.models.asr.decoding import Decoding
from cmjax.models.asr.dfsmn import ConvDFSMNConfig
from cmjax.models.asr.recognizer import Sizes
from cmjax.models.asr.text import Units
from cmjax.models.asr.wav2letter import Wav2letterConfig
from cmjax.processes import ProcessGroup
from train.data.folders import Layout
from train.data.perturb import Perturb
from train.data.strings import Strings
from train.options import check_numbers, plain

Ranges = Literal["per-tap", "scaled", "safe", "naive"]

# May change between a kill and the resumption: they do not change a number.
FREE = (
    "out", "evaluate_only", "test_dir", "decoding", "checkpoint_every", "devices", "compiled",
    "group",
)  # fmt: skip
DATA = ("data", "data_dir", "unseen", "development", "encoding")
"""What says which data to read; a test of a trained network may be told others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatStage:
    """Training in float32."""

    steps: int = 2000
    """Optimiser steps."""
    learning_rate: float = 2e-3
    """Highest learning rate; it warms up over a tenth of the steps and falls as a cosine."""
    weight_decay: float = 1e-3
    """Decoupled weight decay (AdamW)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantStage:
    """Range-scaled quantization-aware training, behind the float stage."""

    precision: Literal["int8-winograd", "int8", "float32"] = "int8-winograd"
    """Arithmetic to train for; float32 ends the run after the float stage."""
    algorithm: str = "auto"
    """Short algorithm of the layers that have one, such as F(2,3). Or chosen per layer: "auto" for
    what is accurate without training too, "fast" for what training makes accurate enough."""
    ranges: Ranges = "per-tap"
    """How integer ranges are chosen; see train.asr.quantize."""
    calibration_batches: int = 8
    """Batches on which scales and ranges are calibrated."""
    scale_steps: int = 100
    """Steps in which scales alone learn."""
    steps: int = 200
    """Steps in which all parameters learn."""
    scale_rate: float = 1e-3
    """Learning rate of the scales."""
    learning_rate: float = 1e-4
    """Learning rate of everything else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Weights of the parts of the quantization-aware loss; 0 switches a part off."""

    task: float = 1.0
    """CTC."""
    local: float = 1.0
    """Relative squared distance of each layer from the same layer in float32."""
    teacher: float = 0.5
    """Kullback-Leibler divergence of the logits from those of the float32 network."""
    temperature: float = 2.0
    """Of the softmaxes in it."""
    saturation: float = 1e-3
    """How far transformed values leave the integer range."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(
                    f"Loss: {field.name} must not be negative, got {getattr(self, field.name)}"
                )
        if self.temperature == 0:
            raise ValueError("Loss: temperature must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a recogniser in float32, then quantization-aware."""

    data: Layout | Literal["synthetic"] = "synthetic"
    """What to learn: a data set's layout, or digits synthesised in code."""
    data_dir: Path | None = None
    """Folder of the data set."""
    test_dir: Path | None = None
    """A second folder of the same layout; everything in it is a further test set."""
    unseen: tuple[str, ...] = ()
    """Speakers to keep out of training and to test on."""
    development: bool = False
    """Leave the test sets alone and test on a fifth of the training data: to choose options."""
    rate: int | None = None
    """Samples per second; by default the data set's own."""
    encoding: str = "utf-8"
    """Of the data set's lists, where they have no byte-order mark: latin-1, cp1251, ..."""
    units: Units | None = None
    """Labels; by default words for a closed vocabulary, characters otherwise."""
    alphabet: str = "auto"
    """Labels of characters: "letters" (English), "data" (all that the training transcripts have),
    or a file with one a line. "auto" takes the letters if they spell 95 % of the transcripts, and
    else those of the data."""
    voices: int = 16
    """Synthetic speakers to learn from; a quarter as many more are for the test alone."""
    bands: int = 40
    """Mel bands."""
    model: Literal["dfsmn", "wav2letter"] = "dfsmn"
    """Network."""
    dfsmn: ConvDFSMNConfig = dataclasses.field(
        default_factory=lambda: ConvDFSMNConfig(width=96, hidden=160, kernel=5, blocks=4)
    )
    """Sizes of the one; these train on two cores."""
    wav2letter: Wav2letterConfig = dataclasses.field(
        default_factory=lambda: Wav2letterConfig(
            first_kernel=11, stride=2, width=112, kernel=5, depth=4, wide_kernel=7, wide=192
        )
    )
    """Sizes of the other; these train on two cores."""
    augment: bool = True
    """Perturb the training data."""
    mask: SpecAugment = dataclasses.field(default_factory=SpecAugment)
    """Masks, warping and frequency responses on features."""
    perturb: Perturb = dataclasses.field(default_factory=Perturb)
    """Perturbation of waveforms."""
    strings: Strings = dataclasses.field(default_factory=Strings)
    """How words are joined to strings, for data of single words."""
    cut_words: bool = True
    """Learn also from single words, cut out of utterances at their pauses (labels: words)."""
    batch: int = 16
    """Utterances a step."""
    float_stage: FloatStage = dataclasses.field(default_factory=FloatStage)
    """Training in float32."""
    quant: QuantStage = dataclasses.field(default_factory=QuantStage)
    """Quantization-aware training."""
    loss: Loss = dataclasses.field(default_factory=Loss)
    """Quantization-aware loss."""
    devices: int = 1
    """Emulated devices that share each batch, over all processes."""
    group: tyro.conf.OmitArgPrefixes[ProcessGroup] = dataclasses.field(default_factory=ProcessGroup)
    """Which processes train together."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = dataclasses.field(default_factory=Decoding)
    """How tests find text."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    seed: int = 0
    """Of the initial parameters, the order of the data and its augmentation."""
    compiled: Path | None = Path("out/compiled")
    """Folder of compiled programs, shared by runs; without it each run compiles anew."""
    out: Path = Path("out/rsq_asr")
    """Folder of checkpoints, metrics and results; an unfinished run in it goes on."""
    evaluate_only: bool = False
    """Test the finished run in `out`, on its own test sets or, with --data and --data-dir, on
    others; train nothing. What the network is comes from the checkpoint."""

    def __post_init__(self):
        if self.data != "synthetic" and self.data_dir is None:
            raise ValueError(f"--data {self.data} needs --data-dir, the folder of the data set")
        if self.data == "synthetic" and (self.data_dir or self.test_dir):
            raise ValueError("--data-dir and --test-dir need --data, the layout of the folder")
        if self.voices < 1:
            raise ValueError(f"--voices must be at least 1, got {self.voices}")
        if self.devices < 1 or self.batch < 1 or self.batch % self.devices:
            raise ValueError(
                f"--batch ({self.batch}) must be a multiple of --devices ({self.devices})"
            )
        if self.checkpoint_every < 1:
            raise ValueError(f"--checkpoint-every must be at least 1, got {self.checkpoint_every}")
        if self.quant.calibration_batches < 1:
            raise ValueError(
                "--quant.calibration-batches must be at least 1, got "
                f"{self.quant.calibration_batches}"
            )
        check_numbers(self)

    @property
    def sizes(self) -> Sizes:
        """Of the network."""
        return self.dfsmn if self.model == "dfsmn" else self.wav2letter

    @property
    def stride(self) -> int:
        """Feature frames per output frame."""
        return math.prod(self.dfsmn.strides) if self.model == "dfsmn" else self.wav2letter.stride

    def record(self) -> dict[str, Any]:
        """As plain JSON values: what a checkpoint remembers."""
        return plain(dataclasses.asdict(self))

    def tested(self, record: dict[str, Any]) -> tuple["Config", bool]:
        """The configuration of a finished run to be tested as this one says.

        Args: record: of the finished run.
        Returns: it with this one's folders, decoding and, if this one names data, data; and whether
          the data are others than those of the run.
        """
        trained = _rebuilt(Config(), record)
        own = Config()
        names = [name for name in DATA if getattr(self, name) != getattr(own, name)]
        taken = DATA if "data" in names or "data_dir" in names else tuple(names)
        changes = {name: getattr(self, name) for name in (*FREE, *taken)}
        config = dataclasses.replace(trained, **changes)
        return config, (config.data, config.data_dir) != (trained.data, trained.data_dir)


def _rebuilt(default: Any, record: Any) -> Any:
    """A dataclass like `default` with the values of its record; what that lacks is the default."""
    values = {}
    for field in dataclasses.fields(default):
        if field.name not in record:
            continue
        own, value = getattr(default, field.name), record[field.name]
        if dataclasses.is_dataclass(own):
            value = _rebuilt(own, value)
        elif isinstance(own, tuple):
            value = tuple(value)
        elif field.name in _PATHS and value is not None:
            value = Path(value)
        values[field.name] = value
    return dataclasses.replace(default, **values)


_PATHS = ("data_dir", "test_dir", "compiled", "out", "language_model")
