// Grouped products in vectors of 16 bytes, which every machine has or the compiler splits up.
#include "grouped.h"

namespace cmjax::grouped::scalar {
namespace {

constexpr int kLanes = 4;
constexpr int kWide = 2;

template <typename V>
inline V multiply_add(V a, V b, V c) {
  return a * b + c;
}

#include "grouped_tiles.inc"

}  // namespace

#include "grouped_kernels.inc"

}  // namespace cmjax::grouped::scalar
