// What the kernels of attention over a cache provide in one instruction set.
//
// Query heads of one token that share their keys and values, which lie in the cache at a stride:
// first all scores, then (after the softmax) the weighted sum of the values.
//
// No C++ standard library here: see msd.h.
#pragma once

#include <cstdint>

namespace cmjax::cached_attention {

#define CMJAX_CACHED_ATTENTION_KERNELS                                                            \
  /* scores[n * scores_stride + t] = scale * q[n] . k[t], for `queries` rows of q. */             \
  void scores(bool half, const float* q, int64_t queries, const void* k, int64_t stride,          \
              int64_t keys, int64_t dim, float scale, float* scores, int64_t scores_stride);      \
  /* y[n] = sum_t weights[n * weights_stride + t] v[t]; y is [queries, dim]. */                   \
  void weigh(bool half, const float* weights, int64_t weights_stride, int64_t queries,            \
             const void* v, int64_t stride, int64_t keys, int64_t dim, float* y);                 \
  void to_float(const uint16_t* from, int64_t size, float* to);                                   \
  void to_half(const float* from, int64_t size, uint16_t* to);

namespace scalar {
CMJAX_CACHED_ATTENTION_KERNELS
}
namespace avx2 {
CMJAX_CACHED_ATTENTION_KERNELS
}
namespace avx512 {
CMJAX_CACHED_ATTENTION_KERNELS
}

#undef CMJAX_CACHED_ATTENTION_KERNELS

}  // namespace cmjax::cached_attention
