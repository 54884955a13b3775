// Rows of activations with AVX-512.
#pragma GCC diagnostic push  // false alarms inside GCC 12's header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "rows.h"

namespace cmjax::rows::avx512 {
namespace {

constexpr int kLanes = 16;

inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

#include "vectors.inc"

#include "exponential.inc"
#include "rows.inc"

}  // namespace

#include "rows_kernels.inc"

}  // namespace cmjax::rows::avx512
