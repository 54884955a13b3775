// Grouped products of bfloat16 with AVX512_BF16.
//
// vdpbf16ps adds the products of two pairs of bfloat16 to a float32, so two lines of a matrix are
// interleaved, 16 columns to a vector, in this order of 128-bit lanes: of 32 columns, vector 0 has in
// lane l the columns 8 l to 8 l + 3, vector 1 the four after them. Subnormal numbers count as zero.
#pragma GCC diagnostic push  // false alarms inside GCC 12's header (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "grouped.h"

namespace cmjax::grouped::avx512_bf16 {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4;  // of a block's columns
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kDepth = 128;  // lines of a block, even
constexpr int kRows = 6;         // of a tile
static_assert(kBlock == kNarrow);
static_assert(kDepth * kBlock * 2 <= kScratchBytes);

inline __m512bh pair_of(const uint16_t* from) {
  int32_t both;
  __builtin_memcpy(&both, from, sizeof(both));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
}

// Two lines of 64 columns, interleaved; the second may be missing, as may columns.
inline void interleave(const uint16_t* line, const uint16_t* below, const __mmask32 valid[2],
                       uint8_t* to) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i a = _mm512_maskz_loadu_epi16(valid[h], line + 32 * h);
    const __m512i b =
        below == nullptr ? __m512i{} : _mm512_maskz_loadu_epi16(valid[h], below + 32 * h);
    _mm512_store_si512(to + 128 * h, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(to + 128 * h + 64, _mm512_unpackhi_epi16(a, b));
  }
}

// Sums of 32 columns in the order of columns, from that of `interleave`.
inline void in_order(__m512 first, __m512 second, __m512 out[2]) {
  const __m512 low = _mm512_shuffle_f32x4(first, second, 0x44);
  const __m512 high = _mm512_shuffle_f32x4(first, second, 0xee);
  out[0] = _mm512_shuffle_f32x4(low, low, 0xd8);
  out[1] = _mm512_shuffle_f32x4(high, high, 0xd8);
}

// `R` rows with a packed block, added to y unless `first`; in order where it is the last. Meanwhile
// the lines of `ahead` are fetched.
template <int R>
inline void tile(const uint16_t* const* x, int64_t depth, const uint8_t* packed, bool first,
                 bool last, float* y, int64_t y_stride, const uint16_t* ahead, int64_t stride) {
  __m512 sums[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sums[r][j] = first ? __m512{} : _mm512_loadu_ps(y + r * y_stride + kLanes * j);
    }
  }
  for (int64_t k = 0; k < depth; k += 2, packed += 4 * kBlock, ahead += 2 * stride) {
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + 32);
    __builtin_prefetch(ahead + stride);
    __builtin_prefetch(ahead + stride + 32);
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      columns[j] = reinterpret_cast<__m512bh>(_mm512_load_si512(packed + 64 * j));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh value = pair_of(x[r] + k);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        sums[r][j] = _mm512_dpbf16_ps(sums[r][j], columns[j], value);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j += 2) {
      __m512 out[2] = {sums[r][j], sums[r][j + 1]};
      if (last) in_order(sums[r][j], sums[r][j + 1], out);
      _mm512_storeu_ps(y + r * y_stride + kLanes * j, out[0]);
      _mm512_storeu_ps(y + r * y_stride + kLanes * (j + 1), out[1]);
    }
  }
}

}  // namespace

void half_columns(const uint16_t* const* x, int64_t count, const uint16_t* w, int64_t inner,
                  int64_t stride, int64_t columns, uint8_t* scratch, float* y, int64_t y_stride) {
  const __mmask64 valid = ~__mmask64{0} >> (kBlock - columns);
  const __mmask32 halves[2] = {static_cast<__mmask32>(valid), static_cast<__mmask32>(valid >> 32)};
  for (int64_t k = 0; k < inner; k += kDepth) {
    const int64_t depth = inner - k < kDepth ? inner - k : kDepth;
    for (int64_t d = 0; d < depth; d += 2) {
      const uint16_t* line = w + (k + d) * stride;
      interleave(line, d + 1 < depth ? line + stride : nullptr, halves, scratch + d * 2 * kBlock);
    }
    const bool first = k == 0, last = k + depth == inner;
    // While the first rows pass, the block below is fetched; then there is nothing to fetch.
    const auto* nothing = reinterpret_cast<const uint16_t*>(scratch);
    const uint16_t* ahead = last ? nothing : w + (k + kDepth) * stride;
    int64_t step = last ? 0 : stride;
    const uint16_t* at[kRows];
    for (int64_t r = 0; r < count; r += kRows, ahead = nothing, step = 0) {
      const int64_t rows = count - r < kRows ? count - r : kRows;
      for (int64_t i = 0; i < rows; ++i) at[i] = x[r + i] + k;
      float* to = y + r * y_stride;
      switch (rows) {
        case 1: tile<1>(at, depth, scratch, first, last, to, y_stride, ahead, step); break;
        case 2: tile<2>(at, depth, scratch, first, last, to, y_stride, ahead, step); break;
        case 3: tile<3>(at, depth, scratch, first, last, to, y_stride, ahead, step); break;
        case 4: tile<4>(at, depth, scratch, first, last, to, y_stride, ahead, step); break;
        case 5: tile<5>(at, depth, scratch, first, last, to, y_stride, ahead, step); break;
        default: tile<6>(at, depth, scratch, first, last, to, y_stride, ahead, step);
      }
    }
  }
}

}  // namespace cmjax::grouped::avx512_bf16
