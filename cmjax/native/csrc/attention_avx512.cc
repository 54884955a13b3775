// Causal attention with AVX-512.
#pragma GCC diagnostic push  // false alarms inside GCC 12's header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "attention.h"

namespace cmjax::attention::avx512 {
namespace {

constexpr int kLanes = 16;
constexpr int kWide = 4;

inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

inline void totals(const __m512 (&v)[4], float* to) {
  const auto half = [](__m512 v) {
    const __m256d high = _mm512_extractf64x4_pd(_mm512_castps_pd(v), 1);
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(high));
  };
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(v[0]), half(v[1])),
                                  _mm256_hadd_ps(half(v[2]), half(v[3])));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

#include "attention.inc"

}  // namespace

#include "attention_kernels.inc"

}  // namespace cmjax::attention::avx512
