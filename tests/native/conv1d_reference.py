"""The kernel's arithmetic in NumPy: exact sums, float32 steps in order. And cases that try it.

`python tests/native/conv1d_reference.py CPUS` compares the kernels with it bit for bit, with the
instruction set of the environment variable CMJAX_NATIVE_ISA.
"""

import itertools
import os
import sys
from dataclasses import dataclass

import jax
import numpy as np

from cmjax import native
from cmjax.primitives.convolution import kernel as conv_kernel
from cmjax.primitives.convolution.toom_cook import ALGORITHMS

OPERANDS = (np.int8, np.int16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: what is static, and how its numbers are drawn."""

    algorithm: str
    operand: type
    tap_blocks: int = 1
    dilation: int = 1
    batch: int = 1
    length: int = 23
    cin: int = 7
    cout: int = 19
    padding: tuple[int, int] = (2, 3)
    out_length: int = 24
    slope: float = 0.2
    numbers: str = "random"  # "largest", "saturating", "just safe"

    @property
    def limit(self) -> int:
        return 127 if self.operand is np.int8 else 2047

    @property
    def static(self) -> dict:
        names = ("algorithm", "tap_blocks", "dilation", "padding", "out_length", "slope")
        chosen = {name: getattr(self, name) for name in names}
        exact = (2**24 - 1) // ALGORITHMS[self.algorithm].growth  # in float32
        return chosen | {"input_limit": min(2**15 - 1, exact)}

    def arrays(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """x, u, and the scales and bias by name."""
        rng = np.random.default_rng([self.length, self.cin, self.cout, self.tap_blocks])
        form = ALGORITHMS[self.algorithm]
        x = rng.normal(size=(self.batch, self.length, self.cin))
        u = rng.integers(
            -self.limit, self.limit + 1, (form.n, self.tap_blocks * self.cin, self.cout)
        )
        u[..., :16] //= 2  # the first panel keeps to the pair rule, further ones do not
        requant = rng.uniform(0.2, 1.0, form.n) * self.limit / (127 * form.growth)
        if self.numbers == "largest":  # every operand and every product at its extreme
            x, u = np.full_like(x, 1e9), np.full_like(u, self.limit)
            requant = np.full_like(requant, 1e6)
        if self.numbers in ("saturating", "just safe"):  # in pairs of products, in int16
            top = self.limit if self.numbers == "saturating" else 64
            u = np.where(rng.random(u.shape) < 0.5, top, -top)
            u[:, 1::2] = u[:, : u.shape[1] // 2 * 2 : 2]
            requant = np.full_like(requant, 1e6)
        draws = {
            "inverse_step": rng.uniform(20.0, 60.0, self.cin),
            "requant": requant,
            "scale": rng.uniform(1e-4, 1e-3, (form.n, self.cout)),
            "bias": rng.normal(size=self.cout),
        }
        named = {name: value.astype(np.float32) for name, value in draws.items()}
        return x.astype(np.float32), u.astype(self.operand), named


def reference(case: Case, x, u, inverse_step, requant, scale, bias) -> np.ndarray:
    """y of `conv_kernel.conv1d`, written from its formula."""
    form, static = ALGORITHMS[case.algorithm], case.static
    limit, reach = static["input_limit"], case.dilation * (case.tap_blocks - 1)
    tiles = -(-case.out_length // form.m)
    rows = tiles + reach
    xi = np.clip(np.rint(x * inverse_step), -limit, limit)
    seen = (rows - 1) * form.m + form.window
    padded = np.zeros((case.batch, max(seen, case.padding[0] + case.length), case.cin))
    padded[:, case.padding[0] : case.padding[0] + case.length] = xi
    windows = np.stack([padded[:, t * form.m : t * form.m + form.window] for t in range(rows)], 1)
    bt = np.array(form.bt, dtype=np.float64)
    sums = np.einsum("pj,btjc->pbtc", bt, windows, optimize=True)  # exact, as all is in float64
    assert np.abs(sums).max() < 2**24
    scaled = np.rint(sums.astype(np.float32) * requant[:, None, None, None])
    v = np.clip(scaled, -case.limit, case.limit).astype(np.float64)
    blocks = [v[:, :, j * case.dilation :][:, :, :tiles] for j in range(case.tap_blocks)]
    acc = np.concatenate(blocks, -1) @ u.astype(np.float64)[:, None]
    assert np.abs(acc).max() < 2**31
    products = acc.astype(np.float32) * scale[:, None, None, :]
    y = np.stack(form.at_program.apply(list(products)), axis=2)
    y = y.reshape(case.batch, tiles * form.m, case.cout)[:, : case.out_length] + bias
    return np.maximum(y, np.float32(case.slope) * y)


def kernel(case: Case, x, u, **scales) -> np.ndarray:
    """y of the kernel."""

    @jax.jit
    def call(x, u, scales):
        packed = conv_kernel.pack_filter(u, tap_blocks=case.tap_blocks)
        return conv_kernel.conv1d(x, packed, operand_limit=case.limit, **case.static, **scales)

    return np.asarray(call(x, u, scales))


def cases() -> list[Case]:
    every = [
        Case(algorithm=name, operand=operand, tap_blocks=blocks)
        for name, operand in itertools.product(ALGORITHMS, OPERANDS)
        for blocks in ((1, 3) if ALGORITHMS[name].m == ALGORITHMS[name].r else (1,))
    ]
    for operand in OPERANDS:
        some = [
            # dilation, and taps that reach past both ends of a short sequence
            {"algorithm": "direct", "tap_blocks": 5, "dilation": 3, "cin": 33},
            {"algorithm": "direct", "tap_blocks": 9, "length": 2, "padding": (6, 6)},
            {"algorithm": "N88", "length": 1, "cin": 1, "cout": 1, "out_length": 1},
            # whole vectors, panels and register tiles, and one more or less of each
            {"algorithm": "F(4,3)", "cin": 64, "cout": 64, "length": 200, "out_length": 200},
            {"algorithm": "F(4,3)", "cin": 63, "cout": 65, "length": 201, "out_length": 201},
            {"algorithm": "F(2,3)", "cin": 17, "cout": 15, "batch": 5, "slope": 0.0},
            # several blocks of tiles in a sequence, and several sequences in a block
            {"algorithm": "N69", "cin": 250, "cout": 40, "length": 900, "out_length": 900},
            {"algorithm": "N88", "cin": 250, "cout": 33, "length": 70, "batch": 9, "slope": 1.0},
            {"algorithm": "N88", "tap_blocks": 4, "cin": 250, "cout": 250, "length": 148},
            {"algorithm": "direct", "tap_blocks": 7, "cin": 300, "cout": 50, "length": 1600},
        ]
        every += [Case(operand=operand, **fields) for fields in some]
        for numbers in ("largest", "saturating", "just safe"):
            for name in ("direct", "F(4,3)", "N88"):
                every.append(Case(algorithm=name, operand=operand, numbers=numbers, cin=250))
    return every


def main(cpus: int) -> int:
    """Compare every case on `cpus` CPUs; on one only the cases that have several blocks."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])  # XLA's threads follow it
    isa = native.status().isa
    chosen = [case for case in cases() if cpus > 1 or case.cin == 250]
    equal = 0
    for case in chosen:
        x, u, scales = case.arrays()
        got, expected = kernel(case, x, u, **scales), reference(case, x, u, **scales)
        if np.array_equal(got.view(np.int32), expected.view(np.int32)):
            equal += 1
        else:
            print(case, "differs by", np.abs(got - expected).max())
    print(f"{isa}: {equal} of {len(chosen)} cases are bit-equal")
    return equal < len(chosen)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
