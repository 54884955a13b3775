"""`cmjax micro`: one kernel or one exchange, the way vendors measure them."""

import dataclasses

import jax
import tyro
from rich.console import Console

from cmjax import report
from cmjax.console import check_target, emit
from cmjax.cost.micro import micro
from cmjax.hardware import Supernode, load_machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Micro:
    """Price one kernel or exchange: `cmjax micro dispatch --ep 8 --tokens 128`."""

    operator: tyro.conf.Positional[str]
    """dispatch, combine, gemm, latent-attention, decode-attention or attention."""
    on: str = "cloudmatrix384"
    """Machine: a name of the catalog, or a .toml file."""
    json: str | None = None
    """Write the result as JSON to this file; `-` is standard output."""
    ep: int | None = None
    """Ranks of a dispatch or combine."""
    tokens: int | None = None
    """Tokens per rank of a dispatch or combine."""
    copies: int | None = None
    """Experts a token goes to (default 8)."""
    hidden: int | None = None
    """Width of a token (default 7168)."""
    experts: int | None = None
    """Routed experts over all ranks (default 256)."""
    quant: str | None = None
    """int8 (default) or bf16."""
    engine: str | None = None
    """Serving engine whose exchange kernels run (default: the machine's first one)."""
    after: int | None = None
    """Microseconds of work that the ranks of an exchange come from, and differ by (default 0)."""
    m: int | None = None
    """Rows of a gemm."""
    k: int | None = None
    """Inner size of a gemm."""
    n: int | None = None
    """Columns of a gemm."""
    groups: int | None = None
    """Matrix products in one kernel (default 1)."""
    batch: int | None = None
    """Requests of an attention."""
    heads: int | None = None
    """Query heads of an attention."""
    kv_heads: int | None = None
    """Key and value heads of a decode-attention."""
    q_len: int | None = None
    """New tokens per request of a latent-attention or decode-attention (there 1 by default)."""
    context: int | None = None
    """Cached tokens per request of a latent-attention or decode-attention."""
    kv_cache: str | None = None
    """bf16 (default) or int8 latent cache."""
    length: int | None = None
    """Prompt length of an attention."""

    def run(self, console: Console) -> None:
        check_target(self.json)
        result = self.measure(load_machine(self.on))
        shown = {key: value for key, value in result.items() if value}  # an exchange has no TFLOPS
        emit(console, self.json, result, report.key_value_table(self.operator, shown))

    def measure(self, machine: Supernode) -> dict[str, float]:
        """Time, rate, utilization and bandwidth on `machine`."""
        own = ("operator", "on", "json")
        options = {k: v for k, v in vars(self).items() if k not in own and v is not None}
        benchmark = micro(self.operator, machine, **options)
        return {k: float(v) for k, v in jax.jit(benchmark.measure)(machine).items()}
