// MSD with AVX2.
//
// INT8: the two parts are one int16, 254 a1 + a2, and vpmaddwd multiplies it with weights that are
// widened on loading: one exact pass instead of two, and no 7-bit operands.
#include <immintrin.h>

#include "msd.h"

namespace cmjax::msd::avx2 {
namespace {

#include "msd_split.inc"

// g++ would otherwise move loads of a whole iteration up and spill accumulators.
#define CMJAX_KEEP(v) asm volatile("" : "+x"(v))

// Steps of 16 values until the int32 lanes are emptied: 2 * 32385 * 128 * 256 < 2**31.
constexpr int64_t kSafe = 256 * 16;

inline int64_t wide_sum(__m256i v) {
  const __m256i pairs = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                                         _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
  const __m128i s =
      _mm_add_epi64(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  return _mm_cvtsi128_si64(s) + _mm_extract_epi64(s, 1);
}

inline float sum_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline __m128i load_some(const int8_t* w, int64_t count) {
  alignas(16) int8_t last[16] = {};
  for (int64_t i = 0; i < count; ++i) last[i] = w[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(last));
}

// Int8: `R` rows with `C` features.
//
// While one group of features is multiplied, the next but one is fetched into the second cache, by
// lines in the order of memory: left alone, the hardware does not follow `C` rows at full speed. One
// row it does follow, and a fetch only disturbs it.
template <int R, int C>
inline void int8_tile(const uint8_t* parts, int64_t row_bytes, const int8_t* w, int64_t inner,
                      float* totals, int64_t stride) {
  int64_t total[R][C] = {};
  for (int64_t start = 0; start < inner; start += kSafe) {
    const int64_t end = inner < start + kSafe ? inner : start + kSafe;
    __m256i sums[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = _mm256_setzero_si256();
    }
    auto step = [&](int64_t k, bool whole) __attribute__((always_inline)) {
      __m256i q[C];
      if constexpr (C > 1) {
        _mm_prefetch(reinterpret_cast<const char*>(w + C * (2 * inner + k)), _MM_HINT_T1);
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const int8_t* from = w + c * inner + k;
        q[c] = _mm256_cvtepi8_epi16(
            whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                  : load_some(from, end - k));
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const auto* a = reinterpret_cast<const __m256i*>(parts + r * row_bytes + 2 * k);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(q[c], _mm256_load_si256(a)));
          CMJAX_KEEP(sums[r][c]);
        }
      }
    };
    int64_t k = start;
    for (; k + 16 <= end; k += 16) step(k, true);
    if (k < end) step(k, false);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] += wide_sum(sums[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) totals[r * stride + c] = static_cast<float>(total[r][c]);
  }
}

// MXFP4: `R` rows with one feature. A row is, for every 64 values, 32 steps of even and 32 of odd
// index; then a float for every block, its unit, filled up with zeros to eight; then for every 64
// values 8 int32, the sums of each lane's steps times -12.
//
// vpmaddubsw adds pairs of unsigned times signed bytes in int16. Weights are half-steps + 12, at
// most 24, and steps at most 72: four products make 6,912, far from saturation. Scales of eight
// blocks meet the row's units at once; a pair of them is then spread over the lanes of its blocks.
constexpr int64_t kGroup = 4;  // chunks of 64 values whose scales are loaded together

inline int64_t groups_of(int64_t blocks) { return (blocks + 2 * kGroup - 1) / (2 * kGroup); }

template <int R>
inline void mxfp4_tile(const uint8_t* parts, int64_t row_bytes, const uint8_t* w,
                       const uint8_t* scales, int64_t inner, float* totals, int64_t stride) {
  const int64_t blocks = inner / kBlock, chunks = (blocks + 1) / 2, groups = groups_of(blocks);
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  __m256 sums[R], factors[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sums[r] = _mm256_setzero_ps();
  auto step = [&](int64_t chunk, __m256i spread, bool whole) __attribute__((always_inline)) {
    const auto* from = reinterpret_cast<const __m128i*>(w + chunk * kBlock);
    const __m256i codes = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                : _mm256_zextsi128_si256(_mm_loadu_si128(from));
    const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, low));
    const __m256i odd =
        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), low));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* row = parts + r * row_bytes;
      const auto* steps = reinterpret_cast<const __m256i*>(row + chunk * 64);
      const auto* starts =
          reinterpret_cast<const __m256i*>(row + chunks * 64 + groups * 32 + chunk * 32);
      const __m256i pairs =
          _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_load_si256(steps)),
                           _mm256_maddubs_epi16(odd, _mm256_load_si256(steps + 1)));
      const __m256i sum =
          _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), _mm256_load_si256(starts));
      const __m256 value = _mm256_permutevar8x32_ps(factors[r], spread);
      sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), value, sums[r]);
    }
  };
  const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), two = _mm256_set1_epi32(2);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t left = blocks - 2 * kGroup * group;
    const uint8_t* from = scales + 2 * kGroup * group;
    uint64_t exponents = 0;
    if (left >= 8) {
      __builtin_memcpy(&exponents, from, 8);
    } else {
      for (int64_t i = 0; i < left; ++i) exponents |= uint64_t{from[i]} << (8 * i);
    }
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(exponents));
    const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto* units = reinterpret_cast<const float*>(parts + r * row_bytes + chunks * 64);
      factors[r] = _mm256_mul_ps(scale, _mm256_load_ps(units + 2 * kGroup * group));
    }
    __m256i spread = first;
    if (left >= 2 * kGroup) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kGroup; ++i, spread = _mm256_add_epi32(spread, two)) {
        step(kGroup * group + i, spread, true);
      }
      continue;
    }
    int64_t i = 0;
    for (; 2 * i + 2 <= left; ++i, spread = _mm256_add_epi32(spread, two)) {
      step(kGroup * group + i, spread, true);
    }
    if (2 * i < left) step(kGroup * group + i, spread, false);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) totals[r * stride] = sum_lanes(sums[r]);
}

template <int R, int C>
inline void int8_features(const uint8_t* parts, const int8_t* w, int64_t features, int64_t inner,
                          float* totals, int64_t stride) {
  const int64_t bytes = int8_bytes(inner);
  int64_t f = 0;
  for (; f + C <= features; f += C) {
    int8_tile<R, C>(parts, bytes, w + f * inner, inner, totals + f, stride);
  }
  for (; f < features; ++f) {
    int8_tile<R, 1>(parts, bytes, w + f * inner, inner, totals + f, stride);
  }
}

template <int R>
inline void mxfp4_features(const uint8_t* parts, const uint8_t* w, const uint8_t* scales,
                           int64_t features, int64_t inner, float* totals, int64_t stride) {
  for (int64_t f = 0; f < features; ++f) {
    mxfp4_tile<R>(parts, mxfp4_bytes(inner), w + f * (inner / 2), scales + f * (inner / kBlock),
                  inner, totals + f, stride);
  }
}

}  // namespace

int64_t int8_bytes(int64_t inner) { return (inner * 2 + 63) / 64 * 64 + 64; }

void int8_split(const float* x, int64_t inner, uint8_t* parts, Row* row) {
  for (int64_t at = inner * 2 / 64 * 64; at < int8_bytes(inner); at += 32) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts + at), _mm256_setzero_si256());
  }
  split_row(x, inner, row, [&](int64_t k, __m256i a1, __m256i a2) {
    const __m256i a = _mm256_add_epi32(_mm256_mullo_epi32(a1, _mm256_set1_epi32(254)), a2);
    const __m128i narrow =
        _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(parts + 2 * k), narrow);
  });
}

void int8_totals(const uint8_t* parts, const Row*, int64_t count, const int8_t* w, int64_t features,
                 int64_t inner, float* totals, int64_t stride) {
  // A few features at a time: their weights stay in the first cache while all rows pass.
  const int64_t bytes = int8_bytes(inner);
  for (int64_t f = 0; f < features; f += 4) {
    const int64_t some = features - f < 4 ? features - f : 4;
    int64_t r = 0;
    auto run = [&](auto tile, int64_t step) {
      tile(parts + r * bytes, w + f * inner, some, inner, totals + r * stride + f, stride);
      r += step;
    };
    while (count - r >= 4) run(int8_features<4, 2>, 4);
    if (count - r >= 2) run(int8_features<2, 4>, 2);
    if (count - r == 1) run(int8_features<1, 1>, 1);
  }
}

int64_t mxfp4_bytes(int64_t inner) {
  const int64_t blocks = inner / kBlock;
  return ((blocks + 1) / 2 * 96 + groups_of(blocks) * 32 + 63) / 64 * 64 + 64;
}

void mxfp4_split(const float* x, int64_t inner, uint8_t* parts) {
  const int64_t blocks = inner / kBlock, chunks = (blocks + 1) / 2, groups = groups_of(blocks);
  auto* steps = reinterpret_cast<int8_t*>(parts);
  auto* units = reinterpret_cast<float*>(parts + chunks * 64);
  auto* starts = reinterpret_cast<__m256i*>(parts + chunks * 64 + groups * 32);
  for (int64_t b = blocks; b < 2 * kGroup * groups; ++b) units[b] = 0.0f;
  for (int64_t b = 0; b < 2 * chunks; ++b) {
    int8_t* evens = steps + b / 2 * 64 + b % 2 * 16;
    if (b < blocks) {
      units[b] = split_block(x + b * kBlock, evens, evens + 32);
    } else {
      _mm_store_si128(reinterpret_cast<__m128i*>(evens), _mm_setzero_si128());
      _mm_store_si128(reinterpret_cast<__m128i*>(evens + 32), _mm_setzero_si128());
    }
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const __m256i twelve = _mm256_set1_epi8(12);
    const auto* from = reinterpret_cast<const __m256i*>(steps + chunk * 64);
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(twelve, _mm256_load_si256(from)),
                                           _mm256_maddubs_epi16(twelve, _mm256_load_si256(from + 1)));
    const __m256i sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    _mm256_store_si256(starts + chunk, _mm256_sub_epi32(_mm256_setzero_si256(), sum));
  }
}

void mxfp4_totals(const uint8_t* parts, int64_t count, const uint8_t* w, const uint8_t* scales,
                  int64_t features, int64_t inner, float* totals, int64_t stride) {
  const int64_t bytes = mxfp4_bytes(inner);
  for (int64_t f = 0; f < features; f += 4) {
    const int64_t some = features - f < 4 ? features - f : 4;
    int64_t r = 0;
    auto run = [&](auto tile, int64_t step) {
      tile(parts + r * bytes, w + f * (inner / 2), scales + f * (inner / kBlock), some, inner,
           totals + r * stride + f, stride);
      r += step;
    };
    while (count - r >= 4) run(mxfp4_features<4>, 4);
    if (count - r >= 2) run(mxfp4_features<2>, 2);
    if (count - r == 1) run(mxfp4_features<1>, 1);
  }
}

}  // namespace cmjax::msd::avx2
