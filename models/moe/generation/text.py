"""Text in, text out: a checkpoint folder, its tokenizer and a mesh in one call."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from cmjax.console import Progress
from cmjax.mesh import RankMesh, prepare_devices
from cmjax.models.moe.checkpoint.generation_config import GenerationDefaults
from cmjax.models.moe.checkpoint.load import Checkpoint, open_checkpoint
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import Sampler, check_prompts
from cmjax.models.moe.generation.chat import read_chat_template
from cmjax.models.moe.generation.open import GeneratorOptions, open_generator
from cmjax.models.moe.generation.tokenizer import encode_prompt, open_tokenizer


def generate(
    source: str | Path | MoEConfig,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    mesh: RankMesh | None = None,
    options: GeneratorOptions | None = None,
    sampler: Sampler | None = None,
    chat: bool = False,
    special_tokens: bool = True,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt with a model's own words.

        >>> from cmjax.models import moe
        >>> texts = moe.generate(moe.tiny(), ["The cat", "A dog"], new_tokens=3)
        >>> len(texts)
        2

    Args:
      source: a checkpoint folder, or a config: random parameters.
      prompts: texts, of any lengths. Where the folder has no tokenizer, a byte is a token.
      new_tokens: most tokens to add to each; fewer if one of them ends the text.
      mesh: the ranks, by default one. XLA devices for its nodes are made if JAX has not started.
      options: see `open_generator`.
      sampler: by default what the folder's generation_config.json says, else greedy; its seed is
        that of random parameters too.
      chat: each prompt is what a user says; the folder's chat template makes it a prompt.
      special_tokens: whether the tokens that begin a text are put before a prompt (unless it has
        them already); a chat template writes its own.
      progress: called with what is done, of how much, and what it is.
    Returns: what was added to each prompt.
    Raises:
      ValueError: see `open_generator`, `read_chat_template` and `Generator.generate`.
      RuntimeError: JAX has started with fewer devices than `mesh` has nodes.
    """
    mesh = mesh or RankMesh(1, 1)
    model = open_checkpoint(source) if isinstance(source, str | Path) else source
    if isinstance(model, Checkpoint):
        folder, config, defaults = model.folder, model.config, model.defaults
    else:
        folder, config, defaults = None, model, GenerationDefaults()
    if sampler is None:
        sampler = Sampler.of(defaults)
        if defaults.left_out:
            warnings.warn(
                f"{folder}: generation_config.json asks for {', '.join(defaults.left_out)}, which "
                "is left out",
                stacklevel=2,
            )
    tokenizer = open_tokenizer(folder, config.vocab_size)
    if chat:
        if folder is None:
            raise ValueError("generate: a chat needs the template of a checkpoint folder")
        template = read_chat_template(folder)
        prompts = [template.render([{"role": "user", "content": text}]) for text in prompts]
    special = special_tokens and not chat
    tokens = [encode_prompt(tokenizer, prompt, special=special) for prompt in prompts]
    check_prompts(config, tokens, new_tokens)
    prepare_devices(mesh.nodes)
    generator = open_generator(
        model,
        mesh,
        options,
        requests=len(tokens),
        prompt_tokens=max(map(len, tokens)),
        seed=sampler.seed,
        progress=progress,
    )
    found = generator.generate(
        tokens, new_tokens, sampler=sampler, end_tokens=config.end_tokens, progress=progress
    )
    return [tokenizer.decode(completion.tokens) for completion in found.completions]
