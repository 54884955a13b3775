// A worker's batch, and where every request stands (cmjax/serving/engine/worker.py and state.py).
#pragma once
#include <deque>
#include <functional>
#include <queue>
#include <tuple>
#include <vector>

#include "serving_table.h"

namespace cmjax::serving {

struct Request {
  int64_t prompt, computed = 0, done = 0, joined = 0, epoch = 0;
  int64_t kept = 0, kept_until = 0;  // of what was computed before a preemption
  int64_t before = -1, after = -1;  // in its worker's batch, by admission
  double token_s = -1.0;  // of the last token before it began to decode
  int32_t worker = -1;
  bool in_batch = false;
};

struct Requests {
  const Inputs& in;
  const Outputs& out;
  std::vector<Request> state;

  Requests(const Inputs& in, const Outputs& out) : in(in), out(out), state(in.n) {
    for (int64_t i = 0; i < in.n; ++i) {
      state[i].prompt = in.prompt[i];
      out.ended[i] = kOpen;
      out.arrival_s[i] = in.arrival_s[i];
      out.scheduled_s[i] = out.first_s[i] = out.decode_s[i] = out.last_s[i] = -1.0;
      out.hit_blocks[i] = out.hit_tokens[i] = 0;
      out.retries[i] = 0;
      out.prefill_worker[i] = out.decode_worker[i] = -1;
    }
  }

  Request& operator[](int64_t i) { return state[i]; }
  const int32_t* blocks(int64_t i) const { return in.block + in.block_start[i]; }
  int64_t block_count(int64_t i) const { return in.block_start[i + 1] - in.block_start[i]; }

  int64_t needs(int64_t i) const { return (state[i].prompt << kFixed) + in.growth[i]; }

  void retry(int64_t i) {
    Request& r = state[i];
    ++r.epoch;
    ++out.retries[i];
    r.computed = 0;
    r.worker = -1;
    if (out.first_s[i] >= 0.0) {
      r.prompt = in.prompt[i] + 1 + ((r.done * in.growth[i]) >> kFixed);
    }
  }
};

struct Worker {
  int32_t index, role;
  const TableInputs& table;
  int64_t ranks, max_requests, max_tokens, chunk, capacity, waste, claimed = 0;
  bool keeps;
  double ready_s, pause_every_s, pause_s;
  int64_t pauses = 0;
  bool alive = true, busy = false;
  std::deque<int64_t> waiting;
  int64_t first = -1, last = -1, batch = 0;
  std::vector<int64_t> prefilling, chunks, joiners;
  int64_t decoding = 0, step = 0, kv_decode = 0, kv_prefill = 0, growth = 0;
  int64_t outstanding = 0, coming = 0, version = 0, steps = 0, peak_kv = 0;
  double start_s = 0.0, end_s = 0.0, busy_s = 0.0;
  using Finish = std::tuple<int64_t, int64_t, int64_t>;  // step, request, epoch
  std::priority_queue<Finish, std::vector<Finish>, std::greater<Finish>> finishes;

  Worker(const Inputs& in, int32_t i)
      : index(i), role(in.role[i]), table(in.tables[in.table[i]]), ranks(in.ranks[i]),
        max_requests(in.max_requests[i]), max_tokens(in.max_tokens[i]),
        chunk(in.chunk[i] ? in.chunk[i] : kNever),
        capacity(in.capacity[i] ? in.capacity[i] : kNever), waste(in.waste[i]), keeps(in.keeps[i] != 0),
        ready_s(in.start_s[i]), pause_every_s(in.pause_every_s[i]), pause_s(in.pause_s[i]) {}

  bool prefills() const { return role != kDecode; }
  int64_t kv() const { return kv_decode + kv_prefill + batch * waste; }
  bool fits(int64_t tokens) const {
    return batch < max_requests && kv() + tokens + waste + growth <= capacity;
  }
  int64_t load() const {
    return role == kPrefill ? outstanding
                            : batch + static_cast<int64_t>(waiting.size()) + coming;
  }

  int64_t next_finish(Requests& requests) {
    while (!finishes.empty()) {
      const auto& [at, request, epoch] = finishes.top();
      if (requests[request].epoch == epoch) return at;
      finishes.pop();
    }
    return kNever;
  }

  double steps_s(int64_t tokens, int64_t work, int64_t sequences, int64_t count) const {
    const double length = tokens ? static_cast<double>(work) / static_cast<double>(tokens) : 0.0;
    double context = 0.0;
    if (decoding) {
      const int64_t middle = kv_decode + growth * (count - 1) / 2;
      context = static_cast<double>(middle) / static_cast<double>(decoding << kFixed);
    }
    const int64_t per_rank = (decoding + ranks - 1) / ranks;
    const int64_t total = tokens + decoding * table.decode_tokens;
    return step_s(table, tokens, length, per_rank, context, total, sequences);
  }

  void enter(Requests& requests, int64_t i) {
    Request& r = requests[i];
    if (r.in_batch) return;
    r.in_batch = true;
    r.before = last;
    r.after = -1;
    if (last >= 0) requests[last].after = i;
    if (first < 0) first = i;
    last = i;
    ++batch;
  }

  void leave(Requests& requests, int64_t i) {
    Request& r = requests[i];
    r.in_batch = false;
    if (r.before >= 0) requests[r.before].after = r.after;
    if (r.after >= 0) requests[r.after].before = r.before;
    if (first == i) first = r.after;
    if (last == i) last = r.before;
    --batch;
  }
};

}  // namespace cmjax::serving
