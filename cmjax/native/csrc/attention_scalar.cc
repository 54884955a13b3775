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

#include "attention.inc"

}  // namespace

#include "attention_kernels.inc"

}  // namespace cmjax::attention::scalar
