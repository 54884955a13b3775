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

#include "attention.inc"

}  // namespace

#include "attention_kernels.inc"

}  // namespace cmjax::attention::avx512
