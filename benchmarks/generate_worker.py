"""One arithmetic of this library in a process of its own, for `benchmarks.generate`.

It speaks the protocol of `benchmarks.generate_peers`:

    python -m benchmarks.generate_worker ARITHMETIC FOLDER REQUESTS PROMPT_TOKENS [PACKED]
"""

import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.generate_peers import answer, peak_bytes, private_output, serve
from cmjax import native
from cmjax.models import moe
from cmjax.models.moe.generation.open import GeneratorOptions
from cmjax.models.moe.huge_pages import use_huge_pages


def main() -> None:
    arithmetic, folder, requests, prompt, *packed = sys.argv[1:]
    answers = private_output()
    if arithmetic == "reads":
        answer(answers, {"bytes_per_s": read_rate()})
        return
    started = time.perf_counter()
    generator = moe.open_generator(
        Path(folder),
        options=GeneratorOptions(
            arithmetic=arithmetic, drafts=0, packed=Path(packed[0]) if packed else None
        ),
        requests=int(requests),
        prompt_tokens=int(prompt),
    )
    loaded = {"load_s": time.perf_counter() - started, "load_peak_bytes": peak_bytes()}

    def turn(prompts: list[list[int]], steps: int) -> tuple[float, list[float], list[list[int]]]:
        """What a caller of `generate` waits for."""
        ticks: list[tuple[float, int]] = []
        found = generator.generate(
            prompts, steps + 1, progress=lambda done, *_: ticks.append((time.perf_counter(), done))
        )
        tokens = [completion.tokens for completion in found.completions]
        # steps that ran in one call took an equal part of it each
        seconds, each = np.diff(np.array(ticks), axis=0).T
        return found.prefill_s, (seconds * len(prompts) / each).tolist(), tokens

    serve(answers, turn, {**loaded, "name": f"cmjax; {native.status().reason}"})


def read_rate() -> float:
    """Bytes per second at which this machine reads memory, with all the threads XLA has."""
    import jax
    import jax.numpy as jnp

    # pieces that take about as long as a product: a longer read is more often interrupted
    pieces = [jnp.ones((1 << 23,), jnp.int32) for _ in range(8)]  # more than the caches hold
    use_huge_pages(pieces)  # as weights are
    if native.status().enabled:
        out = jax.ShapeDtypeStruct((1,), jnp.int32)
        total = jax.jit(lambda x: native.call("cmjax_sum_words", out, x))
    else:
        total = jax.jit(jnp.sum)
    total(pieces[0]).block_until_ready()
    least = float("inf")
    for _ in range(20):
        for piece in pieces:
            start = time.perf_counter()
            total(piece).block_until_ready()
            least = min(least, time.perf_counter() - start)
    return pieces[0].nbytes / least


if __name__ == "__main__":
    main()
