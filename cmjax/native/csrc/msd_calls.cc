// Calls of the W8A16 and W4A16 products: rows that meet one matrix, a matrix for each of a stack, or
// the matrix of their group.
#include <cstring>
#include <vector>

#include "msd_product.h"
#include "row_groups.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;
using msd::int8_product;
using msd::mxfp4_product;
using msd::Sizes;
using msd::Span;

template <typename A, typename W>
bool read_sizes(const A& x, const W& w, int64_t codes, Sizes& sizes) {
  if (x.size() != 3 || w.size() != 3) return false;
  sizes = {x[0], x[1], x[2], w[1]};
  return w[0] == sizes.stack && w[2] * codes == sizes.inner && sizes.inner > 0;
}

template <typename D>
bool is_shape(const D& dimensions, int64_t a, int64_t b, int64_t c) {
  return dimensions.size() == 3 && dimensions[0] == a && dimensions[1] == b && dimensions[2] == c;
}

// Every matrix has the same number of rows, one matrix after the other.
std::vector<Span> spans_of(const Sizes& n) {
  std::vector<Span> spans;
  for (int64_t s = 0; s < n.stack; ++s) spans.push_back({s * n.rows, n.rows});
  return spans;
}

ffi::Error dtype_error() {
  return ffi::Error::InvalidArgument("msd_dot: x and the result must be float32 or bfloat16, both");
}

ffi::Error int8(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> w,
                ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> offset,
                ffi::Result<ffi::AnyBuffer> y) {
  Sizes n;
  if (!read_sizes(x.dimensions(), w.dimensions(), 1, n)) {
    return ffi::Error::InvalidArgument(
        "msd_int8: x must be [stack, rows, inner] and w [stack, features, inner]");
  }
  if (n.inner > msd::kMostInner) {
    return ffi::Error::InvalidArgument("msd_int8: inner is too long for int32 sums");
  }
  const auto of_features = static_cast<size_t>(n.stack * n.features);
  if (!is_shape(scale.dimensions(), n.stack, n.features, 1)) {
    return ffi::Error::InvalidArgument("msd_int8: scale must be [stack, features, 1]");
  }
  if (offset.element_count() != 0 && offset.element_count() != of_features) {
    return ffi::Error::InvalidArgument(
        "msd_int8: offset must be empty or have stack * features elements");
  }
  if (!is_shape(y->dimensions(), n.stack, n.rows, n.features)) {
    return ffi::Error::InvalidArgument("msd_int8: the result must be [stack, rows, features]");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  Values values, results;
  if (!read_pair(x, *y, values, results)) return dtype_error();

  return int8_product(pool, n, spans_of(n), n.stack * n.rows, values, w.typed_data(),
                      scale.typed_data(), offset.element_count() ? offset.typed_data() : nullptr,
                      results);
}

ffi::Error mxfp4(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> w,
                 ffi::Buffer<ffi::U8> scale, ffi::Result<ffi::AnyBuffer> y) {
  Sizes n;
  if (!read_sizes(x.dimensions(), w.dimensions(), 2, n) || n.inner % msd::kBlock != 0) {
    return ffi::Error::InvalidArgument(
        "msd_mxfp4: x must be [stack, rows, inner], inner a multiple of 32, and w [stack, "
        "features, inner / 2]");
  }
  if (!is_shape(scale.dimensions(), n.stack, n.features, n.inner / msd::kBlock)) {
    return ffi::Error::InvalidArgument("msd_mxfp4: scale must be [stack, features, inner / 32]");
  }
  if (!is_shape(y->dimensions(), n.stack, n.rows, n.features)) {
    return ffi::Error::InvalidArgument("msd_mxfp4: the result must be [stack, rows, features]");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  Values values, results;
  if (!read_pair(x, *y, values, results)) return dtype_error();

  return mxfp4_product(pool, n, spans_of(n), n.stack * n.rows, values, w.typed_data(),
                       scale.typed_data(), results);
}

// Rows in groups: x [rows, inner], w [groups, features, ...], as in grouped.cc.
template <typename W, typename S>
ffi::Error grouped(ffi::AnyBuffer& x, const W& w, const S& scale, int64_t codes,
                   int64_t scales, ffi::Buffer<ffi::S32>& counts,
                   ffi::Result<ffi::AnyBuffer>& y, Sizes& n, std::vector<Span>& spans) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  const auto groups = counts.element_count();
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2 || ws[2] * codes != xs[1] || xs[1] == 0 ||
      ys[0] != xs[0] || ys[1] != ws[1] || groups != static_cast<size_t>(ws[0]) ||
      scale.element_count() != static_cast<size_t>(ws[0] * ws[1] * scales)) {
    return ffi::Error::InvalidArgument(
        "grouped_msd_dot: x must be [rows, inner], w [groups, features, inner], counts "
        "[groups], and the result [rows, features]");
  }
  n = {ws[0], xs[0], xs[1], ws[1]};
  const RowGroups lists =
      row_groups(nullptr, counts.typed_data(), n.stack, n.rows, nullptr, 0, false);
  if (!lists.valid) {
    return ffi::Error::InvalidArgument(
        "grouped_msd_dot: a group has negative rows, or rows beyond the buffer");
  }
  for (int64_t g = 0; g < n.stack; ++g) spans.push_back({lists.begin[g], lists.count(g)});
  if (static_cast<int64_t>(lists.rows.size()) < n.rows) {
    std::memset(y->untyped_data(), 0, y->size_bytes());
  }
  return ffi::Error::Success();
}

ffi::Error grouped_int8(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S8> w,
                        ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> counts,
                        ffi::Result<ffi::AnyBuffer> y) {
  Sizes n;
  std::vector<Span> spans;
  if (ffi::Error e = grouped(x, w, scale, 1, 1, counts, y, n, spans); e.failure()) return e;
  if (n.inner > msd::kMostInner) {
    return ffi::Error::InvalidArgument("grouped_msd_dot: inner is too long for int32 sums");
  }
  Values values, results;
  if (!read_pair(x, *y, values, results)) return dtype_error();
  return int8_product(pool, n, spans, n.rows, values, w.typed_data(), scale.typed_data(),
                      nullptr, results);
}

ffi::Error grouped_mxfp4(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> w,
                         ffi::Buffer<ffi::U8> scale, ffi::Buffer<ffi::S32> counts,
                         ffi::Result<ffi::AnyBuffer> y) {
  Sizes n;
  std::vector<Span> spans;
  const int64_t scales = x.dimensions().size() == 2 ? x.dimensions()[1] / msd::kBlock : 0;
  if (ffi::Error e = grouped(x, w, scale, 2, scales, counts, y, n, spans); e.failure()) {
    return e;
  }
  if (n.inner % msd::kBlock != 0) {
    return ffi::Error::InvalidArgument("grouped_msd_dot: inner must be a multiple of 32");
  }
  Values values, results;
  if (!read_pair(x, *y, values, results)) return dtype_error();
  return mxfp4_product(pool, n, spans, n.rows, values, w.typed_data(), scale.typed_data(),
                       results);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_msd_int8, int8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_msd_mxfp4, mxfp4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_grouped_msd_int8, grouped_int8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_grouped_msd_mxfp4, grouped_mxfp4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace cmjax
