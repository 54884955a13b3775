// Causal attention in vectors of 16 bytes.
#include "attention.h"

namespace cmjax::attention::scalar {
namespace {

constexpr int kLanes = 4;
constexpr int kWide = 2;

template <typename V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}

template <typename V>
inline void totals(const V (&v)[4], float* to) {
  for (int i = 0; i < 4; ++i) to[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
}

#include "attention.inc"

}  // namespace

#include "attention_kernels.inc"

}  // namespace cmjax::attention::scalar
