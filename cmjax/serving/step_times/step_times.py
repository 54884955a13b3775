"""Step times of a service, and what its instances hold."""

import dataclasses
from collections.abc import Mapping

from cmjax.deploy.requests import NO_DRAFTS, Gain
from cmjax.serving.engine.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepTimes:
    """Step times by pool.

    Fields:
      tables: of each pool of the service, by its name.
      ranks: of an instance of each pool, those that hold requests of their own: its
        tensor-parallel groups in decode, all dies in prefill.
      kv_tokens: tokens whose keys and values an instance of each pool holds; 0 is no limit.
      kv_token_bytes: bytes of a token's keys and values, all layers.
      gain: tokens that a decoding request gains in a step.
      page: tokens of a page of keys and values; the last page of a request is half empty on
      average. mean_error, worst_error: of interpolation, relative, between the nodes of the grid; 0
        for a profile, whose nodes are all that is known.
      source: where they are from.
    """

    tables: dict[str, Table]
    ranks: dict[str, int]
    kv_tokens: dict[str, int]
    kv_token_bytes: float
    gain: Gain = NO_DRAFTS
    page: int = 1
    mean_error: float = 0.0
    worst_error: float = 0.0
    source: str = ""

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decoding request gains in a step, on average."""
        return float(self.gain.mean)

    def scaled(self, factors: Mapping[str, float]) -> "StepTimes":
        """Steps of every pool so many times as long."""
        return dataclasses.replace(
            self, tables={name: scaled(table, factors[name]) for name, table in self.tables.items()}
        )


def scaled(table: Table, factor: float) -> Table:
    """A table of steps that take `factor` times as long."""
    return dataclasses.replace(
        table,
        batch_s=table.batch_s * factor,
        dense_s=table.dense_s * factor,
        rows_s=table.rows_s * factor,
        constant_s=table.constant_s * factor,
    )
