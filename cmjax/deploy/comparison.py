"""Is one deployment better than another, and how sure is that?

Both prices come from the same constants, so that what is not known of them mostly cancels: the
ratio of two predictions is known better than either. It is the delta method of
`cmjax.cost.interval`, with the difference of their elasticities; of two machines, whose constants
are not known from the same measurements, both variances add.
"""

import dataclasses

import numpy as np

from cmjax.cost.interval import interval
from cmjax.deploy.prediction import Prediction
from cmjax.deploy.predictor import known_uncertainty


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One prediction over another, by the keys of their `headlines` that both have.

    Fields:
      ratio: the number of the one over that of the other.
      interval: 90 % of what the ratio may be, low and high.
    """

    ratio: dict[str, float]
    interval: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        rows = []
        for key, ratio in self.ratio.items():
            low, high = self.interval[key]
            rows.append(f"{key:<22}{ratio:.3f}  90 % interval {low:.3f} – {high:.3f}")
        return "\n".join(rows)


def compare(one: Prediction, other: Prediction) -> Comparison:
    """One prediction over another, with what is known of the ratio.

    Args:
      one, other: of `predict` or `search`, of any deployments and machines.
    Raises: ValueError: a prediction without an interval (it is traced or batched by JAX, or no file
      says how sure its machine's constants are), or a prefill beside a decode.

    >>> import cmjax
    >>> few, many = (cmjax.predict("tiny", phase="decode", npus=n, batch=96) for n in (8, 32))
    >>> found = cmjax.compare(many, few)  # of 32 NPUs over 8: the expert-parallel degree
    >>> low, high = found.interval["tokens_per_s_per_npu"]
    >>> low < found.ratio["tokens_per_s_per_npu"] < high
    True
    """
    if one.deployment.phase != other.deployment.phase:
        raise ValueError(
            f"compare: a {one.deployment.phase} and a {other.deployment.phase} have no number in "
            f"common that says which is better; give two of one phase"
        )
    for which, prediction in (("one", one), ("other", other)):
        if not prediction.interval:
            raise ValueError(
                f"compare: {which} has no interval: it is traced or batched by JAX, or no file "
                f"says how sure the constants of {prediction.machine.name} are"
            )
    ratio, ends = {}, {}
    numbers, others = one.headlines(), other.headlines()
    for key in (key for key in numbers if key in others):
        ratio[key] = float(numbers[key]) / float(others[key])
        ends[key] = _interval(one, other, key, ratio[key])
    return Comparison(ratio, ends)


def _interval(one: Prediction, other: Prediction, key: str, ratio: float) -> tuple[float, float]:
    if one.machine.origin != other.machine.origin:
        widths = [np.log(high / low) / 2 for low, high in (one.interval[key], other.interval[key])]
        factor = float(np.exp(np.hypot(*widths)))
        return ratio / factor, ratio * factor
    known = known_uncertainty(one.machine)
    assert known is not None  # it has an interval
    found = interval(ratio, np.subtract(one.elasticities[key], other.elasticities[key]), known)
    return found.low, found.high
