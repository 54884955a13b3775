// Read a buffer once, as fast as memory delivers it: the bandwidth that weight-bound kernels are
// measured against.
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 1 << 18;  // words: 1 MiB
constexpr int64_t kAhead = 1 << 11;  // words, fetched before they are needed

ffi::Error sum_words(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> words,
                     ffi::ResultBuffer<ffi::S32> sum) {
  const int64_t size = static_cast<int64_t>(words.element_count());
  if (sum->element_count() != 1) return ffi::Error::InvalidArgument("sum_words: one result");
  // Unsigned, because the sum wraps around.
  const auto* data = reinterpret_cast<const uint32_t*>(words.typed_data());
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  const int64_t workers = worker_count(pool, blocks);
  std::vector<uint32_t> partial(workers * 16, 0);  // a cache line each
  parallel_for(pool, blocks, workers, [&](int64_t block, int64_t worker) {
    const int64_t end = std::min(size, (block + 1) * kBlock);
    uint32_t lanes[64] = {};
    int64_t i = block * kBlock;
    for (; i + 64 <= end; i += 64) {
      for (int line = 0; line < 64; line += 16) __builtin_prefetch(data + i + kAhead + line);
      for (int lane = 0; lane < 64; ++lane) lanes[lane] += data[i + lane];
    }
    for (; i < end; ++i) lanes[0] += data[i];
    uint32_t total = 0;
    for (uint32_t lane : lanes) total += lane;
    partial[worker * 16] += total;
  });
  uint32_t total = 0;
  for (uint32_t value : partial) total += value;
  sum->typed_data()[0] = static_cast<int32_t>(total);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_sum_words, sum_words,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

}  // namespace cmjax
