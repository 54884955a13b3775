// Rows of activations with AVX2.
#include <immintrin.h>

#include "rows.h"

namespace cmjax::rows::avx2 {
namespace {

constexpr int kLanes = 8;

inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

#include "vectors.inc"

#include "exponential.inc"
#include "rows.inc"

}  // namespace

#include "rows_kernels.inc"

}  // namespace cmjax::rows::avx2
