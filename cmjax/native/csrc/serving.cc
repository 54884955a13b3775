// The serving event loop for ctypes: run, ask for the sizes of what grew, copy it out, let go.
#include <cstring>
#include <new>

#include "serving_simulation.h"

namespace {

using cmjax::serving::Cache;
using cmjax::serving::Inputs;
using cmjax::serving::Outputs;
using cmjax::serving::Progress;
using cmjax::serving::Simulation;

}  // namespace

// Null if `progress` stopped it, or for want of memory, and then `sizes[0]` is negative; `sizes` are
// those of bins and spans, and the events processed; `bin_s` is the width of a bin.
extern "C" void* cmjax_serve_run(const Inputs* in, const Outputs* out, Progress progress,
                                 int64_t* sizes, double* bin_s) try {
  auto simulation = std::make_unique<Simulation>(*in, *out);
  if (!simulation->run(progress)) return nullptr;
  sizes[0] = static_cast<int64_t>(simulation->gauges().bins.size());
  sizes[1] = static_cast<int64_t>(simulation->spans.size());
  sizes[2] = simulation->processed;
  *bin_s = simulation->gauges().bin_s;
  return simulation.release();
} catch (const std::bad_alloc&) {
  sizes[0] = -1;
  return nullptr;
}

extern "C" void cmjax_serve_take(void* handle, double* bins, double* spans) {
  const std::unique_ptr<Simulation> simulation(static_cast<Simulation*>(handle));
  const auto& kept = simulation->gauges().bins;
  if (!kept.empty()) std::memcpy(bins, kept.data(), kept.size() * sizeof(double));
  if (!simulation->spans.empty()) {
    std::memcpy(spans, simulation->spans.data(), simulation->spans.size() * sizeof(double));
  }
}

// Blocks that requests, one after another, find in a cache of one store at once.
extern "C" void cmjax_serve_hits(const Inputs* in, int64_t* hits) {
  Cache cache(*in);
  int64_t from_disk;
  for (int64_t i = 0; i < in->n; ++i) {
    const int32_t* blocks = in->block + in->block_start[i];
    const int64_t count = in->block_start[i + 1] - in->block_start[i];
    hits[i] = cache.fetch(0, blocks, count, &from_disk);
    for (int64_t b = 0; b < count; ++b) cache.insert(0, blocks[b]);
  }
}
