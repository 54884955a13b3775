// The experts of one layer on a rank that holds all of them, for the rows of a decode step:
//
//     y[t] = sum_c weights[t, c] (swiglu(x[t] up[s]) down[s])      s = slots[t, c]
//
// One call in place of a sort, two products and what lies between them; in bfloat16 the same values
// are rounded.
#include <cstring>
#include <memory>
#include <vector>

#include "msd_product.h"
#include "parallel.h"
#include "sorted_rows.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;
using msd::Sizes;
using msd::Span;

// up(spans, rows, x, y) and down(...) are the products of all rows with the matrices of their slots.
template <typename Up, typename Down>
ffi::Error mix(ffi::ThreadPool& pool, int64_t tokens, int64_t copies, int64_t hidden, int64_t ffn,
               int64_t total, const Values& x, const int32_t* slots, const float* weights,
               const Values& y, const Up& up, const Down& down) {
  const int64_t count = tokens * copies, bytes = x.bytes();
  const Sorted sorted = sort_by_slot(slots, count, total);
  std::vector<Span> spans;
  for (const SlotRows& rows : sorted.slots) spans.push_back({rows.start, rows.count});
  if (!sorted.valid) {
    return ffi::Error::InvalidArgument("sorted_experts: a slot lies outside of those that there are");
  }
  const RowKernels kernel = row_kernels();
  const std::unique_ptr<uint8_t[]> memory(
      new (std::nothrow) uint8_t[count * (2 * hidden + 3 * ffn) * bytes]);
  if (!memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "sorted_experts: memory");
  const Values rows{memory.get(), x.half};
  const Values wide{rows.at(count * hidden), x.half}, narrow{wide.at(count * 2 * ffn), x.half};
  const Values outs{narrow.at(count * ffn), x.half};
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(rows.at(r * hidden), x.at(sorted.copy[r] / copies * hidden), hidden * bytes);
  }
  if (ffi::Error e = up(spans, count, rows, wide); e.failure()) return e;
  parallel_for(pool, count, worker_count(pool, count), [&](int64_t r, int64_t) {
    std::vector<float> room(x.half ? 3 * ffn : 0);
    const float* both = wide.read(kernel, r * 2 * ffn, 2 * ffn, room.data());
    float* to = narrow.place(r * ffn, room.data() + (x.half ? 2 * ffn : 0));
    kernel.swiglu(both, both + ffn, ffn, to);
    narrow.write(kernel, to, ffn, r * ffn);
  });
  if (ffi::Error e = down(spans, count, narrow, outs); e.failure()) return e;
  weigh(kernel, sorted, weights, tokens, copies, hidden, outs, y);
  return ffi::Error::Success();
}

ffi::Error shape_error() {
  return ffi::Error::InvalidArgument(
      "sorted_experts: x and the result must be [tokens, hidden], float32 or bfloat16, slots and "
      "weights [tokens, copies], up [slots, 2 ffn, hidden] and down [slots, hidden, ffn]");
}

// `codes` of the matrices are one byte, `block` values have a scale (0: a whole feature).
template <typename W, typename S>
bool fits(ffi::AnyBuffer& x, ffi::Buffer<ffi::S32>& slots, ffi::Buffer<ffi::F32>& weights, W& up,
          S& up_scale, W& down, S& down_scale, ffi::Result<ffi::AnyBuffer>& y, int64_t codes,
          int64_t block, Values& values, Values& results) {
  const auto xs = x.dimensions(), ss = slots.dimensions(), ws = weights.dimensions();
  const auto us = up.dimensions(), ds = down.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ss.size() != 2 || ws.size() != 2 || us.size() != 3 || ds.size() != 3 ||
      ys.size() != 2 || !read_pair(x, *y, values, results)) {
    return false;
  }
  const int64_t hidden = xs[1], ffn = us[1] / 2, total = us[0];
  const auto scales = [&](int64_t features, int64_t inner) {
    return static_cast<size_t>(total * features * (block == 0 ? 1 : inner / block));
  };
  return ys[0] == xs[0] && ys[1] == hidden && ss[0] == xs[0] && ws[0] == ss[0] && ws[1] == ss[1] &&
         us[1] == 2 * ffn && us[2] * codes == hidden && ds[0] == total && ds[1] == hidden &&
         ds[2] * codes == ffn && hidden > 0 && ffn > 0 && hidden <= msd::kMostInner &&
         ffn <= msd::kMostInner && (block == 0 || (hidden % block == 0 && ffn % block == 0)) &&
         up_scale.element_count() == scales(2 * ffn, hidden) &&
         down_scale.element_count() == scales(hidden, ffn);
}

ffi::Error int8(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slots,
                ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::S8> up,
                ffi::Buffer<ffi::F32> up_scale, ffi::Buffer<ffi::S8> down,
                ffi::Buffer<ffi::F32> down_scale, ffi::Result<ffi::AnyBuffer> y) {
  Values values, results;
  if (!fits(x, slots, weights, up, up_scale, down, down_scale, y, 1, 0, values, results)) {
    return shape_error();
  }
  const auto us = up.dimensions();
  const int64_t total = us[0], ffn = us[1] / 2, hidden = us[2];
  const auto product = [&](auto& w, auto& scale, int64_t inner, int64_t features) {
    return [&, inner, features](const std::vector<Span>& spans, int64_t rows, const Values& from,
                                const Values& to) {
      return msd::int8_product(pool, {total, rows, inner, features}, spans, rows, from,
                               w.typed_data(), scale.typed_data(), nullptr, to);
    };
  };
  return mix(pool, slots.dimensions()[0], slots.dimensions()[1], hidden, ffn, total, values,
             slots.typed_data(), weights.typed_data(), results,
             product(up, up_scale, hidden, 2 * ffn), product(down, down_scale, ffn, hidden));
}

ffi::Error mxfp4(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slots,
                 ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::U8> up,
                 ffi::Buffer<ffi::U8> up_scale, ffi::Buffer<ffi::U8> down,
                 ffi::Buffer<ffi::U8> down_scale, ffi::Result<ffi::AnyBuffer> y) {
  Values values, results;
  if (!fits(x, slots, weights, up, up_scale, down, down_scale, y, 2, msd::kBlock, values,
            results)) {
    return shape_error();
  }
  const auto us = up.dimensions();
  const int64_t total = us[0], ffn = us[1] / 2, hidden = 2 * us[2];
  const auto product = [&](auto& w, auto& scale, int64_t inner, int64_t features) {
    return [&, inner, features](const std::vector<Span>& spans, int64_t rows, const Values& from,
                                const Values& to) {
      return msd::mxfp4_product(pool, {total, rows, inner, features}, spans, rows, from,
                                w.typed_data(), scale.typed_data(), to);
    };
  };
  return mix(pool, slots.dimensions()[0], slots.dimensions()[1], hidden, ffn, total, values,
             slots.typed_data(), weights.typed_data(), results,
             product(up, up_scale, hidden, 2 * ffn), product(down, down_scale, ffn, hidden));
}

}  // namespace

#define CMJAX_SORTED_EXPERTS(W, S)         \
  ffi::Ffi::Bind()                         \
      .Ctx<ffi::ThreadPool>()              \
      .Arg<ffi::AnyBuffer>()               \
      .Arg<ffi::Buffer<ffi::S32>>()        \
      .Arg<ffi::Buffer<ffi::F32>>()        \
      .Arg<ffi::Buffer<ffi::W>>()          \
      .Arg<ffi::Buffer<ffi::S>>()          \
      .Arg<ffi::Buffer<ffi::W>>()          \
      .Arg<ffi::Buffer<ffi::S>>()          \
      .Ret<ffi::AnyBuffer>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_sorted_experts_int8, int8, CMJAX_SORTED_EXPERTS(S8, F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_sorted_experts_mxfp4, mxfp4, CMJAX_SORTED_EXPERTS(U8, U8));

#undef CMJAX_SORTED_EXPERTS

}  // namespace cmjax
