"""W8A16 and W4A16 products at decode sizes: ours beside XLA and PyTorch, all in one process.

    python -m benchmarks.msd [--threads 1|2] [--rows 1 2 4 8 16 64] [--seconds 60]

`[rows, 7168] x [7168, 2048]`. Every candidate goes through its own copies of the weights, more than
200 MB of them, so that no call finds its weights in a cache. One thread: the process is pinned to a
core and the minimum of its CPU time counts; more: the minimum of wall time, with a rest before each
turn. "read" is the time to read the int8 weights once (`cmjax_sum_words`), the bound of any W8A16
product at one row.

`CMJAX_NATIVE_ISA=avx2` restricts our kernels; `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2`
PyTorch's and `XLA_FLAGS=--xla_cpu_max_isa=AVX2` XLA's. PyTorch is left out where it is missing.
"""

import argparse
import itertools
import os

from benchmarks.timing import least_times

K, N = 7168, 2048
ROTATED_BYTES = 220e6


def main() -> None:
    parser = argparse.ArgumentParser(description="W8A16 and W4A16 products beside their peers.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="per number of rows")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= options.threads <= len(cores):
        parser.error(f"--threads must be 1 to {len(cores)}, got {options.threads}")
    os.sched_setaffinity(0, cores[: options.threads])  # before JAX starts its pool

    import jax

    from cmjax import native

    jax.config.update("jax_platforms", "cpu")
    print(f"{native.status().reason}; {options.threads} thread(s); {K} x {N}; ms, lower is better")
    candidates = _ours_and_xla(native) | _torch(options.threads)
    names = list(candidates)
    print(f"{'rows':>4} " + " ".join(f"{name:>15}" for name in names))
    for rows in options.rows:
        best = _measure(candidates, rows, options)
        print(f"{rows:4d} " + " ".join(f"{1e3 * best[name]:15.3f}" for name in names))
        print("     " + " ".join(f"{best[name] / best['MSD W8A16']:14.2f}x" for name in names))
        if "read" in best:
            reached = best["read"] / best["MSD W8A16"]
            rate = K * N / best["read"] / 1e9
            print(f"     MSD W8A16 reaches {reached:.0%} of the {rate:.1f} GB/s read in this run")


def _measure(candidates, rows: int, options) -> dict[str, float]:
    """Best seconds of every candidate, each call on its next weights."""

    def rotating(call):
        turns = itertools.count()
        return lambda: call(next(turns))

    runs = {name: rotating(make(rows)) for name, make in candidates.items()}
    return least_times(runs, options.seconds, options.threads)


def _copies(array, nbytes: int) -> list:
    return [array + 0 for _ in range(max(2, int(ROTATED_BYTES / nbytes)))]


def _ours_and_xla(native) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from cmjax.primitives.msd.product import _reference, msd_dot

    rng = np.random.default_rng(0)
    w8 = _copies(jnp.asarray(rng.integers(-127, 128, (N, K)), jnp.int8), K * N)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, N), jnp.float32)
    w4 = _copies(jnp.asarray(rng.integers(0, 256, (N, K // 2)), jnp.uint8), K * N // 2)
    exponents = jnp.asarray(rng.integers(110, 120, (N, K // 32)), jnp.uint8)
    dense = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    f32, f32_t = _copies(dense, 4 * K * N), _copies(dense.T, 4 * K * N)
    bf16 = _copies(dense.astype(jnp.bfloat16), 2 * K * N)

    plain = {"format": "int8", "passes": 2, "group_size": None, "has_offset": False}
    plain |= {"out_dtype": "float32", "rounding": "away"}

    def over(weights, fn, dtype=jnp.float32):
        fn = jax.jit(fn)

        def at(rows):
            x = jnp.asarray(rng.normal(size=(rows, K)), dtype)
            return lambda i: fn(x, weights[i % len(weights)]).block_until_ready()

        return at

    found = {
        "MSD W8A16": over(w8, lambda x, w: msd_dot(x, w, w_scale=scale)),
        "MSD W4A16": over(w4, lambda x, w: msd_dot(x, w, w_scale=exponents, format="mxfp4")),
        "MSD by XLA": over(w8, lambda x, w: _reference(x, w, scale, **plain)),
        "XLA f32 [K,N]": over(f32_t, lambda x, w: x @ w),
        "XLA f32 [N,K]": over(f32, lambda x, w: x @ w.T),
        "XLA bf16 [N,K]": over(bf16, lambda x, w: x @ w.T, jnp.bfloat16),
    }
    if native.status().enabled:
        out = jax.ShapeDtypeStruct((1,), jnp.int32)
        words = [jax.lax.bitcast_convert_type(w.reshape(N, K // 4, 4), jnp.int32) for w in w8]
        found["read"] = over(words, lambda x, w: native.call("cmjax_sum_words", out, w))
    return found


def _torch(threads: int) -> dict:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        print("PyTorch is not installed: its kernels are left out")
        return {}
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(N, K, generator=generator)
    f32, bf16 = _copies(dense, 4 * K * N), _copies(dense.bfloat16(), 2 * K * N)
    w8 = _copies(torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8), K * N)
    scale = torch.rand(N, generator=generator).bfloat16()

    def over(weights, fn, dtype):
        def at(rows):
            x = torch.randn(rows, K, generator=generator).to(dtype)

            def call(i):
                with torch.inference_mode():
                    fn(x, weights[i % len(weights)])

            return call

        return at

    linear = torch.nn.functional.linear
    return {
        "torch f32": over(f32, linear, torch.float32),
        "torch bf16": over(bf16, linear, torch.bfloat16),
        "torch W8A16": over(
            w8, lambda x, w: torch._weight_int8pack_mm(x, w, scale), torch.bfloat16
        ),
    }


if __name__ == "__main__":
    main()
