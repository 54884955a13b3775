"""A service: pools of instances that requests flow through, and the rules by which they do.

The paper's is peer to peer (CloudMatrix384, section 4.1): prefill instances, decode instances and a
context cache in the DRAM of all nodes are three pools, and a request may go to any idle instance.
"""

import dataclasses
from typing import Literal

from cmjax.deploy.deployment import CacheFormat, Deployment, Quant
from cmjax.deploy.requests import PREFILL_TOKENS, Requests
from cmjax.hardware import Supernode
from cmjax.inputs import MOST_SIZE, check_count, check_number

RouterName = Literal["any-idle", "least-loaded", "round-robin", "cache-aware"]
AdmissionName = Literal["none", "late", "early", "predictive"]
PAPER_RATIO = 6
"""Prefill instances per decode instance in the paper's evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Instances of one kind."""

    instances: int = 1
    """How many."""
    npus: int = 16
    """Of each."""
    ep: int = 0
    """Ranks (dies) per expert-parallel group; 0 means all of an instance."""
    tp: int = 1
    """Ranks (dies) of a node that share each request (tensor parallelism)."""
    redundant: int | None = None
    """Copies of routed experts beyond one of each, over all ranks of a group; `None`: as many as
    the published deployments."""
    start_s: float = 0.0
    """When they are ready; loading a model takes about 5 s from the model cache in DRAM, and its
    size over 2.1 GB/s from the object store (paper, section 4.4)."""

    @property
    def total_npus(self) -> int:
        return self.instances * self.npus

    def check(self, name: str) -> None:
        """Raise ValueError, naming the field, for a number out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low = 1 if field.name in ("instances", "npus", "tp", "batch") else 0
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(f"{name}.{field.name}", value, least=low, most=MOST_SIZE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillPool(Pool):
    """Prefill instances: they batch waiting prompts by tokens, sequence-parallel over their
    dies."""

    tokens: int = 0
    """Tokens of a step; 0: 16384 per NPU."""
    chunk: int = 0
    """Tokens of one prompt in a step; 0: no limit."""

    @property
    def step_tokens(self) -> int:
        return self.tokens or PREFILL_TOKENS * self.npus


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePool(Pool):
    """Decode instances: continuous batching, attention data-parallel over the dies."""

    npus: int = 160
    batch: int = 96
    """Requests per NPU, at most; memory may allow fewer."""
    eplb_every_s: float = 0.0
    """Experts are rebalanced so often; 0: never."""
    eplb_pause_s: float = 0.0
    """A rebalance stops steps for so long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColocatedPool(Pool):
    """Instances that do both, with chunked prefill in the steps of decode (vLLM's scheduling)."""

    tokens: int = 0
    """Tokens of a step, those that decode first; 0: 2048 per NPU."""
    batch: int = 96
    """Requests per NPU, at most."""
    prefix_caching: bool = True
    """What a preempted request had computed stays until others claim its memory."""

    @property
    def step_tokens(self) -> int:
        return self.tokens or 2048 * self.npus


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextCache:
    """Blocks of keys and values by the hash of their prefix, in the DRAM of the nodes."""

    blocks: int | None = None
    """Blocks that all nodes together hold; `None`: what `gb_per_node` does."""
    gb_per_node: float = 1000.0
    """DRAM of a node for the cache [GB]."""
    plane: Literal["ub", "vpc"] = "ub"
    """The network that an instance reads it over: Unified Bus, or the Ethernet of the VPC."""
    scope: Literal["pool", "instance"] = "pool"
    """One for all, blocks spread over nodes by consistent hashing, or one per prefill instance."""
    ssd_blocks: int = 0
    """Blocks of a tier behind it, which takes what DRAM evicts."""
    ssd_gb_per_s: float = 10.0
    """What an instance reads from that tier [GB/s]."""

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        for name in ("blocks", "gb_per_node", "ssd_blocks"):
            value = getattr(self, name)
            if value is not None:
                check_number(f"cache.{name}", value, least=0, most=MOST_SIZE)
        check_number("cache.ssd_gb_per_s", self.ssd_gb_per_s, above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """An instance is lost; its requests are retried, and what it computed for them is gone."""

    pool: Literal["prefill", "decode", "colocated"]
    instance: int = 0
    """Of the pool, from 0."""
    at_s: float = 0.0
    """On the clock of the trace."""
    back_s: float = float("inf")
    """When it serves again, model loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """What serves a trace: either prefill and decode pools, or a colocated one."""

    name: str = "service"
    model: str = "deepseek-r1"
    """Preset name, or the path of a Hugging Face config.json."""
    quant: Quant = "int8"
    """Matrices and dispatched tokens; w4a8 is int8, with experts in int4."""
    kv_cache: CacheFormat = "bf16"
    """Format of the latent cache."""
    mtp: bool = True
    """Draft tokens with the MTP module."""
    drafts: int = 1
    """Tokens that a request drafts in a step of decode (with mtp)."""
    acceptance: float | tuple[float, ...] = 0.7
    """Probability that a draft is accepted if those before it were: one for all drafts, or one for
    each."""
    load: float | None = None
    """Rows on the slowest rank over the mean, in every MoE layer; `None`: all ranks expect equal
    loads."""
    engine: str | None = None
    """Serving engine, whose host time the NPU waits for and whose kernels run; `None`: the
    machine's first one."""
    prefill: PrefillPool | None = None
    decode: DecodePool | None = None
    colocated: ColocatedPool | None = None
    cache: ContextCache | None = None
    router: RouterName = "any-idle"
    admission: AdmissionName = "none"
    memory_fraction: float = 0.9
    """HBM that weights, keys and values may fill."""
    losses: tuple[Loss, ...] = ()

    @property
    def npus(self) -> int:
        """Of all pools."""
        return sum(pool.total_npus for pool in self.pools.values())

    @property
    def pools(self) -> dict[str, Pool]:
        """The pools that there are, by name."""
        named = {"prefill": self.prefill, "decode": self.decode, "colocated": self.colocated}
        return {name: pool for name, pool in named.items() if pool is not None}

    def check(self, machine: Supernode) -> None:
        """Raise ValueError for a service that makes no sense or does not fit the machine."""
        pools = self.pools
        if set(pools) not in ({"prefill", "decode"}, {"colocated"}):
            found = " and ".join(pools) or "none"
            raise ValueError(
                f"{self.name}: a service has pools prefill and decode, or colocated; it has {found}"
            )
        for name, pool in pools.items():
            pool.check(name)
        if self.cache is not None:
            self.cache.check()
        machine.running(self.engine)  # what it does not know is refused here
        if self.npus > machine.npus:
            parts = ", ".join(f"{n} {p.instances} x {p.npus}" for n, p in pools.items())
            raise ValueError(
                f"{self.name}: {self.npus} NPUs ({parts}) are more than the {machine.npus} of "
                f"{machine.name}"
            )
        self.requests().of(self.deployment_for("decode", next(iter(pools.values()))))
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction must lie in 0..1, got {self.memory_fraction:g}")
        if self.decode is not None and self.decode.eplb_pause_s and not self.decode.eplb_every_s:
            raise ValueError("decode.eplb_pause_s needs decode.eplb_every_s")
        for loss in self.losses:
            if loss.pool not in pools or not 0 <= loss.instance < pools[loss.pool].instances:
                raise ValueError(f"losses: there is no instance {loss.instance} of {loss.pool}")
            if not 0 <= loss.at_s <= loss.back_s:
                raise ValueError(
                    f"losses: an instance cannot be lost at {loss.at_s:g} s and back at "
                    f"{loss.back_s:g} s"
                )

    def deployment(self, name: str) -> Deployment:
        """One instance of a pool, for its price."""
        return self.deployment_for("prefill" if name == "prefill" else "decode", self.pools[name])

    def deployment_for(self, phase: Literal["prefill", "decode"], pool: Pool) -> Deployment:
        """An instance of a pool in one phase."""
        return Deployment(
            phase=phase, model=self.model, npus=pool.npus, ep=pool.ep, tp=pool.tp,
            redundant=pool.redundant, quant=self.quant, kv_cache=self.kv_cache, mtp=self.mtp,
            drafts=self.drafts, engine=self.engine,
        )  # fmt: skip

    def requests(self, **given: float) -> Requests:
        """So many requests, of such lengths, under the service's acceptance and load."""
        return Requests(acceptance=self.acceptance, load=self.load, **given)

    def with_cache_blocks(self, blocks: int) -> "Service":
        """The same with a cache of so many blocks; 0 is none."""
        check_count("cache-blocks", blocks, least=0)
        cache = dataclasses.replace(self.cache or ContextCache(), blocks=blocks)
        return dataclasses.replace(self, cache=cache if blocks else None)


def paper_service(npus: int = 384, **fields) -> Service:
    """The paper's instances, prefill of 16 NPUs and decode of 160, filling `npus` in a ratio as
    near to its 6 : 1 as they go.

    Raises: ValueError: fewer NPUs than one of each.

    >>> service = paper_service(384)
    >>> service.prefill.instances, service.decode.instances, service.npus
    (14, 1, 384)
    """
    check_count("npus", npus, most=2**20)
    prefill, decode = PrefillPool(), DecodePool()
    least = prefill.npus + decode.npus
    if npus < least:
        raise ValueError(
            f"{npus} NPUs do not hold the paper's instances, a prefill of {prefill.npus} and a "
            f"decode of {decode.npus}; use {least} or more, or describe smaller ones in a file"
        )
    splits = []
    for decodes in range(1, (npus - prefill.npus) // decode.npus + 1):
        prefills = (npus - decodes * decode.npus) // prefill.npus
        ratio = prefills / (PAPER_RATIO * decodes)
        splits.append((max(ratio, 1 / ratio), prefills, decodes))
    _, prefills, decodes = min(splits)
    given = {
        "prefill": PrefillPool(instances=prefills),
        "decode": DecodePool(instances=decodes),
        "cache": ContextCache(),
    }
    return Service(name="cloudmatrix384", **(given | fields))
