// The norm before a layer of experts, and which slots the tokens of a decode step go to: scores,
// group-limited top-k and weights, as models/moe/layers/router.py defines them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "grouped.h"
#include "values.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

struct Gate {
  int64_t experts, groups, kept, best, chosen;
  bool sigmoid, normalizes;
  float scale;
};

// The places of the `count` largest, largest first, of equal ones the first; NaN is largest.
void largest(const float* values, int64_t size, int64_t count, int64_t* places) {
  const auto above = [](float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); };
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    int64_t at = found;
    while (at > 0 && above(values[i], values[places[at - 1]])) --at;
    if (at == count) continue;
    found = std::min(found + 1, count);
    for (int64_t j = found - 1; j > at; --j) places[j] = places[j - 1];
    places[at] = i;
  }
}

void score(const Gate& gate, float* logits) {
  float* end = logits + gate.experts;
  if (gate.sigmoid) {
    for (float* v = logits; v < end; ++v) *v = 1.0f / (1.0f + std::exp(-*v));
    return;
  }
  const float top = *std::max_element(logits, end);
  float total = 0.0f;
  for (float* v = logits; v < end; ++v) total += *v = std::exp(*v - top);
  for (float* v = logits; v < end; ++v) *v /= total;
}

// Experts of a token and their weights; `biased` has room for the experts, `places` for the groups.
void choose(const Gate& gate, const float* scores, const float* bias, std::vector<float>& biased,
            std::vector<int64_t>& places, int64_t* experts, float* weights) {
  const int64_t size = gate.experts / gate.groups, best = std::min(gate.best, size);
  for (int64_t e = 0; e < gate.experts; ++e) biased[e] = scores[e] + (bias ? bias[e] : 0.0f);
  if (gate.groups > 1) {
    std::vector<float> sums(gate.groups);
    for (int64_t g = 0; g < gate.groups; ++g) {
      largest(biased.data() + g * size, size, best, places.data());
      for (int64_t i = 0; i < best; ++i) sums[g] += biased[g * size + places[i]];
    }
    largest(sums.data(), gate.groups, gate.kept, places.data());
    std::vector<char> allowed(gate.groups);
    for (int64_t i = 0; i < gate.kept; ++i) allowed[places[i]] = true;
    for (int64_t e = 0; e < gate.experts; ++e) {
      if (!allowed[e / size]) biased[e] = -std::numeric_limits<float>::infinity();
    }
  }
  largest(biased.data(), gate.experts, gate.chosen, experts);
  float total = 1e-20f;
  for (int64_t i = 0; i < gate.chosen; ++i) total += weights[i] = scores[experts[i]];
  for (int64_t i = 0; i < gate.chosen; ++i) {
    if (gate.normalizes) weights[i] /= total;
    weights[i] *= gate.scale;
  }
}

decltype(&grouped::scalar::float_lines) lines_kernel() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Vnni) return &grouped::avx512::float_lines;
  if (isa() == Isa::kAvx2) return &grouped::avx2::float_lines;
#endif
  return &grouped::scalar::float_lines;
}

ffi::Error route(ffi::AnyBuffer x, ffi::Buffer<ffi::F32> gain, ffi::Buffer<ffi::F32> weight,
                 ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::S32> rank,
                 ffi::Buffer<ffi::S32> slots_of_expert, ffi::Buffer<ffi::S32> copies,
                 ffi::Result<ffi::AnyBuffer> normed, ffi::ResultBuffer<ffi::S32> slots,
                 ffi::ResultBuffer<ffi::F32> weights, float eps, int64_t groups, int64_t kept,
                 int64_t best, int64_t chosen, bool sigmoid, bool normalizes, float scale) {
  const auto xs = x.dimensions(), ws = weight.dimensions(), ss = slots_of_expert.dimensions();
  const auto outs = slots->dimensions();
  Values from, to;
  if (!read_pair(x, *normed, from, to) || xs.size() != 2 || ws.size() != 2 ||
      ss.size() != 2 || outs.size() != 2 || ws[0] != xs[1] || outs[0] != xs[0] ||
      gain.element_count() != static_cast<size_t>(xs[1]) || rank.element_count() != 1 ||
      copies.element_count() != static_cast<size_t>(ss[0]) || ss[0] < ws[1] || groups < 1 ||
      ws[1] % groups != 0 || chosen > ws[1] || kept > groups ||
      (bias.element_count() != 0 && bias.element_count() != static_cast<size_t>(ws[1])) ||
      outs[1] != chosen + (ss[0] > ws[1]) ||
      weights->element_count() != slots->element_count()) {
    return ffi::Error::InvalidArgument(
        "route: x must be [tokens, hidden], float32 or bfloat16, weight [hidden, experts], the "
        "slots of experts [experts, copies] and the results [tokens, chosen]");
  }
  const RowKernels kernel = row_kernels();
  const auto product = lines_kernel();
  const int64_t tokens = xs[0], hidden = xs[1], experts = ws[1], all = outs[1];
  const Gate gate{experts, groups, kept, best, chosen, sigmoid, normalizes, scale};
  std::vector<float> wide(hidden), scores(experts + 64), biased(experts);
  std::vector<int64_t> places(std::max(experts, groups)), found(all);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = from.read(kernel, t * hidden, hidden, wide.data());
    float* y = to.place(t * hidden, wide.data());
    kernel.rms_norm(row, gain.typed_data(), hidden, eps, y);
    to.write(kernel, y, hidden, t * hidden);
    const float* rounded = to.read(kernel, t * hidden, hidden, wide.data());
    product(grouped::Kind::kFloat, &rounded, 1, weight.typed_data(), hidden, experts, experts,
            scores.data(), experts);
    score(gate, scores.data());
    float* of_token = weights->typed_data() + t * all;
    choose(gate, scores.data(), bias.element_count() ? bias.typed_data() : nullptr, biased, places,
           found.data(), of_token);
    if (all > chosen) {  // the shared expert, in slots of its own
      found[chosen] = experts;
      of_token[chosen] = 1.0f;
    }
    for (int64_t i = 0; i < all; ++i) {
      const int64_t replicas = std::clamp<int64_t>(copies.typed_data()[found[i]], 1, ss[1]);
      const int64_t replica = (t + rank.typed_data()[0]) % replicas;
      slots->typed_data()[t * all + i] = slots_of_expert.typed_data()[found[i] * ss[1] + replica];
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_route, route,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("groups")
                                  .Attr<int64_t>("kept")
                                  .Attr<int64_t>("best")
                                  .Attr<int64_t>("chosen")
                                  .Attr<bool>("sigmoid")
                                  .Attr<bool>("normalizes")
                                  .Attr<float>("scale"));

}  // namespace cmjax
