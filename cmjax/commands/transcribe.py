"""`cmjax transcribe`: text from sound files, by a recognizer that `train.rsq_asr` trained."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cmjax.console import check_target, emit, track
from cmjax.models.asr.audio import read_file
from cmjax.models.asr.containers import BadAudio
from cmjax.models.asr.conv import Precision
from cmjax.models.asr.decoding import Decoding
from cmjax.models.asr.recognizer import load_recognizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcribe:
    """Turn speech into text with a trained recognizer.

    Files may have any format and sample rate that libsndfile reads. One that cannot be read is
    named on standard error, and the others are transcribed.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a training, or the recognizer.npz in it."""
    files: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]]
    """Sound files."""
    precision: Precision | None = None
    """Arithmetic: by default that of the training's last stage; float32 is always there."""
    decoding: tyro.conf.OmitArgPrefixes[Decoding] = dataclasses.field(default_factory=Decoding)
    """How text is found."""
    json: str | None = None
    """Write the texts as JSON to this file; `-` is standard output."""

    def run(self, console: Console) -> None:
        """Transcribe and print.

        Raises: ValueError: no recognizer, or files that cannot be read.
        """
        check_target(self.json)
        if not self.files:
            raise ValueError(
                f"no FILE to transcribe behind the recognizer, which is {self.checkpoint} here "
                "(cmjax transcribe CHECKPOINT FILE ...)"
            )
        recognizer = load_recognizer(self.checkpoint)
        transcribe = recognizer.transcriber(self.precision, self.decoding)
        rows, failed = [], 0
        for path in track(self.files, "transcribing"):
            try:
                samples = read_file(path, recognizer.front.sample_rate)
            except BadAudio as error:
                print(f"{path}: {error}", file=sys.stderr)
                failed += 1
                continue
            text = transcribe(samples)
            seconds = len(samples) / recognizer.front.sample_rate
            rows.append({"file": str(path), "seconds": seconds, "text": text})
        precision = self.precision or recognizer.precision
        emit(console, self.json, {"precision": precision, "files": rows})
        if self.json != "-":
            for row in rows:
                line = f"{row['file']}: {row['text']}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        if failed:
            raise ValueError(f"{failed} of {len(self.files)} files could not be read")
