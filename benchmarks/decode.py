"""Decode steps of a model on CPU: MSD W8A16 weights beside bfloat16 ones, in one process.

    python -m benchmarks.decode [--batch 1 2 4] [--seconds 20] [--context 64]

A dense-attention MoE model (latent attention, one routed expert per token and a shared one) whose
matrices exceed the last-level cache many times over, so that a step reads its weights from memory.
One thread, pinned; candidates take turns; the minimum of CPU time counts.
"""

import argparse
import os
import time


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode with MSD W8A16 weights beside bfloat16.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=20.0, help="per batch size")
    parser.add_argument("--context", type=int, default=64, help="tokens the cache holds")
    options = parser.parse_args()
    if min(options.batch) < 1 or options.context < 2:
        parser.error("--batch must be at least 1 and --context at least 2")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # before JAX starts its pool

    import jax

    from cmjax import native

    jax.config.update("jax_platforms", "cpu")
    models = _models()
    print(f"{native.status().reason}; one thread; ms per decode step, lower is better")
    print(f"{'batch':>5} " + " ".join(f"{name:>12}" for name in models) + "   bfloat16 / msd_w8a16")
    for name, model in models.items():
        size = sum(x.nbytes for x in jax.tree.leaves(_params(model)))
        print(f"  {name}: {size / 1e6:,.0f} MB of parameters")
    for batch in options.batch:
        best = _measure({n: _step(m, batch, options.context) for n, m in models.items()}, options)
        ratio = best["bfloat16"] / best["msd_w8a16"]
        print(
            f"{batch:5d} " + " ".join(f"{1e3 * t:12.2f}" for t in best.values()) + f"{ratio:14.2f}"
        )


def _measure(calls, options) -> dict[str, float]:
    """Best CPU seconds of every candidate, one call of each in turn."""
    best = dict.fromkeys(calls, float("inf"))
    end, turn = time.perf_counter() + options.seconds, 0
    while time.perf_counter() < end or turn < 3:
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
        turn += 1
    return best


def _models():
    from flax import nnx

    from models.moe import Arithmetic, LatentAttention, MoEConfig, MoEModel, one_rank

    config = MoEConfig(
        vocab_size=512,
        hidden_size=2048,
        layers=3,
        dense_layers=(0, 1),
        heads=16,
        attention=LatentAttention(
            q_lora_rank=768, kv_lora_rank=256, qk_nope_dim=64, qk_rope_dim=32, v_dim=64
        ),
        ffn_size=8192,
        expert_ffn_size=2048,
        experts=2,
        shared_experts=1,
        experts_per_token=1,
        expert_groups=1,
        groups_per_token=1,
    )
    plain = MoEModel(config, one_rank(config), precision="bfloat16", rngs=nnx.Rngs(params=0))
    form = "msd_w8a16"  # only the weights differ: head, attention and cache are bfloat16 in both
    few = Arithmetic(projections=form, dense=form, experts=form)
    return {"bfloat16": plain, "msd_w8a16": plain.with_arithmetic(few)}


def _params(model):
    from models.moe.model import parameters

    return parameters(model)


def _step(model, batch: int, context: int):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from models.moe.cache import empty_cache

    graph, state = nnx.split(model)
    cache = empty_cache(model.config, batch, context, model.arithmetic.kv_cache)
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None]
    lengths = jnp.full((batch,), context // 2, jnp.int32)

    @jax.jit
    def decode(state, tokens, cache, lengths):
        main = nnx.merge(graph, state).main
        hidden, _ = main.decode((tokens,), (cache,), (lengths,))
        return main.logits(hidden[0])

    decode(state, tokens, cache, lengths).block_until_ready()
    return lambda: decode(state, tokens, cache, lengths).block_until_ready()


if __name__ == "__main__":
    main()
