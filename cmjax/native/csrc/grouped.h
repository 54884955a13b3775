// What the kernels of grouped products provide in one instruction set; grouped.cc calls those of
// the best one.
//
//     y[r] = x[r] w[g]      for the rows r of group g, w[g] [inner, features] as it lies in memory
//
// Few rows: whole lines of a matrix are streamed once, or (as vectors of 16 bytes do it) blocks of its
// columns, with a row of accumulators for each.
// Many rows: blocks of the matrix are first laid out as the inner loop reads them, in float32 (or
// for int8 by fours of `inner`), and stay in the first cache while all rows pass.
//
// No C++ standard library here: see msd.h.
#pragma once

#include <cstdint>

namespace cmjax::grouped {

constexpr int64_t kColumns = 256;  // most columns of a block
constexpr int64_t kInner = 128;    // of a block that is laid out anew
constexpr int64_t kNarrow = 64;    // its columns
constexpr int64_t kScratchBytes = kInner * kNarrow * sizeof(float);

enum class Kind { kFloat, kHalf };  // of the weights; half is bfloat16

#define CMJAX_GROUPED_KERNELS                                                                     \
  /* y[r * y_stride + c] = sum_k x[r][k] w[k * stride + c] for `columns` <= kColumns. */          \
  void float_columns(Kind kind, const float* const* x, int64_t count, const void* w,              \
                     int64_t inner, int64_t stride, int64_t columns, float* scratch, float* y,    \
                     int64_t y_stride);                                                           \
  /* The same for few rows and the whole width of a matrix, of `lines` of its lines. */           \
  void float_lines(Kind kind, const float* const* x, int64_t count, const void* w, int64_t lines, \
                   int64_t stride, int64_t columns, float* y, int64_t y_stride);                  \
  void to_float(const uint16_t* from, int64_t size, float* to);                                   \
  void to_half(const float* from, int64_t size, uint16_t* to);

namespace scalar {
CMJAX_GROUPED_KERNELS
}
namespace avx2 {
CMJAX_GROUPED_KERNELS
// The same with int8 weights; rows of x are widened, and end in a zero where `inner` is odd.
void int8_widen(const int8_t* from, int64_t size, int16_t* to);
// Of at most kNarrow columns; y has room for kNarrow.
void int8_columns(const int16_t* const* x, int64_t count, const int8_t* w, int64_t inner,
                  int64_t stride, int64_t columns, uint8_t* scratch, int32_t* y,
                  int64_t y_stride);
void int8_lines(const int16_t* const* x, int64_t count, const int8_t* w, int64_t lines,
                int64_t stride, int64_t columns, int32_t* y, int64_t y_stride);
}  // namespace avx2
namespace avx512 {
CMJAX_GROUPED_KERNELS
// The same with int8 weights. Rows of x are followed by zeros up
// to a multiple of four, sums[r] is the sum of row r; scratch has kScratchBytes.
void int8_columns(const int8_t* const* x, const int32_t* sums, int64_t count, const int8_t* w,
                  int64_t inner, int64_t stride, int64_t columns, uint8_t* scratch, int32_t* y,
                  int64_t y_stride);
// `float_lines` with int8 weights: rows of y have room for a multiple of 64 columns.
void int8_lines(const int8_t* const* x, int64_t count, const int8_t* w, int64_t lines,
                int64_t stride, int64_t columns, int32_t* y, int64_t y_stride);
}  // namespace avx512
namespace avx512_bf16 {
// `float_columns` with bfloat16 rows and weights, of at most kNarrow columns; y has room for kNarrow.
// Rows of x are followed by a zero where `inner` is odd; scratch has kScratchBytes.
void half_columns(const uint16_t* const* x, int64_t count, const uint16_t* w, int64_t inner,
                  int64_t stride, int64_t columns, uint8_t* scratch, float* y, int64_t y_stride);
}  // namespace avx512_bf16

#undef CMJAX_GROUPED_KERNELS

}  // namespace cmjax::grouped
