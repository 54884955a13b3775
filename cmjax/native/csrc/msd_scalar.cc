// MSD in plain C++, for every machine; the other files do the same with vectors.
#include "msd.h"

#include <cmath>
#include <cstring>

namespace cmjax::msd::scalar {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

constexpr uint32_t kInfinity = 0x7f800000;

// max |x| as bits: the order of non-negative floats is that of their bits, with NaN on top.
uint32_t largest(const float* x, int64_t count) {
  uint32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t size = bits_of(x[i]) & 0x7fffffff;
    top = size > top ? size : top;
  }
  return top;
}

int rounded(float v) { return static_cast<int>(std::round(v)); }  // ties away from zero

// Nearest E2M1 half-step to v in [-8, 8].
int half_steps(float v) {
  return std::fabs(v) <= 4.0f ? rounded(v) : 2 * rounded(v * 0.5f);
}

constexpr int kHalfSteps[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct Block {  // a split MXFP4 block: 8 p1 + p2 in half-steps, and the value of one
  float unit;
  int8_t steps[kBlock];
};

}  // namespace

int64_t int8_bytes(int64_t inner) { return (inner * 2 + 63) / 64 * 64; }

void int8_split(const float* x, int64_t inner, uint8_t* parts, Row* row) {
  const uint32_t bits = largest(x, inner);
  float top = float_of(bits);
  const bool good = bits < kInfinity && top >= kSmallest;
  const float inverse = good ? 127.0f / top : 0.0f;
  int32_t sum1 = 0, sum2 = 0;
  auto* a = reinterpret_cast<int16_t*>(parts);
  for (int64_t k = 0; k < inner; ++k) {
    float u = good ? x[k] * inverse : 0.0f;
    u = u > 127.0f ? 127.0f : u < -127.0f ? -127.0f : u;
    const int a1 = rounded(u);
    const int a2 = rounded(254.0f * (u - static_cast<float>(a1)));
    a[k] = static_cast<int16_t>(254 * a1 + a2);
    sum1 += a1;
    sum2 += a2;
  }
  if (bits < kInfinity && !good) top = 0.0f;
  if (bits >= kInfinity) top = float_of(0x7fc00000);
  *row = {top * kUnit, static_cast<float>(254 * static_cast<int64_t>(sum1) + sum2), sum1, sum2};
}

void int8_totals(const uint8_t* parts, const Row*, int64_t count, const int8_t* w,
                 int64_t features, int64_t inner, float* totals, int64_t stride) {
  constexpr int64_t kSafe = 512;  // 32385 * 128 * 512 < 2**31
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t r = 0; r < count; ++r) {
      const auto* a = reinterpret_cast<const int16_t*>(parts + r * int8_bytes(inner));
      const int8_t* q = w + f * inner;
      int64_t total = 0;
      for (int64_t start = 0; start < inner; start += kSafe) {
        const int64_t end = start + kSafe < inner ? start + kSafe : inner;
        int32_t sum = 0;
        for (int64_t k = start; k < end; ++k) sum += static_cast<int32_t>(a[k]) * q[k];
        total += sum;
      }
      totals[r * stride + f] = static_cast<float>(total);
    }
  }
}

int64_t mxfp4_bytes(int64_t inner) {
  return (inner / kBlock * static_cast<int64_t>(sizeof(Block)) + 63) / 64 * 64;
}

void mxfp4_split(const float* x, int64_t inner, uint8_t* parts) {
  auto* blocks = reinterpret_cast<Block*>(parts);
  for (int64_t b = 0; b < inner / kBlock; ++b, x += kBlock) {
    const uint32_t bits = largest(x, kBlock);
    const bool good = bits < kInfinity && float_of(bits) >= kSmallest;
    // alpha = 2**exponent is the maximum rounded up to a power of two.
    const uint32_t exponent = good ? ((bits + 0x7fffff) >> 23) : 127;
    const float up = float_of((257 - exponent) << 23);  // 8 / alpha
    float unit = good ? float_of((exponent - 7) << 23) : 0.0f;  // alpha / 128: half of alpha / 64
    if (bits >= kInfinity) unit = float_of(0x7fc00000);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float v = good ? x[i] * up : 0.0f;
      const int p1 = half_steps(v);
      const int p2 = half_steps(8.0f * (v - static_cast<float>(p1)));
      blocks[b].steps[i] = static_cast<int8_t>(8 * p1 + p2);
    }
    blocks[b].unit = unit;
  }
}

void mxfp4_totals(const uint8_t* parts, int64_t count, const uint8_t* w, const uint8_t* scales,
                  int64_t features, int64_t inner, float* totals, int64_t stride) {
  const int64_t per_row = inner / kBlock;
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t r = 0; r < count; ++r) {
      const auto* blocks = reinterpret_cast<const Block*>(parts + r * mxfp4_bytes(inner));
      float total = 0.0f;
      for (int64_t b = 0; b < per_row; ++b) {
        const uint8_t* codes = w + (f * per_row + b) * (kBlock / 2);
        int32_t sum = 0;
        for (int64_t i = 0; i < kBlock / 2; ++i) {
          sum += blocks[b].steps[2 * i] * kHalfSteps[codes[i] & 15];
          sum += blocks[b].steps[2 * i + 1] * kHalfSteps[codes[i] >> 4];
        }
        const float scale = float_of(static_cast<uint32_t>(scales[f * per_row + b]) << 23);
        total += static_cast<float>(sum) * (blocks[b].unit * scale);
      }
      totals[r * stride + f] = total;
    }
  }
}

}  // namespace cmjax::msd::scalar
