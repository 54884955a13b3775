// The handler of mel.h: check every buffer, and share the frames among XLA's threads.
#include "mel.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

MelKernel kernel() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx2) return mel_avx2();
#endif
  return mel_scalar();
}

// Where the transform in place leaves every frequency: digits in reverse, of 4, at last of 2.
std::vector<int64_t> places(int64_t half) {
  std::vector<int64_t> place(half);
  for (int64_t k = 0; k < half; ++k) {
    int64_t rest = k, at = 0, size = half;
    for (; size >= 4; size /= 4, rest /= 4) at += rest % 4 * (size / 4);
    place[k] = at + rest;
  }
  return place;
}

ffi::Error invalid(const char* what) {
  return ffi::Error::InvalidArgument(std::string("mel_energies: ") + what);
}

ffi::Error mel_energies(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                        ffi::Buffer<ffi::F32> window, ffi::Buffer<ffi::F32> turn,
                        ffi::Buffer<ffi::F32> filter, ffi::Buffer<ffi::S32> inside, int64_t shift,
                        float emphasis, ffi::ResultBuffer<ffi::F32> y) {
  const auto in = x.dimensions(), to = y->dimensions(), filters = filter.dimensions();
  if (in.size() != 2 || to.size() != 3 || in[0] != to[0]) {
    return invalid("x must be [batch, samples] and y [batch, frames, bands]");
  }
  Mel m = {};
  m.frame = static_cast<int64_t>(window.element_count());
  m.half = static_cast<int64_t>(turn.element_count()) / 4;
  m.shift = shift;
  m.bands = to[2];
  m.emphasis = emphasis;
  const int64_t batch = in[0], samples = in[1], frames = to[1];
  if (m.half < 1 || (m.half & (m.half - 1)) != 0 || m.frame < 1 || m.frame > 2 * m.half) {
    return invalid("turn must be [points, 2], points a power of two, window [points] at most");
  }
  if (shift < 1 || (frames > 0 && (frames - 1) * shift + m.frame > samples)) {
    return invalid("shift must be at least 1, and every frame within x");
  }
  if (filters.size() != 2 || filters[0] != m.bands || filters[1] != m.half + 1 ||
      static_cast<int64_t>(inside.element_count()) != 2 * m.bands) {
    return invalid("filter must be [bands, points / 2 + 1] and inside [bands, 2]");
  }
  m.inside = inside.typed_data();
  for (int64_t i = 0; i < 2 * m.bands; ++i) {
    if (m.inside[i] < 0 || m.inside[i] > m.half + 1) return invalid("inside leaves the bins");
  }
  const std::vector<int64_t> place = places(m.half);
  m.window = window.typed_data();
  m.turn = turn.typed_data();
  m.filter = filter.typed_data();
  m.place = place.data();

  const MelKernel chosen = kernel();
  const int64_t groups = (frames + chosen.lanes - 1) / chosen.lanes;
  const int64_t workers = worker_count(pool, batch * groups);
  const int64_t floats = (mel_scratch(m, chosen.lanes) + 15) / 16 * 16;
  const std::unique_ptr<float, Free> scratch(
      static_cast<float*>(std::aligned_alloc(64, workers * floats * sizeof(float))));
  const int64_t at_once = std::max<int64_t>(1, batch * groups / (4 * workers));
  const int64_t parts = (batch * groups + at_once - 1) / at_once;
  parallel_for(pool, parts, workers, [&](int64_t part, int64_t worker) {
    const int64_t end = std::min((part + 1) * at_once, batch * groups);
    for (int64_t group = part * at_once; group < end; ++group) {
      const int64_t b = group / groups, first = group % groups * chosen.lanes;
      const float* from = x.typed_data() + b * samples + first * shift;
      chosen.run(m, from, samples - first * shift, first == 0 ? 0.0f : from[-1],
                 std::min(chosen.lanes, frames - first),
                 y->typed_data() + (b * frames + first) * m.bands, scratch.get() + worker * floats);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_mel_energies, mel_energies,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("shift")
                                  .Attr<float>("emphasis")
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace cmjax
