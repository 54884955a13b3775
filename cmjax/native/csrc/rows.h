// What happens to a row of activations between two products, in one instruction set; `row_kernels`
// gives those of the best one. Rows of bfloat16 are widened first, and what is computed of them is
// rounded to bfloat16 where the model's own operations round.
//
// No C++ standard library here: see msd.h.
#pragma once

#include <cstdint>

#include "isa.h"

namespace cmjax {
namespace rows {

#define CMJAX_ROW_KERNELS                                                                          \
  void to_float(const uint16_t* from, int64_t size, float* to);                                    \
  void to_half(const float* from, int64_t size, uint16_t* to);                                     \
  /* y = gain x / sqrt(mean(x^2) + eps); y may be x. */                                            \
  void rms_norm(const float* x, const float* gain, int64_t size, float eps, float* y);             \
  /* Pairs (x[i], x[half + i]), or interleaved (x[2 i], x[2 i + 1]), turned by an angle; y has first \
     members first. */                                                                             \
  void rotate(const float* x, const float* cos, const float* sin, int64_t half, bool interleaved,  \
              float* y);                                                                           \
  /* The nearest steps of max |x| / 127, which is returned. */                                     \
  float quantize(const float* x, int64_t size, int8_t* steps);                                     \
  /* y = gate / (1 + exp(-gate)) up */                                                             \
  void swiglu(const float* gate, const float* up, int64_t size, float* y);                         \
  /* y = x factor scale */                                                                         \
  void rescale(const int32_t* x, float factor, const float* scale, int64_t size, float* y);        \
  /* y += factor x */                                                                              \
  void add_scaled(const float* x, float factor, int64_t size, float* y);

namespace scalar {
CMJAX_ROW_KERNELS
}
namespace avx2 {
CMJAX_ROW_KERNELS
}
namespace avx512 {
CMJAX_ROW_KERNELS
}

#undef CMJAX_ROW_KERNELS

}  // namespace rows

struct RowKernels {
  decltype(&rows::scalar::to_float) to_float;
  decltype(&rows::scalar::to_half) to_half;
  decltype(&rows::scalar::rms_norm) rms_norm;
  decltype(&rows::scalar::rotate) rotate;
  decltype(&rows::scalar::quantize) quantize;
  decltype(&rows::scalar::swiglu) swiglu;
  decltype(&rows::scalar::rescale) rescale;
  decltype(&rows::scalar::add_scaled) add_scaled;
};

RowKernels row_kernels();

// Rows in memory: float32, or bfloat16.
struct Values {
  void* data;
  bool half;

  int64_t bytes() const { return half ? 2 : 4; }
  uint8_t* at(int64_t element) const { return static_cast<uint8_t*>(data) + element * bytes(); }

  // `size` values from `element` on as float32: where they lie, or widened in `room`.
  const float* read(const RowKernels& kernel, int64_t element, int64_t size, float* room) const {
    if (!half) return reinterpret_cast<const float*>(at(element));
    kernel.to_float(reinterpret_cast<const uint16_t*>(at(element)), size, room);
    return room;
  }
  // Where to put values for `write`: their place, or `room`.
  float* place(int64_t element, float* room) const {
    return half ? room : reinterpret_cast<float*>(at(element));
  }
  void write(const RowKernels& kernel, const float* from, int64_t size, int64_t element) const {
    if (half) kernel.to_half(from, size, reinterpret_cast<uint16_t*>(at(element)));
  }
};

}  // namespace cmjax
