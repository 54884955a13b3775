"""Generate text with a model on an emulated (or real) mesh.

    python -m cmjax.commands.generate --weights DIR --prompt "The" --prompt "A cat" --mesh 48x8
    python -m cmjax.commands.generate --random tiny --prompt "The" --new-tokens 16

Prompts are batched over the ranks of the mesh; experts live where the placement plan, or the
published deployment, puts them. Tokens come from the checkpoint's tokenizer.json, or are bytes.
Completions go to standard output, progress and speed to standard error. Exit code 2 is bad input.
"""

import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import tyro
from rich.console import Console

from cmjax.console import bar, check_target, emit, exit_code, terminal
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.moe_step import slot_table
from cmjax.mesh import RankMesh, prepare_devices
from cmjax.models.moe.arithmetic import Arithmetic, KVCache, Precision
from cmjax.models.moe.checkpoint.hf_config import load_config
from cmjax.models.moe.checkpoint.load import Checkpoint, load_params, open_checkpoint
from cmjax.models.moe.config import LatentAttention, MoEConfig
from cmjax.models.moe.generation.batch import Sampler, check_prompts
from cmjax.models.moe.generation.generator import Generated, Generator, padded_length
from cmjax.models.moe.generation.memory import check_memory, chunk_that_fits
from cmjax.models.moe.generation.programs import check_prefill, place_params
from cmjax.models.moe.generation.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from cmjax.models.moe.model import convert_params
from cmjax.models.moe.sharding import Layout, shard_params
from cmjax.models.moe.slots import plan_tables
from cmjax.models.moe.steps import init_params
from cmjax.placement import read_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Options of a generation."""

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
    mesh: str = "1x1"
    """Ranks, as nodes x npus (x dies): 48x8 is the supernode. A node is one XLA device."""
    plan: Path | None = None
    """Where experts live: a plan written by `cmjax place --json`."""
    arithmetic: Annotated[str, tyro.conf.arg(aliases=["--precision"])] = "float32"
    """What the model computes in: float32, bfloat16, int8 (W8A8), msd_w8a16, msd_w4a16 (MXFP4),
    msd_w4a16_kv4, pasa_fp16, int8_pasa_fp16."""
    kv_cache: KVCache | None = None
    """Format of the cache (default: the arithmetic's)."""
    new_tokens: int = 64
    """Most tokens to add to each prompt."""
    context: int | None = None
    """Tokens the cache holds per request (default: as many as the longest needs)."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach this."""
    seed: int = 0
    """Of the drawn tokens, and of random parameters."""
    prefill: Literal["auto", "data-parallel", "sequence-parallel"] = "auto"
    """How prompts are run: each by its rank, or all by all ranks, a share of the heads each (auto:
    where latent attention's heads divide over the ranks)."""
    prefill_chunk: int | None = None
    """Run prompts this many tokens at a time (default: whole, or in chunks where dispatching whole
    prompts would not fit this machine's memory)."""
    drafts: int | None = None
    """Tokens drafted per step by multi-token prediction (default: 1 if the model can)."""
    ignore_end: bool = False
    """Go on after a token that ends a text."""
    json: str | None = None
    """Write the completions as JSON to this file; `-` is standard output."""

    def run(self, out: Console, log: Console) -> None:
        """Generate and print.

        Raises: ValueError: bad input.
        """
        check_target(self.json)
        sampler = Sampler(temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        Arithmetic.of(self.arithmetic)
        mesh = parse_mesh(self.mesh)
        model = self.open_model()
        config = model.config if isinstance(model, Checkpoint) else model
        tokenizer = open_tokenizer(self.weights, config.vocab_size) if self._texts() else None
        if isinstance(tokenizer, ByteTokenizer):
            log.print("no tokenizer.json: every byte is a token")
        prompts = self._prompts(tokenizer)
        check_prompts(config, prompts, self.new_tokens, self.context)
        try:
            prepare_devices(mesh.nodes)
        except RuntimeError as error:  # called from a process that has started JAX
            raise ValueError(f"--mesh {self.mesh}: {error}") from None
        started = time.perf_counter()
        generator = self.build(model, config, mesh, prompts)
        log.print(f"weights in place on {mesh.ranks} ranks: {time.perf_counter() - started:.1f} s")
        with bar(quiet=False) as progress:
            task = progress.add_task("compiling", total=None)

            def on_step(done: int, wanted: int) -> None:
                progress.update(task, total=wanted, completed=done, description="generating")

            found = generator.generate(
                prompts,
                self.new_tokens,
                sampler=sampler,
                context=self.context,
                end_tokens=() if self.ignore_end else config.end_tokens,
                on_step=on_step,
            )
        self._show(out, log, found, prompts, tokenizer, mesh, generator.drafts)

    def _texts(self) -> tuple[str, ...]:
        """Prompts given as text."""
        if self.prompt_file is None:
            return self.prompt
        try:
            lines = self.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.prompt_file}: cannot be read ({error})") from None
        return *self.prompt, *filter(None, lines)

    def _prompts(self, tokenizer: Tokenizer | None) -> list[list[int]]:
        prompts = [tokenizer.encode(text) for text in self._texts()] if tokenizer else []
        for given in self.prompt_tokens:
            try:
                prompts.append([int(token) for token in re.split(r"[,\s]+", given.strip())])
            except ValueError:
                raise ValueError(
                    f"--prompt-tokens must be numbers with commas, got {given!r}"
                ) from None
        if not prompts:
            raise ValueError("no prompt: give --prompt, --prompt-file or --prompt-tokens")
        return prompts

    def open_model(self) -> Checkpoint | MoEConfig:
        """What `weights` or `random` names, its parameters not read yet."""
        if (self.weights is None) == (self.random is None):
            raise ValueError("give either --weights FOLDER or --random PRESET")
        if self.weights is not None:
            return open_checkpoint(self.weights)
        assert self.random is not None
        return load_config(self.random)

    def build(
        self,
        model: Checkpoint | MoEConfig,
        config: MoEConfig,
        mesh: RankMesh,
        prompts: list[list[int]],
    ) -> Generator:
        """The model on its mesh, parameters read or made, for prompts as many and as long."""
        possible = model.has_mtp if isinstance(model, Checkpoint) else config.mtp_layers > 0
        drafts = int(possible) if self.drafts is None else self.drafts
        if drafts and not possible:
            raise ValueError(
                f"--drafts {drafts} needs a multi-token-prediction module, which this model has "
                "not; use --drafts 0"
            )
        mtp = drafts > 0
        tables = None
        if self.plan is None:
            table = slot_table(config, mesh.ranks, Deployment(phase="decode"))
        else:
            tables = plan_tables(read_plan(self.plan), config, mesh.ranks, mtp=mtp)
            table = max(tables, key=lambda table: table.max_copies)
        layout = Layout(table=table, axes=mesh.axes)
        arithmetic = Arithmetic.of(self.arithmetic)
        if self.kv_cache is not None:
            arithmetic = dataclasses.replace(arithmetic, kv_cache=self.kv_cache)
        arithmetic.check(config)
        # weights are read as floats and converted where they are, unless they can be read as wanted
        held: Precision = "float32" if arithmetic.quantized else "bfloat16"
        if direct := self.arithmetic in get_args(Precision):
            held = cast(Precision, self.arithmetic)
        check_memory(config, layout, mesh, held, mtp)
        chunk = self.prefill_chunk
        if chunk is None:
            each = -(-len(prompts) // mesh.ranks)
            chunk = chunk_that_fits(config, layout, each, padded_length(config, prompts))
        sequence_parallel = self._sequence_parallel(config, mesh, chunk)
        check_prefill(config, layout, chunk, sequence_parallel)
        if isinstance(model, Checkpoint):
            with bar(quiet=False) as progress:
                task = progress.add_task("loading")
                params = load_params(
                    model,
                    layout,
                    precision=held,
                    mtp=mtp,
                    mesh=mesh,
                    tables=tables,
                    progress=lambda done, total: progress.update(task, completed=done, total=total),
                )
        else:
            one = init_params(config, held, mtp=mtp, seed=self.seed)
            params = place_params(shard_params(one, layout, tables), layout, mesh)
        if not direct:
            params = convert_params(params, config, layout, held, arithmetic, mtp=mtp)
        return Generator(
            config=config,
            params=params,
            layout=layout,
            mesh=mesh,
            precision=arithmetic,
            kv_cache=arithmetic.kv_cache,
            drafts=drafts,
            prefill_chunk=chunk,
            sequence_parallel=sequence_parallel,
        )

    def _sequence_parallel(self, config: MoEConfig, mesh: RankMesh, chunk: int | None) -> bool:
        if self.prefill != "auto":
            return self.prefill == "sequence-parallel"
        splits = isinstance(config.attention, LatentAttention) and config.heads % mesh.ranks == 0
        return mesh.ranks > 1 and splits and chunk is None

    def _show(
        self,
        out: Console,
        log: Console,
        found: Generated,
        prompts: list[list[int]],
        tokenizer: Tokenizer | None,
        mesh: RankMesh,
        drafts: int,
    ) -> None:
        texts = self._texts()
        requests: list[dict[str, Any]] = []
        for number, (prompt, completion) in enumerate(zip(prompts, found.completions, strict=True)):
            request: dict[str, Any] = {"prompt_tokens": prompt, "tokens": completion.tokens}
            if tokenizer is not None and number < len(texts):
                request |= {"prompt": texts[number], "text": tokenizer.decode(completion.tokens)}
            requests.append(request | {"stopped_by": completion.reason})
        speed = {
            "ranks": mesh.ranks,
            "compile_s": found.compile_s,
            "prefill_s": found.prefill_s,
            "prefill_tokens_per_s": found.prompt_tokens / found.prefill_s,
            "decode_s": found.decode_s,
            "decode_steps": found.steps,
            "decode_tokens_per_s": found.decoded_tokens / found.decode_s if found.steps else None,
            "drafts_per_step": drafts,
            "draft_acceptance": found.acceptance,
        }
        emit(out, self.json, {"requests": requests, "speed": speed})
        if self.json != "-":
            for number, request in enumerate(requests, 1):
                shown = request.get("prompt", request["prompt_tokens"])
                continued = request.get("text", request["tokens"])
                out.print(f"[{number}] {shown} → {continued}", markup=False, highlight=False)
        log.print(_summary(found), highlight=False)


def parse_mesh(text: str) -> RankMesh:
    """`48x8` as 48 nodes of 8 NPUs; `48x8x2` with two dies each; `8` as one node of 8.

    Raises: ValueError: anything else.
    """
    if not re.fullmatch(r"\d+(x\d+){0,2}", text):
        raise ValueError(f"--mesh must be NODESxNPUS or NODESxNPUSxDIES, got {text!r}")
    sizes = [int(part) for part in text.split("x")]
    return RankMesh(*(sizes if len(sizes) > 1 else [1, *sizes]))


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


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    command = tyro.cli(Generate, args=arguments, prog="cmjax generate", description=__doc__)
    return exit_code(lambda: command.run(terminal(), Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
