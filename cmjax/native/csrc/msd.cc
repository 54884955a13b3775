// W8A16 and W4A16 matrix products by multi-scale decomposition: split the rows, multiply in
// integers, recombine. Weights are [features, inner] and are read once, as they lie in memory.
#include "msd_product.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;
using msd::Row;
using msd::Sizes;
using msd::Span;

struct Kernels {
  decltype(&msd::scalar::int8_bytes) int8_bytes;
  decltype(&msd::scalar::int8_split) int8_split;
  decltype(&msd::scalar::int8_totals) int8_totals;
  decltype(&msd::scalar::mxfp4_bytes) mxfp4_bytes;
  decltype(&msd::scalar::mxfp4_split) mxfp4_split;
  decltype(&msd::scalar::mxfp4_totals) mxfp4_totals;
};

#define CMJAX_KERNELS_OF(space)                                                           \
  Kernels {                                                                               \
    &space::int8_bytes, &space::int8_split, &space::int8_totals, &space::mxfp4_bytes,     \
        &space::mxfp4_split, &space::mxfp4_totals                                         \
  }

Kernels kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Vnni) return CMJAX_KERNELS_OF(msd::avx512);
  if (isa() == Isa::kAvx2) return CMJAX_KERNELS_OF(msd::avx2);
#endif
  return CMJAX_KERNELS_OF(msd::scalar);
}

#undef CMJAX_KERNELS_OF

// Features per task: enough tasks for every worker, and large enough to stream.
constexpr int64_t kFeatures = 32;
// Split rows that stay in the second cache while weights pass.
constexpr int64_t kRowsBytes = 384 << 10;
constexpr int64_t kMostRows = 64;
// Values below which splitting is not worth a second thread.
constexpr int64_t kSplitAlone = 1 << 15;

struct Free {
  void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<uint8_t[], Free>;

Scratch aligned_bytes(int64_t count) {
  void* bytes = ::operator new[](count, std::align_val_t{64}, std::nothrow);
  return Scratch(static_cast<uint8_t*>(bytes));
}

// Values that are finished together: left to the compiler, they are finished one by one, which takes
// a third as long as reading their weights.
constexpr int kLanes = 4;
using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector whole(float value) { return value - Vector{}; }

// A product as a value: beyond float32 it saturates, as in the reference.
inline Vector rounded(Vector v) {
  const Vector largest = whole(std::numeric_limits<float>::max());
  v = v > largest ? largest : v;
  return v < -largest ? -largest : v;
}

inline float rounded(float value) { return rounded(whole(value))[0]; }

// Rows from this size on are multiplied as x / 2**64, for their sums could overflow before they meet
// their scale; what comes out is multiplied with 2**64 at last, which rounds nothing.
constexpr float kLarge = 0x1p100f, kShrink = 0x1p-64f, kGrow = 0x1p64f;

bool any_large(const float* x, int64_t count) {
  using Words = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
  int32_t least;
  std::memcpy(&least, &kLarge, sizeof(least));
  const auto size = [](auto bits) { return bits & 0x7fffffff; };  // in the order of |x|
  Words found = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Words bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    found |= size(bits) >= least;
  }
  for (; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    found[0] |= size(bits) >= least;
  }
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) any |= found[lane] != 0;
  return any;
}

// Calls split(row, its values) for all rows, then totals(first row, count, stack, first feature, count,
// out) and finish(row, stack, first feature, count, its totals, its results) for every tile of the
// result.
template <typename Split, typename Totals, typename Finish>
void run(ffi::ThreadPool& pool, const Sizes& n, const std::vector<Span>& spans, int64_t all_rows,
         int64_t row_bytes, const Values& x, const Values& y, const Split& split,
         const Totals& totals, const Finish& finish) {
  const RowKernels kernel = row_kernels();
  std::vector<char> large(all_rows);
  const auto split_one = [&](int64_t row) {
    std::vector<float> room(x.half ? n.inner : 0);
    const float* values = x.read(kernel, row * n.inner, n.inner, room.data());
    large[row] = any_large(values, n.inner);
    if (!large[row]) return split(row, values);
    std::vector<float> less(values, values + n.inner);
    for (float& value : less) value *= kShrink;
    split(row, less.data());
  };
  const int64_t at_once = n.inner * all_rows < kSplitAlone ? all_rows : 1;
  const int64_t splits = (all_rows + at_once - 1) / std::max<int64_t>(at_once, 1);
  parallel_for(pool, splits, worker_count(pool, splits), [&](int64_t block, int64_t) {
    const int64_t end = std::min(all_rows, (block + 1) * at_once);
    for (int64_t row = block * at_once; row < end; ++row) split_one(row);
  });
  const int64_t rows_at_once = std::clamp<int64_t>(kRowsBytes / row_bytes / 12 * 12, 12, kMostRows);
  struct Tile {
    int64_t stack, feature, row, rows;
  };
  std::vector<Tile> tiles;
  for (int64_t stack = 0; stack < n.stack; ++stack) {
    for (int64_t feature = 0; feature < n.features; feature += kFeatures) {
      for (int64_t row = 0; row < spans[stack].count; row += rows_at_once) {
        const int64_t rows = std::min(rows_at_once, spans[stack].count - row);
        tiles.push_back({stack, feature, spans[stack].start + row, rows});
      }
    }
  }
  const auto tasks = static_cast<int64_t>(tiles.size());
  parallel_for(pool, tasks, worker_count(pool, tasks), [&](int64_t task, int64_t) {
    const auto [stack, feature, row, rows] = tiles[task];
    const int64_t features = std::min(kFeatures, n.features - feature);
    float sums[kMostRows * kFeatures], room[kFeatures];
    totals(row, rows, stack, feature, features, sums);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * n.features + feature;
      float* out = y.place(at, room);
      finish(row + r, stack, feature, features, sums + r * kFeatures, out);
      for (int64_t f = 0; large[row + r] && f < features; ++f) out[f] = rounded(out[f] * kGrow);
      y.write(kernel, out, features, at);
    }
  });
}

// out[f] = value(f, sums[f]), kLanes at a time; `value` may only read what belongs to features, with
// `load(array, f)`.
template <typename Value>
inline void finish(int64_t features, const float* sums, float* out, const Value& value) {
  for (int64_t f = 0; f < features; f += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, features - f);
    const auto load = [some](const float* from) {
      Vector v = {};
      if (some == kLanes) {
        std::memcpy(&v, from, sizeof(v));
      } else {
        std::memcpy(&v, from, some * sizeof(float));
      }
      return v;
    };
    const Vector v = value(f, load(sums + f), load);
    if (some == kLanes) {
      std::memcpy(out + f, &v, sizeof(v));
    } else {
      std::memcpy(out + f, &v, some * sizeof(float));
    }
  }
}

}  // namespace

ffi::Error msd::int8_product(ffi::ThreadPool& pool, const Sizes& n, const std::vector<Span>& spans,
                             int64_t all_rows, const Values& x, const int8_t* w,
                             const float* scales, const float* offsets, const Values& y) {
  const Kernels kernel = kernels();
  const int64_t bytes = kernel.int8_bytes(n.inner);
  const Scratch parts = aligned_bytes(bytes * all_rows);
  const std::unique_ptr<Row[]> rows(new (std::nothrow) Row[all_rows]);
  if (!parts || !rows) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "msd_int8: memory");
  run(
      pool, n, spans, all_rows, bytes, x, y,
      [&](int64_t row, const float* values) {
        kernel.int8_split(values, n.inner, parts.get() + row * bytes, &rows[row]);
      },
      [&](int64_t row, int64_t count, int64_t stack, int64_t feature, int64_t features,
          float* sums) {
        const int8_t* from = w + (stack * n.features + feature) * n.inner;
        kernel.int8_totals(parts.get() + row * bytes, &rows[row], count, from, features, n.inner,
                           sums, kFeatures);
      },
      [&](int64_t row, int64_t stack, int64_t feature, int64_t features, const float* sums,
          float* out) {
        // The order and rounding of every operation are those of the reference in msd.py.
        const int64_t first = stack * n.features + feature;
        const Vector unit = whole(rows[row].unit), sum = whole(rows[row].sum * rows[row].unit);
        finish(features, sums, out, [&](int64_t f, Vector v, const auto& load) {
          v *= unit;
          if (offsets != nullptr) v = rounded(v) + rounded(load(offsets + first + f) * sum);
          return rounded(v * load(scales + first + f));
        });
      });
  return ffi::Error::Success();
}

ffi::Error msd::mxfp4_product(ffi::ThreadPool& pool, const Sizes& n,
                              const std::vector<Span>& spans, int64_t all_rows, const Values& x,
                              const uint8_t* w, const uint8_t* scale, const Values& y) {
  const Kernels kernel = kernels();
  const int64_t bytes = kernel.mxfp4_bytes(n.inner);
  const Scratch parts = aligned_bytes(bytes * all_rows);
  if (!parts) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "msd_mxfp4: memory");
  run(
      pool, n, spans, all_rows, bytes, x, y,
      [&](int64_t row, const float* values) {
        kernel.mxfp4_split(values, n.inner, parts.get() + row * bytes);
      },
      [&](int64_t row, int64_t count, int64_t stack, int64_t feature, int64_t features,
          float* sums) {
        const int64_t first = stack * n.features + feature;
        kernel.mxfp4_totals(parts.get() + row * bytes, count,
                            w + first * (n.inner / 2),
                            scale + first * (n.inner / msd::kBlock), features, n.inner,
                            sums, kFeatures);
      },
      [&](int64_t, int64_t, int64_t, int64_t features, const float* sums, float* out) {
        finish(features, sums, out, [](int64_t, Vector v, const auto&) { return rounded(v); });
      });
  return ffi::Error::Success();
}

}  // namespace cmjax
