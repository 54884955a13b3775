"""Make a JAX primitive of a plain-jnp reference: one call registers all of its rules.

A primitive appears as *one* equation in a model's jaxpr, so that a cost rule can price it by name
and static parameters, while `jit`, `vmap`, `grad`, `scan` and `shard_map` treat it as its
reference.
This is the only file of the package that touches JAX's semi-public interfaces.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cmjax.native import status

__all__ = [
    "Primitive",
    "Zero",
    "clamp",
    "count_where",
    "define",
    "define_call",
    "reference_of",
    "straight_through",
]

Zero = ad.Zero  # a tangent known to be zero; derivative rules test `type(t) is Zero`
_REFERENCES: dict[Primitive, Callable] = {}


def count_where(bad: Callable[[Any], Any], x: Any) -> int:
    """Elements of `x` for which `bad` is true; 0 while `x` is traced and its values are not known.

    For checks of values: they speak where they can, also of constants inside a `jit`.
    """
    if isinstance(x, Tracer):
        return 0
    with jax.ensure_compile_time_eval():
        return int(jnp.sum(bad(jnp.asarray(x)), dtype=jnp.int32))


def clamp(low: Any, x: Any, high: Any) -> Any:
    """`lax.clamp` between plain numbers: they take the dtype of `x`, not float64 under x64."""
    return lax.clamp(jnp.asarray(low, x.dtype), x, jnp.asarray(high, x.dtype))


def reference_of(p: Primitive) -> Callable | None:
    """The reference that `p` was defined with; `None` for a primitive of JAX's own."""
    return _REFERENCES.get(p)


def define(
    name: str,
    reference: Callable,
    *,
    check: Callable | None = None,
    jvp: Callable | None = None,
    batch: Callable | None = None,
    native: Callable | None = None,
    collective: bool = False,
    multiple_results: bool = False,
) -> Primitive:
    """Register `reference(*arrays, **static)` as the primitive `name` and return it.

    Args:
      name: as it will show in jaxprs; `cm_` first.
      reference: plain jnp; the definition of correct, and the lowering on every platform. Returns
        an array, or with `multiple_results` a flat list of arrays. Static parameters are hashable.
      check: called with the abstract operands and parameters; raises what a caller should read.
      jvp: `jvp(primitive, primals, tangents, **static)` -> (out, tangent); by default the
        derivative of the reference.
      batch: `batch(args, dims, **static)`; by default every operand gets a leading axis, which is
        right for a reference that accepts any number of leading batch axes. With `collective`
        `batch(axis, args, dims, **static)`, `axis` with a `name` and a `size`.
      native: the reference again, made of calls to the C++ kernels of `cmjax.native` (and to the
        reference itself for what they do not serve), with the same results; the lowering on CPU
        devices where the kernels are enabled.
      collective: the reference talks over named axes. Under `vmap` (of any axis name) it is then,
        without `batch`, decomposed into the reference, whose own collectives know about virtual
        axes.
      multiple_results: the reference returns a list.
    """
    p = Primitive(name)
    p.multiple_results = multiple_results
    _REFERENCES[p] = reference

    def abstract(*avals, **params):
        if check is not None:
            check(*avals, **params)
        # Tracing, not a hand-written shape: it keeps what shard_map knows about varying axes.
        outs = jax.make_jaxpr(functools.partial(reference, **params))(*avals).out_avals
        outs = [out.update(weak_type=False) for out in outs]
        return outs if multiple_results else outs[0]

    @functools.cache
    def jitted(items):
        return jax.jit(functools.partial(p.bind, **dict(items)))

    def run(*args, **params):
        with jax.disable_jit(False):  # without jit, the jitted call would bind again, and again
            return jitted(tuple(sorted(params.items())))(*args)

    p.def_impl(run)
    p.def_abstract_eval(abstract)
    plain = mlir.lower_fun(reference, multiple_results=multiple_results)
    mlir.register_lowering(p, plain)
    if native is not None:
        kernel = mlir.lower_fun(native, multiple_results=multiple_results)
        mlir.register_lowering(p, _where_kernels_run(kernel, plain), platform="cpu")
    ad.primitive_jvps[p] = functools.partial(jvp or _reference_jvp(reference), p)
    if collective:
        batching.fancy_primitive_batchers[p] = batch or _decompose_under_vmap(p, reference, jvp)
    else:
        batching.primitive_batchers[p] = batch or _leading_batch(p)
    return p


def define_call(name: str, reference: Callable, native: Callable) -> Primitive:
    """Several operations that CPU devices run as one: for the `cpu` branch of
    `lax.platform_dependent`, whose default branch, the operations themselves, is what is priced.

    Args:
      name: as it will show in jaxprs; `cm_` first.
      reference: the operations, as a function of arrays and static parameters that gives a list of
        arrays. Derivatives are its own, and so is what a virtual axis of several ranks maps.
      native: see `define`.
    """

    def jvp(p, primals, tangents, **params):
        exact = functools.partial(reference, **params)
        out, dout = _moved(exact, primals, tangents)
        return out, [_tangent(o, d) for o, d in zip(out, dout, strict=True)]

    def batch(args, dims, **params):
        sizes = {a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None}
        if sizes == {1}:
            pairs = zip(args, dims, strict=True)
            one = p.bind(*(a if d is None else lax.squeeze(a, [d]) for a, d in pairs), **params)
            out = [x[None] for x in one]
        else:
            out = jax.vmap(functools.partial(reference, **params), in_axes=tuple(dims))(*args)
        return out, [0] * len(out)

    p = define(name, reference, jvp=jvp, batch=batch, native=native, multiple_results=True)
    return p


def straight_through(exact: Callable, p, primals, tangents, params) -> tuple[Any, Any]:
    """For a `jvp` rule: the value of `p`, with the derivative of `exact(*operands)` instead.

    Of `exact`, which has the operands and the one result of `p`, only what the tangent needs is
    computed, along operands that have one.
    """
    return p.bind(*primals, **params), _moved(exact, primals, tangents)[1]


def _moved(exact: Callable, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`jax.jvp` along the operands that have a tangent."""
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def of_moving(*values):
        operands = list(primals)
        for i, value in zip(moving, values, strict=True):
            operands[i] = value
        return exact(*operands)

    at = tuple(primals[i] for i in moving)
    return jax.jvp(of_moving, at, tuple(tangents[i] for i in moving))


def _where_kernels_run(kernel: Callable, plain: Callable) -> Callable:
    """A CPU lowering that keeps to XLA where a custom call would do harm.

    An exported program must run where the library is not; and under automatic sharding XLA would
    gather a custom call's operands onto every device, while it partitions the reference. Inside
    `shard_map`, over all of its mesh, the program is one device's own, and kernels run.
    """

    def rule(ctx, *args, **params):
        module = ctx.module_context
        axes = module.axis_context
        mesh = getattr(axes, "mesh", None)
        one_device = getattr(axes, "num_devices", None) == 1 or (
            mesh is not None and set(mesh.axis_names) <= set(getattr(axes, "manual_axes", ()))
        )
        exporting = module.lowering_parameters.for_export
        use_kernel = status().enabled and one_device and not exporting
        return (kernel if use_kernel else plain)(ctx, *args, **params)

    return rule


def _leading_batch(p: Primitive) -> Callable:
    """Batching for references whose every operand accepts extra leading axes."""

    def rule(args, dims, **params):
        size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
        moved = (batching.bdim_at_front(a, d, size) for a, d in zip(args, dims, strict=True))
        out = p.bind(*moved, **params)
        return (out, [0] * len(out)) if p.multiple_results else (out, 0)

    return rule


def _decompose_under_vmap(p: Primitive, reference: Callable, jvp: Callable | None) -> Callable:
    """Batching for collectives: the virtual axis is bound, and the reference runs under it."""

    def rule(axis, args, dims, **params):
        named = axis.name in jax.tree.leaves(params.get("axes", ()))
        if all(d is None for d in dims) and not named:
            out = p.bind(*args, **params)
            return (out, [None] * len(out)) if p.multiple_results else (out, None)
        names = {"axis_name": axis.name} if named else {}
        one = functools.partial(reference, **params)
        if jvp is not None:  # the derivative of the primitive, not that of its parts
            one = jax.custom_jvp(one)
            one.defjvp(_dense_tangents(functools.partial(jvp, p, **params)))
        out = jax.vmap(
            one,
            in_axes=tuple(dims),
            axis_size=axis.size,
            **names,
        )(*args)
        return (out, [0] * len(out)) if p.multiple_results else (out, 0)

    return rule


def _dense_tangents(rule: Callable) -> Callable:
    """A derivative rule that tests for `Zero`, in the form `jax.custom_jvp` wants."""

    def dense(primals, tangents):
        moving = [
            ad.Zero(jax.typeof(x).to_tangent_aval()) if t.dtype == jax.dtypes.float0 else t
            for x, t in zip(primals, tangents, strict=True)
        ]
        out, dout = rule(primals, moving)
        return out, jax.tree.map(
            lambda t: ad.instantiate_zeros(t) if type(t) is ad.Zero else t,
            dout,
            is_leaf=lambda t: type(t) is ad.Zero,
        )

    return dense


def _reference_jvp(reference: Callable) -> Callable:
    """The derivative of the reference, taken only along operands that have a tangent."""

    def rule(p, primals, tangents, **params):
        # The value comes from the primitive itself, so that it stays one equation when
        # differentiated; what of the reference's value the tangent does not need is dead code.
        exact = functools.partial(reference, **params)
        out, dout = straight_through(exact, p, primals, tangents, params)
        if not p.multiple_results:
            return out, _tangent(out, dout)
        return out, [_tangent(o, d) for o, d in zip(out, dout, strict=True)]

    return rule


def _tangent(out: jax.Array, tangent: Any) -> Any:
    if jnp.issubdtype(out.dtype, jnp.inexact):
        return tangent
    return ad.Zero(jax.typeof(out).to_tangent_aval())
