// Attention over a cache with AVX-512.
#pragma GCC diagnostic push  // false alarms inside GCC 12's header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cached_attention.h"

namespace cmjax::cached_attention::avx512 {
namespace {

constexpr int kLanes = 16;

inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

#include "vectors.inc"
#include "cached_attention.inc"

}  // namespace

#include "cached_attention_kernels.inc"

}  // namespace cmjax::cached_attention::avx512
