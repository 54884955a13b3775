// Continuous batching (cmjax/serving/engine/scheduler.py, whose comments say why).
#pragma once
#include <algorithm>

#include "serving_cache.h"
#include "serving_worker.h"

namespace cmjax::serving {

// What leaves a worker.
struct Leaving {
  virtual void prefilled(Worker& worker, int64_t request, double now) = 0;
  virtual void done(int64_t request, double now) = 0;
  virtual void given_up(int64_t request, double now) = 0;

 protected:
  ~Leaving() = default;
};

class Scheduler {
 public:
  Scheduler(const Inputs& in, const Outputs& out, Requests& requests, Cache& cache, Leaving& leaving)
      : in_(in), out_(out), requests_(requests), cache_(cache), leaving_(leaving) {}

  int64_t store(const Worker& w) const { return in_.stores > 1 ? w.index : 0; }

  bool joinable(const Worker& w) const {
    return !w.waiting.empty() && w.fits(requests_.needs(w.waiting.front()));
  }

  bool start(Worker& w, double now) {
    const bool preempted = make_room(w, now);
    Plan plan;
    continue_prefills(w, plan);
    if (!preempted) admit(w, now, plan);
    if (plan.tokens == 0 && w.decoding == 0) return false;
    const double pause_s = pause(w, now);
    int64_t steps = 1;
    if (plan.tokens == 0 && pause_s == 0.0) {
      steps = std::min(w.next_finish(requests_) - w.step, kMostSteps);
      if (w.growth) steps = std::min(steps, (w.capacity - w.kv()) / w.growth);
    }
    const int64_t sequences = w.decoding + static_cast<int64_t>(w.chunks.size());
    const double each = w.steps_s(plan.tokens, plan.work, sequences, steps);
    if (w.pause_s > 0.0 && steps > 1) {
      const double until_s = static_cast<double>(w.pauses + 1) * w.pause_every_s - now;
      steps = std::min(steps, static_cast<int64_t>(until_s / each) + 1);
    }
    const double duration = static_cast<double>(steps) * each;
    w.busy = true;
    ++w.version;
    w.steps = steps;
    w.start_s = now;
    w.end_s = now + (duration + plan.fetch_s + pause_s);
    return true;
  }

  bool truncate(Worker& w, double now) {
    if (w.steps == 1) return false;
    const double each = (w.end_s - w.start_s) / static_cast<double>(w.steps);
    const int64_t steps = static_cast<int64_t>((now - w.start_s) / each) + 1;
    if (steps >= w.steps) return false;
    w.steps = steps;
    w.end_s = std::max(w.start_s + static_cast<double>(steps) * each, now);
    ++w.version;
    return true;
  }

  void end(Worker& w, double now) {
    w.busy = false;
    w.busy_s += now - w.start_s;
    w.step += w.steps;
    w.kv_decode += w.growth * w.steps;
    w.claimed += w.growth * w.steps;
    w.peak_kv = std::max(w.peak_kv, w.kv());
    while (w.next_finish(requests_) <= w.step) {
      const int64_t request = std::get<1>(w.finishes.top());
      w.finishes.pop();
      leave_decode(w, request);
      leaving_.done(request, now);
    }
    scratch_.assign(w.prefilling.begin(), w.prefilling.begin() + w.chunks.size());
    for (size_t i = 0; i < scratch_.size(); ++i) {
      Request& r = requests_[scratch_[i]];
      r.computed += w.chunks[i];
      w.outstanding -= w.chunks[i];
      if (r.computed == r.prompt) prefilled(w, scratch_[i], now);
    }
    w.chunks.clear();
  }

  std::vector<int64_t> lose(Worker& w, double now) {
    if (w.busy) {
      const double each = (w.end_s - w.start_s) / static_cast<double>(w.steps);
      const int64_t steps = std::min(static_cast<int64_t>((now - w.start_s) / each), w.steps - 1);
      w.step += steps;
      w.kv_decode += steps * w.growth;
      w.busy_s += now - w.start_s;
    }
    w.busy = false;
    ++w.version;
    w.chunks.clear();
    w.joiners.clear();
    std::vector<int64_t> lost;
    for (int64_t i = w.first; i >= 0; i = requests_[i].after) lost.push_back(i);
    for (int64_t request : lost) evict(w, request, now);
    for (int64_t request : w.waiting) {
      lost.push_back(request);
      if (w.prefills()) {
        w.outstanding -= requests_[request].prompt;
      } else {
        requests_.retry(request);
      }
    }
    w.waiting.clear();
    return lost;
  }

 private:
  struct Plan {
    int64_t tokens = 0, work = 0;
    double fetch_s = 0.0;
  };

  bool make_room(Worker& w, double now) {
    bool preempted = false;
    while (w.decoding && w.kv() + w.growth > w.capacity) {
      const int64_t request = w.last;
      const int64_t free = w.capacity - w.kv(), held = w.kv();
      evict(w, request, now);
      preempted = true;
      if (w.role == kColocated) {
        if (w.keeps) {
          requests_[request].kept = held - w.kv() - w.waste;
          requests_[request].kept_until = w.claimed + free;
        }
        w.waiting.push_front(request);
        w.outstanding += requests_[request].prompt;
      } else {
        leaving_.given_up(request, now);
      }
    }
    return preempted;
  }

  void add_chunk(Worker& w, Plan& plan, const Request& r, int64_t chunk) {
    plan.tokens += chunk;
    plan.work += chunk * (2 * r.computed + chunk);
    w.chunks.push_back(chunk);
  }

  void continue_prefills(Worker& w, Plan& plan) {
    w.chunks.clear();
    const int64_t budget = w.max_tokens - w.decoding * w.table.decode_tokens;
    for (int64_t request : w.prefilling) {
      const Request& r = requests_[request];
      const int64_t chunk = std::min({r.prompt - r.computed, budget - plan.tokens, w.chunk});
      if (chunk <= 0) break;
      add_chunk(w, plan, r, chunk);
    }
  }

  void admit(Worker& w, double now, Plan& plan) {
    const int64_t budget = w.max_tokens - w.decoding * w.table.decode_tokens;
    int64_t memory_tokens = 0, disk_tokens = 0;
    while (joinable(w)) {
      if (!w.prefills()) {
        const int64_t request = w.waiting.front();
        w.waiting.pop_front();
        join_decode(w, request, now);
        continue;
      }
      if (plan.tokens >= budget || w.chunks.size() < w.prefilling.size()) break;
      const int64_t i = w.waiting.front();
      w.waiting.pop_front();
      if (requests_[i].kept) {
        find_kept(w, requests_[i]);
      } else if (in_.stores) {
        fetch(w, i, &memory_tokens, &disk_tokens);
      }
      if (out_.scheduled_s[i] < 0.0) out_.scheduled_s[i] = now;
      Request& r = requests_[i];
      out_.prefill_worker[i] = w.index;
      r.worker = w.index;
      w.enter(requests_, i);
      w.prefilling.push_back(i);
      w.kv_prefill += r.prompt << kFixed;
      w.claimed += (r.prompt - r.computed) << kFixed;
      add_chunk(w, plan, r, std::min({r.prompt - r.computed, budget - plan.tokens, w.chunk}));
    }
    if (memory_tokens + disk_tokens > 0) {
      plan.fetch_s = in_.latency_s + static_cast<double>(memory_tokens) * in_.memory_s +
                     static_cast<double>(disk_tokens) * in_.disk_s;
    }
  }

  void find_kept(Worker& w, Request& r) {
    const int64_t gone = std::max(w.claimed - r.kept_until, int64_t{0});
    const int64_t kept = std::max(r.kept - gone, int64_t{0}) >> kFixed;
    r.kept = 0;
    r.computed = std::min(kept, r.prompt - 1);
    w.outstanding -= r.computed;
  }

  void fetch(Worker& w, int64_t i, int64_t* memory_tokens, int64_t* disk_tokens) {
    Request& r = requests_[i];
    int64_t from_disk = 0;
    const int64_t hits =
        cache_.fetch(store(w), requests_.blocks(i), requests_.block_count(i), &from_disk);
    const int64_t tokens = std::min(hits * in_.block_tokens, r.prompt - 1);
    if (out_.scheduled_s[i] < 0.0) {
      out_.hit_blocks[i] = hits;
      out_.hit_tokens[i] = tokens;
    }
    r.computed = tokens;
    w.outstanding -= tokens;
    const int64_t disk = std::min(from_disk * in_.block_tokens, tokens);
    *memory_tokens += tokens - disk;
    *disk_tokens += disk;
  }

  double pause(Worker& w, double now) {
    if (w.pause_s == 0.0) return 0.0;
    const int64_t due = static_cast<int64_t>(now / w.pause_every_s);
    if (due <= w.pauses) return 0.0;
    w.pauses = due;
    return w.pause_s;
  }

  void prefilled(Worker& w, int64_t i, double now) {
    Request& r = requests_[i];
    w.prefilling.erase(std::find(w.prefilling.begin(), w.prefilling.end(), i));
    w.kv_prefill -= r.prompt << kFixed;
    if (in_.stores) {
      const int64_t count = requests_.block_count(i);
      for (int64_t b = 0; b < count; ++b) cache_.insert(store(w), requests_.blocks(i)[b]);
    }
    if (out_.first_s[i] < 0.0) {
      out_.first_s[i] = now;
    } else {
      ++r.done;
    }
    r.token_s = now;
    if (r.done >= in_.steps[i]) {
      w.leave(requests_, i);
      leaving_.done(i, now);
    } else if (w.role == kColocated) {
      join_decode(w, i, now);
    } else {
      w.leave(requests_, i);
      leaving_.prefilled(w, i, now);
    }
  }

  void join_decode(Worker& w, int64_t i, double now) {
    Request& r = requests_[i];
    if (out_.decode_s[i] < 0.0) out_.decode_s[i] = now;
    out_.decode_worker[i] = w.index;
    r.worker = w.index;
    r.joined = w.step;
    w.joiners.push_back(i);
    w.enter(requests_, i);
    ++w.decoding;
    w.kv_decode += r.prompt << kFixed;
    w.growth += in_.growth[i];
    w.peak_kv = std::max(w.peak_kv, w.kv());
    w.finishes.emplace(w.step + in_.steps[i] - r.done, i, r.epoch);
  }

  void leave_decode(Worker& w, int64_t i) {
    Request& r = requests_[i];
    const int64_t steps = w.step - r.joined;
    --w.decoding;
    w.kv_decode -= (r.prompt << kFixed) + steps * in_.growth[i];
    w.growth -= in_.growth[i];
    r.done += steps;
    w.leave(requests_, i);
  }

  void evict(Worker& w, int64_t i, double now) {
    Request& r = requests_[i];
    const auto at = std::find(w.prefilling.begin(), w.prefilling.end(), i);
    if (at != w.prefilling.end()) {
      w.prefilling.erase(at);
      w.kv_prefill -= r.prompt << kFixed;
      w.outstanding -= r.prompt - r.computed;
      w.leave(requests_, i);
    } else {
      leave_decode(w, i);
      r.token_s = now;
    }
    requests_.retry(i);
  }

  const Inputs& in_;
  const Outputs& out_;
  Requests& requests_;
  Cache& cache_;
  Leaving& leaving_;
  std::vector<int64_t> scratch_;
};

}  // namespace cmjax::serving
