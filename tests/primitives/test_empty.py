"""No rows, no tokens, no signals: every primitive gives an empty result of the right shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.models.asr.features import LogMel, log_mel
from cmjax.primitives import (
    attention,
    dispatch,
    flash_attention,
    fsmn_memory,
    int8_conv1d,
    latent_attention,
    merge_by_lse,
    msd_attention,
    msd_decompose,
    msd_dot,
    pasa_attention,
    quantize_kv,
    quantize_weight,
    rsq_quantize,
    winograd_conv1d,
)

LENGTHS = jnp.zeros((0,), jnp.int32)


def zeros(*shape, dtype=np.float32):
    return jnp.zeros(shape, dtype)


def few_bit(**options):
    cache = zeros(0, 5, 2, 8, dtype=np.int8)
    scale = jnp.ones((0, 5, 2, 1), jnp.float32)
    return msd_attention(
        zeros(0, 3, 4, 8), cache, cache, k_scale=scale, v_scale=scale, scale=1.0, **options
    )


def product(groups=()):
    scale = jnp.ones((8, *groups), jnp.float32)
    size = 32 if groups else None
    return msd_dot(zeros(0, 64), zeros(8, 64, dtype=np.int8), w_scale=scale, group_size=size)


KV = zeros(0, 5, 2, 8)
Q = zeros(0, 3, 4, 8)
CASES = {
    "rsq": (lambda: rsq_quantize(zeros(0, 4), 0.5), (0, 4)),
    "fsmn": (
        lambda: fsmn_memory(
            zeros(0, 5, 4), zeros(0, 5, 4), zeros(3, 4), zeros(1, 4), zeros(0, 2, dtype="i4")
        ),
        (0, 5, 4),
    ),
    "decompose": (lambda: msd_decompose(zeros(0, 64)).parts, (2, 0, 64)),
    "decompose mxfp4": (lambda: msd_decompose(zeros(0, 64), format="mxfp4").parts, (2, 0, 64)),
    "product": (product, (0, 8)),
    "product of groups": (lambda: product((2,)), (0, 8)),
    "mxfp4 product": (
        lambda: msd_dot(
            zeros(0, 64),
            zeros(8, 32, dtype=np.uint8),
            w_scale=zeros(8, 2, dtype=np.uint8),
            format="mxfp4",
        ),
        (0, 8),
    ),
    "weight": (lambda: quantize_weight(zeros(0, 64)).values, (0, 64)),
    "cache": (lambda: quantize_kv(KV, KV).k, (0, 5, 2, 8)),
    "cache by channel": (lambda: quantize_kv(KV, KV, per="channel").v, (0, 5, 2, 8)),
    "few-bit attention": (lambda: few_bit(causal=True), (0, 3, 4, 8)),
    "few-bit attention of lengths": (
        lambda: few_bit(causal=False, lengths=LENGTHS, sinks=zeros(4)),
        (0, 3, 4, 8),
    ),
    "pasa": (lambda: pasa_attention(Q, KV, KV, causal=True), (0, 3, 4, 8)),
    "flash": (lambda: flash_attention(Q, KV, KV, sinks=zeros(4)), (0, 3, 4, 8)),
    "attention": (lambda: attention(Q, KV, KV, scale=1.0, causal=True), (0, 3, 4, 8)),
    "latent": (
        lambda: latent_attention(
            zeros(0, 1, 4, 8),
            zeros(0, 1, 4, 2),
            zeros(0, 5, 8),
            None,
            zeros(0, 5, 2),
            LENGTHS,
            scale=1.0,
        ),
        (0, 1, 4, 8),
    ),
    "merge": (lambda: merge_by_lse(zeros(2, 0, 3, 4, 8), zeros(2, 0, 3, 4))[0], (0, 3, 4, 8)),
    "dispatch": (
        lambda: (
            dispatch(
                zeros(0, 8),
                zeros(0, 2, dtype="i4"),
                axes=(),
                ranks=1,
                slots_per_rank=4,
                capacity=1,
                quantize=True,
            ).rows
        ),
        (4, 1, 8),
    ),
    "int8": (lambda: int8_conv1d(zeros(0, 8, 4), zeros(3, 4, 4)), (0, 8, 4)),
    "winograd": (
        lambda: winograd_conv1d(zeros(0, 8, 4), zeros(3, 4, 4), algorithm="F(2,3)"),
        (0, 8, 4),
    ),
    "log-mel": (lambda: log_mel(zeros(0, 800), LogMel()), (0, 8, 40)),
}


@pytest.mark.parametrize("how", [lambda fn: fn, jax.jit])
@pytest.mark.parametrize("name", CASES)
def test_nothing_in_gives_nothing_out_in_its_shape(name, how):
    fn, shape = CASES[name]
    assert how(fn)().shape == shape


def test_a_gradient_of_nothing_is_nothing():
    for fn in (
        lambda q: pasa_attention(q, KV, KV, causal=True).sum(),
        lambda q: attention(q, KV, KV, scale=1.0, causal=True).sum(),
        lambda q: few_bit(causal=True).sum() + q.sum(),
    ):
        assert jax.grad(fn)(Q).shape == Q.shape
