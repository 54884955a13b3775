// Attention of the newest token of every sequence over its cache: keys and values are read where
// they lie, up to the length that is there.
#include "cached_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

struct Kernels {
  decltype(&cached_attention::scalar::scores) scores;
  decltype(&cached_attention::scalar::weigh) weigh;
  decltype(&cached_attention::scalar::to_float) to_float;
  decltype(&cached_attention::scalar::to_half) to_half;
};

Kernels kernels() {
#define CMJAX_KERNELS_OF(space) {&space::scores, &space::weigh, &space::to_float, &space::to_half}
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Vnni) return CMJAX_KERNELS_OF(cached_attention::avx512);
  if (isa() == Isa::kAvx2) return CMJAX_KERNELS_OF(cached_attention::avx2);
#endif
  return CMJAX_KERNELS_OF(cached_attention::scalar);
#undef CMJAX_KERNELS_OF
}

struct Sizes {
  int64_t sequences, heads, dim, keys, kv_heads, value_dim;
};

inline bool finite(float v) { return std::isfinite(v); }
inline bool finite(uint16_t half) { return (half & 0x7f80) != 0x7f80; }

// Whether one of `count` rows, which lie at a stride, holds an infinity or NaN.
template <typename T>
bool is_broken(const T* rows, int64_t stride, int64_t count, int64_t dim) {
  for (int64_t t = 0; t < count; ++t) {
    const T* row = rows + t * stride;
    if (!std::all_of(row, row + dim, [](T v) { return finite(v); })) return true;
  }
  return false;
}

// Softmax of a row of scores. One that is not finite has overflowed, or is of a key for which
// broken(t): then, and of NaN, all weights are NaN.
template <typename Broken>
void softmax(float* row, int64_t keys, const Broken& broken) {
  if (keys == 0) return;
  for (int64_t t = 0; t < keys; ++t) {
    if (!finite(row[t]) && (std::isnan(row[t]) || broken(t))) {
      std::fill(row, row + keys, std::numeric_limits<float>::quiet_NaN());
      return;
    }
  }
  const float top = *std::max_element(row, row + keys);
  float total = 0.0f;
  for (int64_t t = 0; t < keys; ++t) {
    row[t] = std::exp(row[t] - top);
    total += row[t];
  }
  for (int64_t t = 0; t < keys; ++t) row[t] /= total;
}

template <typename T>
ffi::Error attend(ffi::ThreadPool& pool, const Sizes& n, const T* q, const T* k, const T* v,
                  const int32_t* lengths, float scale, int64_t window, T* y) {
  constexpr bool kHalf = sizeof(T) == 2;
  const Kernels kernel = kernels();
  const int64_t rows = n.heads / n.kv_heads, tasks = n.sequences * n.kv_heads;
  const int64_t workers = worker_count(pool, tasks);
  const int64_t each = rows * (n.dim + n.value_dim + n.keys);
  const std::unique_ptr<float[]> space(new (std::nothrow) float[workers * each]);
  if (!space) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "cached_attention: memory");
  // A task has the query heads of one sequence that share a key head.
  parallel_for(pool, tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t sequence = task / n.kv_heads, head = task % n.kv_heads;
    float* queries = space.get() + worker * each;
    float* found = queries + rows * n.dim;
    float* weights = found + rows * n.value_dim;
    const T* from = q + task * rows * n.dim;
    T* to = y + task * rows * n.value_dim;
    if constexpr (kHalf) {
      kernel.to_float(from, rows * n.dim, queries);
    } else {
      std::copy(from, from + rows * n.dim, queries);
    }
    const int64_t length = lengths[sequence];
    const int64_t past = std::clamp<int64_t>(length, 0, n.keys);
    const int64_t start = window < 0 ? 0 : std::clamp<int64_t>(length - window, 0, past);
    const int64_t keys = past - start;
    const int64_t key_stride = n.kv_heads * n.dim, value_stride = n.kv_heads * n.value_dim;
    const T* key = k + (sequence * n.keys + start) * key_stride + head * n.dim;
    const T* value = v + (sequence * n.keys + start) * value_stride + head * n.value_dim;
    kernel.scores(kHalf, queries, rows, key, key_stride, keys, n.dim, scale, weights, keys);
    for (int64_t row = 0; row < rows; ++row) {
      softmax(weights + row * keys, keys,
              [&](int64_t t) { return is_broken(key + t * key_stride, key_stride, 1, n.dim); });
    }
    if constexpr (kHalf) {  // weights have the values' dtype, as in the reference
      for (int64_t i = 0; i < rows * keys; ++i) {
        uint16_t rounded;
        kernel.to_half(weights + i, 1, &rounded);
        kernel.to_float(&rounded, 1, weights + i);
      }
    }
    kernel.weigh(kHalf, weights, keys, rows, value, value_stride, keys, n.value_dim, found);
    // A value that is not finite shows in what is found; then all of the query's result is NaN.
    if (is_broken(found, n.value_dim, rows, n.value_dim) &&
        is_broken(value, value_stride, keys, n.value_dim)) {
      std::fill(found, found + rows * n.value_dim, std::numeric_limits<float>::quiet_NaN());
    }
    if constexpr (kHalf) {
      kernel.to_half(found, rows * n.value_dim, to);
    } else {
      std::copy(found, found + rows * n.value_dim, to);
    }
  });
  return ffi::Error::Success();
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::S32> lengths, ffi::Result<ffi::AnyBuffer> y, float scale,
                     int64_t window) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), ys = y->dimensions();
  if (qs.size() != 3 || ks.size() != 4 || vs.size() != 4 || ys.size() != 3) {
    return ffi::Error::InvalidArgument(
        "cached_attention: q and the result must be [sequences, heads, d], k and v [sequences, "
        "length, heads, d]");
  }
  const Sizes n{qs[0], qs[1], qs[2], ks[1], ks[2], vs[3]};
  if (ks[0] != qs[0] || ks[3] != qs[2] || vs[0] != qs[0] || vs[1] != ks[1] || vs[2] != ks[2] ||
      ys[0] != qs[0] || ys[1] != qs[1] || ys[2] != vs[3] || ks[2] < 1 || qs[1] % ks[2] != 0 ||
      lengths.element_count() != static_cast<size_t>(qs[0])) {
    return ffi::Error::InvalidArgument(
        "cached_attention: shapes of q, k, v, lengths and the result do not fit each other");
  }
  const auto type = q.element_type();
  if (k.element_type() != type || v.element_type() != type || y->element_type() != type) {
    return ffi::Error::InvalidArgument("cached_attention: q, k and v must have one dtype");
  }
  if (type == ffi::F32) {
    return attend(pool, n, q.typed_data<float>(), k.typed_data<float>(), v.typed_data<float>(),
                  lengths.typed_data(), scale, window, y->typed_data<float>());
  }
  if (type == ffi::BF16) {
    const auto halves = [](void* data) { return static_cast<uint16_t*>(data); };
    return attend<uint16_t>(pool, n, halves(q.untyped_data()), halves(k.untyped_data()),
                            halves(v.untyped_data()), lengths.typed_data(), scale, window,
                            halves(y->untyped_data()));
  }
  return ffi::Error::InvalidArgument("cached_attention: no kernel for this dtype");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_cached_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"));

}  // namespace cmjax
