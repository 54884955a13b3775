// conv1d with AVX-512 VNNI: four 8-bit or two 16-bit products per 32-bit lane and instruction,
// exact in either case.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "conv1d.h"

namespace cmjax {
namespace {

using F = __m512;
constexpr int64_t kLanes = 16;
constexpr int64_t kPanels = 2;

inline F splat(float x) { return _mm512_set1_ps(x); }
inline F load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* to, F x) { _mm512_storeu_ps(to, x); }
inline F largest(F a, F b) { return _mm512_max_ps(a, b); }
inline F clip(F x, float limit) {
  constexpr int kSmallerMagnitudeWithSignOfFirst = 2;
  return _mm512_range_ps(x, _mm512_set1_ps(limit), kSmallerMagnitudeWithSignOfFirst);
}
inline F between(F x, F low, F high) { return _mm512_min_ps(_mm512_max_ps(x, low), high); }
struct Finite {  // zeros for lanes that are not finite, which it remembers
  __mmask16 odd = 0;
  F of(F x) {
    constexpr int kNanOrInfinity = 0x99;
    const __mmask16 wrong = _mm512_fpclass_ps_mask(x, kNanOrInfinity);
    odd |= wrong;
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(~wrong), x);
  }
  bool all() const { return odd == 0; }
};
inline F from_int32(const int32_t* x) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(x)); }
inline F fused(float c, F a, F b) { return _mm512_fmadd_ps(_mm512_set1_ps(c), a, b); }
inline void narrow(F x, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm512_cvtepi32_epi8(_mm512_castps_si512(x)));
}
inline void narrow(F x, int16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_castps_si512(x)));
}

inline __m512i products(__m512i sum, __m512i v, __m512i u, uint8_t) {
  return _mm512_dpbusd_epi32(sum, v, u);
}
inline __m512i products(__m512i sum, __m512i v, __m512i u, int16_t) {
  return _mm512_dpwssd_epi32(sum, v, u);
}

struct Panel;

template <class Operand>
struct Dot {
  static constexpr int64_t kTiles = 8;
  template <int tiles, int panels>
  static void run(const Panel& at);
};

#include "conv1d_pipeline.inc"

template <class Operand>
template <int tiles, int panels>
void Dot<Operand>::run(const Panel& at) {
  __m512i acc[tiles][panels];
  const char* u = at.u;
#pragma GCC unroll 8
  for (int p = 0; p < panels; ++p) {
    const __m512i start = _mm512_and_si512(_mm512_loadu_si512(u + p * at.panel_bytes),
                                           _mm512_set1_epi32(~1));
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) acc[t][p] = start;
  }
  const char* segment = at.v;
  for (int64_t s = 0; s < at.segments; ++s, segment += at.segment_bytes) {
    const char* v = segment;
    for (int64_t k = 0; k < at.groups; ++k, v += kGroupBytes) {
      u += kRowBytes;
      __m512i b[panels];
#pragma GCC unroll 8
      for (int p = 0; p < panels; ++p) {
        b[p] = _mm512_loadu_si512(u + p * at.panel_bytes);
        __builtin_prefetch(u + p * at.panel_bytes + at.ahead, 0, 2);
      }
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) {
        int32_t group;
        __builtin_memcpy(&group, v + t * at.row, sizeof(group));
        const __m512i a = _mm512_set1_epi32(group);
#pragma GCC unroll 8
        for (int p = 0; p < panels; ++p) acc[t][p] = products(acc[t][p], a, b[p], Operand());
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p) {
      _mm512_storeu_si512(at.m + (t * panels + p) * kPanel, acc[t][p]);
    }
  }
}

}  // namespace

Conv1dKernels conv1d_avx512() { return kKernels; }

}  // namespace cmjax
