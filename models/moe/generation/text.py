"""Text in, text out: a checkpoint folder, its tokenizer and a mesh in one call."""

from collections.abc import Sequence
from pathlib import Path

from cmjax.console import Progress
from cmjax.mesh import RankMesh, prepare_devices
from cmjax.models.moe.checkpoint.load import Checkpoint, open_checkpoint
from cmjax.models.moe.config import MoEConfig
from cmjax.models.moe.generation.batch import Sampler, check_prompts
from cmjax.models.moe.generation.open import GeneratorOptions, open_generator
from cmjax.models.moe.generation.tokenizer import open_tokenizer


def generate(
    source: str | Path | MoEConfig,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    mesh: RankMesh | None = None,
    options: GeneratorOptions | None = None,
    sampler: Sampler | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Continue each prompt with a model's own words.

        >>> from cmjax.models import moe
        >>> texts = moe.generate(moe.tiny(), ["The cat", "A dog"], new_tokens=3)
        >>> len(texts)
        2

    Args:
      source: a checkpoint folder, or a config: random parameters.
      prompts: texts, of any lengths. Where the folder has no tokenizer.json, a byte is a token.
      new_tokens: most tokens to add to each; fewer if one of them ends the text.
      mesh: the ranks, by default one. XLA devices for its nodes are made if JAX has not started.
      options: see `open_generator`.
      sampler: by default greedy; its seed is that of random parameters too.
      progress: called with what is done, of how much, and what it is.
    Returns: what was added to each prompt.
    Raises:
      ValueError: see `open_generator` and `Generator.generate`.
      RuntimeError: JAX has started with fewer devices than `mesh` has nodes.
    """
    mesh, sampler = mesh or RankMesh(1, 1), sampler or Sampler()
    model = open_checkpoint(source) if isinstance(source, str | Path) else source
    folder, config = (
        (model.folder, model.config) if isinstance(model, Checkpoint) else (None, model)
    )
    tokenizer = open_tokenizer(folder, config.vocab_size)
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
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
