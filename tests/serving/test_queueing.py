"""Long runs of the event loop against queueing theory: a prefill worker that takes one request at a
time, in time proportional to its tokens, is a single-server queue."""

import math

import numpy as np
import pytest

from cmjax.serving.engine import native
from cmjax.serving.engine.run import run
from cmjax.serving.engine.table import Table
from tests.serving.scenarios import inputs, requests, workers

pytestmark = pytest.mark.skipif(not native.available(), reason="long runs need the kernels")

UNIT = 1_000_000  # tokens per second of service
COUNT = 2_000_000


def per_token() -> Table:
    """A token takes 1 / UNIT s."""
    one = np.zeros(1)
    return Table(tokens=np.array([0.0, UNIT]), length=one, requests=one, context=one,
                 batch_s=np.array([0.0, 1.0]).reshape(2, 1, 1, 1))  # fmt: skip


def time_in_system(service_s: np.ndarray, rate: float, servers: int = 1) -> float:
    """Mean seconds from arrival to end, of Poisson arrivals."""
    rng = np.random.default_rng(1)
    arrival = np.cumsum(rng.exponential(1 / rate, len(service_s)))
    tokens = np.maximum(np.rint(service_s * UNIT), 1)
    server = {"max_requests": 1, "max_tokens": 1 << 40}
    found = run(inputs(
        requests(arrival, tokens, np.ones(len(tokens))), workers(*[server] * servers),
        (per_token(),), bin_s=1e5,
    ))  # fmt: skip
    return float((found.last_s - found.arrival_s).mean())


@pytest.fixture
def exponential() -> np.ndarray:
    return np.random.default_rng(2).exponential(1.0, COUNT)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_poisson_arrivals_and_exponential_service_are_m_m_1(exponential, load):
    assert time_in_system(exponential, load) == pytest.approx(1 / (1 - load), rel=0.02)


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_equal_service_is_m_d_1(load):
    expected = 1 + load / (2 * (1 - load))
    assert time_in_system(np.ones(COUNT), load) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("cv", [0.5, 1.5])
def test_general_service_keeps_pollaczek_and_khinchin(cv):
    load, rng = 0.6, np.random.default_rng(3)
    service = rng.gamma(1 / cv**2, cv**2, COUNT)
    expected = 1 + load * (1 + cv**2) / (2 * (1 - load))
    assert time_in_system(service, load) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("servers", [2, 8])
def test_one_queue_for_many_servers_is_m_m_c(exponential, servers):
    load = 0.7
    offered = load * servers
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    full = offered**servers / math.factorial(servers) / (1 - load)
    waits = full / (sum(terms) + full)  # Erlang C
    expected = 1 + waits / (servers * (1 - load))
    assert time_in_system(exponential, offered, servers) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("clients", [1, 3, 10])
def test_a_closed_loop_keeps_mean_value_analysis_and_littles_law(exponential, clients):
    """Thinking clients and one exponential server: product form, whatever the think time."""
    think, count = 4.0, COUNT // 4
    tokens = np.maximum(np.rint(exponential[:count] * UNIT), 1)
    found = run(inputs(
        requests(np.zeros(count), tokens, np.ones(count)), workers({"max_requests": 1}),
        (per_token(),), clients=clients, think_s=think, bin_s=1e5,
    ))  # fmt: skip
    response = float((found.last_s - found.arrival_s).mean())
    throughput = count / found.last_s.max()
    assert throughput * (response + think) == pytest.approx(clients, rel=0.02)
    queue = expected = 0.0
    for n in range(1, clients + 1):
        expected = 1 + queue
        queue = n / (think + expected) * expected
    assert response == pytest.approx(expected, rel=0.02)


def test_the_gauges_are_littles_law(exponential):
    """Mean number in the system = rate x mean time in it."""
    rng = np.random.default_rng(5)
    arrival = np.cumsum(rng.exponential(1 / 0.7, COUNT))
    tokens = np.maximum(np.rint(exponential * UNIT), 1)
    found = run(inputs(
        requests(arrival, tokens, np.ones(COUNT)), workers({"max_requests": 1}), (per_token(),),
        bin_s=1e4,
    ))  # fmt: skip
    waiting, busy = found.gauges[:, :2].sum(0)
    np.testing.assert_allclose(waiting, (found.scheduled_s - found.arrival_s).sum(), rtol=1e-6)
    np.testing.assert_allclose(busy, found.busy_s.sum(), rtol=1e-6)
