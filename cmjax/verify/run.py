"""Run a program of one rank on every rank of an emulated supernode, and count what it sends."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from cmjax.console import html_table
from cmjax.mesh import RANKED, RankMesh, on_every_rank, prepare_devices
from cmjax.verify.traffic import TIERS, count_traffic, pair_bytes, tier_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """Bytes that one run moved between ranks.

    Fields:
      mesh: the ranks.
      pairs: by exchange (its primitive and number, such as `dispatch.0`), from every rank to every
        rank, their own included.
    """

    mesh: RankMesh
    pairs: Mapping[str, Int[np.ndarray, "sources destinations"]]

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes of all exchanges by where the other end is: `own`, `die`, `node`, `supernode`."""
        totals: dict[str, int] = {tier: 0 for tier in TIERS}
        for pairs in self.pairs.values():
            for tier, count in tier_bytes(pairs, self.mesh).items():
                totals[tier] += count
        return totals

    def to_dict(self) -> dict[str, Any]:
        """Bytes by tier, in all and by exchange, as JSON can hold them."""
        by_exchange = {name: tier_bytes(pairs, self.mesh) for name, pairs in self.pairs.items()}
        return {"bytes": self.tier_bytes, "exchanges": by_exchange}

    def __repr__(self) -> str:
        parts = ", ".join(f"{tier} {count:,}" for tier, count in self.tier_bytes.items())
        return f"Traffic({self.mesh.ranks} ranks, bytes: {parts})"

    def _repr_html_(self) -> str:
        rows = [
            (name, *(f"{count:,}" for count in tier_bytes(pairs, self.mesh).values()))
            for name, pairs in self.pairs.items()
        ]
        return html_table(f"bytes to {', '.join(TIERS)}", rows)


def run_on_mesh(
    fn: Callable,
    mesh: RankMesh,
    *args: Any,
    in_specs: Any = RANKED,
    out_specs: Any = RANKED,
    count_bytes: bool = False,
) -> Any:
    """Run `fn`, a program of one rank, on every rank of `mesh`, and wait for it.

    Args:
      fn: per-rank function; its collectives run over `mesh.axes`.
      mesh: the ranks; its nodes become XLA devices, which are started if JAX has not been used yet.
      *args: pytrees; what is `RANKED` has a leading axis of one entry per rank.
      in_specs: one of `RANKED` and `REPLICATED` for all arguments, or a tuple of one (or a pytree
        prefix of them) per argument. out_specs: likewise for the result.
      count_bytes: also count what every rank sends every other, by brute force: each exchange runs
        a second time with the senders' numbers in place of the elements.
    Returns: the result; with `count_bytes`, a pair of it and its `Traffic`.
    Raises:
      ValueError: an argument without its axis of ranks; or, counting, an exchange inside `while`,
        which does not say how often it is sent.
      RuntimeError: JAX already runs with fewer devices than the mesh has nodes.

    >>> import jax, jax.numpy as jnp
    >>> from cmjax import RankMesh, run_on_mesh
    >>> mesh = RankMesh(nodes=1, npus=4)
    >>> swap = lambda x: jax.lax.all_to_all(x, mesh.axes, 0, 0, tiled=True)
    >>> y, sent = run_on_mesh(swap, mesh, jnp.arange(16.0).reshape(4, 4), count_bytes=True)
    >>> print(y[1], sent.tier_bytes)
    [ 1.  5.  9. 13.] {'own': 16, 'die': 0, 'node': 48, 'supernode': 0}
    """
    prepare_devices(mesh.nodes)
    specs = in_specs if isinstance(in_specs, tuple) else (in_specs,) * len(args)
    if not count_bytes:
        return jax.block_until_ready(_compiled(fn, mesh, specs, out_specs)(*args))
    counted = on_every_rank(count_traffic(fn, mesh), mesh, specs, (out_specs, RANKED))
    result, received = jax.block_until_ready(jax.jit(counted)(*args))
    pairs = {name: pair_bytes(found.moved) for name, found in received.items()}
    return result, Traffic(mesh, pairs)


@functools.lru_cache(maxsize=32)
def _compiled(fn: Callable, mesh: RankMesh, in_specs: tuple, out_specs: Any) -> Callable:
    return jax.jit(on_every_rank(fn, mesh, in_specs, out_specs))
