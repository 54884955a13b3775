// What lies between the products of latent attention, for the rows of a decode step: from the
// down-projections to the normalised latent of queries and to the entries of the cache, and from the
// columns of the queries' up-projection to rows by head.
#include <cstring>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "values.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

// A row of float32 to `to`, rounded where that is bfloat16.
void store(const RowKernels& kernel, const float* from, int64_t size, const Values& to, int64_t at) {
  if (to.half) return to.write(kernel, from, size, at);
  std::memcpy(to.at(at), from, size * sizeof(float));
}

ffi::Error entries(ffi::AnyBuffer query, ffi::AnyBuffer columns, ffi::Buffer<ffi::F32> cos,
                   ffi::Buffer<ffi::F32> sin, ffi::Buffer<ffi::F32> query_gain,
                   ffi::Buffer<ffi::F32> gain, ffi::Result<ffi::AnyBuffer> low,
                   ffi::Result<ffi::AnyBuffer> latent, ffi::ResultBuffer<ffi::F32> step,
                   ffi::Result<ffi::AnyBuffer> key, float eps, bool interleaved) {
  const auto qs = query.dimensions(), cs = columns.dimensions(), ls = latent->dimensions();
  const auto ks = key->dimensions();
  Values from, kept, of_query, to_low, rotated;
  const bool stepped = latent->element_type() == ffi::S8;
  if (qs.size() != 2 || cs.size() != 2 || ls.size() != 2 || ks.size() != 2 || ls[0] != cs[0] ||
      ks[0] != cs[0] || qs[0] != cs[0] || ls[1] + ks[1] != cs[1] || ks[1] % 2 != 0 ||
      !read_pair(query, *low, of_query, to_low) || !read_values(columns, from) ||
      !read_values(*key, rotated) || (!stepped && !read_pair(columns, *latent, from, kept)) ||
      query.element_type() != columns.element_type() ||
      low->element_count() != query.element_count() ||
      query_gain.element_count() != static_cast<size_t>(qs[1]) ||
      gain.element_count() != static_cast<size_t>(ls[1]) ||
      cos.element_count() != static_cast<size_t>(cs[0] * ks[1] / 2) ||
      sin.element_count() != cos.element_count() ||
      step->element_count() != static_cast<size_t>(stepped ? cs[0] : 0)) {
    return ffi::Error::InvalidArgument(
        "latent_entries: query must be [tokens, q_rank] or [tokens, 0], columns [tokens, rank + "
        "rope], angles [tokens, rope / 2], latent [tokens, rank] and key [tokens, rope]");
  }
  const RowKernels kernel = row_kernels();
  const int64_t tokens = cs[0], width = cs[1], rank = ls[1], rope = ks[1], q_rank = qs[1];
  const int64_t widest = width > q_rank ? width : q_rank;
  std::vector<float> room(widest), row(widest), turned(rope);
  std::vector<uint16_t> narrow(widest);
  // What the model rounds to its dtype between two operations is rounded here.
  const auto settle = [&](std::vector<float>& values, int64_t size) {
    if (!from.half) return;
    kernel.to_half(values.data(), size, narrow.data());
    kernel.to_float(narrow.data(), size, values.data());
  };
  for (int64_t t = 0; t < tokens; ++t) {
    if (q_rank != 0) {
      const float* x = of_query.read(kernel, t * q_rank, q_rank, room.data());
      kernel.rms_norm(x, query_gain.typed_data(), q_rank, eps, row.data());
      store(kernel, row.data(), q_rank, to_low, t * q_rank);
    }
    const float* all = from.read(kernel, t * width, width, room.data());
    kernel.rms_norm(all, gain.typed_data(), rank, eps, row.data());
    if (stepped) {
      settle(row, rank);
      auto* steps = static_cast<int8_t*>(latent->untyped_data()) + t * rank;
      step->typed_data()[t] = kernel.quantize(row.data(), rank, steps);
    } else {
      store(kernel, row.data(), rank, kept, t * rank);
    }
    kernel.rotate(all + rank, cos.typed_data() + t * rope / 2, sin.typed_data() + t * rope / 2,
                  rope / 2, interleaved, turned.data());
    settle(turned, rope);
    store(kernel, turned.data(), rope, rotated, t * rope);
  }
  return ffi::Error::Success();
}

ffi::Error heads(ffi::AnyBuffer columns, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                 ffi::Result<ffi::AnyBuffer> plain, ffi::Result<ffi::AnyBuffer> turned,
                 bool interleaved) {
  const auto cs = columns.dimensions(), ps = plain->dimensions(), ts = turned->dimensions();
  Values from, to, rotated;
  if (cs.size() != 2 || ps.size() != 3 || ts.size() != 3 || !read_pair(columns, *plain, from, to) ||
      !read_pair(columns, *turned, from, rotated) || ps[1] != cs[0] || ts[0] != cs[0] ||
      ts[1] != ps[0] || (ps[2] + ts[2]) * ps[0] != cs[1] || ts[2] % 2 != 0 ||
      cos.element_count() != static_cast<size_t>(cs[0] * ts[2] / 2) ||
      sin.element_count() != cos.element_count()) {
    return ffi::Error::InvalidArgument(
        "latent_heads: columns must be [tokens, heads (nope + rope)], angles [tokens, rope / 2], and "
        "the results [heads, tokens, nope] and [tokens, heads, rope]");
  }
  const RowKernels kernel = row_kernels();
  const int64_t tokens = cs[0], count = ps[0], nope = ps[2], rope = ts[2];
  std::vector<float> room(rope), row(rope);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < count; ++h) {
      const int64_t at = (t * count + h) * (nope + rope);
      std::memcpy(to.at((h * tokens + t) * nope), from.at(at), nope * from.bytes());
      const float* x = from.read(kernel, at + nope, rope, room.data());
      kernel.rotate(x, cos.typed_data() + t * rope / 2, sin.typed_data() + t * rope / 2, rope / 2,
                    interleaved, row.data());
      store(kernel, row.data(), rope, rotated, (t * count + h) * rope);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_latent_entries, entries,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("interleaved"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_latent_heads, heads,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("interleaved"));

}  // namespace cmjax
