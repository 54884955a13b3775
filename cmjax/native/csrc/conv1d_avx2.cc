// conv1d with AVX2.
#include <immintrin.h>

#include "conv1d.h"

namespace cmjax {
namespace {

using F = __m256;
constexpr int64_t kLanes = 8;
constexpr int64_t kPanels = 1;

inline F splat(float x) { return _mm256_set1_ps(x); }
inline F load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* to, F x) { _mm256_storeu_ps(to, x); }
inline F largest(F a, F b) { return _mm256_max_ps(a, b); }
inline F clip(F x, float limit) {
  return _mm256_min_ps(_mm256_max_ps(x, splat(-limit)), splat(limit));
}
inline F between(F x, F low, F high) { return _mm256_min_ps(_mm256_max_ps(x, low), high); }
struct Finite {  // zeros for lanes that are not finite, which it remembers
  F odd = _mm256_setzero_ps();
  F of(F x) {
    const F wrong = _mm256_cmp_ps(x - x, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    odd = _mm256_or_ps(odd, wrong);
    return _mm256_andnot_ps(wrong, x);
  }
  bool all() const { return _mm256_movemask_ps(odd) == 0; }
};
inline F from_int32(const int32_t* x) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline F fused(float c, F a, F b) { return _mm256_fmadd_ps(_mm256_set1_ps(c), a, b); }
inline __m128i low_halves(F x, __m256i bytes) {
  const __m256i narrow = _mm256_shuffle_epi8(_mm256_castps_si256(x), bytes);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(narrow, 0x08));
}
inline void narrow(F x, uint8_t* to) {
  const __m256i kLowBytes = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12));
  const __m128i both = low_halves(x, kLowBytes);  // 8 bytes of either half, the first 4 wanted
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi32(both, 0x08));
}
inline void narrow(F x, int16_t* to) {
  const __m256i kLowWords = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 1, 4, 5, 8, 9, 12, 13));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low_halves(x, kLowWords));
}

struct Panel;

// 16 registers: accumulators, two of the filter (four in the exact tile), one or two of v.
template <class Operand>
struct Dot {
  static constexpr int64_t kTiles = sizeof(Operand) == 1 ? 4 : 6;
  template <int tiles, int panels>
  static void run(const Panel& at);
};

#include "conv1d_pipeline.inc"

inline __m256i load_bytes(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline __m256i group_of(const char* v) {
  int32_t group;
  __builtin_memcpy(&group, v, sizeof(group));
  return _mm256_set1_epi32(group);
}

// What differs between tiles: the filter's rows as the products take them, and the products.
struct Saturating {  // unsigned times signed bytes, pairs of which `vpmaddubsw` adds in 16 bits
  __m256i ones = _mm256_set1_epi16(1);
  __m256i rows[2];
  void filter(const char* u) {
    rows[0] = load_bytes(u);
    rows[1] = load_bytes(u + 32);
  }
  void add(__m256i (&acc)[2], __m256i v) const {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_maddubs_epi16(v, rows[i]);
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(pairs, ones));
    }
  }
};

struct Exact {  // the same bytes, widened to 16 bits: even and odd ones apart
  __m256i low = _mm256_set1_epi16(0xff);
  __m256i even[2], odd[2];
  void filter(const char* u) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i row = load_bytes(u + 32 * i);
      even[i] = _mm256_srai_epi16(_mm256_slli_epi16(row, 8), 8);
      odd[i] = _mm256_srai_epi16(row, 8);
    }
  }
  void add(__m256i (&acc)[2], __m256i v) const {
    const __m256i v_even = _mm256_and_si256(v, low), v_odd = _mm256_srli_epi16(v, 8);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(v_even, even[i]));
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(v_odd, odd[i]));
    }
  }
};

struct Words {  // 16-bit operands
  __m256i rows[2];
  void filter(const char* u) {
    rows[0] = load_bytes(u);
    rows[1] = load_bytes(u + 32);
  }
  void add(__m256i (&acc)[2], __m256i v) const {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(v, rows[i]));
    }
  }
};

template <class Products, int tiles>
inline void register_tile(const Panel& at) {
  __m256i acc[tiles][2];
  const char* u = at.u;
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    const __m256i start = _mm256_and_si256(load_bytes(u + 32 * i), _mm256_set1_epi32(~1));
#pragma GCC unroll 8
    for (int t = 0; t < tiles; ++t) acc[t][i] = start;
  }
  Products products;
  for (int64_t s = 0; s < at.segments; ++s) {
    const char* v = at.v + s * at.segment_bytes;
    for (int64_t k = 0; k < at.groups; ++k, v += kGroupBytes) {
      u += kRowBytes;
      products.filter(u);
      __builtin_prefetch(u + at.ahead, 0, 2);
#pragma GCC unroll 8
      for (int t = 0; t < tiles; ++t) {
        products.add(acc[t], group_of(v + t * at.row));
        // GCC would load all of v first and spill accumulators for it.
        asm volatile("" : "+x"(acc[t][0]), "+x"(acc[t][1]));
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at.m + t * kPanel + i * 8), acc[t][i]);
    }
  }
}

inline bool may_saturate(const Panel& at) {
  const __m256i starts = _mm256_or_si256(load_bytes(at.u), load_bytes(at.u + 32));
  return !_mm256_testz_si256(starts, _mm256_set1_epi32(1));
}

template <class Operand>
template <int tiles, int panels>
void Dot<Operand>::run(const Panel& at) {
  static_assert(panels == 1, "16 registers hold no more");
  if constexpr (sizeof(Operand) == 2) {
    register_tile<Words, tiles>(at);
  } else if (may_saturate(at)) {
    register_tile<Exact, tiles>(at);
  } else {
    register_tile<Saturating, tiles>(at);
  }
}

}  // namespace

Conv1dKernels conv1d_avx2() { return kKernels; }

}  // namespace cmjax
