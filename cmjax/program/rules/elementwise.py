"""Element-wise primitives, moves and reductions: passes of the vector cores over their operands.

Their tables say how many instructions an element takes. A complex element is two real numbers;
what one costs beyond them is in `REAL_OPERATIONS`.
"""

from cmjax.program.rules.registry import cost_rule
from cmjax.program.size import Size, product
from cmjax.program.work import Operand, Work

# Vector instructions per element. One-instruction operations first; the others are expanded by the
# vector core into short polynomial or iterative sequences of about this many instructions, and
# special functions into series.
TRANSCENDENTAL_INSTRUCTIONS = 4.0
ELEMENTWISE: dict[str, float] = {}
ELEMENTWISE |= dict.fromkeys(
    """add add_any sub mul max min neg abs sign floor ceil round and or xor not eq ne lt le gt ge
    eq_to lt_to le_to stack select_n clamp convert_element_type reduce_precision shift_left
    shift_right_logical shift_right_arithmetic is_finite square copy copy_p concatenate pad rev
    integer_pow real imag complex conj population_count clz nextafter bitcast_convert_type
    dynamic_slice dynamic_update_slice gather one_minus_square mulhi random_bits threefry2x32
    random_seed random_wrap random_unwrap random_clone random_split random_fold_in
    rng_bit_generator rng_uniform polynomial""".split(),
    1.0,
)
ELEMENTWISE |= dict.fromkeys(
    "div rem exp exp2 log log2 log1p expm1 sqrt rsqrt cbrt pow sin cos tan tanh logistic erf erfc "
    "erf_inv atan2 asin acos atan sinh cosh asinh acosh atanh lgamma digamma reciprocal".split(),
    TRANSCENDENTAL_INSTRUCTIONS,
)
_SERIES = (
    "igamma igammac igamma_grad_a polygamma zeta regularized_incomplete_beta bessel_i0e "
    "bessel_i1e random_gamma"
).split()
ELEMENTWISE |= dict.fromkeys(_SERIES, 32.0)
TRANSCENDENTAL = {
    *"exp exp2 log log2 log1p expm1 sqrt rsqrt cbrt pow sin cos tan tanh logistic erf erfc erf_inv "
    "atan2 asin acos atan sinh cosh asinh acosh atanh lgamma digamma".split(),
    *_SERIES,
}
# They move or rename values: XLA counts no FLOP for them.
MOVES = set(
    "copy copy_p concatenate stack pad rev convert_element_type reduce_precision "
    "bitcast_convert_type dynamic_slice dynamic_update_slice gather real imag complex select_n "
    "random_seed random_wrap random_unwrap random_clone random_split random_fold_in".split()
)
# No work and no traffic of their own: layout, views, constants, annotations.
FREE = set(
    "reshape squeeze broadcast_in_dim broadcast_to transpose slice split iota stop_gradient pvary "
    "pcast sharding_constraint layout_constraint optimization_barrier axis_index create_token name "
    "mesh_cast reshard expand_dims dim_as_value platform_index tile unstack device_put "
    "debug_callback debug_print empty empty2 reduced_vary_cast vary_unreduced_cast".split()
)
REDUCTIONS = set(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin "
    "cumsum cumprod cummax cummin cumlogsumexp".split()
)
REAL_OPERATIONS = {"mul": 6.0, "square": 6.0, "integer_pow": 6.0, "div": 11.0, "reduce_prod": 6.0}
"""Real operations of one complex one: (a+bi)(c+di) is four products and two sums. Others: two."""


def elementwise_work(name: str, inputs: list[Operand], outputs: list[Operand]) -> Work:
    """Work of an element-wise primitive: passes of the vector cores over its widest operand."""
    operands = [*inputs, *outputs]
    size = product(outputs[-1].shape)
    if name == "dynamic_update_slice":
        size = inputs[1].size
    counted = 0.0 if name in MOVES else size
    instructions = ELEMENTWISE[name]
    if name == "polynomial":  # Horner: a product and a sum for each coefficient but the first
        instructions = 2.0 * (len(inputs) - 2)
        counted = counted * instructions
    if counted and any(operand.is_complex for operand in operands):
        real = REAL_OPERATIONS.get(name, 2.0)
        counted = counted * real
        instructions *= real / 2.0  # one pass over a complex element is one over two real numbers
    is_transcendental = name in TRANSCENDENTAL
    return Work(
        vector_bytes=size * (instructions * max(operand.itemsize for operand in operands)),
        flops=0.0 if is_transcendental else counted,
        transcendentals=counted if is_transcendental else 0.0,
    )


def reduction_work(name: str, inputs: list[Operand]) -> Work:
    """Work of a reduction: each input element enters one vector instruction."""
    x = inputs[0]
    real = REAL_OPERATIONS.get(name, 2.0) if x.is_complex else 1.0
    passes = real / 2.0 if x.is_complex else 1.0
    return Work(vector_bytes=x.nbytes * passes, flops=x.size * real)


@cost_rule("reduce")
def _reduce(*operands: Operand, jaxpr, **_) -> Work:
    """A reduction by a function of its own: its operations, once per element."""
    steps = float(len(getattr(jaxpr, "jaxpr", jaxpr).eqns))
    inputs = operands[: len(operands) // 2]
    return Work(
        vector_bytes=sum((x.nbytes for x in inputs), Size()) * steps,
        flops=inputs[0].size * steps,
    )


@cost_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(x: Operand, *, out, window_dimensions, **_) -> Work:
    """One instruction per output and place of the window."""
    taps = out[0].size * product(window_dimensions)
    return Work(vector_bytes=taps * x.itemsize, flops=taps)


@cost_rule("reduce_window")
def _reduce_window_by(*operands: Operand, out, jaxpr, window_dimensions, **_) -> Work:
    """As a window's maximum, with the operations of a function of its own."""
    steps = float(len(getattr(jaxpr, "jaxpr", jaxpr).eqns))
    taps = out[0].size * product(window_dimensions) * steps
    return Work(vector_bytes=taps * operands[0].itemsize, flops=taps)


@cost_rule("select_and_scatter_add")
def _select_and_scatter_add(source: Operand, x: Operand, *, window_dimensions, **_) -> Work:
    """The gradient of a window's maximum: find it again, then add one number there."""
    taps = source.size * product(window_dimensions)
    return Work(vector_bytes=taps * x.itemsize, flops=taps + source.size)


@cost_rule("select_and_gather_add")
def _select_and_gather_add(tangents: Operand, x: Operand, *, out, window_dimensions, **_) -> Work:
    """The forward derivative of a window's maximum: find it, and take the tangent there."""
    taps = out[0].size * product(window_dimensions)
    return Work(vector_bytes=taps * x.itemsize, flops=taps)
