// Integer products of rows in groups, between checks of shapes and what follows.
#pragma once

#include <cstdint>

#include "row_groups.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {

// y[r] = x[r] w[g] for the rows r of every group g: x [rows, inner], w [groups, inner, features],
// y [rows, features]. An error where the CPU has neither VNNI nor AVX2.
xla::ffi::Error int8_dot(xla::ffi::ThreadPool& pool, int64_t inner, int64_t features,
                         const RowGroups& lists, const int8_t* x, const int8_t* w, int32_t* y);

}  // namespace cmjax
