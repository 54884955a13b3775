// MSD with AVX-512 VNNI: 64 byte products per instruction, summed by fours in int32.
//
// vpdpbusd multiplies unsigned with signed bytes. INT8 weights get their sign bit flipped, q + 128,
// and the 128 times the sum of the row is taken off at the end; sums wrap around on the way, which
// does not matter, as the result fits. The two parts are two instructions, so nothing is widened.
#pragma GCC diagnostic push  // false alarms inside GCC 12's header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "msd.h"

namespace cmjax::msd::avx512 {
namespace {

#include "msd_split.inc"

// g++ would otherwise move loads of a whole iteration up and spill accumulators.
#define CMJAX_KEEP(v) asm volatile("" : "+v"(v))

// sum += q * [from, from + 64), the latter as an operand in memory.
inline void add_products(__m512i& sum, __m512i q, const uint8_t* from) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(q), "m"(*reinterpret_cast<const __m512i*>(from)));
}

constexpr int64_t kAhead = 8192;  // bytes (measured)

int64_t plane_bytes(int64_t inner) { return (inner + 63) / 64 * 64 + 64; }

// Int8: `R` rows with `C` features. A row is the plane of a1, then that of a2.
//
// Weights are fetched kAhead before they are needed, by lines in the order of memory: left alone, the
// hardware comes too late, and does not follow `C` rows at full speed.
//
// `Few` rows fit into the first cache, but what is touched once there leaves it with the weights that
// stream through: so they are operands in memory, touched for every feature (up to 1.7 times faster
// at three and four rows). More rows come from the second cache anyway, once each.
template <int R, int C, bool Few>
inline void int8_tile(const uint8_t* parts, int64_t row_bytes, const Row* rows, const int8_t* w,
                      int64_t inner, float* totals, int64_t stride) {
  const __m512i flip = _mm512_set1_epi8(-128);
  const int64_t plane = row_bytes / 2;
  __m512i c1[R][C], c2[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) c1[r][c] = c2[r][c] = _mm512_setzero_si512();
  }
  auto step = [&](int64_t k, __mmask64 valid) __attribute__((always_inline)) {
    __m512i q[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + C * k + 64 * c), _MM_HINT_T0);
      q[c] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(valid, w + c * inner + k), flip);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* a = parts + r * row_bytes + k;
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        if constexpr (Few) {
          add_products(c1[r][c], q[c], a);
          add_products(c2[r][c], q[c], a + plane);
        } else {
          c1[r][c] = _mm512_dpbusd_epi32(c1[r][c], q[c], _mm512_load_si512(a));
          c2[r][c] = _mm512_dpbusd_epi32(c2[r][c], q[c], _mm512_load_si512(a + plane));
          CMJAX_KEEP(c1[r][c]);
          CMJAX_KEEP(c2[r][c]);
        }
      }
    }
  };
  int64_t k = 0;
  for (; k + 64 <= inner; k += 64) step(k, ~__mmask64{0});
  if (k < inner) step(k, ~__mmask64{0} >> (64 - (inner - k)));  // the parts are zero there
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const auto offset = [](int32_t sum) { return 128u * static_cast<uint32_t>(sum); };
      const auto t1 = static_cast<int32_t>(
          static_cast<uint32_t>(_mm512_reduce_add_epi32(c1[r][c])) - offset(rows[r].sum1));
      const auto t2 = static_cast<int32_t>(
          static_cast<uint32_t>(_mm512_reduce_add_epi32(c2[r][c])) - offset(rows[r].sum2));
      totals[r * stride + c] = static_cast<float>(254 * static_cast<int64_t>(t1) + t2);
    }
  }
}

// MXFP4: `R` rows with `C` features. A row is, for every 128 values, 64 steps of even and 64 of odd
// index; then per 128 values 16 floats, the units of its four blocks (four lanes each); then 16
// int32, the sums of each lane's steps times -12.
struct Mxfp4Row {
  const int8_t* steps;
  const float* units;
  const int32_t* starts;
  Mxfp4Row(const uint8_t* parts, int64_t chunks)
      : steps(reinterpret_cast<const int8_t*>(parts)),
        units(reinterpret_cast<const float*>(parts + chunks * 128)),
        starts(reinterpret_cast<const int32_t*>(parts + chunks * 192)) {}
};

template <int R, int C>
inline void mxfp4_tile(const uint8_t* parts, int64_t row_bytes, const uint8_t* w,
                       const uint8_t* scales, int64_t inner, float* totals, int64_t stride) {
  const int64_t blocks = inner / kBlock, chunks = (blocks + 3) / 4;
  const __m512i low = _mm512_set1_epi8(15);
  // Half-steps + 12 by code.
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  // Of four exponents, the j-th to the top byte of the four lanes of block j.
  const __m512i spread = _mm512_set_epi32(
      0x03808080, 0x03808080, 0x03808080, 0x03808080, 0x02808080, 0x02808080, 0x02808080,
      0x02808080, 0x01808080, 0x01808080, 0x01808080, 0x01808080, 0x00808080, 0x00808080,
      0x00808080, 0x00808080);
  __m512 sums[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  auto step = [&](int64_t chunk, __mmask64 valid, int64_t some) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      _mm_prefetch(reinterpret_cast<const char*>(w + kAhead + 64 * (C * chunk + c)), _MM_HINT_T0);
      const __m512i codes =
          _mm512_maskz_loadu_epi8(valid, w + (c * blocks + 4 * chunk) * (kBlock / 2));
      const __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low));
      const __m512i odd =
          _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low));
      int32_t exponents = 0;  // plainly: a masked load waits for the next line too
      __builtin_memcpy(&exponents, scales + c * blocks + 4 * chunk, some);
      const __m512 scale = _mm512_castsi512_ps(_mm512_srli_epi32(
          _mm512_shuffle_epi8(_mm512_set1_epi32(exponents), spread), 1));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Mxfp4Row row(parts + r * row_bytes, chunks);
        __m512i sum = _mm512_load_si512(row.starts + chunk * 16);
        sum = _mm512_dpbusd_epi32(sum, even, _mm512_load_si512(row.steps + chunk * 128));
        sum = _mm512_dpbusd_epi32(sum, odd, _mm512_load_si512(row.steps + chunk * 128 + 64));
        const __m512 value = _mm512_mul_ps(scale, _mm512_load_ps(row.units + chunk * 16));
        sums[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), value, sums[r][c]);
      }
    }
  };
  const int64_t whole = blocks / 4;
  for (int64_t chunk = 0; chunk < whole; ++chunk) step(chunk, ~__mmask64{0}, 4);
  if (const int64_t rest = blocks - 4 * whole; rest > 0) {
    step(whole, ~__mmask64{0} >> (64 - 16 * rest), rest);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) totals[r * stride + c] = _mm512_reduce_add_ps(sums[r][c]);
  }
}

template <int R, int C, bool Few>
inline void int8_features(const uint8_t* parts, const Row* rows, const int8_t* w, int64_t features,
                          int64_t inner, float* totals, int64_t stride) {
  const int64_t bytes = int8_bytes(inner);
  int64_t f = 0;
  for (; f + C <= features; f += C) {
    int8_tile<R, C, Few>(parts, bytes, rows, w + f * inner, inner, totals + f, stride);
  }
  for (; f < features; ++f) {
    int8_tile<R, 1, Few>(parts, bytes, rows, w + f * inner, inner, totals + f, stride);
  }
}

template <int R, int C>
inline void mxfp4_features(const uint8_t* parts, const uint8_t* w, const uint8_t* scales,
                           int64_t features, int64_t inner, float* totals, int64_t stride) {
  const int64_t bytes = mxfp4_bytes(inner);
  int64_t f = 0;
  auto at = [&](const uint8_t* base, int64_t per_row) { return base + f * per_row; };
  for (; f + C <= features; f += C) {
    mxfp4_tile<R, C>(parts, bytes, at(w, inner / 2), at(scales, inner / kBlock), inner, totals + f,
                     stride);
  }
  for (; f < features; ++f) {
    mxfp4_tile<R, 1>(parts, bytes, at(w, inner / 2), at(scales, inner / kBlock), inner, totals + f,
                     stride);
  }
}

}  // namespace

int64_t int8_bytes(int64_t inner) { return 2 * plane_bytes(inner); }

void int8_split(const float* x, int64_t inner, uint8_t* parts, Row* row) {
  const int64_t plane = plane_bytes(inner);
  for (int64_t k = inner / 64 * 64; k < plane; k += 64) {
    _mm512_store_si512(parts + k, _mm512_setzero_si512());
    _mm512_store_si512(parts + plane + k, _mm512_setzero_si512());
  }
  split_row(x, inner, row, [&](int64_t k, __m256i a1, __m256i a2) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(parts + k), _mm256_cvtepi32_epi8(a1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(parts + plane + k), _mm256_cvtepi32_epi8(a2));
  });
}

void int8_totals(const uint8_t* parts, const Row* rows, int64_t count, const int8_t* w,
                 int64_t features, int64_t inner, float* totals, int64_t stride) {
  // A few features at a time: their weights stay in the first cache while all rows pass.
  const int64_t bytes = int8_bytes(inner);
  for (int64_t f = 0; f < features; f += 4) {
    const int64_t some = features - f < 4 ? features - f : 4;
    int64_t r = 0;
    auto run = [&](auto tile, int64_t step) {
      tile(parts + r * bytes, rows + r, w + f * inner, some, inner, totals + r * stride + f, stride);
      r += step;
    };
    const bool few = count <= 4;
    while (count - r >= 3) run(few ? int8_features<3, 4, true> : int8_features<3, 4, false>, 3);
    if (count - r == 2) run(int8_features<2, 4, false>, 2);
    if (count - r == 1) run(int8_features<1, 1, false>, 1);
  }
}

int64_t mxfp4_bytes(int64_t inner) { return (inner / kBlock + 3) / 4 * 256 + 64; }

void mxfp4_split(const float* x, int64_t inner, uint8_t* parts) {
  const int64_t blocks = inner / kBlock, chunks = (blocks + 3) / 4;
  auto* steps = reinterpret_cast<int8_t*>(parts);
  auto* units = reinterpret_cast<float*>(parts + chunks * 128);
  auto* starts = reinterpret_cast<int32_t*>(parts + chunks * 192);
  for (int64_t b = 0; b < 4 * chunks; ++b) {
    int8_t* evens = steps + b / 4 * 128 + b % 4 * 16;
    float unit = 0.0f;
    if (b < blocks) {
      unit = split_block(x + b * kBlock, evens, evens + 64);
    } else {
      _mm_store_si128(reinterpret_cast<__m128i*>(evens), _mm_setzero_si128());
      _mm_store_si128(reinterpret_cast<__m128i*>(evens + 64), _mm_setzero_si128());
    }
    _mm_store_ps(units + 4 * b, _mm_set1_ps(unit));
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const __m512i twelve = _mm512_set1_epi8(12);
    __m512i sum = _mm512_setzero_si512();
    sum = _mm512_dpbusd_epi32(sum, twelve, _mm512_load_si512(steps + chunk * 128));
    sum = _mm512_dpbusd_epi32(sum, twelve, _mm512_load_si512(steps + chunk * 128 + 64));
    _mm512_store_si512(starts + chunk * 16, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
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
    while (count - r >= 4) run(mxfp4_features<4, 4>, 4);
    if (count - r >= 2) run(mxfp4_features<2, 2>, 2);
    if (count - r == 1) run(mxfp4_features<1, 2>, 1);
  }
}

}  // namespace cmjax::msd::avx512
