"""How fast DeepSeek-R1's decode step on 320 ranks is traced and priced.

    CMJAX_CACHE=off taskset -c 0 python -m benchmarks.price_speed  # on one core

Prints seconds to trace (cold: the first time in this process), seconds for the first price with
its compilation, and priced configurations per second of processor time once compiled, whatever else
the machine does. Each configuration has its own batch, context, expert load and HBM bandwidth. They
are priced at once, or so many at a time that what is between stays in the core's cache.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cmjax.cost import price
from cmjax.cost.waiting import Differences
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.predictor import Predictor
from cmjax.hardware import load_machine, replace_leaf

CONFIGURATIONS = 20_000
AT_A_TIME = 250
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
    configurations = jnp.asarray(rng.uniform(low, high, (CONFIGURATIONS, 4)), jnp.float32)
    for size in (CONFIGURATIONS, AT_A_TIME):
        rate = _rate(step_s, configurations, size)
        print(f"configurations per second {rate:10,.0f}  ({size:,} at a time)")


def _rate(step_s, configurations: Array, size: int) -> float:
    """Configurations per second of processor time, the median of some runs."""
    many = jax.jit(lambda every: jax.lax.map(lambda each: step_s(*each), every, batch_size=size))
    many(configurations).block_until_ready()
    rates = []
    for _ in range(REPEATS):
        start = time.process_time()
        many(configurations).block_until_ready()
        rates.append(CONFIGURATIONS / (time.process_time() - start))
    return float(np.median(rates))


if __name__ == "__main__":
    main()
