// Buffers of XLA as rows of activations.
#pragma once

#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {

// A buffer of float32 or bfloat16; false of anything else.
template <typename Buffer>
bool read_values(Buffer& buffer, Values& values) {
  const auto type = buffer.element_type();
  values = {buffer.untyped_data(), type == xla::ffi::BF16};
  return values.half || type == xla::ffi::F32;
}

// Rows and results of one such dtype.
template <typename X, typename Y>
bool read_pair(X& x, Y& y, Values& values, Values& results) {
  return x.element_type() == y.element_type() && read_values(x, values) && read_values(y, results);
}

}  // namespace cmjax
