// The handler of fsmn.h: check every buffer, cut the frames into parts, run them on XLA's threads.
#include "fsmn.h"

#include <algorithm>
#include <string>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kLeastProducts = 1 << 17;  // of a thread: fewer take less time than to wake it

void (*kernel())(const Memory&) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Vnni:
      return fsmn_avx512;
    case Isa::kAvx2:
      return fsmn_avx2;
    default:
      break;
  }
#endif
  return fsmn_scalar;
}

ffi::Error invalid(const char* what) {
  return ffi::Error::InvalidArgument(std::string("fsmn_memory: ") + what);
}

ffi::Error fsmn_memory(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> p,
                       ffi::Buffer<ffi::F32> past, ffi::Buffer<ffi::F32> future,
                       ffi::Buffer<ffi::S32> span, int64_t past_stride, int64_t future_stride,
                       int64_t padding, ffi::ResultBuffer<ffi::F32> y) {
  const auto of_x = x.dimensions(), of_p = p.dimensions();
  const auto of_past = past.dimensions(), of_future = future.dimensions();
  if (of_x.size() != 3 || of_p.size() != 3 || of_x[0] != of_p[0] || of_x[2] != of_p[2] ||
      x.element_count() != y->element_count()) {
    return invalid("x, p and y must be [batch, frames, channels]");
  }
  const int64_t batch = of_x[0], frames = of_x[1], channels = of_x[2], length = of_p[1];
  if (of_past.size() != 2 || of_past[0] < 1 || of_past[1] != channels || of_future.size() != 2 ||
      of_future[1] != channels) {
    return invalid("past and future must be [taps, channels]");
  }
  if (past_stride < 1 || future_stride < 1 || padding < 0) {
    return invalid("strides must be at least 1, padding at least 0");
  }
  if (static_cast<int64_t>(span.element_count()) != 2 * batch) {
    return invalid("span must be [batch, 2]");
  }
  if (y->element_count() == 0) return ffi::Error::Success();

  // A context is what frames and their taps meet of p: its row 0 is met by the earliest tap.
  const int64_t present = (of_past[0] - 1) * past_stride;
  const int64_t reach = present + of_future[0] * future_stride;
  const int64_t taps = of_past[0] + of_future[0];
  std::vector<int64_t> offset = {present};
  std::vector<const float*> weight;
  for (int64_t i = 0; i < of_past[0]; ++i) {
    offset.push_back(present - i * past_stride);
    weight.push_back(past.typed_data() + i * channels);
  }
  for (int64_t j = 0; j < of_future[0]; ++j) {
    offset.push_back(present + (j + 1) * future_stride);
    weight.push_back(future.typed_data() + j * channels);
  }
  const auto run = kernel();

  // Frames [first, end) of sequence b.
  auto compute = [&](int64_t b, int64_t first, int64_t end) {
    const float* sequence = p.typed_data() + b * length * channels;
    std::vector<float> edge;  // a context with zeros where p has no frames
    for (int64_t frame = first; frame < end; frame += kMemoryFrames) {
      const int64_t count = std::min(kMemoryFrames, end - frame);
      const int64_t from = frame - padding, to = from + reach + count;
      const bool inside = from >= 0 && to <= length;
      if (!inside) {
        const int64_t begin = std::clamp<int64_t>(from, 0, length);
        const int64_t stop = std::clamp<int64_t>(to, begin, length);
        edge.assign((to - from) * channels, 0.0f);
        std::copy(sequence + begin * channels, sequence + stop * channels,
                  edge.begin() + (begin - from) * channels);
      }
      const int64_t at = (b * frames + frame) * channels;
      run({count, channels, taps, x.typed_data() + at, y->typed_data() + at,
           inside ? sequence + from * channels : edge.data(), offset.data(), weight.data()});
    }
  };

  const int64_t groups = (frames + kMemoryFrames - 1) / kMemoryFrames;
  const int64_t products = batch * frames * channels * taps;
  const int64_t workers = worker_count(pool, std::min(batch * groups, products / kLeastProducts));
  const int64_t parts = std::min(groups, (4 * workers + batch - 1) / batch);  // of a sequence
  const int64_t size = (groups + parts - 1) / parts * kMemoryFrames;
  parallel_for(pool, batch * parts, workers, [&](int64_t part, int64_t) {
    const int64_t b = part / parts, start = std::min(part % parts * size, frames);
    const int64_t stop = std::min(start + size, frames);
    const int64_t first = std::clamp<int64_t>(span.typed_data()[2 * b], start, stop);
    const int64_t end = std::clamp<int64_t>(span.typed_data()[2 * b + 1], first, stop);
    float* to = y->typed_data() + b * frames * channels;
    std::fill(to + start * channels, to + first * channels, 0.0f);
    compute(b, first, end);
    std::fill(to + end * channels, to + stop * channels, 0.0f);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_fsmn_memory, fsmn_memory,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("past_stride")
                                  .Attr<int64_t>("future_stride")
                                  .Attr<int64_t>("padding")
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace cmjax
