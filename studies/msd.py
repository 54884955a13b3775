"""Multi-scale dequantization: what it costs in accuracy, and what it saves in time.

    python -m studies.msd [--out out]

Four questions on the method of Zheng et al., arXiv 2605.13915: how many bits do the parts keep, how
far off are matrix products, how far off is attention over a quantized cache, and from how many rows
on does splitting activations cost more than dequantizing weights? Every row says whether its number
is the paper's (its abstract), derived (a formula worked out here), or measured (by this run).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from cmjax.console import terminal
from cmjax.hardware import load_machine
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.primitives import (
    dequantize_weight,
    msd_attention,
    msd_decompose,
    msd_dot,
    quantize_kv,
    quantize_weight,
)
from cmjax.primitives.msd.decompose import STEP
from cmjax.report import Section, write_page
from cmjax.report.plots.figure import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    add_axes,
    new_figure,
    save,
    set_title,
)
from studies.msd_closed_forms import crossover_rows, dequantized_product, kv_bytes, parts_product

GAPS = (6.0, 7.0, 8.0, 9.0, 10.0, 10.5, 11.0, 11.5, 12.0, 13.0, 14.0)
LAYERS = {  # DeepSeek-R1's matrix products by name: features, inner
    "q_a + kv_a (2112 x 7168)": (2112, 7168),
    "o_proj (7168 x 16384)": (7168, 16384),
    "expert gate + up (4096 x 7168)": (4096, 7168),
    "expert down (7168 x 2048)": (7168, 2048),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Options of this study."""

    out: Path = Path("out")
    """Folder for pictures and the page."""
    seed: int = 0
    """Of all random operands."""


def effective_bits(rng: np.random.Generator, path: Path) -> Section:
    """-log2 of the relative L2 error, by format and parts, for two kinds of rows."""
    rows = {
        "uniform": rng.uniform(-1, 1, (64, 4096)).astype(np.float32),
        "Gaussian": rng.normal(size=(64, 4096)).astype(np.float32),
    }
    rows["uniform"][:, ::32] = 1.0
    published = {("int8", 2): "about 16", ("mxfp4", 2): "6.6", ("mxfp8", 1): "5.24"}
    forms = [("int8", 1), ("int8", 2), ("int8", 3), ("mxfp4", 1), ("mxfp4", 2), ("mxfp8", 1)]
    bits = {}
    for format, passes in forms:
        for name, x in rows.items():
            got = _mxfp8(x) if format == "mxfp8" else _from_parts(x, format, passes)
            bits[format, passes, name] = -np.log2(_relative(got, x))
    figure = new_figure(3.4)
    axes = add_axes(figure, left=0.7, bottom=0.75)
    at = np.arange(len(forms))
    for shift, (name, colour) in zip(
        (-0.2, 0.2), (("uniform", BLUE), ("Gaussian", ORANGE)), strict=True
    ):
        values = [bits[f, p, name] for f, p in forms]
        axes.bar(at + shift, values, 0.38, color=colour, label=name)
        for x, v in zip(at + shift, values, strict=True):
            axes.text(x, v + 0.3, f"{v:.1f}", ha="center", size=8)
    axes.set_xticks(at, [f"{f.upper()}\n{p} part{'s' * (p > 1)}" for f, p in forms])
    axes.set(ylabel="effective bits", ylim=(0, 26))
    axes.legend(frameon=False, loc="upper right", title="values")
    set_title(
        figure,
        "Two INT8 parts keep about 15 bits of an activation, two MXFP4 parts 6",
        "Bits: -log2 of the relative L2 error of the activations alone; 64 rows of 4,096",
    )
    save(figure, path)
    return Section(
        "How many bits the parts keep",
        "The paper's figures fit log2(2 M / (sqrt(12) rms)), which for rows uniform on [-M, M] is "
        "what is measured here; its MXFP8 figure fits Gaussian rows. Measured by this run; bounds: "
        "M / 64516 for two INT8 parts, alpha / 64 for two MXFP4 parts (both also the paper's).",
        ("format", "parts", "uniform, measured", "Gaussian, measured", "paper's abstract"),
        tuple(
            (
                f,
                str(p),
                f"{bits[f, p, 'uniform']:.2f}",
                f"{bits[f, p, 'Gaussian']:.2f}",
                published.get((f, p), "-"),
            )
            for f, p in forms
        ),
        image=path,
    )


def products(rng: np.random.Generator, path: Path) -> Section:
    """Relative L2 error of x W.T against the exact product of the same few-bit weights."""
    shape = (64, 4096)
    outlying = np.where(rng.random(shape[1]) < 0.002, 50, 1)
    kinds = {
        "N(0, 1)": rng.normal(size=shape),
        "0.2 % of channels x 50": rng.normal(size=shape) * outlying,
        "Student t(3)": rng.standard_t(3, size=shape),
        "N(5, 1)": rng.normal(5, 1, size=shape),
    }
    w = jnp.asarray(rng.normal(size=(1024, 4096)), jnp.float32)
    weight, small = quantize_weight(w), quantize_weight(w, format="mxfp4")
    dense = np.asarray(dequantize_weight(weight), np.float64)
    rounded = dense.astype(ml_dtypes.bfloat16).astype(np.float64)
    dense4 = np.asarray(dequantize_weight(small), np.float64)
    errors = {}
    for name, x in kinds.items():
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        wide, x = x.astype(np.float64), jnp.asarray(x)
        exact, exact4 = wide @ dense.T, wide @ dense4.T
        errors[name] = {
            "dequantize to bfloat16": _relative(wide @ rounded.T, exact),
            "W8A16, two parts": _relative(msd_dot(x, weight), exact),
            "W8A8, one part": _relative(msd_dot(x, weight, passes=1), exact),
            "W4A16, two parts": _relative(msd_dot(x, small), exact4),
            "W4A4, one part": _relative(msd_dot(x, small, passes=1), exact4),
        }
    methods = list(next(iter(errors.values())))
    colours = (GREY, BLUE, ORANGE, GREEN, VERMILION)
    figure = new_figure(3.8)
    axes = add_axes(figure, left=0.8, right=2.2)
    for i, (method, colour) in enumerate(zip(methods, colours, strict=True)):
        values = [errors[name][method] for name in kinds]
        axes.bar(np.arange(4) + 0.16 * (i - 2), values, 0.15, color=colour, label=method)
    axes.set_xticks(range(4), ["N(0, 1)", "0.2 % of\nchannels x 50", "t(3)", "N(5, 1)"])
    axes.set(yscale="log", ylabel="relative L2 error")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9)
    set_title(
        figure,
        "Two INT8 parts beat dequantizing to bfloat16 on every kind of activation",
        "64 x 4,096 bfloat16 activations, 1,024 features, float32 results; same few-bit weights",
    )
    save(figure, path)
    return Section(
        "How far off matrix products are",
        "Measured by this run, against float64 products of the very same quantized weights: the "
        "error of quantizing the weights is not in it (0.87 % for INT8 here). MXFP4 weights are "
        "exact in bfloat16, so dequantizing them has no error at all; W4A16 is a speed trade.",
        ("activations", *methods),
        tuple((name, *(f"{e[m]:.1e}" for m in methods)) for name, e in errors.items()),
        image=path,
    )


def attention(rng: np.random.Generator, path: Path) -> list[Section]:
    """Attention over an INT8 cache: an error table, and what a fixed scale does beside a sink."""
    cases = [
        ("N(0, 1)", 1.0, 0.0),
        ("Q x 4 (peaky)", 4.0, 0.0),
        ("Q x 0.1, V + 1 (flat)", 0.1, 1.0),
    ]
    rows = []
    for name, factor, shift in cases:
        q = (factor * rng.normal(size=(1, 64, 1, 128))).astype(np.float32)
        k, v = rng.normal(size=(2, 1, 4096, 1, 128)).astype(np.float32)
        for per in ("token", "channel"):
            errors = _attention_errors(q, k, v + np.float32(shift), per)
            rows.append((name, per, *(f"{e:.1e}" for e in errors)))
    sink = [_attention_errors(*_sink(gap), "token") for gap in GAPS]
    figure = new_figure(3.6)
    axes = add_axes(figure, left=0.8)
    names = ("dequantize to bfloat16", "two parts, fixed scale 127", "two parts, block maximum")
    for i, (name, colour) in enumerate(zip(names, (GREY, VERMILION, BLUE), strict=True)):
        values = [max(s[i], 1e-7) for s in sink]
        axes.plot(GAPS, values, "o-", color=colour, markersize=4, label=name)
    axes.set(yscale="log", ylabel="relative L2 error", ylim=(3e-8, 8))
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.set_xlabel("nats between the sink's score and all others")
    set_title(
        figure,
        "A fixed scale loses every other key 11 nats under an attention sink",
        "One sink and 32,767 equal keys, values 1 against -1, d = 128, INT8 cache, one query",
    )
    save(figure, path)
    table = Section(
        "How far off attention over an INT8 cache is",
        "Relative L2 error against exact attention over the same cache, 64 queries, 4,096 keys, "
        "d = 128. Measured by this run.",
        ("data", "scales per", *names),
        tuple(rows),
    )
    trap = Section(
        "An attention sink, and the scale of the softmax weights",
        "The vendor's kernels split the weights with the fixed scale 127, which flushes what is "
        "under exp(-11.07) of the maximum (derived). cmjax splits each block of 128 keys against "
        "its own maximum. Measured by this run.",
        ("gap, nats", *names),
        tuple((f"{g:g}", *(f"{e:.1e}" for e in s)) for g, s in zip(GAPS, sink, strict=True)),
        image=path,
    )
    return [table, trap]


def time_and_traffic(path: Path) -> Section:
    """The closed forms for DeepSeek-R1's layers on a die of the CloudMatrix384."""
    chip = load_machine("cloudmatrix384").chip
    counts = 2.0 ** np.arange(0, 14)
    ways = "through HBM", "on chip, the cube waits", "on chip, overlapped"
    rows, curves = [], {}
    for name, (n, k) in LAYERS.items():
        parts = np.array([parts_product(m, n, k).seconds(chip) for m in counts])

        def gain(overlapped, through_memory, n=n, k=k, parts=parts):
            rival = (dequantized_product(m, n, k, through_memory=through_memory) for m in counts)
            return np.array([r.seconds(chip, overlapped=overlapped) for r in rival]) / parts

        curves[name] = gain(False, True), gain(False, False), gain(True, False)
        crossover = f"{float(crossover_rows(n, k)):,.0f}"
        for way, curve in zip(ways, curves[name], strict=True):
            rows.append((name, way, *(f"{curve[i]:.2f}" for i in (0, 7, 12)), crossover))
    shown = "expert gate + up (4096 x 7168)"
    figure = new_figure(3.8)
    axes = add_axes(figure, left=0.75, right=0.3)
    for curve, way, colour in zip(curves[shown], ways, (VERMILION, ORANGE, BLUE), strict=True):
        axes.plot(counts, curve, "o-", color=colour, markersize=3, label=way)
    axes.set(xlabel="rows (tokens)", ylabel="time, dequantize / two parts", ylim=(0, 5.5))
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=9, loc="upper right", title="weights dequantized")
    set_title(
        figure,
        "On a 910C die, parts save the detour of dequantized weights through HBM",
        f"{shown} of DeepSeek-R1, at the catalog's peak rates; 1: no gain",
    )
    save(figure, path)
    direct = float(kv_bytes(1, 1, "dequantize"))
    return Section(
        "Time and traffic on an Ascend 910C die",
        "Derived, from the catalog's peaks; the paper's own formulas and constants were not at "
        "hand, and no hardware was measured. Time of dequantizing (through HBM / on chip with the "
        "cube waiting / on chip and overlapped) over that of two parts; and the rows at which the "
        "vector work of both is equal for unit costs. With dequantization on chip, decoding is "
        "bound by HBM either way at these constants, and parts gain at most about a quarter. KV "
        f"cache traffic: {direct / float(kv_bytes(1, 1, 'parts')):g} times less with two passes "
        f"(the paper: up to 2.5), {direct / float(kv_bytes(1, 1, 'stacked')):g} times less with "
        "both parts in one product.",
        ("layer", "dequantized", "1 row", "128 rows", "4,096 rows", "equal vector work, rows"),
        tuple(rows),
        image=path,
    )


def run(out: Path, console: Console, seed: int = 0) -> list[Section]:
    """Print the tables, draw the pictures into `out`, return the page's sections."""
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sections = [
        effective_bits(rng, out / "msd_bits.png"),
        products(rng, out / "msd_products.png"),
        *attention(rng, out / "msd_sink.png"),
        time_and_traffic(out / "msd_time.png"),
    ]
    for section in sections:
        table = Table(*section.columns, title=section.heading)
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
        console.print(section.prose + "\n")
    return sections


def _relative(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _from_parts(x, format, passes):
    parts, scale = msd_decompose(x, format=format, passes=passes)
    steps = sum(np.asarray(p, np.float64) / STEP[format] ** i for i, p in enumerate(parts))
    return np.repeat(np.asarray(scale, np.float64), x.shape[-1] // scale.shape[-1], -1) * steps


def _mxfp8(x):
    """E4M3 in blocks of 32 with a power-of-two scale that just holds the maximum."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    top = np.abs(blocks).max(-1, keepdims=True)
    scale = np.exp2(np.ceil(np.log2(top / 448)))
    return ((blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(float) * scale).reshape(x.shape)


def _sink(gap):
    k = np.zeros((1, 32768, 1, 128), np.float32)
    k[0, 0, 0, 0] = gap
    v = np.ones_like(k)
    v[0, 0] = -1
    q = np.zeros((1, 1, 1, 128), np.float32)
    q[..., 0] = 128**0.5
    return q, k, v


def _attention_errors(q, k, v, per):
    """Relative error of bfloat16 dequantization, of the fixed scale and of block maxima."""
    cache = quantize_kv(k, v, per=per)
    keys = np.asarray(cache.k, np.float64)[0, :, 0] * np.asarray(cache.k_scale, np.float64)[0, :, 0]
    values = np.asarray(cache.v, np.float64)[0, :, 0] * np.asarray(cache.v_scale, float)[0, :, 0]

    def attend(keys, values, narrow):
        scores = narrow(q[0, :, 0]).astype(np.float64) @ keys.T * 128**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return narrow(weights).astype(np.float64) @ values / weights.sum(-1, keepdims=True)

    def bfloat16(a):
        return a.astype(ml_dtypes.bfloat16).astype(np.float64)

    exact = attend(keys, values, lambda a: a)
    dequantized = attend(bfloat16(keys), bfloat16(values), bfloat16)
    parts = [
        msd_attention(
            jnp.asarray(q),
            cache.k,
            cache.v,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            scale=128**-0.5,
            causal=False,
            p_scale=p_scale,
        )[0, :, 0]
        for p_scale in ("fixed", "block")
    ]
    return [_relative(got, exact) for got in (dequantized, *parts)]


def main(study: Study) -> None:
    jax.config.update("jax_platforms", "cpu")
    sections = run(study.out, terminal(), study.seed)
    write_page(study.out / "msd.html", "Multi-scale dequantization", sections)
    print(f"wrote {study.out}/msd.html")


if __name__ == "__main__":
    leave(run_program(main, Study, __doc__))
