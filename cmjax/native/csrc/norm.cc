// RMS normalisation of the few rows of a decode step.
#include <vector>

#include "values.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

ffi::Error rms_norm(ffi::AnyBuffer x, ffi::Buffer<ffi::F32> gain, ffi::Result<ffi::AnyBuffer> y,
                    float eps) {
  const auto xs = x.dimensions();
  Values from, to;
  if (!read_pair(x, *y, from, to) || xs.size() != 2 || y->element_count() != x.element_count() ||
      gain.element_count() != static_cast<size_t>(xs[1])) {
    return ffi::Error::InvalidArgument(
        "rms_norm: x and the result must be [rows, dim], float32 or bfloat16, gain [dim]");
  }
  const RowKernels kernel = row_kernels();
  const int64_t size = xs[1];
  std::vector<float> wide(size);
  for (int64_t r = 0; r < xs[0]; ++r) {
    const float* row = from.read(kernel, r * size, size, wide.data());
    float* out = to.place(r * size, wide.data());
    kernel.rms_norm(row, gain.typed_data(), size, eps, out);
    to.write(kernel, out, size, r * size);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_rms_norm, rms_norm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));

}  // namespace cmjax
