// Grouped products with AVX-512, int8 ones with VNNI.
//
// vpdpbusd multiplies unsigned with signed bytes: weights get their sign bit flipped, w + 128, and
// 128 times the sum of the row is taken off at the end. It sums products by fours of `inner`, so
// four rows of a matrix are interleaved, 16 columns to a vector, in this order of 128-bit lanes:
// vector j has in lane l the columns 16 l + 4 j and the three after it. Where whole lines are streamed,
// the four are lines far apart.
#pragma GCC diagnostic push  // false alarms inside GCC 12's header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "grouped.h"

namespace cmjax::grouped::avx512 {
namespace {

constexpr int kLanes = 16;
constexpr int kWide = 4;

inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }

#include "grouped_tiles.inc"

template <int N>
struct Count {
  static constexpr int value = N;
};

constexpr int64_t kGroup = 64;  // columns that are interleaved together

// Four rows of 64 columns, interleaved; `valid` columns are read, of the first `depth` rows.
inline void interleave(const int8_t* w, int64_t stride, int64_t depth, __mmask64 valid,
                       __m512i out[4]) {
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    row[i] = i < depth ? _mm512_maskz_loadu_epi8(valid, w + i * stride) : _mm512_setzero_si512();
    row[i] = _mm512_xor_si512(row[i], flip);
  }
  const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]);
  const __m512i high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]);
  const __m512i high23 = _mm512_unpackhi_epi8(row[2], row[3]);
  out[0] = _mm512_unpacklo_epi16(low01, low23);
  out[1] = _mm512_unpackhi_epi16(low01, low23);
  out[2] = _mm512_unpacklo_epi16(high01, high23);
  out[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Sums of 64 columns in the order of columns, from that of `interleave`.
inline void in_order(const __m512i v[4], __m512i out[4]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  const __m512i d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  out[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  out[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  out[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  out[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

inline __m512i broadcast4(const int8_t* from) {
  int32_t bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return _mm512_set1_epi32(bytes);
}

// Totals of `R` rows with `G` groups of 64 columns; fetch(k, group, out) gives the weights of four
// k from k on. Adds to y, and with `last` takes the offset off.
template <int R, int G, typename Fetch>
inline void int8_tile(const int8_t* const* x, const int32_t* sums, int64_t inner, bool first,
                      bool last, int64_t columns, int32_t* y, int64_t y_stride,
                      const Fetch& fetch) {
  __m512i acc[R][G][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[r][g][j] = _mm512_setzero_si512();
    }
  }
  for (int64_t k = 0; k < inner; k += 4) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      __m512i w[4];
      fetch(k, g, w);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i value = broadcast4(x[r] + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          acc[r][g][j] = _mm512_dpbusd_epi32(acc[r][g][j], w[j], value);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512i offset = _mm512_set1_epi32(
        last ? static_cast<int32_t>(128u * static_cast<uint32_t>(sums[r])) : 0);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      __m512i lanes[4];
      in_order(acc[r][g], lanes);
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        const int64_t at = g * kGroup + 16 * l;
        if (at >= columns) break;
        const int64_t some = columns - at < 16 ? columns - at : 16;
        const auto mask = static_cast<__mmask16>((1u << some) - 1);
        int32_t* to = y + r * y_stride + at;
        __m512i total = _mm512_sub_epi32(lanes[l], offset);
        if (!first) total = _mm512_add_epi32(total, _mm512_maskz_loadu_epi32(mask, to));
        _mm512_mask_storeu_epi32(to, mask, total);
      }
    }
  }
}

// Straight from the matrix, one pass over it.
template <int R, int G>
inline void int8_direct(const int8_t* const* x, const int32_t* sums, const int8_t* w,
                        int64_t inner, int64_t stride, int64_t columns, int32_t* y,
                        int64_t y_stride) {
  const int64_t whole = inner / 4 * 4;
  for (int64_t c = 0; c < columns; c += G * kGroup) {
    const int64_t left = columns - c;
    __mmask64 valid[G];
    for (int g = 0; g < G; ++g) {
      const int64_t some = left - g * kGroup;
      valid[g] = some >= 64 ? ~__mmask64{0} : some <= 0 ? 0 : ~__mmask64{0} >> (64 - some);
    }
    const auto fetch = [&](int64_t k, int g, __m512i* out) __attribute__((always_inline)) {
      const int8_t* from = w + k * stride + c + g * kGroup;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(from + (24 + i) * stride), _MM_HINT_T0);
      }
      interleave(from, stride, 4, valid[g], out);
    };
    const int64_t some = left < G * kGroup ? left : G * kGroup;
    int8_tile<R, G>(x, sums, whole, true, true, some, y + c, y_stride, fetch);
    if (whole < inner) {
      const int8_t* rest[R];
      for (int r = 0; r < R; ++r) rest[r] = x[r] + whole;
      const auto last = [&](int64_t, int g, __m512i* out) __attribute__((always_inline)) {
        interleave(w + whole * stride + c + g * kGroup, stride, inner - whole, valid[g], out);
      };
      int8_tile<R, G>(rest, sums, 4, false, false, some, y + c, y_stride, last);
    }
  }
}

// Meanwhile the rows of `ahead`, one for every k, are fetched.
template <int R>
inline void int8_packed(const int8_t* const* x, const int32_t* sums, const uint8_t* packed,
                        int64_t depth, bool first, bool last, int64_t columns, int32_t* y,
                        int64_t y_stride, Ahead ahead) {
  const auto fetch = [&](int64_t k, int, __m512i* out) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) __builtin_prefetch(ahead.at + (k + i) * ahead.stride);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[j] = _mm512_load_si512(packed + k * kGroup + 64 * j);
  };
  int8_tile<R, 1>(x, sums, depth, first, last, columns, y, y_stride, fetch);
}

constexpr int64_t kDepth = kScratchBytes / kGroup;  // of a block of int8

// Adds lines k, k + apart, ... of 4 `U` streams, or with U = 1 the `depth` <= 4 that there are; sums
// stay in the order of `interleave`.
template <int R, int U>
inline void add_int8_lines(const int8_t* const* x, int64_t k, int64_t apart, int64_t depth,
                           const int8_t* w, int64_t stride, int64_t columns, int32_t* y,
                           int64_t y_stride) {
  __m512i values[R][U];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      int8_t four[4];
      for (int i = 0; i < 4; ++i) {
        four[i] = i < depth ? x[r][k + (4 * u + i) * apart] : int8_t{0};
      }
      values[r][u] = broadcast4(four);
    }
  }
  for (int64_t c = 0; c < columns; c += kGroup) {
    const int64_t left = columns - c;
    const __mmask64 valid = ~__mmask64{0} >> (left < kGroup ? kGroup - left : 0);
    __m512i sums[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_loadu_si512(y + r * y_stride + c + 16 * j);
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int8_t* from = w + (k + 4 * u * apart) * stride + c;
#pragma GCC unroll 4
      for (int i = 0; U > 1 && i < 4; ++i) __builtin_prefetch(from + i * apart * stride + kAhead);
      __m512i fours[4];
      interleave(from, apart * stride, depth, valid, fours);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          sums[r][j] = _mm512_dpbusd_epi32(sums[r][j], fours[j], values[r][u]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) _mm512_storeu_si512(y + r * y_stride + c + 16 * j, sums[r][j]);
    }
  }
}

template <int R>
inline void int8_stream(const int8_t* const* x, const int8_t* w, int64_t lines, int64_t stride,
                        int64_t columns, int32_t* y, int64_t y_stride) {
  constexpr int U = 2;
  const int64_t each = lines / (4 * U);
  for (int r = 0; r < R; ++r) {
    for (int64_t c = 0; c < columns; c += kGroup) {
      for (int j = 0; j < 4; ++j) {
        _mm512_storeu_si512(y + r * y_stride + c + 16 * j, _mm512_setzero_si512());
      }
    }
  }
  for (int64_t k = 0; k < each; ++k) {
    add_int8_lines<R, U>(x, k, each, 4, w, stride, columns, y, y_stride);
  }
  for (int64_t k = 4 * U * each; k < lines; k += 4) {
    add_int8_lines<R, 1>(x, k, 1, lines - k < 4 ? lines - k : 4, w, stride, columns, y, y_stride);
  }
  for (int r = 0; r < R; ++r) {
    int32_t sum = 0;
    for (int64_t k = 0; k < lines; ++k) sum += x[r][k];
    const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(128u * static_cast<uint32_t>(sum)));
    for (int64_t c = 0; c < columns; c += kGroup) {
      int32_t* to = y + r * y_stride + c;
      __m512i sums[4], lanes[4];
      for (int j = 0; j < 4; ++j) sums[j] = _mm512_loadu_si512(to + 16 * j);
      in_order(sums, lanes);
      for (int l = 0; l < 4; ++l) {
        _mm512_storeu_si512(to + 16 * l, _mm512_sub_epi32(lanes[l], offset));
      }
    }
  }
}

}  // namespace

#include "grouped_kernels.inc"

void int8_columns(const int8_t* const* x, const int32_t* sums, int64_t count, const int8_t* w,
                  int64_t inner, int64_t stride, int64_t columns, uint8_t* scratch, int32_t* y,
                  int64_t y_stride) {
  switch (count) {
    case 1: return int8_direct<1, 4>(x, sums, w, inner, stride, columns, y, y_stride);
    case 2: return int8_direct<2, 2>(x, sums, w, inner, stride, columns, y, y_stride);
    case 3: return int8_direct<3, 1>(x, sums, w, inner, stride, columns, y, y_stride);
    case 4: return int8_direct<4, 1>(x, sums, w, inner, stride, columns, y, y_stride);
    default: break;
  }
  for (int64_t c = 0; c < columns; c += kGroup) {
    const int64_t some = columns - c < kGroup ? columns - c : kGroup;
    const __mmask64 valid = ~__mmask64{0} >> (64 - some);
    for (int64_t k = 0; k < inner; k += kDepth) {
      const int64_t depth = inner - k < kDepth ? inner - k : kDepth;
      for (int64_t d = 0; d < depth; d += 4) {
        __m512i out[4];
        interleave(w + (k + d) * stride + c, stride, depth - d < 4 ? depth - d : 4, valid, out);
        for (int j = 0; j < 4; ++j) _mm512_store_si512(scratch + d * kGroup + 64 * j, out[j]);
      }
      const bool first = k == 0, last = k + depth == inner;
      const Ahead nothing{reinterpret_cast<const char*>(scratch), 0};
      Ahead ahead = last ? nothing : ahead_of(w + (k + kDepth) * stride + c, stride);
      const int8_t* at[6];
      int64_t r = 0;
      for (; r < count; r += 6, ahead = nothing) {
        const int64_t rows = count - r < 6 ? count - r : 6;
        for (int64_t i = 0; i < rows; ++i) at[i] = x[r + i] + k;
        const int32_t* s = sums + r;
        int32_t* to = y + r * y_stride + c;
        const auto packed = [&](auto count) {
          int8_packed<decltype(count)::value>(at, s, scratch, depth, first, last, some, to,
                                              y_stride, ahead);
        };
        switch (rows) {
          case 1: packed(Count<1>{}); break;
          case 2: packed(Count<2>{}); break;
          case 3: packed(Count<3>{}); break;
          case 4: packed(Count<4>{}); break;
          case 5: packed(Count<5>{}); break;
          default: packed(Count<6>{});
        }
      }
    }
  }
}

void int8_lines(const int8_t* const* x, int64_t count, const int8_t* w, int64_t lines,
                int64_t stride, int64_t columns, int32_t* y, int64_t y_stride) {
  int64_t r = 0;
  const auto run = [&](auto rows, int64_t step) {
    rows(x + r, w, lines, stride, columns, y + r * y_stride, y_stride);
    r += step;
  };
  while (count - r >= 4) run(int8_stream<4>, 4);
  if (count - r == 3) run(int8_stream<3>, 3);
  if (count - r == 2) run(int8_stream<2>, 2);
  if (count - r == 1) run(int8_stream<1>, 1);
}

}  // namespace cmjax::grouped::avx512
