// y[r] = x[r] w[g] for the rows r of every group g: dense layers (one group) and experts. Matrices
// of groups without rows are not touched.
#include "grouped.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "int8_dot.h"
#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;
using grouped::Kind;
using grouped::kColumns;
using grouped::kNarrow;

struct Kernels {
  decltype(&grouped::scalar::float_columns) float_columns;
  decltype(&grouped::scalar::to_float) to_float;
  decltype(&grouped::scalar::to_half) to_half;
  decltype(&grouped::scalar::float_lines) float_lines;
  int64_t streamed_rows;  // of a group, up to which whole lines are streamed (measured)
};

Kernels kernels() {
#if defined(__x86_64__)
  namespace avx512 = grouped::avx512;
  namespace avx2 = grouped::avx2;
  if (isa() == Isa::kAvx512Vnni) {
    return {&avx512::float_columns, &avx512::to_float, &avx512::to_half,
            &avx512::float_lines, 16};
  }
  if (isa() == Isa::kAvx2) {
    return {&avx2::float_columns, &avx2::to_float, &avx2::to_half,
            &avx2::float_lines, 8};
  }
#endif
  namespace scalar = grouped::scalar;
  return {&scalar::float_columns, &scalar::to_float, &scalar::to_half,
          &scalar::float_lines, 0};
}

struct Free {
  void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<uint8_t[], Free>;

Scratch aligned_bytes(int64_t count) {
  return Scratch(static_cast<uint8_t*>(
      ::operator new[](std::max<int64_t>(count, 1), std::align_val_t{64}, std::nothrow)));
}

struct Task {
  int64_t group, column;
};

struct Sizes {
  int64_t rows, inner, groups, features;
};

// How wide the blocks are that tasks take: few rows stream wide ones, as long as every worker gets
// some.
int64_t columns_of(const RowGroups& lists, const Sizes& n, int64_t workers) {
  int64_t used = 0, most = 0;
  for (int64_t g = 0; g < n.groups; ++g) {
    used += lists.count(g) > 0;
    most = std::max(most, lists.count(g));
  }
  int64_t columns = most <= 2 ? kColumns : kNarrow;
  while (columns > kNarrow && used * ((n.features + columns - 1) / columns) < 4 * workers) {
    columns /= 2;
  }
  return columns;
}

// Per-worker memory: results of a task, and what its kernel lays out anew.
struct Workspace {
  int64_t bytes;
  Scratch memory;
  Workspace(int64_t workers, int64_t most_rows, int64_t columns)
      : bytes((most_rows * columns * 4 + grouped::kScratchBytes + 127) / 64 * 64),
        memory(aligned_bytes(workers * bytes)) {}
  uint8_t* layout(int64_t worker) { return memory.get() + worker * bytes; }
  uint8_t* results(int64_t worker) { return layout(worker) + grouped::kScratchBytes; }
};

int64_t most_rows(const RowGroups& lists) {
  int64_t most = 0;
  for (int64_t g = 0; g < lists.groups(); ++g) most = std::max(most, lists.count(g));
  return most;
}

ffi::Error memory_error() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "grouped_dot: memory");
}

// By blocks of columns of every matrix that has rows, a task each.
//
// product(group, first column, columns, memory to lay operands out in, results [rows, stride]);
// finish(group, first column, columns, stride, results).
template <typename Sum, typename Product, typename Finish>
ffi::Error by_columns(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists,
                      int64_t columns, const Product& product, const Finish& finish) {
  std::vector<Task> tasks;
  for (int64_t g = 0; g < n.groups; ++g) {
    if (lists.count(g) == 0) continue;
    for (int64_t c = 0; c < n.features; c += columns) tasks.push_back({g, c});
  }
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t workers = worker_count(pool, count);
  Workspace space(workers, most_rows(lists), columns);
  if (!space.memory) return memory_error();
  parallel_for(pool, count, workers, [&](int64_t task, int64_t worker) {
    const auto [group, column] = tasks[task];
    const int64_t some = std::min(columns, n.features - column);
    auto* results = reinterpret_cast<Sum*>(space.results(worker));
    product(group, column, some, space.layout(worker), results);
    finish(group, column, some, columns, results);
  });
  return ffi::Error::Success();
}

// Few rows, by whole lines: a task multiplies some lines of a matrix, and who ends last of those of a
// matrix adds their sums. How lines are divided does not depend on the threads, so sums do not either.
//
// product(group, first line, lines, first column, columns, sums [rows, columns]);
// finish(group, first column, columns, sums).
template <typename Sum, typename Product, typename Finish>
ffi::Error stream(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists,
                  const Product& product, const Finish& finish) {
  constexpr int64_t kWidest = 2048;  // sums of a few rows stay in the second cache
  constexpr int64_t kTasks = 16, kMostParts = 8;
  int64_t used = 0;
  for (int64_t g = 0; g < n.groups; ++g) used += lists.count(g) > 0;
  const int64_t wide = std::max<int64_t>(1, (n.features + kWidest - 1) / kWidest);
  const int64_t columns = ((n.features + wide - 1) / wide + 63) / 64 * 64;
  const int64_t blocks_each = (n.features + columns - 1) / columns;
  const int64_t parts = std::clamp<int64_t>(
      kTasks / std::max<int64_t>(used * blocks_each, 1), 1, kMostParts);
  const int64_t lines = (n.inner + parts - 1) / parts;
  struct Block {
    int64_t group, column, at;
  };
  std::vector<Block> blocks;
  int64_t sums = 0;
  for (int64_t g = 0; g < n.groups; ++g) {
    if (lists.count(g) == 0) continue;
    for (int64_t c = 0; c < n.features; c += columns) {
      blocks.push_back({g, c, sums});
      sums += parts * lists.count(g) * columns;
    }
  }
  const Scratch memory = aligned_bytes(sums * static_cast<int64_t>(sizeof(Sum)));
  std::vector<std::atomic<int64_t>> done(blocks.size());
  if (!memory) return memory_error();
  const auto count = static_cast<int64_t>(blocks.size()) * parts;
  parallel_for(pool, count, worker_count(pool, count), [&](int64_t task, int64_t) {
    const auto [group, column, at] = blocks[task / parts];
    const int64_t part = task % parts, first = std::min(part * lines, n.inner);
    const int64_t some = std::min(columns, n.features - column), rows = lists.count(group);
    Sum* of_block = reinterpret_cast<Sum*>(memory.get()) + at;
    Sum* own = of_block + part * rows * columns;
    product(group, first, std::min(lines, n.inner - first), column, some, columns, own);
    if (done[task / parts].fetch_add(1, std::memory_order_acq_rel) + 1 < parts) return;
    for (int64_t p = 1; p < parts; ++p) {
      const Sum* other = of_block + p * rows * columns;
      for (int64_t r = 0; r < rows; ++r) {  // behind `some` columns nothing was written
        for (int64_t i = r * columns; i < r * columns + some; ++i) of_block[i] += other[i];
      }
    }
    finish(group, column, some, columns, of_block);
  });
  return ffi::Error::Success();
}

// row(i) for the `total` rows of all groups, some at a time on every thread.
template <typename Row>
void each_row(ffi::ThreadPool& pool, int64_t total, int64_t inner, const Row& row) {
  const int64_t at_once = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(inner, 1));
  const int64_t blocks = (total + at_once - 1) / at_once;
  parallel_for(pool, blocks, worker_count(pool, blocks), [&](int64_t block, int64_t) {
    const int64_t end = std::min(total, (block + 1) * at_once);
    for (int64_t i = block * at_once; i < end; ++i) row(i);
  });
}

template <typename T>
ffi::Error floats(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists, const T* x,
                  const T* w, T* y) {
  constexpr bool kHalf = sizeof(T) == 2;
  const Kernels kernel = kernels();
  const auto total = static_cast<int64_t>(lists.rows.size());
  const Scratch wide = aligned_bytes(kHalf ? total * n.inner * 4 : 0);
  std::vector<const float*> at(total);
  if (!wide) return memory_error();
  if constexpr (kHalf) {
    auto* to = reinterpret_cast<float*>(wide.get());
    each_row(pool, total, n.inner, [&](int64_t i) {
      kernel.to_float(x + lists.rows[i] * n.inner, n.inner, to + i * n.inner);
    });
    for (int64_t i = 0; i < total; ++i) at[i] = to + i * n.inner;
  } else {
    for (int64_t i = 0; i < total; ++i) at[i] = x + lists.rows[i] * n.inner;
  }
  constexpr Kind kind = kHalf ? Kind::kHalf : Kind::kFloat;
  const auto write = [&](int64_t group, int64_t column, int64_t some, int64_t stride,
                         const float* results) {
    for (int64_t r = 0; r < lists.count(group); ++r) {
      T* to = y + lists.of(group)[r] * n.features + column;
      if constexpr (kHalf) {
        kernel.to_half(results + r * stride, some, to);
      } else {
        std::memcpy(to, results + r * stride, some * sizeof(float));
      }
    }
  };
  const auto weights_at = [&](int64_t group, int64_t line, int64_t column) {
    return w + (group * n.inner + line) * n.features + column;
  };
  if (most_rows(lists) <= kernel.streamed_rows) {
    const auto product = [&](int64_t group, int64_t line, int64_t lines, int64_t column,
                             int64_t some, int64_t stride, float* sums) {
      const int64_t rows = lists.count(group);
      std::vector<const float*> from(at.begin() + lists.begin[group],
                                     at.begin() + lists.begin[group] + rows);
      for (const float*& row : from) row += line;
      kernel.float_lines(kind, from.data(), rows, weights_at(group, line, column), lines,
                         n.features, some, sums, stride);
    };
    return stream<float>(pool, n, lists, product, write);
  }
  const int64_t columns = columns_of(lists, n, pool.num_threads());
  const auto product = [&](int64_t group, int64_t column, int64_t some, uint8_t* layout,
                           float* results) {
    kernel.float_columns(kind, at.data() + lists.begin[group], lists.count(group),
                         weights_at(group, 0, column), n.inner, n.features, some,
                         reinterpret_cast<float*>(layout), results, columns);
  };
  return by_columns<float>(pool, n, lists, columns, product, write);
}

#if defined(__x86_64__)
// Copies of the rows of all groups, in their order, followed by zeros up to `padded` elements.
template <typename T>
Scratch padded_rows(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists, const T* x,
                    int64_t padded, std::vector<const T*>& at) {
  const auto total = static_cast<int64_t>(lists.rows.size());
  Scratch copies = aligned_bytes(total * padded * static_cast<int64_t>(sizeof(T)));
  if (!copies) return copies;
  at.resize(total);
  each_row(pool, total, n.inner, [&](int64_t i) {
    T* to = reinterpret_cast<T*>(copies.get()) + i * padded;
    std::memcpy(to, x + lists.rows[i] * n.inner, n.inner * sizeof(T));
    std::fill(to + n.inner, to + padded, T{0});
    at[i] = to;
  });
  return copies;
}

#if defined(CMJAX_AVX512_BF16)
// Many rows of bfloat16, with AVX512_BF16.
ffi::Error halves(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists, const uint16_t* x,
                  const uint16_t* w, uint16_t* y) {
  std::vector<const uint16_t*> at;
  const Scratch copies = padded_rows(pool, n, lists, x, (n.inner + 1) / 2 * 2, at);
  if (!copies) return memory_error();
  const auto product = [&](int64_t group, int64_t column, int64_t some, uint8_t* layout,
                           float* results) {
    grouped::avx512_bf16::half_columns(at.data() + lists.begin[group], lists.count(group),
                                       w + group * n.inner * n.features + column, n.inner,
                                       n.features, some, layout, results, kNarrow);
  };
  const auto write = [&](int64_t group, int64_t column, int64_t some, int64_t stride,
                         const float* results) {
    for (int64_t r = 0; r < lists.count(group); ++r) {
      grouped::avx512::to_half(results + r * stride, some,
                               y + lists.of(group)[r] * n.features + column);
    }
  };
  return by_columns<float>(pool, n, lists, kNarrow, product, write);
}
#endif

// What puts sums at the places of their rows.
auto writes_integers(const Sizes& n, const RowGroups& lists, int32_t* y) {
  return [&n, &lists, y](int64_t group, int64_t column, int64_t some, int64_t stride,
                         const int32_t* sums) {
    for (int64_t r = 0; r < lists.count(group); ++r) {
      std::memcpy(y + lists.of(group)[r] * n.features + column, sums + r * stride,
                  some * sizeof(int32_t));
    }
  };
}

// By whole lines; `at` are the rows of all groups, as `lines` takes them.
template <typename X, typename Lines>
ffi::Error stream_integers(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists,
                           const std::vector<const X*>& at, const Lines& lines_of,
                           const int8_t* w, int32_t* y) {
  const auto product = [&](int64_t group, int64_t line, int64_t lines, int64_t column, int64_t some,
                           int64_t stride, int32_t* sums) {
    std::vector<const X*> from(at.begin() + lists.begin[group],
                               at.begin() + lists.begin[group + 1]);
    for (const X*& row : from) row += line;
    lines_of(from.data(), lists.count(group), w + (group * n.inner + line) * n.features + column,
             lines, n.features, some, sums, stride);
  };
  return stream<int32_t>(pool, n, lists, product, writes_integers(n, lists, y));
}

// With VNNI.
ffi::Error integers(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists, const int8_t* x,
                    const int8_t* w, int32_t* y) {
  constexpr int64_t kStreamedRows = 24;  // as `Kernels::streamed_rows`
  const auto total = static_cast<int64_t>(lists.rows.size());
  if (most_rows(lists) <= kStreamedRows) {
    std::vector<const int8_t*> rows(total);
    for (int64_t i = 0; i < total; ++i) rows[i] = x + lists.rows[i] * n.inner;
    return stream_integers(pool, n, lists, rows, &grouped::avx512::int8_lines, w, y);
  }
  std::vector<const int8_t*> at;
  const Scratch copies = padded_rows(pool, n, lists, x, (n.inner + 3) / 4 * 4, at);
  if (!copies) return memory_error();
  std::vector<int32_t> sums(total);
  for (int64_t i = 0; i < total; ++i) {
    for (int64_t k = 0; k < n.inner; ++k) sums[i] += at[i][k];
  }
  const int64_t columns = columns_of(lists, n, pool.num_threads());
  const auto product = [&](int64_t group, int64_t column, int64_t some, uint8_t* layout,
                           int32_t* results) {
    const int64_t first = lists.begin[group];
    grouped::avx512::int8_columns(at.data() + first, sums.data() + first, lists.count(group),
                                  w + group * n.inner * n.features + column, n.inner, n.features,
                                  some, layout, results, columns);
  };
  return by_columns<int32_t>(pool, n, lists, columns, product, writes_integers(n, lists, y));
}

// With AVX2.
ffi::Error widened_integers(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists,
                            const int8_t* x, const int8_t* w, int32_t* y) {
  constexpr int64_t kStreamedRows = 8;  // as `Kernels::streamed_rows`
  const auto total = static_cast<int64_t>(lists.rows.size());
  const int64_t padded = (n.inner + 1) / 2 * 2;
  const Scratch copies = aligned_bytes(total * padded * 2);
  if (!copies) return memory_error();
  auto* wide = reinterpret_cast<int16_t*>(copies.get());
  std::vector<const int16_t*> at(total);
  each_row(pool, total, n.inner, [&](int64_t i) {
    int16_t* to = wide + i * padded;
    grouped::avx2::int8_widen(x + lists.rows[i] * n.inner, n.inner, to);
    std::fill(to + n.inner, to + padded, int16_t{0});
    at[i] = to;
  });
  if (n.inner == 0 || most_rows(lists) <= kStreamedRows) {
    return stream_integers(pool, n, lists, at, &grouped::avx2::int8_lines, w, y);
  }
  const auto product = [&](int64_t group, int64_t column, int64_t some, uint8_t* layout,
                           int32_t* results) {
    grouped::avx2::int8_columns(at.data() + lists.begin[group], lists.count(group),
                                w + group * n.inner * n.features + column, n.inner, n.features,
                                some, layout, results, kNarrow);
  };
  return by_columns<int32_t>(pool, n, lists, kNarrow, product, writes_integers(n, lists, y));
}
#endif

}  // namespace

ffi::Error int8_dot(ffi::ThreadPool& pool, int64_t inner, int64_t features, const RowGroups& lists,
                    const int8_t* x, const int8_t* w, int32_t* y) {
#if defined(__x86_64__)
  const Sizes n{static_cast<int64_t>(lists.rows.size()), inner, lists.groups(), features};
  if (isa() == Isa::kAvx512Vnni) return integers(pool, n, lists, x, w, y);
  if (isa() == Isa::kAvx2) return widened_integers(pool, n, lists, x, w, y);
#endif
  return ffi::Error::InvalidArgument("no kernel multiplies int8 on this machine");
}

namespace {

ffi::Error grouped_dot(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                       ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> counts,
                       ffi::Result<ffi::AnyBuffer> y, bool skip_zeros) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2 || ws[1] != xs[1] || ys[0] != xs[0] ||
      ys[1] != ws[2] ||
      (starts.element_count() != 0 && starts.element_count() != static_cast<size_t>(ws[0])) ||
      counts.element_count() != static_cast<size_t>(ws[0])) {
    return ffi::Error::InvalidArgument(
        "grouped_dot: x must be [rows, inner], w [groups, inner, features], counts [groups], starts "
        "too or empty, and the result [rows, features]");
  }
  const Sizes n{xs[0], xs[1], ws[0], ws[2]};
  const auto type = x.element_type();
  if (w.element_type() != type) {
    return ffi::Error::InvalidArgument("grouped_dot: x and w must have one dtype");
  }
  const int32_t* first = starts.element_count() == 0 ? nullptr : starts.typed_data();
  const auto row_bytes = n.inner * static_cast<int64_t>(ffi::ByteWidth(type));
  const RowGroups lists = row_groups(first, counts.typed_data(), n.groups, n.rows,
                                     x.untyped_data(), row_bytes, skip_zeros);
  if (!lists.valid) {
    return ffi::Error::InvalidArgument(
        "grouped_dot: a group has negative rows, or rows beyond the buffer");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  if (static_cast<int64_t>(lists.rows.size()) < n.rows) {
    std::memset(y->untyped_data(), 0, y->size_bytes());
  }
  if (type == ffi::F32 && y->element_type() == ffi::F32) {
    return floats(pool, n, lists, x.typed_data<float>(), w.typed_data<float>(),
                  y->typed_data<float>());
  }
  if (type == ffi::BF16 && y->element_type() == ffi::BF16) {
    const auto* from = static_cast<const uint16_t*>(x.untyped_data());
    const auto* weights = static_cast<const uint16_t*>(w.untyped_data());
    auto* to = static_cast<uint16_t*>(y->untyped_data());
#if defined(CMJAX_AVX512_BF16)
    constexpr int64_t kStreamedRows = 12;  // measured
    if (multiplies_bfloat16() && n.inner > 0 && most_rows(lists) > kStreamedRows) {
      return halves(pool, n, lists, from, weights, to);
    }
#endif
    return floats(pool, n, lists, from, weights, to);
  }
  if (type == ffi::S8 && y->element_type() == ffi::S32) {
    return int8_dot(pool, n.inner, n.features, lists, x.typed_data<int8_t>(),
                    w.typed_data<int8_t>(), y->typed_data<int32_t>());
  }
  return ffi::Error::InvalidArgument("grouped_dot: no kernel for these dtypes on this machine");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_grouped_dot, grouped_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("skip_zeros"));

}  // namespace cmjax
