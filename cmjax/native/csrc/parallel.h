// Spread blocks of work over XLA's own thread pool.
//
// The caller is itself a thread of that pool, so it must never wait for tasks that might not have
// started: it works through the blocks with the helpers, and then waits only for blocks that a
// helper has already taken. A helper that comes too late finds no block left and touches nothing
// but the shared counter.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace cmjax {

// Workers that `parallel_for` may use at once: the size of per-worker scratch.
inline int64_t worker_count(const xla::ffi::ThreadPool& pool, int64_t blocks) {
  return std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), blocks));
}

// Call `body(block, worker)` for every block in [0, blocks), workers in [0, workers).
// Two calls with the same worker never overlap. `workers` comes from `worker_count`.
template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t blocks, int64_t workers, const Body& body) {
  if (workers <= 1) {
    for (int64_t block = 0; block < blocks; ++block) body(block, int64_t{0});
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto shared = std::make_shared<Shared>();
  const Body* work = &body;  // outlives every block: the caller waits for all of them
  auto drain = [shared, work, blocks](int64_t worker) {
    for (;;) {
      const int64_t block = shared->next.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks) return;
      (*work)(block, worker);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t worker = 1; worker < workers; ++worker) {
    pool.Schedule([drain, worker] { drain(worker); });
  }
  drain(0);
  while (shared->done.load(std::memory_order_acquire) < blocks) std::this_thread::yield();
}

}  // namespace cmjax
