// W8A16 and W4A16 matrix products by multi-scale decomposition: split the rows, multiply in
// integers, recombine. Weights are [features, inner] and are read once, as they lie in memory.
#include "msd.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "row_groups.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;
using msd::Row;

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

struct Sizes {
  int64_t stack, rows, inner, features;
};

struct Free {
  void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<uint8_t[], Free>;

Scratch aligned_bytes(int64_t count) {
  void* bytes = ::operator new[](count, std::align_val_t{64}, std::nothrow);
  return Scratch(static_cast<uint8_t*>(bytes));
}

template <typename A, typename W>
bool read_sizes(const A& x, const W& w, int64_t codes, Sizes& sizes) {
  if (x.size() != 3 || w.size() != 3) return false;
  sizes = {x[0], x[1], x[2], w[1]};
  return w[0] == sizes.stack && w[2] * codes == sizes.inner && sizes.inner > 0;
}

template <typename D>
bool is_shape(const D& dimensions, int64_t a, int64_t b, int64_t c) {
  return dimensions.size() == 3 && dimensions[0] == a && dimensions[1] == b && dimensions[2] == c;
}

// Rows of x that meet one matrix of the stack.
struct Span {
  int64_t start, count;
};

// Every matrix has the same number of rows, one matrix after the other.
std::vector<Span> spans_of(const Sizes& n) {
  std::vector<Span> spans;
  for (int64_t s = 0; s < n.stack; ++s) spans.push_back({s * n.rows, n.rows});
  return spans;
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
         int64_t row_bytes, const float* x, float* y, const Split& split, const Totals& totals,
         const Finish& finish) {
  std::vector<char> large(all_rows);
  const auto split_one = [&](int64_t row) {
    const float* values = x + row * n.inner;
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
    float sums[kMostRows * kFeatures];
    totals(row, rows, stack, feature, features, sums);
    for (int64_t r = 0; r < rows; ++r) {
      float* out = y + (row + r) * n.features + feature;
      finish(row + r, stack, feature, features, sums + r * kFeatures, out);
      for (int64_t f = 0; large[row + r] && f < features; ++f) out[f] = rounded(out[f] * kGrow);
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

// y of all spans; offsets may be null.
ffi::Error int8_product(ffi::ThreadPool& pool, const Sizes& n, const std::vector<Span>& spans,
                        int64_t all_rows, const float* x, const int8_t* w, const float* scales,
                        const float* offsets, float* y) {
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

ffi::Error int8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> w,
                ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> offset,
                ffi::ResultBuffer<ffi::F32> y) {
  Sizes n;
  if (!read_sizes(x.dimensions(), w.dimensions(), 1, n)) {
    return ffi::Error::InvalidArgument(
        "msd_int8: x must be [stack, rows, inner] and w [stack, features, inner]");
  }
  if (n.inner > msd::kMostInner) {
    return ffi::Error::InvalidArgument("msd_int8: inner is too long for int32 sums");
  }
  const auto of_features = static_cast<size_t>(n.stack * n.features);
  if (!is_shape(scale.dimensions(), n.stack, n.features, 1)) {
    return ffi::Error::InvalidArgument("msd_int8: scale must be [stack, features, 1]");
  }
  if (offset.element_count() != 0 && offset.element_count() != of_features) {
    return ffi::Error::InvalidArgument(
        "msd_int8: offset must be empty or have stack * features elements");
  }
  if (!is_shape(y->dimensions(), n.stack, n.rows, n.features)) {
    return ffi::Error::InvalidArgument("msd_int8: the result must be [stack, rows, features]");
  }
  if (y->element_count() == 0) return ffi::Error::Success();

  return int8_product(pool, n, spans_of(n), n.stack * n.rows, x.typed_data(), w.typed_data(),
                      scale.typed_data(), offset.element_count() ? offset.typed_data() : nullptr,
                      y->typed_data());
}

ffi::Error mxfp4_product(ffi::ThreadPool& pool, const Sizes& n, const std::vector<Span>& spans,
                         int64_t all_rows, const float* x, const uint8_t* w, const uint8_t* scale,
                         float* y) {
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

ffi::Error mxfp4(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> w,
                 ffi::Buffer<ffi::U8> scale, ffi::ResultBuffer<ffi::F32> y) {
  Sizes n;
  if (!read_sizes(x.dimensions(), w.dimensions(), 2, n) || n.inner % msd::kBlock != 0) {
    return ffi::Error::InvalidArgument(
        "msd_mxfp4: x must be [stack, rows, inner], inner a multiple of 32, and w [stack, "
        "features, inner / 2]");
  }
  if (!is_shape(scale.dimensions(), n.stack, n.features, n.inner / msd::kBlock)) {
    return ffi::Error::InvalidArgument("msd_mxfp4: scale must be [stack, features, inner / 32]");
  }
  if (!is_shape(y->dimensions(), n.stack, n.rows, n.features)) {
    return ffi::Error::InvalidArgument("msd_mxfp4: the result must be [stack, rows, features]");
  }
  if (y->element_count() == 0) return ffi::Error::Success();

  return mxfp4_product(pool, n, spans_of(n), n.stack * n.rows, x.typed_data(), w.typed_data(),
                       scale.typed_data(), y->typed_data());
}

// Rows in groups: x [rows, inner], w [groups, features, ...], as in grouped.cc.
template <typename W, typename S>
ffi::Error grouped(ffi::Buffer<ffi::F32>& x, const W& w, const S& scale, int64_t codes,
                   int64_t scales, ffi::Buffer<ffi::S32>& counts,
                   ffi::ResultBuffer<ffi::F32>& y, Sizes& n, std::vector<Span>& spans) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  const auto groups = counts.element_count();
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2 || ws[2] * codes != xs[1] || xs[1] == 0 ||
      ys[0] != xs[0] || ys[1] != ws[1] || groups != static_cast<size_t>(ws[0]) ||
      scale.element_count() != static_cast<size_t>(ws[0] * ws[1] * scales)) {
    return ffi::Error::InvalidArgument(
        "grouped_msd_dot: x must be [rows, inner], w [groups, features, inner], counts "
        "[groups], and the result [rows, features]");
  }
  n = {ws[0], xs[0], xs[1], ws[1]};
  const RowGroups lists =
      row_groups(nullptr, counts.typed_data(), n.stack, n.rows, nullptr, 0, false);
  if (!lists.valid) {
    return ffi::Error::InvalidArgument(
        "grouped_msd_dot: a group has negative rows, or rows beyond the buffer");
  }
  for (int64_t g = 0; g < n.stack; ++g) spans.push_back({lists.begin[g], lists.count(g)});
  if (static_cast<int64_t>(lists.rows.size()) < n.rows) {
    std::memset(y->untyped_data(), 0, y->size_bytes());
  }
  return ffi::Error::Success();
}

ffi::Error grouped_int8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> w,
                        ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> counts,
                        ffi::ResultBuffer<ffi::F32> y) {
  Sizes n;
  std::vector<Span> spans;
  if (ffi::Error e = grouped(x, w, scale, 1, 1, counts, y, n, spans); e.failure()) return e;
  if (n.inner > msd::kMostInner) {
    return ffi::Error::InvalidArgument("grouped_msd_dot: inner is too long for int32 sums");
  }
  return int8_product(pool, n, spans, n.rows, x.typed_data(), w.typed_data(), scale.typed_data(),
                      nullptr, y->typed_data());
}

ffi::Error grouped_mxfp4(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> w,
                         ffi::Buffer<ffi::U8> scale, ffi::Buffer<ffi::S32> counts,
                         ffi::ResultBuffer<ffi::F32> y) {
  Sizes n;
  std::vector<Span> spans;
  const int64_t scales = x.dimensions().size() == 2 ? x.dimensions()[1] / msd::kBlock : 0;
  if (ffi::Error e = grouped(x, w, scale, 2, scales, counts, y, n, spans); e.failure()) {
    return e;
  }
  if (n.inner % msd::kBlock != 0) {
    return ffi::Error::InvalidArgument("grouped_msd_dot: inner must be a multiple of 32");
  }
  return mxfp4_product(pool, n, spans, n.rows, x.typed_data(), w.typed_data(), scale.typed_data(),
                       y->typed_data());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_msd_int8, int8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_msd_mxfp4, mxfp4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_grouped_msd_int8, grouped_int8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_grouped_msd_mxfp4, grouped_mxfp4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace cmjax
