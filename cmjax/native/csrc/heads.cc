// From the columns of a grouped-query projection to queries, and to entries of the cache, for the
// rows of a decode step: normalised and rotated by head, and written where they belong.
#include <cstring>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

// A token's entries of the cache: [requests, room, heads, dim] of the dtype of the rows, or int8 steps
// with the value of one, [requests, room, heads].
struct Entries {
  uint8_t* data;
  float* steps;  // or null

  void write(const RowKernels& kernel, const Values& like, const float* from, int64_t dim,
             int64_t head) const {
    if (steps != nullptr) {
      steps[head] = kernel.quantize(from, dim, reinterpret_cast<int8_t*>(data) + head * dim);
      return;
    }
    const Values to{data, like.half};
    if (like.half) return to.write(kernel, from, dim, head * dim);
    std::memcpy(to.at(head * dim), from, dim * sizeof(float));
  }
};

ffi::Error shape_error() {
  return ffi::Error::InvalidArgument(
      "cached_heads: columns must be [requests, new, (heads + 2 kv_heads) dim], positions "
      "[requests, new], angles [requests, new, dim / 2], and entries [requests, room, kv_heads, dim]");
}

bool reads(ffi::AnyBuffer& buffer, Values& values) {
  const auto type = buffer.element_type();
  values = {buffer.untyped_data(), type == ffi::BF16};
  return values.half || type == ffi::F32;
}

// The entries come in and go out in the same memory.
ffi::Error heads(ffi::ThreadPool pool, ffi::AnyBuffer columns, ffi::Buffer<ffi::S32> positions,
                 ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                 ffi::Buffer<ffi::F32> q_norm, ffi::Buffer<ffi::F32> k_norm, ffi::AnyBuffer,
                 ffi::AnyBuffer, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32>,
                 ffi::Result<ffi::AnyBuffer> q, ffi::Result<ffi::AnyBuffer> key,
                 ffi::Result<ffi::AnyBuffer> value, ffi::ResultBuffer<ffi::F32> key_step,
                 ffi::ResultBuffer<ffi::F32> value_step, float eps, bool interleaved) {
  const auto cs = columns.dimensions(), ks = key->dimensions(), qs = q->dimensions();
  const auto ps = positions.dimensions();
  Values from, to;
  if (cs.size() != 3 || ks.size() != 4 || qs.size() != 4 || ps.size() != 2 || !reads(columns, from) ||
      !reads(*q, to) || from.half != to.half) {
    return shape_error();
  }
  const int64_t requests = cs[0], fresh = cs[1], room = ks[1], kv_heads = ks[2], dim = ks[3];
  const int64_t count = qs[2], half = dim / 2;
  const bool stepped = key->element_type() == ffi::S8;
  const auto angles = static_cast<size_t>(requests * fresh * half);
  const auto steps = static_cast<size_t>(stepped ? requests * room * kv_heads : 0);
  const auto gains = [dim](auto& norm) {
    return norm.element_count() == 0 || norm.element_count() == static_cast<size_t>(dim);
  };
  if (ps[0] != requests || ps[1] != fresh || qs[0] != requests || qs[1] != fresh || qs[3] != dim ||
      dim != 2 * half || cs[2] != (count + 2 * kv_heads) * dim || ks[0] != requests ||
      value->element_count() != key->element_count() || cos.element_count() != angles || sin.element_count() != angles ||
      !gains(q_norm) || !gains(k_norm) || key_step->element_count() != steps ||
      value_step->element_count() != steps || value->element_type() != key->element_type() ||
      (!stepped && key->element_type() != columns.element_type())) {
    return shape_error();
  }
  const RowKernels kernel = row_kernels();
  const int64_t tokens = requests * fresh, width = cs[2], each = stepped ? 1 : from.bytes();
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
    const int64_t position = positions.typed_data()[token];
    const int64_t at = (token / fresh * room + position) * kv_heads;
    const bool fits = position >= 0 && position < room;  // beyond the cache, entries are dropped
    const Entries keys{static_cast<uint8_t*>(key->untyped_data()) + at * dim * each,
                       stepped ? key_step->typed_data() + at : nullptr};
    const Entries values{static_cast<uint8_t*>(value->untyped_data()) + at * dim * each,
                         stepped ? value_step->typed_data() + at : nullptr};
    for (int64_t h = 0; h < count + kv_heads; ++h) {
      const auto& norm = h < count ? q_norm : k_norm;
      std::memcpy(row.data(), all + h * dim, dim * sizeof(float));
      if (norm.element_count() != 0) {
        kernel.rms_norm(row.data(), norm.typed_data(), dim, eps, row.data());
        settle(row, narrow);
      }
      kernel.rotate(row.data(), cos.typed_data() + token * half, sin.typed_data() + token * half,
                    half, interleaved, turned.data());
      if (h < count) {
        const int64_t place = (token * count + h) * dim;
        if (!to.half) std::memcpy(to.at(place), turned.data(), dim * sizeof(float));
        to.write(kernel, turned.data(), dim, place);
      } else if (fits) {
        settle(turned, narrow);
        keys.write(kernel, from, turned.data(), dim, h - count);
      }
    }
    for (int64_t h = 0; fits && h < kv_heads; ++h) {
      values.write(kernel, from, all + (count + kv_heads + h) * dim, dim, h);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_cached_heads, heads,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
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
