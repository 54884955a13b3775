// Attention over a cache in vectors of 16 bytes.
#include "cached_attention.h"

namespace cmjax::cached_attention::scalar {
namespace {

constexpr int kLanes = 4;

template <typename V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}

#include "vectors.inc"
#include "cached_attention.inc"

}  // namespace

#include "cached_attention_kernels.inc"

}  // namespace cmjax::cached_attention::scalar
