// Attention of the newest few tokens of every sequence over its cache: keys and values are read
// where they lie, up to the length that is there.
#include "cached_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

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
  int64_t sequences, queries, heads, dim, keys, kv_heads, value_dim;
  int64_t group() const { return heads / kv_heads; }  // query heads that share keys
};

// Softmax of one row of scores over the keys [first, past); the others get weight zero.
void softmax(float* row, int64_t first, int64_t past, int64_t keys) {
  std::fill(row, row + first, 0.0f);
  std::fill(row + past, row + keys, 0.0f);
  if (first >= past) return;
  for (int64_t t = first; t < past; ++t) {
    if (!std::isfinite(row[t])) {  // of a key that holds an infinity or NaN
      std::fill(row + first, row + past, std::numeric_limits<float>::quiet_NaN());
      return;
    }
  }
  const float top = *std::max_element(row + first, row + past);
  float total = 0.0f;
  for (int64_t t = first; t < past; ++t) {
    row[t] = std::exp(row[t] - top);
    total += row[t];
  }
  for (int64_t t = first; t < past; ++t) row[t] /= total;
}

template <typename T>
ffi::Error attend(ffi::ThreadPool& pool, const Sizes& n, const T* q, const T* k, const T* v,
                  const int32_t* lengths, float scale, int64_t window, T* y) {
  constexpr bool kHalf = sizeof(T) == 2;
  const Kernels kernel = kernels();
  const int64_t rows = n.queries * n.group(), tasks = n.sequences * n.kv_heads;
  const int64_t workers = worker_count(pool, tasks);
  const int64_t each = rows * (n.dim + n.value_dim + n.keys) + n.keys;
  std::vector<float> space(workers * each);
  parallel_for(pool, tasks, workers, [&](int64_t task, int64_t worker) {
    const int64_t sequence = task / n.kv_heads, head = task % n.kv_heads;
    float* queries = space.data() + worker * each;
    float* found = queries + rows * n.dim;
    float* weights = found + rows * n.value_dim;
    // Rows of one task: query by query, the heads of a group beside each other.
    const auto at = [&](int64_t query) {
      return (sequence * n.queries + query) * n.heads + head * n.group();
    };
    for (int64_t query = 0; query < n.queries; ++query) {
      const int64_t size = n.group() * n.dim;
      const T* from = q + at(query) * n.dim;
      if constexpr (kHalf) {
        kernel.to_float(from, size, queries + query * size);
      } else {
        std::copy(from, from + size, queries + query * size);
      }
    }
    const int64_t length = lengths[sequence];
    const int64_t there = std::clamp<int64_t>(length, 0, n.keys);
    const int64_t oldest = length - n.queries + 1 - window;  // that the first query sees
    const int64_t start = window < 0 ? 0 : std::clamp<int64_t>(oldest, 0, there);
    const int64_t keys = there - start;
    const auto* key = k + ((sequence * n.keys + start) * n.kv_heads + head) * n.dim;
    kernel.scores(kHalf, queries, rows, key, n.kv_heads * n.dim, keys, n.dim, scale, weights, keys);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t position = length - n.queries + row / n.group();
      const int64_t past = std::clamp<int64_t>(position + 1 - start, 0, keys);
      const int64_t first =
          window < 0 ? 0 : std::clamp<int64_t>(position + 1 - window - start, 0, keys);
      float* of_row = weights + row * keys;
      softmax(of_row, std::min(first, past), past, keys);
      if constexpr (kHalf) {  // weights have the values' dtype, as in the reference
        for (int64_t t = 0; t < keys; ++t) {
          uint16_t rounded;
          kernel.to_half(of_row + t, 1, &rounded);
          kernel.to_float(&rounded, 1, of_row + t);
        }
      }
    }
    const auto* value = v + ((sequence * n.keys + start) * n.kv_heads + head) * n.value_dim;
    kernel.weigh(kHalf, weights, keys, rows, value, n.kv_heads * n.value_dim, keys, n.value_dim,
                 found);
    for (int64_t row = 0; row < rows; ++row) {  // a value that holds one makes all of it NaN too
      float* of_row = found + row * n.value_dim;
      if (!std::all_of(of_row, of_row + n.value_dim, [](float y) { return std::isfinite(y); })) {
        std::fill(of_row, of_row + n.value_dim, std::numeric_limits<float>::quiet_NaN());
      }
    }
    for (int64_t query = 0; query < n.queries; ++query) {
      const int64_t size = n.group() * n.value_dim;
      T* to = y + at(query) * n.value_dim;
      if constexpr (kHalf) {
        kernel.to_half(found + query * size, size, to);
      } else {
        std::copy(found + query * size, found + (query + 1) * size, to);
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::S32> lengths, ffi::Result<ffi::AnyBuffer> y, float scale,
                     int64_t window) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), ys = y->dimensions();
  if (qs.size() != 4 || ks.size() != 4 || vs.size() != 4 || ys.size() != 4) {
    return ffi::Error::InvalidArgument(
        "cached_attention: q, k, v and the result must be [sequences, length, heads, d]");
  }
  const Sizes n{qs[0], qs[1], qs[2], qs[3], ks[1], ks[2], vs[3]};
  if (ks[0] != qs[0] || ks[3] != qs[3] || vs[0] != qs[0] || vs[1] != ks[1] || vs[2] != ks[2] ||
      ys[0] != qs[0] || ys[1] != qs[1] || ys[2] != qs[2] || ys[3] != vs[3] || ks[2] < 1 ||
      qs[2] % ks[2] != 0 || lengths.element_count() != static_cast<size_t>(qs[0])) {
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
