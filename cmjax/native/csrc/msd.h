// What the MSD kernels of one instruction set provide; msd.cc calls those of the best one.
//
// A row x of activations, with M = max |x|, is split into u = 127 x / M, a1 = round(u) and
// a2 = round(254 (u - a1)), ties away from zero. Then sum_k (254 a1 + a2) q is an exact integer
// below 2**40, which is rounded to float32 once: no result depends on the instruction set, on the
// tiles or on the threads. In MXFP4 the parts of a block of 32 make one integer 8 p1 + p2 of at
// most 72 half-steps, and only the sums over blocks round.
//
// No C++ standard library here: these files are compiled for newer instructions than the CPU that
// links them may have, and an inline function of theirs could be the one the linker keeps.
#pragma once

#include <cstdint>

namespace cmjax::msd {

constexpr int64_t kBlock = 32;                 // values that share an MXFP4 scale
constexpr float kSmallest = 0x1p-100f;         // maxima under this count as zero
constexpr float kUnit = 1.0f / (127 * 254);    // value of one step of 254 a1 + a2 at M = 1
constexpr int64_t kMostInner = 132104;         // (2**31 - 1) / (127 * 128)

// Scalars of one split row.
struct Row {
  float unit;      // M / (127 * 254); NaN if the row holds an infinity or NaN
  float sum;       // sum of 254 a1 + a2
  int32_t sum1;    // sums of a1 and of a2
  int32_t sum2;
};

#define CMJAX_MSD_KERNELS                                                                         \
  /* Bytes of a split row, a multiple of 64; the kernel's own layout. */                          \
  int64_t int8_bytes(int64_t inner);                                                              \
  void int8_split(const float* x, int64_t inner, uint8_t* parts, Row* row);                       \
  /* totals[r * stride + f] = float(sum_k (254 a1 + a2)[r, k] w[f, k]) */                         \
  void int8_totals(const uint8_t* parts, const Row* rows, int64_t count, const int8_t* w,         \
                   int64_t features, int64_t inner, float* totals, int64_t stride);               \
  int64_t mxfp4_bytes(int64_t inner);                                                             \
  void mxfp4_split(const float* x, int64_t inner, uint8_t* parts);                                \
  /* w [features, inner / 2] codes, scales [features, inner / 32] E8M0 exponents */               \
  void mxfp4_totals(const uint8_t* parts, int64_t count, const uint8_t* w, const uint8_t* scales, \
                    int64_t features, int64_t inner, float* totals, int64_t stride);

namespace scalar {
CMJAX_MSD_KERNELS
}
namespace avx2 {
CMJAX_MSD_KERNELS
}
namespace avx512 {
CMJAX_MSD_KERNELS
}

#undef CMJAX_MSD_KERNELS

}  // namespace cmjax::msd
