"""`cmjax generate`: text from a model on an emulated (or real) mesh."""

import dataclasses
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from cmjax.console import check_target, emit, show_progress
from cmjax.console import log as to_stderr
from cmjax.cores import keep_to_cores, usable_cores
from cmjax.executables import keep_executables
from cmjax.inputs import check_count, parse_json, read_text
from cmjax.mesh import MOST_EMULATED, RankMesh
from cmjax.models.moe.checkpoint.generation_config import GenerationDefaults
from cmjax.models.moe.checkpoint.hf_config import load_config
from cmjax.models.moe.checkpoint.load import Checkpoint, open_checkpoint
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import Sampler, check_prompts
from cmjax.models.moe.generation.chat import read_chat_template
from cmjax.models.moe.generation.generator import Generated, Generator
from cmjax.models.moe.generation.open import GeneratorOptions, open_generator
from cmjax.models.moe.generation.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    encode_prompt,
    open_tokenizer,
)
from cmjax.processes import ProcessGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Generate text with a model on an emulated mesh.

    Prompts are batched over the ranks of the mesh; experts live where the placement plan, or the
    published deployment, puts them. Tokens come from the checkpoint's tokenizer, or are bytes; how
    they are drawn and what ends a text, from its generation_config.json where no option says it.
    Completions go to standard output, progress and speed to standard error. Several processes share
    the nodes of the mesh; the first one prints.
    """

    weights: Path | None = None
    """Checkpoint folder: config.json and safetensors."""
    random: str | None = None
    """Instead of weights: a preset (tiny), or a config.json, with random parameters."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; give it several times for a batch."""
    prompt_file: Path | None = None
    """More prompts, one a line."""
    prompt_tokens: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Prompts as token numbers: `1,2,3`."""
    chat: bool = False
    """Prompts are what a user says: the checkpoint's chat template makes them prompts."""
    system: str | None = None
    """With --chat: the system's message before each."""
    chat_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """With --chat: what else the template knows, `enable_thinking=false`; values are JSON, or
    text."""
    special_tokens: bool = True
    """Whether the tokens that begin a text are put before a prompt. They never come twice, and a
    chat template writes its own."""
    mesh: str = "1x1"
    """Ranks, as nodes x npus (x dies): 48x8 is the supernode. A node is one XLA device."""
    model: tyro.conf.OmitArgPrefixes[GeneratorOptions] = dataclasses.field(
        default_factory=GeneratorOptions
    )
    """What the model computes in, and how it is spread over the ranks."""
    group: tyro.conf.OmitArgPrefixes[ProcessGroup] = dataclasses.field(default_factory=ProcessGroup)
    """Which processes generate together."""
    threads: int | None = None
    """Cores to compute on (default: all that this process may use); several processes on a machine
    share them out."""
    new_tokens: int = 64
    """Most tokens to add to each prompt."""
    context: int | None = None
    """Tokens the cache holds per request (default: as many as the longest needs)."""
    temperature: float | None = None
    """0 takes the likeliest token (default: as the checkpoint says, else 0)."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities reach this (default: as the
    checkpoint says, else 1)."""
    top_k: int | None = None
    """Of these, first, only this many likeliest; 0 for all (default: as the checkpoint says, else
    all)."""
    seed: int = Sampler.seed
    """Of the drawn tokens, and of random parameters."""
    ignore_end: bool = False
    """Go on after a token that ends a text."""
    json: str | None = None
    """Write the completions as JSON to this file; `-` is standard output."""

    def run(self, console: Console) -> None:
        """Generate and print.

        Raises: ValueError: bad input.
        """
        first = self.group.first
        if first:
            check_target(self.json)
        log = to_stderr() if first else Console(quiet=True)
        self._sampler(GenerationDefaults())  # bad options are found before a file is read
        mesh = RankMesh.parse(self.mesh)
        model, config = open_model(self.weights, self.random)
        defaults = model.defaults if isinstance(model, Checkpoint) else GenerationDefaults()
        sampler = self._sampler(defaults)
        if defaults.left_out:
            left_out = f"generation_config.json: left out: {', '.join(defaults.left_out)}"
            log.print(left_out, markup=False, highlight=False)
        tokenizer = open_tokenizer(self.weights, config.vocab_size) if self._texts() else None
        if isinstance(tokenizer, ByteTokenizer):
            log.print("no tokenizer: every byte is a token")
        prompts = self._prompts(tokenizer)
        check_prompts(config, prompts, self.new_tokens, self.context)
        limit_threads(self.threads)
        prepare_mesh(mesh, self.mesh, self.group)
        keep_executables()
        generator, load_s = self._loaded(model, mesh, prompts, log)
        with show_progress("compiling", quiet=not first) as progress:
            found = generator.generate(
                prompts,
                self.new_tokens,
                sampler=sampler,
                context=self.context,
                end_tokens=() if self.ignore_end else config.end_tokens,
                progress=progress,
            )
        start = {"ranks": mesh.ranks, "load_s": load_s, "drafts_per_step": generator.drafts}
        if first:
            self._show(console, log, found, prompts, tokenizer, start)

    def _loaded(
        self,
        model: Checkpoint | MoEConfig,
        mesh: RankMesh,
        prompts: list[list[int]],
        log: Console,
    ) -> tuple[Generator, float]:
        """The model on its mesh, and the seconds that it took."""
        started = time.perf_counter()
        with (
            warnings.catch_warnings(record=True) as warned,
            show_progress("loading", quiet=log.quiet) as progress,
        ):
            generator = open_generator(
                model,
                mesh,
                self.model,
                requests=len(prompts),
                prompt_tokens=max(map(len, prompts)),
                seed=self.seed,
                progress=progress,
            )
        load_s = time.perf_counter() - started
        for warning in warned:
            log.print(f"{warning.message}", markup=False, highlight=False)
        log.print(f"weights in place on {mesh.ranks} ranks: {load_s:.1f} s")
        return generator, load_s

    def _texts(self) -> tuple[str, ...]:
        """Prompts given as text."""
        if self.prompt_file is None:
            return self.prompt
        return *self.prompt, *filter(None, read_text(self.prompt_file).splitlines())

    def _sampler(self, defaults: GenerationDefaults) -> Sampler:
        return Sampler.of(
            defaults,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
        )

    def _prompts(self, tokenizer: Tokenizer | None) -> list[list[int]]:
        special = self.special_tokens and not self.chat
        texts = self._chats() if self.chat else self._texts()
        prompts = [encode_prompt(tokenizer, t, special=special) for t in texts] if tokenizer else []
        for given in self.prompt_tokens:
            try:
                prompts.append([int(token) for token in re.split(r"[,\s]+", given.strip())])
            except ValueError:
                raise ValueError(
                    f"--prompt-tokens must be numbers with commas, got {given!r}"
                ) from None
        if not self.chat and (self.system is not None or self.chat_option):
            raise ValueError("--system and --chat-option go with --chat")
        if not prompts:
            raise ValueError("no prompt: give --prompt, --prompt-file or --prompt-tokens")
        return prompts

    def _chats(self) -> list[str]:
        """Each prompt as a chat of one message, or two with the system's."""
        if self.weights is None:
            raise ValueError("--chat needs the chat template of a checkpoint: give --weights")
        template, options = read_chat_template(self.weights), {}
        for given in self.chat_option:
            name, equals, value = given.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"--chat-option must be NAME=VALUE, got {given!r}")
            try:
                options[name] = parse_json(value, "")
            except ValueError:
                options[name] = value
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        chats = ([*before, {"role": "user", "content": text}] for text in self._texts())
        return [template.render(chat, **options) for chat in chats]

    def _show(
        self,
        console: Console,
        log: Console,
        found: Generated,
        prompts: list[list[int]],
        tokenizer: Tokenizer | None,
        start: dict[str, Any],
    ) -> None:
        texts = self._texts()
        requests: list[dict[str, Any]] = []
        for number, (prompt, completion) in enumerate(zip(prompts, found.completions, strict=True)):
            request: dict[str, Any] = {"prompt_tokens": prompt, "tokens": completion.tokens}
            if tokenizer is not None and number < len(texts):
                request |= {"prompt": texts[number], "text": tokenizer.decode(completion.tokens)}
            requests.append(request | {"stopped_by": completion.reason})
        speed = start | {
            "compile_s": found.compile_s,
            "prefill_s": found.prefill_s,
            "prefill_tokens_per_s": found.prompt_tokens / found.prefill_s,
            "decode_s": found.decode_s,
            "decode_steps": found.steps,
            "decode_tokens_per_s": found.decoded_tokens / found.decode_s if found.steps else None,
            "draft_acceptance": found.acceptance,
        }
        emit(console, self.json, {"requests": requests, "speed": speed})
        if self.json != "-":
            for number, request in enumerate(requests, 1):
                shown = request.get("prompt", request["prompt_tokens"])
                continued = request.get("text", request["tokens"])
                console.print(f"[{number}] {shown} → {continued}", markup=False, highlight=False)
        log.print(_summary(found), highlight=False)


def open_model(
    weights: Path | None, random: str | None
) -> tuple[Checkpoint | MoEConfig, MoEConfig]:
    """What `--weights` or `--random` names, its parameters not read yet, and its config."""
    if (weights is None) == (random is None):
        raise ValueError("give either --weights FOLDER or --random PRESET")
    if weights is not None:
        checkpoint = open_checkpoint(weights)
        return checkpoint, checkpoint.config
    assert random is not None, "one of the two is there"
    config = load_config(random)
    return config, config


def limit_threads(threads: int | None) -> None:
    """Keep this process, and the threads that JAX will start, to so many cores.

    Raises: ValueError: less than one, more than this process may use, or a system that cannot.
    """
    if threads is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("--threads: this system cannot keep a process to some of its cores")
    cores = usable_cores()
    if not 1 <= threads <= len(cores):
        raise ValueError(
            f"--threads must be 1 to {len(cores)}, the cores that this process may use; got "
            f"{threads}"
        )
    keep_to_cores(cores[:threads])


def prepare_mesh(mesh: RankMesh, given: str, group: ProcessGroup | None = None) -> None:
    """XLA devices for the nodes of `--mesh`, over all processes of a group.

    Raises: ValueError: this process has started JAX with fewer, or the group does not meet.
    """
    check_count(f"--mesh {given}: ranks", mesh.ranks, most=MOST_EMULATED)
    try:
        (group or ProcessGroup()).join(mesh.nodes)
    except RuntimeError as error:
        if "backend" in str(error) and "initialize" in str(error):  # JAX_PLATFORMS, not the mesh
            raise
        raise ValueError(f"--mesh {given}: {error}") from None


def _summary(found: Generated) -> str:
    lines = [
        f"compiled in {found.compile_s:.1f} s; "
        f"prefill {found.prompt_tokens} tokens in {found.prefill_s:.3f} s, "
        f"{found.prompt_tokens / found.prefill_s:,.0f} tokens/s"
    ]
    if found.steps:
        lines.append(
            f"decode {found.decoded_tokens} tokens in {found.decode_s:.3f} s and {found.steps} "
            f"steps, {found.decoded_tokens / found.decode_s:,.1f} tokens/s"
        )
    if found.acceptance is not None:
        lines.append(
            f"drafts accepted: {found.accepted} of {found.drafted} ({found.acceptance:.1%})"
        )
    return "\n".join(lines)
