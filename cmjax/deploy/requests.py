"""What an instance serves: how many requests at a time, how long, how many drafts are right."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import tyro
from jaxtyping import Array, Float

from cmjax.deploy.deployment import Deployment, Phase
from cmjax.inputs import check_number

if TYPE_CHECKING:
    Number = float | Float[Array, "..."]
else:
    Number = float  # what a command line reads
PREFILL_TOKENS = 16384
"""Prompt tokens per NPU and step that a prefill instance batches by default."""


def parse_acceptance(words: Sequence[str]) -> float | tuple[float, ...]:
    """Probabilities that drafts are accepted, as a command line gives them.

    >>> parse_acceptance(["0.7"]), parse_acceptance(["0.9,0.7"]), parse_acceptance(["0.9", "0.7"])
    (0.7, (0.9, 0.7), (0.9, 0.7))

    Raises: ValueError: no numbers.
    """
    parts = ",".join(words).split(",")
    try:
        each = tuple([float(part) for part in parts])
    except ValueError:
        given = " ".join(words)
        raise ValueError(
            f"mtp-acceptance takes one number, or one for each draft, as 0.9,0.7; got {given!r}"
        ) from None
    return each[0] if len(each) == 1 else each


def parse_load(word: str) -> dict[str, Any]:
    """Expert load as a command line gives it, as options of `predict`.

    >>> parse_load("perfect"), parse_load("1.6"), parse_load("loads.npz")
    ({}, {'load': 1.6}, {'loads': 'loads.npz'})
    """
    if word == "perfect":
        return {}
    try:
        return {"load": float(word)}
    except ValueError:
        return {"loads": word}


_ACCEPTANCE = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="FLOAT[,FLOAT...]",
    instance_from_str=parse_acceptance,
    is_instance=lambda value: isinstance(value, int | float | tuple),
    str_from_instance=lambda value: [
        ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    ],
)
_LEAST, _MOST = 1e-6, {"batch": 10**6, "prompt": 10**9, "context": 10**9}
_MOST_SPREAD = 100


class Gain(NamedTuple):
    """Tokens that a decoding request gains in a step: their mean, their variance, and the most."""

    mean: Any = 1.0
    variance: Any = 0.0
    most: int = 1


NO_DRAFTS = Gain()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """What the instance serves. (A pytree: every number may be traced by JAX.)"""

    batch: Number | None = None
    """Requests per NPU (default: 96 for decode, 16384 / prompt for prefill)."""
    prompt: Number = 4096.0
    """Prompt tokens of a request."""
    output: Number = 256.0
    """Generated tokens of a request; decode is priced in the middle of them."""
    context: Number | None = None
    """Cached tokens of a request in decode, in place of prompt and output."""
    context_spread: Number | None = None
    """Standard deviation of requests' context (or prompt) lengths over their mean; by default what
    being anywhere between the prompt and the last generated token makes."""
    acceptance: Annotated[
        Number | tuple[Number, ...], tyro.conf.arg(name="mtp-acceptance"), _ACCEPTANCE
    ] = 0.7
    """Probability that a draft is accepted if those before it were: one for all drafts, or one for
    each (ignored without drafts)."""
    load: Annotated[Any, tyro.conf.Suppress] = None
    """Rows on the slowest rank over the mean, one number or one per MoE layer; `None` is a load of
    equal expectation on all ranks, with the scatter that routing a finite batch leaves."""

    def of(self, deployment: Deployment) -> "Requests":
        """These requests with the default batch of the deployment's phase, if none was given.

        Raises: ValueError: a number out of its range, or cached tokens for a prefill.
        """
        self._check()
        if self.context is not None and not deployment.decoding:
            raise ValueError("context applies to decode; give prompt for a prefill")
        if self.batch is not None:
            return self
        batch = 96.0 if deployment.decoding else PREFILL_TOKENS / self.prompt
        return dataclasses.replace(self, batch=batch)

    def _check(self) -> None:
        for name in ("batch", "prompt", "context"):
            value = getattr(self, name)
            if _known(value):
                check_number(name, value, above=0, least=_LEAST, most=_MOST[name])
        if self.context_spread is not None and _known(self.context_spread):
            check_number("context-spread", self.context_spread, least=0, most=_MOST_SPREAD)
        if _known(self.load):
            check_number("load", self.load, least=1, most=_MOST["batch"])
        if _known(self.output):
            check_number("output", self.output, least=0, most=_MOST["prompt"])
        each = self.acceptance if isinstance(self.acceptance, tuple) else (self.acceptance,)
        for chance in each:
            if _known(chance) and not 0 <= chance <= 1:
                raise ValueError(f"mtp-acceptance must lie in 0..1, got {chance:g}")

    def tokens_per_step(self, drafts: int) -> Number:
        """Tokens that a request gains in a step of decode, on average (see `gain`)."""
        return self.gain(drafts).mean

    def gain(self, drafts: int) -> Gain:
        """What a request gains in a step of decode: a token, and each draft that is accepted.

        A draft counts if it and all before it are accepted, so that it is the j-th token beyond the
        first with probability `p_j = a1 a2 ... aj`. The mean is `1 + sum p_j`, and that of the
        square `1 + sum (2 j + 1) p_j`.
        Raises: ValueError: as many acceptances as there are drafts were not given.

        >>> mean, variance, most = Requests(acceptance=(0.8, 0.5)).gain(2)
        >>> round(mean, 6), round(variance, 6), most  # 1, 2 or 3 with 0.2, 0.4 and 0.4
        (2.2, 0.56, 3)
        """
        each = self.acceptance
        if not isinstance(each, tuple):
            each = (each,) * drafts
        if drafts and len(each) != drafts:
            raise ValueError(
                f"mtp-acceptance has {len(each)} numbers for {drafts} draft(s); give one for all, "
                "or one for each"
            )
        mean, square, chance = 1.0, 1.0, 1.0
        for j, accepted in enumerate(each[:drafts], 1):
            chance = chance * accepted
            mean = mean + chance
            square = square + (2 * j + 1) * chance
        return Gain(mean, square - mean**2, 1 + drafts)

    def length(self, phase: Phase) -> Number:
        """Tokens per request at which a step is priced."""
        if phase == "prefill":
            return self.prompt
        return self.prompt + self.output / 2 if self.context is None else self.context

    def length_spread(self, phase: Phase) -> Number:
        """Standard deviation of the tokens per request over their mean."""
        if self.context_spread is not None:
            return self.context_spread
        if phase == "prefill" or self.context is not None:
            return 0.0
        return self.output / math.sqrt(12.0) / self.length(phase)

    def longest(self, phase: Phase) -> Number:
        """Tokens per request that the caches must hold."""
        if phase == "prefill":
            return self.prompt
        return self.prompt + self.output if self.context is None else self.context


def _known(value: Any) -> bool:
    """Whether a field holds a number that can be compared now."""
    return isinstance(value, int | float)
