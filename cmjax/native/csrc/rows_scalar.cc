// Rows of activations in vectors of 16 bytes.
#include "rows.h"

namespace cmjax::rows::scalar {
namespace {

constexpr int kLanes = 4;

template <typename V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}

#include "vectors.inc"

#include "exponential.inc"
#include "rows.inc"

}  // namespace

#include "rows_kernels.inc"

}  // namespace cmjax::rows::scalar
