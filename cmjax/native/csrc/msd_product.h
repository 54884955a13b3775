// W8A16 and W4A16 products of rows in groups, each with a matrix of its own: what is computed for
// one call, between checks of shapes and what follows.
#pragma once

#include <cstdint>
#include <vector>

#include "msd.h"
#include "values.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax::msd {

struct Sizes {
  int64_t stack, rows, inner, features;
};

// Rows of x that meet one matrix of the stack.
struct Span {
  int64_t start, count;
};

// y [all_rows, features] of all spans; w [stack, features, inner], a scale for each feature, and
// offsets or null.
xla::ffi::Error int8_product(xla::ffi::ThreadPool& pool, const Sizes& n,
                             const std::vector<Span>& spans, int64_t all_rows, const Values& x,
                             const int8_t* w, const float* scales, const float* offsets,
                             const Values& y);

// The same of w [stack, features, inner / 2] codes and scale [stack, features, inner / 32].
xla::ffi::Error mxfp4_product(xla::ffi::ThreadPool& pool, const Sizes& n,
                              const std::vector<Span>& spans, int64_t all_rows, const Values& x,
                              const uint8_t* w, const uint8_t* scale, const Values& y);

}  // namespace cmjax::msd
