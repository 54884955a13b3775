// The experts of one layer in W8A8, as experts.cc computes the others:
//
//     y[t] = sum_c weights[t, c] (q(swiglu(q(x[t]) up[s])) down[s])      s = slots[t, c]
//
// q rounds a row to 127 steps of its largest value; the products are sums of integers.
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "int8_dot.h"
#include "parallel.h"
#include "sorted_rows.h"
#include "values.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

// As int8_dot takes them.
RowGroups groups_of(const Sorted& sorted) {
  RowGroups found;
  found.rows.resize(sorted.copy.size());
  std::iota(found.rows.begin(), found.rows.end(), 0);
  for (const SlotRows& rows : sorted.slots) found.begin.push_back(rows.start);
  found.begin.push_back(static_cast<int64_t>(sorted.copy.size()));
  return found;
}

template <typename T>
std::unique_ptr<T[]> room_for(int64_t count) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[count]);
}

ffi::Error experts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slots,
                   ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::S8> up,
                   ffi::Buffer<ffi::F32> up_scale, ffi::Buffer<ffi::S8> down,
                   ffi::Buffer<ffi::F32> down_scale, ffi::Result<ffi::AnyBuffer> y) {
  const auto xs = x.dimensions(), ss = slots.dimensions(), us = up.dimensions();
  const auto ds = down.dimensions();
  Values from, to;
  if (xs.size() != 2 || ss.size() != 2 || us.size() != 3 || ds.size() != 3 ||
      !read_pair(x, *y, from, to) || y->element_count() != x.element_count() || ss[0] != xs[0] ||
      weights.element_count() != slots.element_count() || us[1] != xs[1] || us[2] != 2 * ds[1] ||
      ds[0] != us[0] || ds[2] != xs[1] ||
      up_scale.element_count() != static_cast<size_t>(us[0] * us[2]) ||
      down_scale.element_count() != static_cast<size_t>(ds[0] * ds[2])) {
    return ffi::Error::InvalidArgument(
        "sorted_experts: x and the result must be [tokens, hidden], float32 or bfloat16, slots and "
        "weights [tokens, copies], up [slots, hidden, 2 ffn] and down [slots, ffn, hidden]");
  }
  const int64_t tokens = xs[0], copies = ss[1], hidden = xs[1], total = us[0], ffn = ds[1];
  const int64_t count = tokens * copies;
  const Sorted sorted = sort_by_slot(slots.typed_data(), count, total);
  if (!sorted.valid) {
    return ffi::Error::InvalidArgument("sorted_experts: a slot lies outside of those that there are");
  }
  const RowGroups lists = groups_of(sorted);
  const RowKernels kernel = row_kernels();
  const auto steps = room_for<int8_t>((tokens + count) * hidden + count * ffn);
  const auto sums = room_for<int32_t>(count * std::max(2 * ffn, hidden));
  const auto outs = room_for<uint8_t>(count * hidden * to.bytes());
  if (!steps || !sums || !outs) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "sorted_experts: memory");
  }
  int8_t* const rows = steps.get() + tokens * hidden;
  int8_t* const inner = rows + count * hidden;
  std::vector<float> step(tokens), inner_step(count);
  const int64_t widest = std::max(hidden, 2 * ffn);
  std::vector<float> room(widest);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = from.read(kernel, t * hidden, hidden, room.data());
    step[t] = kernel.quantize(row, hidden, steps.get() + t * hidden);
  }
  std::vector<int32_t> slot_of(count);
  for (int64_t s = 0; s < total; ++s) {
    const auto [start, some] = sorted.slots[s];
    for (int64_t r = start; r < start + some; ++r) {
      slot_of[r] = static_cast<int32_t>(s);
      std::memcpy(rows + r * hidden, steps.get() + sorted.copy[r] / copies * hidden, hidden);
    }
  }
  const auto failed = int8_dot(pool, hidden, 2 * ffn, lists, rows, up.typed_data(), sums.get());
  if (failed.failure()) return failed;
  parallel_for(pool, count, worker_count(pool, count), [&](int64_t r, int64_t) {
    std::vector<float> both(2 * ffn), one(ffn);
    kernel.rescale(sums.get() + r * 2 * ffn, step[sorted.copy[r] / copies],
                   up_scale.typed_data() + slot_of[r] * 2 * ffn, 2 * ffn, both.data());
    kernel.swiglu(both.data(), both.data() + ffn, ffn, one.data());
    inner_step[r] = kernel.quantize(one.data(), ffn, inner + r * ffn);
  });
  const auto broken = int8_dot(pool, ffn, hidden, lists, inner, down.typed_data(), sums.get());
  if (broken.failure()) return broken;
  const Values results{outs.get(), to.half};
  for (int64_t r = 0; r < count; ++r) {
    float* row = results.place(r * hidden, room.data());
    kernel.rescale(sums.get() + r * hidden, inner_step[r],
                   down_scale.typed_data() + slot_of[r] * hidden, hidden, row);
    results.write(kernel, row, hidden, r * hidden);
  }
  weigh(kernel, sorted, weights.typed_data(), tokens, copies, hidden, results, to);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_sorted_experts_w8a8, experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace cmjax
