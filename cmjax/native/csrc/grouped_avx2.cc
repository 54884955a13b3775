// Grouped products with AVX2.
//
// Int8: two lines of the matrix are interleaved and widened to int16, so that vpmaddwd sums the
// products of both exactly: for few rows as they are read, for many in a block that is laid out first.
#include <immintrin.h>

#include "grouped.h"

namespace cmjax::grouped::avx2 {
namespace {

constexpr int kLanes = 8;
constexpr int kWide = 2;

inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }

#include "grouped_tiles.inc"

// 16 columns of two lines, as pairs.
inline void interleave(__m128i line, __m128i below, __m256i out[2]) {
  out[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(line, below));
  out[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(line, below));
}

inline __m128i line_of(const int8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// Two values of a row, in every lane.
inline __m256i two_of(int16_t value, int16_t next) {
  const auto low = static_cast<uint16_t>(value), high = static_cast<uint16_t>(next);
  return _mm256_set1_epi32(static_cast<int32_t>(high << 16 | low));
}

// Adds lines k, k + apart, ... of 2 `U` streams, or of one stream with U = 0; `columns` is a multiple
// of 16.
template <int R, int U>
inline void add_int8_lines(const int16_t* const* x, int64_t k, int64_t apart, const int8_t* w,
                           int64_t stride, int64_t columns, int32_t* y, int64_t y_stride) {
  constexpr int kPairs = U == 0 ? 1 : U;
  __m256i values[R][kPairs];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int u = 0; u < kPairs; ++u) {
      const int16_t* from = x[r] + k + 2 * u * apart;
      values[r][u] = two_of(from[0], U == 0 ? int16_t{0} : from[apart]);
    }
  }
  const int8_t* line = w + k * stride;
  for (int64_t c = 0; c < columns; c += 16) {
    __m256i sums[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto* from = reinterpret_cast<const __m256i*>(y + r * y_stride + c);
      sums[r][0] = _mm256_loadu_si256(from);
      sums[r][1] = _mm256_loadu_si256(from + 1);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kPairs; ++u) {
      const int8_t* from = line + 2 * u * apart * stride + c;
      __m256i pairs[2];
      interleave(line_of(from), U == 0 ? _mm_setzero_si128() : line_of(from + apart * stride),
                 pairs);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pairs[0], values[r][u]));
        sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pairs[1], values[r][u]));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      auto* to = reinterpret_cast<__m256i*>(y + r * y_stride + c);
      _mm256_storeu_si256(to, sums[r][0]);
      _mm256_storeu_si256(to + 1, sums[r][1]);
    }
  }
}

template <int R>
inline void int8_stream(const int16_t* const* x, const int8_t* w, int64_t lines, int64_t stride,
                        int64_t columns, int32_t* y, int64_t y_stride) {
  constexpr int U = R == 1 ? 4 : R == 2 ? 2 : 1;
  const int64_t whole = columns / 16 * 16, each = lines / (2 * U);
  for (int r = 0; r < R; ++r) {
    for (int64_t c = 0; c < columns; ++c) y[r * y_stride + c] = 0;
  }
  for (int64_t k = 0; k < each; ++k) {
    add_int8_lines<R, U>(x, k, each, w, stride, whole, y, y_stride);
  }
  for (int64_t k = 2 * U * each; k < lines; ++k) {
    add_int8_lines<R, 0>(x, k, 0, w, stride, whole, y, y_stride);
  }
  for (int64_t k = 0; whole < columns && k < lines; ++k) {
    for (int64_t c = whole; c < columns; ++c) {
      for (int r = 0; r < R; ++r) y[r * y_stride + c] += w[k * stride + c] * x[r][k];
    }
  }
}

constexpr int64_t kStrip = 16;  // columns whose sums of up to kStripRows rows stay in registers
constexpr int kStripRows = 6;
constexpr int64_t kDepth = 128;  // lines of a block: half of a first cache of 32 KiB
static_assert(kDepth * kNarrow * sizeof(int16_t) <= kScratchBytes);

// Lays out `depth` lines (then a line of zeros, if that is odd) of `columns` <= kNarrow: strip by
// strip, two lines at a time.
inline void lay_out(const int8_t* w, int64_t stride, int64_t depth, int64_t columns, int16_t* to) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t c = 0; c < columns; c += kStrip) {
    const int64_t some = columns - c < kStrip ? columns - c : kStrip;
    for (int64_t p = 0; p < pairs; ++p, to += 2 * kStrip) {
      const int8_t* from = w + 2 * p * stride + c;
      const bool two = 2 * p + 1 < depth;
      alignas(16) int8_t padded[2][kStrip] = {};
      __m256i out[2];
      if (some == kStrip) {
        interleave(line_of(from), two ? line_of(from + stride) : _mm_setzero_si128(), out);
      } else {
        __builtin_memcpy(padded[0], from, some);
        if (two) __builtin_memcpy(padded[1], from + stride, some);
        interleave(line_of(padded[0]), line_of(padded[1]), out);
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), out[0]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to) + 1, out[1]);
    }
  }
}

// Adds `pairs` pairs of lines of a strip to `R` rows of y, or sets them.
template <int R>
inline void int8_strip(const int16_t* const* x, const int16_t* strip, int64_t pairs, bool first,
                       int32_t* y, int64_t y_stride) {
  __m256i sums[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const auto* from = reinterpret_cast<const __m256i*>(y + r * y_stride);
    sums[r][0] = first ? _mm256_setzero_si256() : _mm256_loadu_si256(from);
    sums[r][1] = first ? _mm256_setzero_si256() : _mm256_loadu_si256(from + 1);
  }
  const auto* lines = reinterpret_cast<const __m256i*>(strip);
  for (int64_t p = 0; p < pairs; ++p, lines += 2) {
    const __m256i low = _mm256_load_si256(lines), high = _mm256_load_si256(lines + 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t both;
      __builtin_memcpy(&both, x[r] + 2 * p, sizeof(both));
      const __m256i values = _mm256_set1_epi32(both);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(low, values));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(high, values));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    auto* to = reinterpret_cast<__m256i*>(y + r * y_stride);
    _mm256_storeu_si256(to, sums[r][0]);
    _mm256_storeu_si256(to + 1, sums[r][1]);
  }
}

}  // namespace

#include "grouped_kernels.inc"

void int8_widen(const int8_t* from, int64_t size, int16_t* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = from[i];
}

void int8_columns(const int16_t* const* x, int64_t count, const int8_t* w, int64_t inner,
                  int64_t stride, int64_t columns, uint8_t* scratch, int32_t* y,
                  int64_t y_stride) {
  auto* layout = reinterpret_cast<int16_t*>(scratch);
  for (int64_t k = 0; k < inner; k += kDepth) {
    const int64_t depth = inner - k < kDepth ? inner - k : kDepth, pairs = (depth + 1) / 2;
    lay_out(w + k * stride, stride, depth, columns, layout);
    for (int64_t r = 0; r < count; r += kStripRows) {
      const int16_t* at[kStripRows] = {};
      const int64_t rows = count - r < kStripRows ? count - r : kStripRows;
      for (int64_t i = 0; i < rows; ++i) at[i] = x[r + i] + k;
      for (int64_t c = 0; c < columns; c += kStrip) {
        const int16_t* strip = layout + c * 2 * pairs;
        int32_t* to = y + r * y_stride + c;
        switch (rows) {
          case 1: int8_strip<1>(at, strip, pairs, k == 0, to, y_stride); break;
          case 2: int8_strip<2>(at, strip, pairs, k == 0, to, y_stride); break;
          case 3: int8_strip<3>(at, strip, pairs, k == 0, to, y_stride); break;
          case 4: int8_strip<4>(at, strip, pairs, k == 0, to, y_stride); break;
          case 5: int8_strip<5>(at, strip, pairs, k == 0, to, y_stride); break;
          default: int8_strip<kStripRows>(at, strip, pairs, k == 0, to, y_stride);
        }
      }
    }
  }
}

void int8_lines(const int16_t* const* x, int64_t count, const int8_t* w, int64_t lines,
                int64_t stride, int64_t columns, int32_t* y, int64_t y_stride) {
  int64_t r = 0;
  const auto run = [&](auto rows, int64_t step) {
    rows(x + r, w, lines, stride, columns, y + r * y_stride, y_stride);
    r += step;
  };
  while (count - r >= 4) run(int8_stream<4>, 4);
  while (count - r >= 2) run(int8_stream<2>, 2);
  if (count - r == 1) run(int8_stream<1>, 1);
}

}  // namespace cmjax::grouped::avx2
