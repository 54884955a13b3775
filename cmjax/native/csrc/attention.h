// What the kernels of causal attention provide in one instruction set.
//
// Rows are query heads that share their keys and values, which lie at a stride: first all scores,
// then softmax, then the weighted sums of the values.
//
// No C++ standard library here: see msd.h.
#pragma once

#include <cstdint>

#include "grouped.h"

namespace cmjax::attention {

enum class Kind { kFloat, kHalf, kInt8 };  // of keys and values; half is bfloat16

constexpr int64_t kKeys = 64;  // that are scored together; rows of scores are a multiple
constexpr int64_t kFewRows = 16;  // for which laying keys out anew costs more than it saves
// Scratch of `scores` and `weigh`, in floats, for rows of `dim`.
constexpr int64_t scratch_floats(int64_t dim) {
  constexpr int64_t kOfProducts = grouped::kScratchBytes / sizeof(float);
  return dim * kKeys > kOfProducts ? dim * kKeys : kOfProducts;
}

#define CMJAX_ATTENTION_KERNELS                                                                   \
  /* scores[r * scores_stride + t] (+)= q[r] . k[t], for all of kKeys, of which `keys` are there;  \
     keys are read as they lie, or laid out anew, which adds in another order. */                 \
  void scores(Kind kind, const float* const* q, int64_t rows, const void* k, int64_t stride,      \
              int64_t keys, int64_t dim, bool add, bool as_they_lie, float* scratch,              \
              float* scores, int64_t scores_stride);                                              \
  /* Multiplies; false if one of the products is not finite. */                                   \
  bool scaled(float* values, int64_t size, float factor);                                         \
  /* Softmax in place of values[from, to); the rest, up to `size`, becomes 0. */                  \
  void softmax(float* values, int64_t from, int64_t to, int64_t size);                            \
  /* To the nearest bfloat16. */                                                                  \
  void round_to_half(float* values, int64_t size);                                                \
  /* y[r * y_stride + d] = sum_t weights[r][t] v[t][d]; rows of y have room for kKeys more. */    \
  void weigh(Kind kind, const float* const* weights, int64_t rows, const void* v, int64_t stride, \
             int64_t keys, int64_t dim, float* scratch, float* y, int64_t y_stride);              \
  void to_float(const uint16_t* from, int64_t size, float* to);                                   \
  void to_half(const float* from, int64_t size, uint16_t* to);

namespace scalar {
CMJAX_ATTENTION_KERNELS
}
namespace avx2 {
CMJAX_ATTENTION_KERNELS
}
namespace avx512 {
CMJAX_ATTENTION_KERNELS
}

#undef CMJAX_ATTENTION_KERNELS

}  // namespace cmjax::attention
