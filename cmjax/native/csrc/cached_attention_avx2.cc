// Attention over a cache with AVX2.
#include <immintrin.h>

#include "cached_attention.h"

namespace cmjax::cached_attention::avx2 {
namespace {

constexpr int kLanes = 8;

inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

#include "vectors.inc"
#include "cached_attention.inc"

}  // namespace

#include "cached_attention_kernels.inc"

}  // namespace cmjax::cached_attention::avx2
