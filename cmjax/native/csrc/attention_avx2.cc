// Causal attention with AVX2.
#include <immintrin.h>

#include "attention.h"

namespace cmjax::attention::avx2 {
namespace {

constexpr int kLanes = 8;
constexpr int kWide = 2;

inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

#include "attention.inc"

}  // namespace

#include "attention_kernels.inc"

}  // namespace cmjax::attention::avx2
