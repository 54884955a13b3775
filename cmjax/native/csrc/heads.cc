// From the columns of a grouped-query projection to queries, keys and values, for the rows of a decode
// step: normalised and rotated by head, as many pairs as there are angles; keys and values in the
// format of the cache.
#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "values.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

// Keys or values: [requests, new, heads, dim] of the dtype of the rows, or int8 steps with the value of
// one, [requests, new, heads].
struct Entries {
  Values values;
  float* steps;  // or null

  void write(const RowKernels& kernel, const float* from, int64_t dim, int64_t head) const {
    if (steps != nullptr) {
      auto* to = static_cast<int8_t*>(values.data) + head * dim;
      steps[head] = kernel.quantize(from, dim, to);
      return;
    }
    if (values.half) return values.write(kernel, from, dim, head * dim);
    std::memcpy(values.at(head * dim), from, dim * sizeof(float));
  }
};

ffi::Error shape_error() {
  return ffi::Error::InvalidArgument(
      "rotary_heads: columns must be [requests, new, (heads + 2 kv_heads) dim], angles [requests, "
      "new, at most dim / 2], and keys and values [requests, new, kv_heads, dim]");
}

ffi::Error heads(ffi::ThreadPool pool, ffi::AnyBuffer columns, ffi::Buffer<ffi::F32> cos,
                 ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::F32> q_norm,
                 ffi::Buffer<ffi::F32> k_norm, ffi::Result<ffi::AnyBuffer> q,
                 ffi::Result<ffi::AnyBuffer> key, ffi::Result<ffi::AnyBuffer> value,
                 ffi::ResultBuffer<ffi::F32> key_step, ffi::ResultBuffer<ffi::F32> value_step,
                 float eps, bool interleaved) {
  const auto cs = columns.dimensions(), ks = key->dimensions(), qs = q->dimensions();
  const auto as = cos.dimensions();
  Values from, to;
  if (cs.size() != 3 || as.size() != 3 || ks.size() != 4 || qs.size() != 4 ||
      !read_pair(columns, *q, from, to)) {
    return shape_error();
  }
  const int64_t tokens = cs[0] * cs[1], kv_heads = ks[2], dim = ks[3], count = qs[2];
  const int64_t width = cs[2], half = as[2];
  const bool stepped = key->element_type() == ffi::S8;
  const auto angles = static_cast<size_t>(tokens * half);
  const auto steps = static_cast<size_t>(stepped ? tokens * kv_heads : 0);
  const auto gains = [dim](auto& norm) {
    return norm.element_count() == 0 || norm.element_count() == static_cast<size_t>(dim);
  };
  if (qs[0] * qs[1] != tokens || qs[3] != dim || ks[0] * ks[1] != tokens || dim < 2 * half ||
      width != (count + 2 * kv_heads) * dim || value->element_count() != key->element_count() ||
      cos.element_count() != angles || sin.element_count() != angles || !gains(q_norm) ||
      !gains(k_norm) || key_step->element_count() != steps ||
      value_step->element_count() != steps || value->element_type() != key->element_type() ||
      (!stepped && key->element_type() != columns.element_type())) {
    return shape_error();
  }
  const RowKernels kernel = row_kernels();
  const auto entries = [&](auto& buffer, auto& steps) {
    return Entries{{buffer->untyped_data(), from.half}, stepped ? steps->typed_data() : nullptr};
  };
  const Entries keys = entries(key, key_step), values = entries(value, value_step);
  // What the model rounds to its dtype between two operations is rounded here.
  const auto settle = [&](std::vector<float>& row, std::vector<uint16_t>& narrow) {
    if (!from.half) return;
    kernel.to_half(row.data(), dim, narrow.data());
    kernel.to_float(narrow.data(), dim, row.data());
  };
  parallel_for(pool, tokens, worker_count(pool, tokens), [&](int64_t token, int64_t) {
    std::vector<float> wide(from.half ? width : 0), row(dim), turned(dim);
    std::vector<uint16_t> narrow(dim);
    const float* all = from.read(kernel, token * width, width, wide.data());
    for (int64_t h = 0; h < count + kv_heads; ++h) {
      const auto& norm = h < count ? q_norm : k_norm;
      std::memcpy(row.data(), all + h * dim, dim * sizeof(float));
      if (norm.element_count() != 0) {
        kernel.rms_norm(row.data(), norm.typed_data(), dim, eps, row.data());
        settle(row, narrow);
      }
      kernel.rotate(row.data(), cos.typed_data() + token * half, sin.typed_data() + token * half,
                    half, interleaved, turned.data());
      std::copy(row.begin() + 2 * half, row.end(), turned.begin() + 2 * half);
      if (h < count) {
        const int64_t place = (token * count + h) * dim;
        if (!to.half) std::memcpy(to.at(place), turned.data(), dim * sizeof(float));
        to.write(kernel, turned.data(), dim, place);
      } else {
        settle(turned, narrow);
        keys.write(kernel, turned.data(), dim, token * kv_heads + h - count);
      }
    }
    for (int64_t h = 0; h < kv_heads; ++h) {
      values.write(kernel, all + (count + kv_heads + h) * dim, dim, token * kv_heads + h);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_rotary_heads, heads,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("interleaved"));

}  // namespace cmjax
