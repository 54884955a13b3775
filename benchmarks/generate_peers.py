"""One peer of `benchmarks.generate` in a process of its own: transformers on torch, or llama.cpp.

It runs in any Python that has the peer: it imports nothing of this project. Requests are lines of
JSON on standard input, answers lines on standard output:

    -> {"prompts": [[1, 2, 3]], "steps": 4}
    <- {"prefill_s": 0.1, "steps_s": [0.02, ...], "tokens": [[...]], "peak_bytes": 123456789}

The first line it writes says how loading went: {"load_s": ..., "load_peak_bytes": ..., "name":
...}, or {"absent": "why"}.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path


def main():
    kind, form, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    answers = private_output()
    started = time.perf_counter()
    try:
        name, turn = {"transformers": open_transformers, "llama.cpp": open_llama}[kind](
            folder, form
        )
    except ImportError as error:
        answer(answers, {"absent": f"{error}"})
        return
    loaded = {"load_s": time.perf_counter() - started, "load_peak_bytes": peak_bytes()}
    serve(answers, turn, {**loaded, "name": name})


def serve(answers, turn, loaded):
    """Answer requests until standard input ends."""
    answer(answers, loaded)
    for line in sys.stdin:
        request = json.loads(line)
        forget_peak()
        prefill_s, steps_s, tokens = turn(request["prompts"], request["steps"])
        answer(
            answers,
            {
                "prefill_s": prefill_s,
                "steps_s": steps_s,
                "tokens": tokens,
                "peak_bytes": peak_bytes(),
            },
        )


def private_output():
    """Standard output for answers only: what libraries print goes to standard error."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def answer(to, value):
    """Write a line at once."""
    to.write(json.dumps(value) + "\n")
    to.flush()


def peak_bytes():
    """Most resident memory of this process since `forget_peak`; None where the system has no
    /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def forget_peak():
    """Let the peak start from what is resident now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def open_transformers(folder, form):
    """A checkpoint in torch's `form`, and a turn of greedy decoding."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, form))
    model.eval()

    @torch.inference_mode()
    def turn(prompts, steps):
        tokens = torch.tensor(prompts)
        ticks, got = [time.perf_counter()], []
        found = model(tokens, use_cache=True, logits_to_keep=1)
        got.append(found.logits[:, -1].argmax(-1, keepdim=True))
        got[-1].tolist()
        ticks.append(time.perf_counter())
        for _ in range(steps):
            found = model(got[-1], past_key_values=found.past_key_values, use_cache=True)
            got.append(found.logits[:, -1].argmax(-1, keepdim=True))
            got[-1].tolist()
            ticks.append(time.perf_counter())
        return *durations(ticks), torch.cat(got, 1).tolist()

    return f"transformers {transformers.__version__} on torch {torch.__version__}", turn


def open_llama(folder, form):
    """The GGUF file of `form` in the folder (written on first use), and a turn of greedy decoding,
    all requests in one llama.cpp batch."""
    import llama_cpp  # pyright: ignore[reportMissingImports]
    import numpy as np
    from gguf_file import write_gguf

    path = folder / f"{form}.gguf"
    if not path.exists():
        write_gguf(folder, path, form)
    llama_cpp.llama_log_set(silent_callback(llama_cpp), None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    contexts = {}

    def context(requests, room):
        if (requests, room) not in contexts:
            for old in contexts.values():
                llama_cpp.llama_free(old)
            contexts.clear()
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = requests * room, requests
            params.n_batch = requests * room
            params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
            contexts[requests, room] = llama_cpp.llama_init_from_model(model, params)
        return contexts[requests, room]

    def run(held, rows):
        """One llama.cpp batch of (token, position, request, wanted); likeliest of the wanted."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for at, (token, position, request, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, request
            batch.logits[at] = wanted
        if llama_cpp.llama_decode(held, batch):
            raise RuntimeError("llama_decode failed")
        found = []
        for at, row in enumerate(rows):
            if row[3]:
                scores = llama_cpp.llama_get_logits_ith(held, at)
                found.append(int(np.ctypeslib.as_array(scores, (vocabulary,)).argmax()))
        llama_cpp.llama_batch_free(batch)
        return found

    def turn(prompts, steps):
        size = len(prompts[0])
        room = -(-(size + steps + 1) // 256) * 256
        held = context(len(prompts), room)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(held), True)
        rows = [
            (token, place, request, place == size - 1)
            for request, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        ticks = [time.perf_counter()]
        got = [run(held, rows)]
        ticks.append(time.perf_counter())
        for step in range(steps):
            rows = [(token, size + step, r, True) for r, token in enumerate(got[-1])]
            got.append(run(held, rows))
            ticks.append(time.perf_counter())
        return *durations(ticks), [list(each) for each in zip(*got, strict=True)]

    return f"llama.cpp of llama-cpp-python {llama_cpp.__version__}", turn


def silent_callback(llama_cpp):
    """A log callback that writes nothing; kept, because llama.cpp holds only its address."""
    global _silent
    _silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    return _silent


def durations(ticks):
    """Seconds of the prefill, and of each step."""
    each = [after - before for before, after in itertools.pairwise(ticks)]
    return each[0], each[1:]


if __name__ == "__main__":
    main()
