// Causal attention with AVX2.
#include <immintrin.h>

#include "attention.h"

namespace cmjax::attention::avx2 {
namespace {

constexpr int kLanes = 8;
constexpr int kWide = 2;

inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

inline void totals(const __m256 (&v)[4], float* to) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

#include "attention.inc"

}  // namespace

#include "attention_kernels.inc"

}  // namespace cmjax::attention::avx2
