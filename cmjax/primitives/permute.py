"""Rows put in the order of their experts, and back, where the exchange does not do it itself.

Kernels that deliver a token once to a rank, however many of its experts are there (DeepEP's normal
ones), leave it in the order of its source. A kernel of its own then writes a row for each of its
experts here, in the order that their products want, and another one adds up a token's rows before
they return (`ep_scatter` and `ep_gather` of SGLang, `moe_permute` and `moe_unpermute` of
TransformerEngine). Copies of k experts spread over R ranks are a token on the fewer

    R (1 - (1 - 1/R)^k)

ranks. `dispatch` and `combine` of this package have rows in their final places already, so that
both functions give back what they are given: what they are for is their price, HBM's time for
those bytes, which is charged where an exchange is too large for L2 and has such kernels.
"""

from jaxtyping import Array, Num

from cmjax.occupancy import reach_probability
from cmjax.primitives.define import define
from cmjax.program import Work, cost_rule


def permute(
    rows: Num[Array, "slots rows hidden"], *, ranks: int, copies: int
) -> Num[Array, "slots rows hidden"]:
    """Lay received tokens out by expert: reads each once, writes a row for every expert.

    Args:
      rows: as `dispatch` delivers them.
      ranks: of the exchange. copies: experts of a token.
    Returns: `rows`.

    >>> import jax.numpy as jnp
    >>> permute(jnp.ones((1, 2, 3)), ranks=32, copies=8).shape
    (1, 2, 3)
    """
    return permute_p.bind(rows, ranks=ranks, copies=copies)


def unpermute(
    rows: Num[Array, "slots rows hidden"], *, ranks: int, copies: int
) -> Num[Array, "slots rows hidden"]:
    """Add up a token's rows on this rank: reads every row, writes each token once.

    Args and result as of `permute`; the sum itself is part of `combine`.
    """
    return unpermute_p.bind(rows, ranks=ranks, copies=copies)


def _reference(rows, *, ranks, copies):
    return rows


permute_p = define("cm_permute", _reference)
unpermute_p = define("cm_unpermute", _reference)


def _tokens(ranks: int, copies: int) -> float:
    """Tokens on a rank for every row there."""
    return ranks * reach_probability(1 / ranks, copies) / copies


@cost_rule(permute_p)
def _permute_cost(rows, *, out, mesh, ranks, copies) -> Work:
    return Work(
        kind="permute",
        read_bytes=rows.nbytes * _tokens(ranks, copies),
        write_bytes=rows.nbytes,
    )


@cost_rule(unpermute_p)
def _unpermute_cost(rows, *, out, mesh, ranks, copies) -> Work:
    return Work(
        kind="permute",
        flops=rows.size,
        read_bytes=rows.nbytes,
        write_bytes=rows.nbytes * _tokens(ranks, copies),
    )
