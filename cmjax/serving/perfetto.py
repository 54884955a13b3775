"""The busy intervals of instances as Chrome's trace format, which Perfetto opens."""

import json

import numpy as np

from cmjax.serving.engine import GAUGES, EngineOutputs
from cmjax.serving.service import Service


def perfetto_text(service: Service, out: EngineOutputs, bin_s: float) -> str:
    """A row per instance, a counter per gauge; one event a line."""
    events: list[dict] = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": service.name}}
    ]
    index = 0
    for name, pool in service.pools.items():
        for i in range(pool.instances):
            events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": index,
                           "args": {"name": f"{name} {i}"}})  # fmt: skip
            index += 1
    for worker, start_s, end_s, tokens, decoding, steps in out.spans.tolist():
        args = {"prompt_tokens": int(tokens), "requests": int(decoding), "steps": int(steps)}
        what = "prefill" if not decoding else "decode" if not tokens else "prefill + decode"
        events.append({
            "name": what, "ph": "X", "pid": 0, "tid": int(worker),
            "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6, "args": args,
        })  # fmt: skip
    means = out.gauges / bin_s
    for at, row in zip(np.arange(len(means)) * bin_s * 1e6, means.tolist(), strict=True):
        events += [
            {"name": name, "ph": "C", "pid": 0, "ts": at, "args": {name: value}}
            for name, value in zip(GAUGES, row, strict=True)
        ]
    lines = ",\n".join(json.dumps(event) for event in events)
    return f'{{"displayTimeUnit": "ms", "traceEvents": [\n{lines}\n]}}\n'
