// The memory of a DFSMN block with its skip:
//
//   y[t] = x[t] + p[t] + sum_i past[i] p[t - s1 i] + sum_j future[j] p[t + s2 (j + 1)]
//
// per channel; frames outside p are zeros. Products and sums are rounded one by one, in this order,
// so every instruction set gives the same bits.
#pragma once

#include <cstdint>

namespace cmjax {

constexpr int64_t kMemoryFrames = 8;  // that one call computes together, at most

// Consecutive frames of one sequence.
struct Memory {
  int64_t frames, channels, taps;
  const float* x;
  float* y;
  const float* p;              // [reach + frames][channels]
  const int64_t* offset;       // [1 + taps]: rows of p that frame 0 itself and its taps meet
  const float* const* weight;  // [taps], each [channels]
};

void fsmn_scalar(const Memory&);
void fsmn_avx2(const Memory&);
void fsmn_avx512(const Memory&);

}  // namespace cmjax
