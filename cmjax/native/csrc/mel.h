// Energies in mel bands of the frames of a signal:
//
//   frame t = x[shift t .. shift t + frame), minus its mean, pre-emphasised, times a window
//   z[n] = frame[2 n] + i frame[2 n + 1],   Z = FFT(z),   F = FFT(frame), of Z and its mirror image
//   y[t, band] = sum_k filter[band, k] |F[k]|^2
//
// Every lane of a vector computes a frame of its own, by the same operations in the same order, so
// every instruction set gives the same bits.
#pragma once

#include <cstdint>

namespace cmjax {

// What is the same for all frames. `half` is half the points of the transform, a power of two.
struct Mel {
  int64_t frame, shift, half, bands;
  float emphasis;         // x[n] - emphasis x[n - 1]
  const float* window;    // [frame]
  const float* turn;      // [2 half][2]: real and imaginary part of exp(-pi i k / half)
  const float* filter;    // [bands][half + 1]
  const int32_t* inside;  // [bands][2]: first bin of which the filter is not zero, and the end
  const int64_t* place;   // [half]: where the transform in place leaves frequency k
};

// For one instruction set.
struct MelKernel {
  int64_t lanes;
  // Energies y[count][bands] of `count` frames, at most `lanes`. Of x, the first of their samples,
  // so many exist; `before` is the one in front of it.
  void (*run)(const Mel&, const float* x, int64_t samples, float before, int64_t count, float* y,
              float* scratch);
};

MelKernel mel_scalar();
MelKernel mel_avx2();

// Shifts that `lanes` frames extend over.
inline int64_t mel_columns(const Mel& m, int64_t lanes) { return lanes + (m.frame - 1) / m.shift; }

// Floats of scratch of one worker, aligned to 64 bytes: pre-emphasised samples in two orders, of
// which the first gives way to the points of the transform, and their power.
inline int64_t mel_scratch(const Mel& m, int64_t lanes) {
  const int64_t samples = m.shift * mel_columns(m, lanes), points = (3 * m.half + 2) * lanes;
  return samples + (samples > points ? samples : points);
}

}  // namespace cmjax
