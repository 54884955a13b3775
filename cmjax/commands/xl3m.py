"""`cmjax xl3m`: a question about a text of any length, answered by a model of a short window."""

import dataclasses
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from cmjax.commands.generate import open_model, prepare_mesh
from cmjax.console import check_target, emit, show_progress
from cmjax.console import log as to_stderr
from cmjax.inputs import read_text
from cmjax.mesh import RankMesh
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import Sampler
from cmjax.models.moe.generation.generator import Generator
from cmjax.models.moe.generation.open import GeneratorOptions, open_generator
from cmjax.models.moe.generation.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from cmjax.models.moe.xl3m.context import KeyContext, XL3MConfig, key_context
from cmjax.models.moe.xl3m.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class XL3M:
    """Answer a question about a text of any length, with a model of a short window.

    The text is read segment by segment, each with the question; the answer is generated from the
    segments that leave the model least uncertain. It goes to standard output, progress to standard
    error.
    """

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
    arithmetic: str = GeneratorOptions.arithmetic
    """What the model computes in: float32, bfloat16, int8, ... (as of `cmjax generate`)."""
    window: int | None = None
    """Longest input the model is trusted with (default: as many as it is meant for)."""
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
    temperature: float = Sampler.temperature
    """0 takes the likeliest token."""
    seed: int = Sampler.seed
    """Of the drawn tokens, and of random parameters."""
    json: str | None = None
    """Write the answer and what it was taken from as JSON to this file; `-` is standard output."""

    def run(self, console: Console) -> None:
        """Read and answer.

        Raises: ValueError: bad input.
        """
        check_target(self.json)
        log = to_stderr()
        sampler = Sampler(temperature=self.temperature, seed=self.seed)
        mesh = RankMesh.parse(self.mesh)
        text = _read_text(self.text)
        model, config = open_model(self.weights, self.random)
        tokenizer = open_tokenizer(self.weights, config.vocab_size)
        if isinstance(tokenizer, ByteTokenizer):
            log.print("no tokenizer: every byte is a token")
        question = np.array(tokenizer.encode(self.question, special=False), np.int32)
        if not question.size:
            raise ValueError("--question is empty")
        sizes = self._sizes(config, tuple(tokenizer.encode("")))
        sizes.room(question.size)  # before weights are read
        content = np.array(tokenizer.encode(text, special=False), np.int32)
        prepare_mesh(mesh, self.mesh)
        with show_progress("loading") as progress:
            generator = open_generator(
                model,
                mesh,
                GeneratorOptions(arithmetic=self.arithmetic, drafts=0),
                prompt_tokens=sizes.window - self.new_tokens,
                seed=self.seed,
                split=False,  # the scorer scans the stack
                progress=progress,
            )
        key = self._key_context(generator, sizes, content, question, log)
        found = generator.generate(
            [key.tokens.tolist()],
            self.new_tokens,
            sampler=sampler,
            end_tokens=config.end_tokens,
        )
        answer = tokenizer.decode(found.completions[0].tokens)
        self._show(console, key, content, tokenizer, answer)

    def _sizes(self, config: MoEConfig, prefix: tuple[int, ...]) -> XL3MConfig:
        window = config.context_limit if self.window is None else self.window
        if window > config.context_limit:
            raise ValueError(
                f"--window {window} is more than the {config.context_limit} tokens the model is "
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
            parallelism=generator.parallelism,
            mesh=generator.mesh,
            precision=generator.precision,
        )
        started = time.perf_counter()
        with show_progress("reading") as progress:
            key = key_context(content, question, scorer, sizes, progress=progress)
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
        console: Console,
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
        emit(console, self.json, result)
        if self.json != "-":
            console.print(answer, markup=False, highlight=False)


def _read_text(path: Path) -> str:
    text = read_text(path)
    if not text:
        raise ValueError(f"{path}: the text is empty")
    return text
