"""Step times from the cost model: priced once on a grid, and looked up between its nodes.

A prefill step of T tokens of length L is priced as T / L prompts of L tokens; a decode step of n
requests per rank at context c as it is, a rank being a tensor-parallel group where there are some.
Both are nearly linear in T, T L, n and n c between nodes, so that few nodes are enough; what is
left is measured half-way between them and reported.
"""

import dataclasses
import functools

import jax
import numpy as np

from cmjax.deploy import Predictor, Requests
from cmjax.deploy.deployment import Deployment
from cmjax.hardware import Supernode
from cmjax.serving.engine.table import Lookup, Table
from cmjax.serving.service import ColocatedPool, Pool, PrefillPool, Service
from cmjax.serving.step_times.step_times import StepTimes

_LENGTHS = np.geomspace(128, 131072, 11)
_PER_OCTAVE = 2  # nodes


def price_service(service: Service, machine: Supernode) -> StepTimes:
    """Price the instances of a service.

    Raises: ValueError: an instance that the machine cannot hold, or that holds no requests.
    """
    tables, ranks, kv_tokens, errors = {}, {}, {}, []
    for name, pool in service.pools.items():
        tables[name], found = _table(name, pool, service, machine)
        errors.append(found)
        ranks[name] = pool.npus * machine.dies_per_npu // (1 if name == "prefill" else pool.tp)
        held = _kv_tokens(name, pool, service, machine)
        kv_tokens[name] = 0 if name == "prefill" else held  # it hands them over at once
    name = next(n for n in service.pools if n != "prefill")
    of_one_die = dataclasses.replace(service.pools[name], tp=1)
    predictor = Predictor.of(service.deployment_for("decode", of_one_die).choices()[0], machine)
    all_errors = np.concatenate(errors)
    return StepTimes(
        tables=tables,
        ranks=ranks,
        kv_tokens=kv_tokens,
        kv_token_bytes=_kv_token_bytes(predictor),
        gain=predictor.gain(service.requests()),
        mean_error=float(all_errors.mean()),
        worst_error=float(all_errors.max()),
        source=f"priced on {machine.name}",
    )


def _table(name: str, pool: Pool, service: Service, machine: Supernode) -> tuple[Table, np.ndarray]:
    shape, leaves = jax.tree.structure(machine), tuple(map(float, jax.tree.leaves(machine)))
    limit = pool.step_tokens if isinstance(pool, PrefillPool | ColocatedPool) else 0
    batch = 0 if isinstance(pool, PrefillPool) else pool.batch  # type: ignore[attr-defined]
    phases = {
        "prefill": service.deployment_for("prefill", pool),
        "decode": service.deployment_for("decode", pool),
    }
    each, load = -(-batch * pool.tp // machine.dies_per_npu), service.load
    if name == "prefill":
        return _prefill_table(phases["prefill"], shape, leaves, limit, load)
    if name == "decode":
        return _decode_table(phases["decode"], shape, leaves, each, load)
    prefill, of_prefill = _prefill_table(phases["prefill"], shape, leaves, limit, load)
    decode, of_decode = _decode_table(phases["decode"], shape, leaves, each, load)
    return _both(prefill, decode), np.concatenate([of_prefill, of_decode])


@functools.lru_cache(maxsize=64)
def _prefill_table(
    deployment: Deployment, shape, leaves, limit: int, load: float | None
) -> tuple[Table, np.ndarray]:
    machine = jax.tree.unflatten(shape, leaves)
    least = deployment.instance_npus * machine.dies_per_npu  # a token per die
    tokens = _nodes(least, max(limit, 2 * least))

    def seconds(t, length):
        return _fastest(deployment, machine, t / deployment.instance_npus / length, length, load)

    return _priced(tokens, _LENGTHS, seconds, prefill=True)


@functools.lru_cache(maxsize=64)
def _decode_table(
    deployment: Deployment, shape, leaves, limit: int, load: float | None
) -> tuple[Table, np.ndarray]:
    machine = jax.tree.unflatten(shape, leaves)
    per_rank = np.unique(np.rint(_nodes(1, max(limit, 2))))
    ranks = machine.dies_per_npu / deployment.tp  # per NPU

    def seconds(n, context):
        return _fastest(deployment, machine, n * ranks, context, load)

    return _priced(per_rank, _LENGTHS, seconds, prefill=False)


def _priced(first, second, seconds, *, prefill: bool) -> tuple[Table, np.ndarray]:
    """A table, and its relative errors half-way between nodes."""
    x, y = np.meshgrid(first, second, indexing="ij")
    values = seconds(x.ravel(), y.ravel()).reshape(x.shape)
    none = np.zeros(1)
    if prefill:
        table = Table(tokens=first, length=second, requests=none, context=none,
                      batch_s=np.ascontiguousarray(values[:, :, None, None]))  # fmt: skip
    else:
        table = Table(tokens=none, length=none, requests=first, context=second,
                      batch_s=np.ascontiguousarray(values[None, None]))  # fmt: skip
    middle = np.sqrt(first[1:] * first[:-1]), np.sqrt(second[1:] * second[:-1])
    x, y = (m.ravel() for m in np.meshgrid(*middle, indexing="ij"))
    true, lookup = seconds(x, y), Lookup(table)
    found = [
        lookup.step_s(a, b, 0, 0.0, 0, 0) if prefill else lookup.step_s(0, 0.0, a, b, 0, 0)
        for a, b in zip(x, y, strict=True)
    ]
    return table, np.abs(np.array(found) / true - 1)


def _both(prefill: Table, decode: Table) -> Table:
    """A step that does both: what each takes alone, and what both would read (weights, mostly)
    once.

    The least prefill step and the least decode step stand for the latter.
    """
    p, d = prefill.batch_s[:, :, 0, 0], decode.batch_s[0, 0]
    shared = min(float(p.min()), float(d.min()))
    t, n = (len(prefill.tokens), len(decode.requests))
    values = np.empty((t + 2, len(prefill.length), n + 1, len(decode.context)))
    values[0, :, 0] = 0.0
    values[0, :, 1:] = d
    with_floor = np.concatenate([p[:1], p])  # a single token takes as long as the first node
    values[1:, :, 0] = with_floor[:, :, None]
    values[1:, :, 1:] = with_floor[:, :, None, None] + d - shared
    return Table(
        tokens=np.concatenate([[0.0, 1.0], prefill.tokens]),
        length=prefill.length,
        requests=np.concatenate([[0.0], decode.requests]),
        context=decode.context,
        batch_s=values,
    )


def _fastest(deployment: Deployment, machine: Supernode, batch, length, load) -> np.ndarray:
    """By the faster number of microbatches; one request per rank is not halved."""
    found = [
        Predictor.of(choice, machine).steps_s(batch, length, load)
        for choice in deployment.choices()
    ]
    if len(found) == 1:
        return found[0]
    one_each = deployment.decoding & (batch * deployment.tp < 2 * machine.dies_per_npu)
    return np.where(one_each, found[0], np.minimum(*found))


def _nodes(low: float, high: float) -> np.ndarray:
    count = int(np.ceil(np.log2(high / low) * _PER_OCTAVE)) + 1
    return np.geomspace(low, high, max(count, 2))


def _kv_token_bytes(predictor: Predictor) -> float:
    """Of a die, by how its caches grow with the context, with as many requests as there are dies.

    Without tensor parallelism these are the bytes of a token. A group of n dies that divides heads
    among them holds a token in as many bytes; one whose caches have no heads (MLA), in n times as
    many.
    """
    dies = float(predictor.machine.dies_per_npu)

    def caches(context):
        requests = Requests(batch=dies, context=context)
        return float(predictor.memory_bytes(requests)["caches"])

    return (caches(8192.0) - caches(4096.0)) / 4096.0


def _kv_tokens(name: str, pool: Pool, service: Service, machine: Supernode) -> int:
    """Tokens that the dies of an instance hold, beside the weights."""
    shortest = Requests(batch=float(machine.dies_per_npu), prompt=1.0, context=1.0)
    predictor = Predictor.of(service.deployment(name).choices()[0], machine)
    weights = float(predictor.memory_bytes(shortest)["weights"])
    room = float(machine.chip.hbm_bytes) * service.memory_fraction - weights
    if room <= 0:
        raise ValueError(
            f"{name}: the weights of {service.model} take {weights / 1e9:.1f} GB of a die's "
            f"{float(machine.chip.hbm_bytes) / 1e9:.0f} GB; use more NPUs per instance"
        )
    dies = pool.npus * machine.dies_per_npu
    decoding = Predictor.of(service.deployment_for("decode", pool).choices()[0], machine)
    return int(room / _kv_token_bytes(decoding) * dies)
