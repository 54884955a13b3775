"""The registry of cost rules: one per JAX primitive, looked up by the primitive's name.

A rule is a function of the operation's arguments (as `Operand`s, by position) and of `out`, `mesh`
(axis name -> size) and the primitive's parameters (by keyword), and returns `Work`. Element-wise
primitives need only an entry in a table. A primitive without a rule cannot be priced: an error,
never a silent zero.
"""

import math
from collections.abc import Callable, Mapping

from cmjax.program.size import Size, product
from cmjax.program.work import Operand, Work, matmul_flops

Rule = Callable[..., Work]
RULES: dict[str, Rule] = {}


class UnpricedPrimitive(ValueError):
    """A program contains a primitive for which no cost rule is registered."""


def cost_rule(primitive) -> Callable[[Rule], Rule]:
    """Register the decorated function as the cost rule of `primitive` (a Primitive or its name).

    Example:
      @cost_rule("my_primitive")
      def _cost(x, scale, *, bits, **_):
          return Work(vector_bytes=4 * x.nbytes)
    """
    name = getattr(primitive, "name", primitive)

    def register(rule: Rule) -> Rule:
        RULES[name] = rule
        return rule

    return register


# Vector instructions per element. One-instruction operations first; the others are expanded by the
# vector core into short polynomial or iterative sequences of about this many instructions.
ELEMENTWISE: dict[str, float] = {}
ELEMENTWISE |= dict.fromkeys(
    """add add_any sub mul max min neg abs sign floor ceil round and or xor not eq ne lt le gt ge
    stack select_n clamp convert_element_type reduce_precision shift_left shift_right_logical
    shift_right_arithmetic is_finite square copy copy_p concatenate pad rev integer_pow real imag
    population_count clz nextafter bitcast_convert_type dynamic_slice dynamic_update_slice gather
    one_minus_square mulhi random_bits threefry2x32 random_seed random_wrap random_unwrap
    random_fold_in""".split(),
    1.0,
)
ELEMENTWISE |= dict.fromkeys(
    "div rem exp exp2 log log2 log1p expm1 sqrt rsqrt cbrt pow sin cos tan tanh logistic erf erfc "
    "erf_inv atan2 asin acos atan sinh cosh asinh acosh atanh lgamma digamma".split(),
    4.0,
)
TRANSCENDENTAL = set(
    "exp exp2 log log2 log1p expm1 sqrt rsqrt cbrt pow sin cos tan tanh logistic erf erfc erf_inv "
    "atan2 asin acos atan sinh cosh asinh acosh atanh lgamma digamma".split()
)
# They move or rename values: XLA counts no FLOP for them.
MOVES = set(
    "copy copy_p concatenate stack pad rev convert_element_type reduce_precision "
    "bitcast_convert_type dynamic_slice dynamic_update_slice gather real imag select_n "
    "random_seed random_wrap random_unwrap random_fold_in".split()
)
# No work and no traffic of their own: layout, views, constants, annotations.
FREE = set(
    "reshape squeeze broadcast_in_dim transpose slice split iota stop_gradient pvary pcast "
    "sharding_constraint optimization_barrier axis_index create_token name mesh_cast reshard "
    "expand_dims dim_as_value platform_index tile unstack".split()
)
REDUCTIONS = set(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin "
    "cumsum cumprod cummax cummin cumlogsumexp reduce_window_sum".split()
)


def elementwise_work(name: str, inputs: list[Operand], outputs: list[Operand]) -> Work:
    """Work of an element-wise primitive: one pass of the vector cores over its widest operand."""
    out = outputs[0]
    width = max([operand.itemsize for operand in [*inputs, *outputs]])
    size = product(out.shape)
    if name == "dynamic_update_slice":
        size = inputs[1].size
    counted = 0.0 if name in MOVES else size
    is_transcendental = name in TRANSCENDENTAL
    return Work(
        vector_bytes=size * (ELEMENTWISE[name] * width),
        flops=0.0 if is_transcendental else counted,
        transcendentals=counted if is_transcendental else 0.0,
    )


def reduction_work(inputs: list[Operand]) -> Work:
    """Work of a reduction: each input element enters one vector instruction."""
    x = inputs[0]
    return Work(vector_bytes=x.nbytes, flops=x.size)


@cost_rule("dot_general")
def _dot_general(lhs: Operand, rhs: Operand, *, dimension_numbers, **_) -> Work:
    """2 M N K FLOP on the cube cores, at the rate of the wider operand."""
    (contract, _), (batch, _) = dimension_numbers
    (_, contract_rhs), (_, batch_rhs) = dimension_numbers
    inner = product(lhs.shape[d] for d in contract)
    outer = product(lhs.shape[d] for d in batch)
    rows = product(d for i, d in enumerate(lhs.shape) if i not in (*contract, *batch))
    columns = product(d for i, d in enumerate(rhs.shape) if i not in (*contract_rhs, *batch_rhs))
    flops = outer * rows * columns * inner * 2.0
    wider = lhs.dtype if lhs.itemsize >= rhs.itemsize else rhs.dtype
    return Work(flops=flops, **matmul_flops(wider, flops))


@cost_rule("conv_general_dilated")
def _convolution(lhs: Operand, rhs: Operand, *, out, dimension_numbers, **_) -> Work:
    """2 x outputs x (kernel taps x input channels per group) FLOP."""
    out_features = rhs.shape[dimension_numbers.rhs_spec[0]]
    flops = out[0].size * (rhs.size / out_features) * 2.0
    wider = lhs.dtype if lhs.itemsize >= rhs.itemsize else rhs.dtype
    return Work(flops=flops, **matmul_flops(wider, flops))


@cost_rule("sort")
def _sort(*operands: Operand, dimension: int, **_) -> Work:
    """A merge sort on the vector cores: log2(n) passes, four of them per trip through HBM.

    The number of passes is taken at the row length when it is a constant, else at 2**17.
    """
    row = operands[0].shape[dimension].constant
    passes = math.log2(max(2.0, row if row is not None else 2.0**17))
    nbytes = sum((operand.nbytes for operand in operands), Size())
    trips = max(1.0, passes / 4)
    return Work(
        vector_bytes=nbytes * passes,
        flops=operands[0].size * passes,
        read_bytes=nbytes * trips,
        write_bytes=nbytes * trips,
    )


@cost_rule("top_k")
def _top_k(operand: Operand, *, out, **_) -> Work:
    """One selection pass over the rows, then a sort of what is kept: about two passes."""
    return Work(vector_bytes=operand.nbytes * 2.0, flops=operand.size)


def _scatter(operand: Operand, indices: Operand, updates: Operand, *, out, **_) -> Work:
    """In place: reads the updates, writes as many elements; the rest is not touched."""
    return Work(
        vector_bytes=updates.nbytes,
        read_bytes=updates.nbytes + indices.nbytes,
        write_bytes=updates.nbytes,
    )


def _scatter_combine(operand: Operand, indices: Operand, updates: Operand, *, out, **_) -> Work:
    """In place with arithmetic: the touched elements are read as well."""
    return Work(
        vector_bytes=updates.nbytes,
        flops=updates.size,
        read_bytes=updates.nbytes * 2.0 + indices.nbytes,
        write_bytes=updates.nbytes,
    )


RULES["scatter"] = _scatter
for _name in (
    "scatter-add",
    "scatter-sub",
    "scatter-mul",
    "scatter-min",
    "scatter-max",
    "scatter_add",
):
    RULES[_name] = _scatter_combine


def tier_shares(names, mesh: Mapping[str, int]) -> tuple[int, float, float, float]:
    """How the peers of a collective over mesh axes `names` are spread over the tiers.

    Returns: (ranks in the group, fraction of them on the own NPU's other die, in the own node,
    on other nodes); the rest of the fractions, 1/ranks, is the rank itself.
    Raises: ValueError: an axis that the fabric does not know.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in ("node", "npu", "die"):
            raise ValueError(
                f"collective over mesh axis {name!r}: the fabric knows 'node', 'npu' and 'die'"
            )
        if name not in mesh:
            raise ValueError(f"collective over mesh axis {name!r}, which no shard_map defines")
    dies = mesh["die"] if "die" in names else 1
    in_node = dies * (mesh["npu"] if "npu" in names else 1)
    ranks = in_node * (mesh["node"] if "node" in names else 1)
    return ranks, (dies - 1) / ranks, (in_node - dies) / ranks, (ranks - in_node) / ranks


def exchange(nbytes: Size, names, mesh: Mapping[str, int]) -> dict:
    """Traffic fields when a rank sends 1/ranks of `nbytes` to every rank of the group, direct."""
    ranks, die, node, supernode = tier_shares(names, mesh)
    reach = 2 if supernode else 1 if node else 0 if die else -1
    return {
        "die_bytes": nbytes * die,
        "node_bytes": nbytes * node,
        "supernode_bytes": nbytes * supernode,
        "reach": reach,
        "launches": 1.0 if ranks > 1 else 0.0,
    }


@cost_rule("all_to_all")
def _all_to_all(x: Operand, *, out, mesh, axis_name, **_) -> Work:
    """Each rank keeps 1/ranks of its array and sends the rest, one share to each peer."""
    return Work(kind="collective", **exchange(x.nbytes, axis_name, mesh))


@cost_rule("all_gather")
def _all_gather(x: Operand, *, out, mesh, axis_name, **_) -> Work:
    """Each rank sends its whole shard to every peer (full mesh)."""
    return Work(kind="collective", **exchange(out[0].nbytes, axis_name, mesh))


RULES["all_gather_invariant"] = _all_gather


@cost_rule("reduce_scatter")
def _reduce_scatter(x: Operand, *, out, mesh, axis_name, **_) -> Work:
    """Each rank sends 1/ranks of its array to every peer, which adds what it receives."""
    return Work(
        kind="collective",
        vector_bytes=x.nbytes,
        flops=x.size,
        **exchange(x.nbytes, axis_name, mesh),
    )


def _all_reduce(*xs: Operand, out, mesh, axes, **_) -> Work:
    """Reduce-scatter, then all-gather."""
    names = tuple(a for a in axes if isinstance(a, str))
    nbytes = sum((x.nbytes for x in xs), Size())
    size = sum((x.size for x in xs), Size())
    return Work(
        kind="collective",
        vector_bytes=nbytes,
        flops=size,
        **exchange(nbytes * 2.0, names, mesh),
    )


for _name in ("psum", "psum2", "psum_invariant", "pmax", "pmin"):
    RULES[_name] = _all_reduce


@cost_rule("ppermute")
def _ppermute(x: Operand, *, out, mesh, axis_name, **_) -> Work:
    """Each rank sends its array to one peer; charged on the furthest tier of the axis."""
    _, _, node, supernode = tier_shares(axis_name, mesh)
    tier = "supernode" if supernode else "node" if node else "die"
    reach = {"die": 0, "node": 1, "supernode": 2}[tier]
    return Work(kind="collective", reach=reach, **{f"{tier}_bytes": x.nbytes})
