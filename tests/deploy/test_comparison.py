"""A comparison of two predictions: what both share cancels, what they do not adds up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmjax
from cmjax.cost.interval import Z90
from cmjax.deploy import predictor_of
from cmjax.deploy.predictor import known_uncertainty
from cmjax.hardware import leaf_names, load_machine, replace_leaf

M = load_machine("cloudmatrix384")
KEY = "tokens_per_s_per_npu"


def decode(machine=M, **options):
    options = {"npus": 8, "batch": 96, "context": 4096} | options
    return cmjax.predict("tiny", machine, phase="decode", **options)


def width(interval):
    return float(np.log(interval[1] / interval[0]))


def test_a_prediction_beside_itself_is_one_for_sure():
    one = decode()
    found = cmjax.compare(one, one)
    assert found.ratio.keys() == one.headlines().keys()
    for key, ratio in found.ratio.items():
        assert ratio == 1.0
        assert found.interval[key] == pytest.approx((1.0, 1.0))


def test_the_ratio_scatters_as_that_of_machines_drawn_from_what_is_known():
    one, other = decode(microbatches=1), decode(microbatches=2)
    known = known_uncertainty(M)
    assert known is not None
    at = [leaf_names(M).index(key) for key in known.keys]
    rng = np.random.default_rng(0)
    draws = rng.multivariate_normal(np.zeros(len(at)), known.covariance, 400)
    leaves, tree = jax.tree.flatten(M)
    scales = np.ones((len(draws), len(leaves)))
    scales[:, at] = np.exp(0.1 * draws)  # a tenth, so that the price is linear in them
    machines = jax.tree.unflatten(tree, list(jnp.asarray(scales * np.array(leaves, float)).T))

    def rates(prediction):
        predictor = predictor_of(prediction)

        def rate(machine):
            on = dataclasses.replace(predictor, machine=machine)
            return on.predict(prediction.requests).tokens_per_s_per_npu

        return np.log(np.asarray(jax.vmap(rate)(machines), float))

    scatter = np.std(rates(one) - rates(other)) / 0.1
    found = cmjax.compare(one, other)
    assert width(found.interval[KEY]) / (2 * Z90) == pytest.approx(scatter, rel=0.1)
    assert width(found.interval[KEY]) < 0.8 * width(one.interval[KEY])


def test_a_constant_that_is_changed_on_purpose_is_in_the_ratio_and_not_in_its_width():
    one = decode()
    other = decode(replace_leaf(M, "chip.hbm_bytes_per_s", 1.05 * M.chip.hbm_bytes_per_s))
    found = cmjax.compare(other, one)
    assert found.ratio[KEY] > 1.0
    assert width(found.interval[KEY]) < 0.1 * width(one.interval[KEY])


def test_what_is_not_known_of_two_machines_adds_up():
    one, other = decode(), decode("h800-pod")
    found = cmjax.compare(one, other)
    assert found.ratio[KEY] == pytest.approx(
        float(one.tokens_per_s_per_npu) / float(other.tokens_per_s_per_npu)
    )
    each = width(one.interval[KEY]), width(other.interval[KEY])
    assert width(found.interval[KEY]) == pytest.approx(np.hypot(*each))


def test_what_cannot_be_compared_is_refused():
    one = decode()
    prompt = cmjax.predict("tiny", M, phase="prefill", npus=8, prompt=4096)
    with pytest.raises(ValueError, match="a decode and a prefill have no number in common"):
        cmjax.compare(one, prompt)
    unknown = dataclasses.replace(one, interval={}, elasticities={})
    with pytest.raises(ValueError, match="other has no interval"):
        cmjax.compare(one, unknown)
