"""Text from a model on a mesh of ranks."""

from cmjax.models.moe.generation.batch import Completion, Sampler
from cmjax.models.moe.generation.chat import ChatTemplate, read_chat_template
from cmjax.models.moe.generation.continuous import ContinuousBatch, Emitted, Finished
from cmjax.models.moe.generation.generator import Generated, Generator
from cmjax.models.moe.generation.open import GeneratorOptions, open_generator
from cmjax.models.moe.generation.programs import place_params
from cmjax.models.moe.generation.text import generate
from cmjax.models.moe.generation.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    encode_prompt,
    open_tokenizer,
)

__all__ = [
    "ByteTokenizer",
    "ChatTemplate",
    "Completion",
    "ContinuousBatch",
    "Emitted",
    "Finished",
    "Generated",
    "Generator",
    "GeneratorOptions",
    "Sampler",
    "Tokenizer",
    "encode_prompt",
    "generate",
    "open_generator",
    "open_tokenizer",
    "place_params",
    "read_chat_template",
]
