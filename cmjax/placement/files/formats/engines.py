"""Engines that load a plan: how each chooses a copy, and what it has to be told beside the file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cmjax.placement.plan import Plan


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
      name: as people write it.
      routing: how its tokens choose among copies (`cmjax.placement.routing`).
      options: what it has to be told for a plan in a file, in one line.
      numbered: whether its file goes by the model's layer numbers.
    """

    name: str
    routing: str
    options: Callable[[Plan, str], str]
    numbered: bool = False


def _sglang(plan, path):
    nodes = f" --nnodes {plan.nodes}" if plan.nodes > 1 else ""
    return (
        f"--init-expert-location {path} --ep-num-redundant-experts {_redundant(plan)} "
        f"--ep-size {plan.ranks}{nodes}"
    )


def _vllm_ascend(plan, path):
    config = f'{{"expert_map_path": "{path}", "num_redundant_experts": {_redundant(plan)}}}'
    return (
        f"--additional-config '{{\"eplb_config\": {config}}}'; vLLM-Ascend is giving up this "
        f"static file for vLLM's own map (--format vllm)"
    )


def _vllm(plan, path):
    return (
        f"--enable-expert-parallel --enable-eplb --eplb-config "
        f"'{{\"num_redundant_experts\": {_redundant(plan)}}}', with {path} as its offline map"
    )


def _tensorrt_llm(plan, path):
    return (
        f"moe_config: {{load_balancer: {path}}} and moe_expert_parallel_size: {plan.ranks}; the "
        f"{plan.slots} slots, {_redundant(plan)} of them redundant, are in the file"
    )


def _redundant(plan):
    return plan.slots - plan.experts


ENGINES: Mapping[str, Engine] = {
    "sglang": Engine("SGLang", "nearest-copy", _sglang, numbered=True),
    "vllm-ascend": Engine("vLLM-Ascend", "rank-modulo", _vllm_ascend),
    "vllm": Engine("vLLM", "even", _vllm),
    "tensorrt-llm": Engine("TensorRT-LLM", "even", _tensorrt_llm, numbered=True),
}
"""By the name of the format that each loads."""


def routing_of(format: str) -> str:
    """How the engine that loads a format chooses a copy; `even` for cmjax's own."""
    return ENGINES[format].routing if format in ENGINES else "even"
