"""Answer a question about a text of any length, with a model of a short window, by XL3M.

    python -m cmjax.models.moe.xl3m --weights DIR --text book.txt --question "Who wrote the letter?"
    python -m cmjax.models.moe.xl3m --random tiny --text book.txt --question "Who?" --mesh 4x2

The text is read segment by segment, each with the question; the answer is generated from the
segments that leave the model least uncertain. It goes to standard output, progress to standard
error. Exit code 2 is bad input.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from cmjax.commands.generate import Generate, parse_mesh
from cmjax.console import bar, check_target, emit, exit_code, terminal
from cmjax.mesh import prepare_devices
from cmjax.models.moe.checkpoint.load import Checkpoint
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import Sampler
from cmjax.models.moe.generation.generator import Generator
from cmjax.models.moe.generation.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from cmjax.models.moe.xl3m.context import KeyContext, XL3MConfig, key_context
from cmjax.models.moe.xl3m.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """Options of a reading."""

    text: Path
    """The text, UTF-8."""
    question: str
    """Read after every segment, and before the answer."""
    weights: Path | None = None
    """Checkpoint folder: config.json and safetensors."""
    random: str | None = None
    """Instead of weights: a preset (tiny), or a config.json, with random parameters."""
    mesh: str = "1x1"
    """Ranks, as nodes x npus (x dies); segments are spread over them. A node is one XLA device."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """What the model computes in."""
    window: int | None = None
    """Longest input the model is trusted with (default: its max_position)."""
    segment: int | None = None
    """Tokens of a segment (default: a quarter of the window)."""
    stride: int | None = None
    """Tokens between segment starts (default: half a segment)."""
    keep: int | None = None
    """Segments kept (default: as many as fit into the window)."""
    batch: int = 16
    """Segments read at a time."""
    new_tokens: int = 64
    """Most tokens of the answer."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    seed: int = 0
    """Of the drawn tokens, and of random parameters."""
    json: str | None = None
    """Write the answer and what it was taken from as JSON to this file; `-` is standard output."""

    def run(self, out: Console, log: Console) -> None:
        """Read and answer.

        Raises: ValueError: bad input.
        """
        check_target(self.json)
        sampler = Sampler(temperature=self.temperature, seed=self.seed)
        mesh = parse_mesh(self.mesh)
        text = _read_text(self.text)
        options = Generate(
            weights=self.weights,
            random=self.random,
            arithmetic=self.precision,
            seed=self.seed,
            drafts=0,
        )
        model = options.open_model()
        config = model.config if isinstance(model, Checkpoint) else model
        tokenizer = open_tokenizer(self.weights, config.vocab_size)
        if isinstance(tokenizer, ByteTokenizer):
            log.print("no tokenizer.json: every byte is a token")
        question = np.array(tokenizer.encode(self.question, special=False), np.int32)
        if not question.size:
            raise ValueError("--question is empty")
        sizes = self._sizes(config, tuple(tokenizer.encode("")))
        sizes.room(question.size)  # before weights are read
        content = np.array(tokenizer.encode(text, special=False), np.int32)
        prepare_devices(mesh.nodes)
        longest = [0] * (sizes.window - self.new_tokens)
        generator = options.build(model, config, mesh, [longest])
        key = self._key_context(generator, sizes, content, question, log)
        found = generator.generate(
            [key.tokens.tolist()],
            self.new_tokens,
            sampler=sampler,
            end_tokens=config.end_tokens,
        )
        answer = tokenizer.decode(found.completions[0].tokens)
        self._show(out, key, content, tokenizer, answer)

    def _sizes(self, config: MoEConfig, prefix: tuple[int, ...]) -> XL3MConfig:
        window = config.max_position if self.window is None else self.window
        if window > config.max_position:
            raise ValueError(
                f"--window {window} is more than the {config.max_position} tokens the model is "
                "meant for (max_position)"
            )
        segment = max(window // 4, 1) if self.segment is None else self.segment
        return XL3MConfig(
            window=window,
            segment=segment,
            stride=max(segment // 2, 1) if self.stride is None else self.stride,
            keep=self.keep,
            answer=self.new_tokens,
            batch=self.batch,
            prefix=prefix,
        )

    def _key_context(
        self,
        generator: Generator,
        sizes: XL3MConfig,
        content: np.ndarray,
        question: np.ndarray,
        log: Console,
    ) -> KeyContext:
        scorer = Scorer(
            config=generator.config,
            params=generator.params,
            layout=generator.layout,
            mesh=generator.mesh,
            precision=generator.precision,
        )
        started = time.perf_counter()
        with bar(quiet=False) as progress:
            task = progress.add_task("reading", total=None)
            key = key_context(
                content,
                question,
                scorer,
                sizes,
                on_segment=lambda done, total: progress.update(task, completed=done, total=total),
            )
        taken = time.perf_counter() - started
        if content.size <= sizes.room(question.size):
            log.print(f"{content.size:,} tokens: the text fits into the window", highlight=False)
            return key
        log.print(
            f"{content.size:,} tokens in {key.entropy.size:,} segments of {sizes.segment}, read in "
            f"{taken:.1f} s; kept {len(key.kept)}, key context of {key.tokens.size} tokens",
            highlight=False,
        )
        return key

    def _show(
        self,
        out: Console,
        key: KeyContext,
        content: np.ndarray,
        tokenizer: Tokenizer,
        answer: str,
    ) -> None:
        result = {
            "answer": answer,
            "intervals": key.intervals,
            "evidence": [tokenizer.decode(content[a:b].tolist()) for a, b in key.intervals],
            "segments": key.kept,
            "entropy_nats": [float(key.entropy[number]) for number in key.kept],
        }
        emit(out, self.json, result)
        if self.json != "-":
            out.print(answer, markup=False, highlight=False)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not text:
        raise ValueError(f"{path}: the text is empty")
    return text


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    command = tyro.cli(Read, args=arguments, prog="cmjax xl3m", description=__doc__)
    return exit_code(lambda: command.run(terminal(), Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
