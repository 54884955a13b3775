"""How fast DeepSeek-R1's decode step on 320 ranks is traced and priced.

    python -m benchmarks.price_speed

Prints seconds to trace (cold: the first time in this process), seconds for the first price with
its compilation, and priced configurations per second once compiled: each configuration has its own
batch, context, expert load and HBM bandwidth.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from cmjax.cost import price
from cmjax.cost.waiting import Differences
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.predictor import Predictor
from cmjax.hardware import load_machine, replace_leaf

CONFIGURATIONS = 20_000
REPEATS = 5


def main() -> None:
    machine = load_machine("cloudmatrix384")
    start = time.perf_counter()
    predictor = Predictor.of(Deployment(phase="decode", microbatches=2), machine)
    print(f"trace, cold             {time.perf_counter() - start:8.2f} s")

    def step_s(batch, context, load, hbm_bytes_per_s):
        symbols = predictor.step.symbols({"batch": batch, "context": context, "load": load})
        changed = replace_leaf(machine, "chip.hbm_bytes_per_s", hbm_bytes_per_s)
        differences = Differences(attention=0.02, load=load)
        return price(predictor.program, changed, symbols, differences=differences).total_s

    one = jax.jit(step_s)
    start = time.perf_counter()
    one(96.0, 4096.0, 1.1, 1.6e12).block_until_ready()
    print(f"first price, compiling  {time.perf_counter() - start:8.2f} s")

    rng = np.random.default_rng(0)
    low, high = np.array([4, 512, 1.0, 1.2e12]), np.array([256, 16384, 2.0, 4.0e12])
    columns = jnp.asarray(rng.uniform(low, high, (CONFIGURATIONS, 4)), jnp.float32).T
    many = jax.jit(jax.vmap(step_s))
    many(*columns).block_until_ready()
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        many(*columns).block_until_ready()
        rates.append(CONFIGURATIONS / (time.perf_counter() - start))
    print(f"configurations per second {np.median(rates):10,.0f}  (median of {REPEATS} runs)")


if __name__ == "__main__":
    main()
