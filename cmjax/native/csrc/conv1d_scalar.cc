// conv1d in plain C++, for machines that have no kernel of their own.
#include "conv1d.h"

namespace cmjax {
namespace {

typedef float F __attribute__((vector_size(16)));  // every 64-bit machine has these
constexpr int64_t kLanes = 4;
constexpr int64_t kPanels = 1;

inline F splat(float x) { return F{x, x, x, x}; }
inline F load(const float* x) {
  F to;
  __builtin_memcpy(&to, x, sizeof(to));
  return to;
}
inline void store(float* to, F x) { __builtin_memcpy(to, &x, sizeof(x)); }
inline F largest(F a, F b) {
  F to;
  for (int64_t i = 0; i < kLanes; ++i) to[i] = a[i] > b[i] ? a[i] : b[i];
  return to;
}
inline F clip(F x, float limit) {
  F to;
  for (int64_t i = 0; i < kLanes; ++i) {
    const float above = x[i] > -limit ? x[i] : -limit;
    to[i] = above < limit ? above : limit;
  }
  return to;
}
inline F between(F x, F low, F high) {
  F to;
  for (int64_t i = 0; i < kLanes; ++i) {
    const float above = x[i] > low[i] ? x[i] : low[i];
    to[i] = above < high[i] ? above : high[i];
  }
  return to;
}
struct Finite {  // zeros for lanes that are not finite, which it remembers
  bool odd = false;
  F of(F x) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool wrong = x[i] - x[i] != 0.0f;
      odd |= wrong;
      if (wrong) x[i] = 0.0f;
    }
    return x;
  }
  bool all() const { return !odd; }
};
inline F from_int32(const int32_t* x) {
  F to;
  for (int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<float>(x[i]);
  return to;
}
inline F fused(float c, F a, F b) { return splat(c) * a + b; }
template <class Operand>
inline void narrow(F x, Operand* to) {
  uint32_t bits[kLanes];
  __builtin_memcpy(bits, &x, sizeof(x));
  for (int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<Operand>(bits[i]);
}

struct Panel;

template <class Operand>
struct Dot {
  static constexpr int64_t kTiles = 1;
  template <int tiles, int panels>
  static void run(const Panel& at);
};

#include "conv1d_pipeline.inc"

template <class Operand>
struct FilterOf {
  using Type = int16_t;
};
template <>
struct FilterOf<uint8_t> {
  using Type = int8_t;
};

template <class Operand>
template <int tiles, int panels>
void Dot<Operand>::run(const Panel& at) {
  using Filter = typename FilterOf<Operand>::Type;
  constexpr int64_t kGroup = kGroupBytes / sizeof(Operand);
  uint32_t acc[kPanel];  // unsigned: a sum of offset operands may wrap around on its way
  __builtin_memcpy(acc, at.u, sizeof(acc));
  for (int64_t o = 0; o < kPanel; ++o) acc[o] &= ~1u;
  const char* u = at.u;
  for (int64_t s = 0; s < at.segments; ++s) {
    const char* v = at.v + s * at.segment_bytes;
    for (int64_t k = 0; k < at.groups; ++k, v += kGroupBytes) {
      u += kRowBytes;
      Operand group[kGroup];
      Filter rows[kPanel * kGroup];
      __builtin_memcpy(group, v, sizeof(group));
      __builtin_memcpy(rows, u, sizeof(rows));
      for (int64_t o = 0; o < kPanel; ++o) {
        int32_t sum = 0;
        for (int64_t i = 0; i < kGroup; ++i) sum += group[i] * rows[o * kGroup + i];
        acc[o] += static_cast<uint32_t>(sum);
      }
    }
  }
  __builtin_memcpy(at.m, acc, sizeof(acc));
}

}  // namespace

Conv1dKernels conv1d_scalar() { return kKernels; }

}  // namespace cmjax
