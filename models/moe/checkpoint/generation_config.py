"""How a checkpoint's text is meant to be drawn and where it ends: its generation_config.json."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from cmjax.models.moe.checkpoint.config_schema import Tokens, token_numbers
from cmjax.models.moe.checkpoint.json_file import convert, read_object

FILE = "generation_config.json"
_TOP_K = 50  # of transformers, where a file that samples says nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_eos_token_id": (),
    "stop_strings": ([],),
}
"""What changes a text and is not computed here, with the values that change nothing (nor does
null)."""


class _Keys(Struct):
    eos_token_id: Tokens = None
    do_sample: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What holds where the caller says nothing."""

    end_tokens: tuple[int, ...] | None = None
    """Tokens that end a text; `None`: those of the config."""
    do_sample: bool = False
    """Whether tokens are drawn; otherwise the likeliest is taken."""
    temperature: float = 1.0
    """Of drawn tokens."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach this."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    left_out: tuple[str, ...] = ()
    """What the file asks for and this library does not do: `repetition_penalty 1.1`."""


def read_generation_config(folder: Path) -> GenerationDefaults:
    """Of a checkpoint folder; greedy where it has no generation_config.json.

    As in transformers, a file that samples and names no `top_k` means 50.

    Raises: ValueError: the file cannot be read, or a value in it makes no sense.
    """
    path = folder / FILE
    if not path.exists():
        return GenerationDefaults()
    raw = read_object(path)
    keys = convert(raw, _Keys, path)
    samples = bool(keys.do_sample)
    top_k = keys.top_k if keys.top_k is not None else _TOP_K if samples else 0
    return GenerationDefaults(
        end_tokens=None if keys.eos_token_id is None else token_numbers(keys.eos_token_id),
        do_sample=samples,
        temperature=1.0 if keys.temperature is None else keys.temperature,
        top_p=1.0 if keys.top_p is None else keys.top_p,
        top_k=top_k,
        left_out=tuple(
            f"{key} {raw[key]}"
            for key, neutral in _NEUTRAL.items()
            if raw.get(key) is not None and raw[key] not in neutral
        ),
    )
