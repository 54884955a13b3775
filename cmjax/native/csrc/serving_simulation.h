// The event loop (cmjax/serving/engine/simulation.py, router.py, admission.py and events.py).
#pragma once
#include <limits>
#include <memory>

#include "serving_scheduler.h"

namespace cmjax::serving {

class Simulation final : private Leaving {
 public:
  Simulation(const Inputs& in, const Outputs& out)
      : in_(in), out_(out), requests_(in, out), cache_(in),
        scheduler_(in, out, requests_, cache_, *this), links_(in.workers * in.links, 0.0),
        next_rank_(in.workers, 0), gauges_{in.bin_s, {}, {}, {}} {
    workers_.reserve(in.workers);
    for (int32_t i = 0; i < in.workers; ++i) workers_.emplace_back(in, i);
    for (Worker& w : workers_) (w.role == kDecode ? decode_ : prefill_).push_back(&w);
    std::fill_n(out.gaps, kGapBins, int64_t{0});
  }

  // False if `progress` stopped it.
  bool run(Progress progress) {
    for (int64_t i = 0; i < in_.losses; ++i) {
      push(in_.loss_s[i], kLoss, i);
      push(in_.back_s[i], kBack, in_.loss_worker[i]);
    }
    for (const Worker& w : workers_) {
      if (w.ready_s > 0.0) push(w.ready_s, kBack, w.index);
    }
    for (int64_t i = 0; i < std::min(in_.clients, in_.n); ++i) next_client(0.0);
    int64_t report = kProgressEvery;
    while (ended_ < in_.n) {
      const double now = std::min(next_arrival_s(), next_event_s());
      if (now == kForever) break;
      instant(now);
      if (progress != nullptr && processed >= report) {
        report = processed + kProgressEvery;
        if (progress(ended_)) return false;
      }
    }
    double end_s = in_.n ? out_.last_s[0] : 0.0;
    for (int64_t i = 0; i < in_.n; ++i) end_s = std::max(end_s, out_.last_s[i]);
    for (int g = 0; g < kGauges; ++g) gauges_.advance(g, std::max(end_s, gauges_.since[g]));
    for (const Worker& w : workers_) {
      out_.peak_kv[w.index] = w.peak_kv;
      out_.busy_s[w.index] = w.busy_s;
    }
    return true;
  }

  int64_t processed = 0;
  std::vector<double> spans;
  const Gauges& gauges() const { return gauges_; }

 private:
  static constexpr double kForever = std::numeric_limits<double>::infinity();
  enum Kind : int64_t { kStep, kHandover, kLoss, kBack, kArrival };
  struct Event {
    double time;
    int64_t made, kind, subject, version;
    bool operator>(const Event& other) const {
      return time != other.time ? time > other.time : made > other.made;
    }
  };

  void push(double time, int64_t kind, int64_t subject, int64_t version = 0) {
    events_.push({time, made_++, kind, subject, version});
  }
  double next_event_s() const { return events_.empty() ? kForever : events_.top().time; }
  double next_arrival_s() const {
    return in_.clients || arrived_ == in_.n ? kForever : in_.arrival_s[arrived_];
  }

  void instant(double now) {
    while (next_arrival_s() <= now) {
      ++arrived_;
      arrive(arrived_ - 1, now);
    }
    while (next_event_s() <= now) {
      const Event event = events_.top();
      events_.pop();
      happen(event, now);
    }
    share(now);
    for (Worker& w : workers_) {
      if (!w.alive || now < w.ready_s) continue;
      if (w.busy) {
        cut_short(w, now);
      } else if (!w.waiting.empty() || w.batch) {
        if (scheduler_.start(w, now)) push(w.end_s, kStep, w.index, w.version);
      }
    }
    gauge(now);
  }

  void happen(const Event& event, double now) {
    ++processed;
    switch (event.kind) {
      case kArrival:
        return arrive(event.subject, now);
      case kStep: {
        Worker& w = workers_[event.subject];
        if (w.version != event.version || !w.busy) return;
        count(w, now);
        return scheduler_.end(w, now);
      }
      case kHandover:
        return handed_over(event.subject, now);
      case kLoss:
        return lose(workers_[in_.loss_worker[event.subject]], now);
      case kBack:
        return back(workers_[event.subject], now);
    }
  }

  void arrive(int64_t request, double now) {
    ++processed;
    out_.arrival_s[request] = now;
    ++pending_;
    if (!admitted(requests_[request].prompt)) {
      --pending_;
      return end(request, kRejected, now);
    }
    dispatch(request, now);
  }

  void dispatch(int64_t request, double) {
    const int64_t prompt = requests_[request].prompt;
    Worker* w = choose(request);
    if (w == nullptr) {
      queue_.push_back(request);
      queued_tokens_ += prompt;
    } else {
      w->waiting.push_back(request);
      w->outstanding += prompt;
    }
  }

  Worker* choose(int64_t request) {
    int64_t alive = 0;
    for (const Worker* w : prefill_) alive += w->alive;
    if (in_.router == kAnyIdle || alive == 0) return nullptr;
    if (in_.router == kRoundRobin) {
      int64_t turn = turn_++ % alive;
      for (Worker* w : prefill_) {
        if (w->alive && turn-- == 0) return w;
      }
    }
    Worker* best = nullptr;
    int64_t least = 0;
    for (Worker* w : prefill_) {
      if (!w->alive) continue;
      const int64_t load = in_.router == kCacheAware ? uncached_load(*w, request) : w->load();
      if (best == nullptr || load < least) {
        best = w;
        least = load;
      }
    }
    return best;
  }

  int64_t uncached_load(const Worker& w, int64_t request) const {
    const int64_t prompt = requests_.state[request].prompt;
    int64_t hits = 0;
    if (in_.stores) {
      hits = cache_.peek(scheduler_.store(w), requests_.blocks(request),
                         requests_.block_count(request)) * in_.block_tokens;
      hits = std::min(hits, prompt - 1);
    }
    return w.outstanding + prompt - hits;
  }

  // Hand the common queue to idle workers, the one with the fewest tokens first.
  void share(double now) {
    while (!queue_.empty()) {
      Worker* best = nullptr;
      for (Worker* w : prefill_) {
        const int64_t held = w->batch + static_cast<int64_t>(w->waiting.size());
        const bool takes = w->alive && !w->busy && now >= w->ready_s &&
                           w->outstanding < w->max_tokens && held < w->max_requests;
        if (takes && (best == nullptr || w->outstanding < best->outstanding)) best = w;
      }
      if (best == nullptr) return;
      const int64_t request = queue_.front();
      queue_.pop_front();
      queued_tokens_ -= requests_[request].prompt;
      best->waiting.push_back(request);
      best->outstanding += requests_[request].prompt;
    }
  }

  bool admitted(int64_t prompt) const {
    if (in_.admission == kNone || in_.admission == kLate) return true;
    int64_t alive = 0, queued = queued_tokens_;
    for (const Worker* w : prefill_) {
      alive += w->alive;
      queued += w->outstanding;
    }
    if (alive == 0) return false;
    const double wait_s = static_cast<double>(queued + prompt) /
                          (static_cast<double>(alive) * in_.prefill_tokens_per_s);
    if (wait_s > in_.slo_ttft_s) return false;
    if (decode_.empty()) return true;
    double running = static_cast<double>(decode_running());
    if (in_.admission == kPredictive) {
      if (decoded_) {
        const double mean_s = decoded_s_ / static_cast<double>(decoded_);
        const double left = wait_s < mean_s ? 1.0 - wait_s / mean_s : 0.0;
        running = running * left;
      }
      running = running + static_cast<double>(pending_);
    }
    return running < decode_room();
  }

  int64_t decode_running() const {
    int64_t found = 0;
    for (const Worker* w : decode_) found += w->batch + static_cast<int64_t>(w->waiting.size());
    return found;
  }
  double decode_room() const {
    int64_t alive = 0;
    for (const Worker* w : decode_) alive += w->alive;
    return static_cast<double>(in_.decode_limit * alive);
  }

  void prefilled(Worker& w, int64_t request, double now) override {
    if (in_.admission == kLate && !(static_cast<double>(decode_running()) < decode_room())) {
      --pending_;
      return end(request, kRejectedLate, now);
    }
    Worker* target = nullptr;
    for (Worker* d : decode_) {
      if (d->alive && (target == nullptr || d->load() < target->load())) target = d;
    }
    if (target == nullptr) {
      homeless_.push_back(request);
      return;
    }
    const int64_t rank = next_rank_[target->index];
    next_rank_[target->index] = (rank + 1) % target->ranks;
    double& link = links_[w.index * in_.links + rank * in_.links / target->ranks];
    link = std::max(now, link) + static_cast<double>(requests_[request].prompt) * in_.handover_s;
    requests_[request].worker = target->index;
    ++target->coming;
    push(link + in_.handover_latency_s, kHandover, request);
  }

  void handed_over(int64_t request, double now) {
    Worker& target = workers_[requests_[request].worker];
    --target.coming;
    if (!target.alive) {
      requests_.retry(request);
      return dispatch(request, now);
    }
    --pending_;
    target.waiting.push_back(request);
  }

  void given_up(int64_t request, double now) override {
    ++pending_;
    dispatch(request, now);
  }

  void done(int64_t request, double now) override {
    out_.last_s[request] = now;
    if (workers_[requests_[request].worker].role != kDecode) {
      --pending_;
    } else {
      ++decoded_;
      decoded_s_ += now - out_.decode_s[request];
    }
    end(request, kCompleted, now);
  }

  void end(int64_t request, Ended how, double now) {
    out_.ended[request] = how;
    ++ended_;
    if (in_.clients) next_client(now + in_.think_s);
  }

  void next_client(double now) {
    if (arrived_ < in_.n) push(now, kArrival, arrived_++);
  }

  void lose(Worker& w, double now) {
    w.alive = false;
    for (int64_t request : scheduler_.lose(w, now)) {
      if (w.role == kDecode) {
        given_up(request, now);
      } else {
        dispatch(request, now);
      }
    }
  }

  void back(Worker& w, double now) {
    w.alive = true;
    std::vector<int64_t> homeless;
    homeless.swap(homeless_);
    for (int64_t request : homeless) {
      prefilled(workers_[out_.prefill_worker[request]], request, now);
    }
    if (in_.router != kAnyIdle) {
      std::deque<int64_t> queue;
      queue.swap(queue_);
      queued_tokens_ = 0;
      for (int64_t request : queue) dispatch(request, now);
    }
  }

  void cut_short(Worker& w, double now) {
    bool waits = scheduler_.joinable(w);
    if (!waits && w.prefills() && !queue_.empty() && w.waiting.empty()) {
      waits = w.fits(requests_.needs(queue_.front()));
    }
    if (waits && scheduler_.truncate(w, now)) push(w.end_s, kStep, w.index, w.version);
  }

  void count(Worker& w, double now) {
    if (w.decoding) {
      const double gap_s = (now - w.start_s) / static_cast<double>(w.steps);
      out_.gaps[gap_bin(gap_s)] +=
          w.decoding * w.steps - static_cast<int64_t>(w.joiners.size());
      for (int64_t request : w.joiners) {
        ++out_.gaps[gap_bin(w.start_s + gap_s - requests_[request].token_s)];
      }
      w.joiners.clear();
    }
    if (static_cast<int64_t>(spans.size()) < 6 * in_.record) {
      int64_t tokens = 0;
      for (int64_t chunk : w.chunks) tokens += chunk;
      for (double value : {static_cast<double>(w.index), w.start_s, now,
                           static_cast<double>(tokens), static_cast<double>(w.decoding),
                           static_cast<double>(w.steps)}) {
        spans.push_back(value);
      }
    }
  }

  void gauge(double now) {
    int64_t queued = static_cast<int64_t>(queue_.size()), busy = 0, ready = 0, running = 0;
    int64_t decode_busy = 0, kv = 0;
    for (const Worker& w : workers_) {
      if (w.role == kDecode) {
        ready += static_cast<int64_t>(w.waiting.size()) + w.coming;
        decode_busy += w.busy;
        kv += w.kv_decode >> kFixed;
      } else {
        queued += static_cast<int64_t>(w.waiting.size());
        busy += w.busy;
        kv += (w.kv_decode + w.kv_prefill) >> kFixed;
      }
      running += w.decoding;
    }
    const int64_t values[kGauges] = {queued, busy, ready, running, decode_busy, kv};
    for (int g = 0; g < kGauges; ++g) gauges_.set(g, now, static_cast<double>(values[g]));
  }

  const Inputs& in_;
  const Outputs& out_;
  Requests requests_;
  Cache cache_;
  Scheduler scheduler_;
  std::vector<Worker> workers_;
  std::vector<Worker*> prefill_, decode_;
  std::deque<int64_t> queue_;
  int64_t queued_tokens_ = 0, turn_ = 0, pending_ = 0, decoded_ = 0, arrived_ = 0, ended_ = 0;
  double decoded_s_ = 0.0;
  std::vector<double> links_;
  std::vector<int64_t> next_rank_;
  std::vector<int64_t> homeless_;
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  int64_t made_ = 0;
  Gauges gauges_;
};

}  // namespace cmjax::serving
