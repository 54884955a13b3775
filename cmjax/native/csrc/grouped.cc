// y[r] = x[r] w[g] for the rows r of every group g: dense layers (one group) and experts. Matrices
// of groups without rows are not touched.
#include "grouped.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "row_groups.h"
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
};

Kernels kernels() {
#if defined(__x86_64__)
  namespace avx512 = grouped::avx512;
  namespace avx2 = grouped::avx2;
  if (isa() == Isa::kAvx512Vnni) {
    return {&avx512::float_columns, &avx512::to_float, &avx512::to_half};
  }
  if (isa() == Isa::kAvx2) return {&avx2::float_columns, &avx2::to_float, &avx2::to_half};
#endif
  namespace scalar = grouped::scalar;
  return {&scalar::float_columns, &scalar::to_float, &scalar::to_half};
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

// Blocks of columns of every matrix that has rows. Few rows stream wide blocks, as long as every
// worker gets some.
std::vector<Task> tasks_of(const RowGroups& lists, const Sizes& n, int64_t workers,
                           int64_t& columns) {
  int64_t used = 0, most = 0;
  for (int64_t g = 0; g < n.groups; ++g) {
    used += lists.count(g) > 0;
    most = std::max(most, lists.count(g));
  }
  columns = most <= 2 ? kColumns : kNarrow;
  while (columns > kNarrow && used * ((n.features + columns - 1) / columns) < 4 * workers) {
    columns /= 2;
  }
  std::vector<Task> tasks;
  for (int64_t g = 0; g < n.groups; ++g) {
    if (lists.count(g) == 0) continue;
    for (int64_t c = 0; c < n.features; c += columns) tasks.push_back({g, c});
  }
  return tasks;
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
    const int64_t at_once = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(n.inner, 1));
    const int64_t blocks = (total + at_once - 1) / at_once;
    parallel_for(pool, blocks, worker_count(pool, blocks), [&](int64_t block, int64_t) {
      const int64_t end = std::min(total, (block + 1) * at_once);
      for (int64_t i = block * at_once; i < end; ++i) {
        kernel.to_float(x + lists.rows[i] * n.inner, n.inner, to + i * n.inner);
      }
    });
    for (int64_t i = 0; i < total; ++i) at[i] = to + i * n.inner;
  } else {
    for (int64_t i = 0; i < total; ++i) at[i] = x + lists.rows[i] * n.inner;
  }
  int64_t columns = 0;
  const std::vector<Task> tasks = tasks_of(lists, n, pool.num_threads(), columns);
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t workers = worker_count(pool, count);
  Workspace space(workers, most_rows(lists), columns);
  if (!space.memory) return memory_error();
  parallel_for(pool, count, workers, [&](int64_t task, int64_t worker) {
    const auto [group, column] = tasks[task];
    const int64_t some = std::min(columns, n.features - column), rows = lists.count(group);
    auto* results = reinterpret_cast<float*>(space.results(worker));
    kernel.float_columns(kHalf ? Kind::kHalf : Kind::kFloat, at.data() + lists.begin[group], rows,
                         w + group * n.inner * n.features + column, n.inner, n.features, some,
                         reinterpret_cast<float*>(space.layout(worker)), results, columns);
    for (int64_t r = 0; r < rows; ++r) {
      T* to = y + lists.of(group)[r] * n.features + column;
      if constexpr (kHalf) {
        kernel.to_half(results + r * columns, some, to);
      } else {
        std::memcpy(to, results + r * columns, some * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

#if defined(__x86_64__)
ffi::Error integers(ffi::ThreadPool& pool, const Sizes& n, const RowGroups& lists, const int8_t* x,
                    const int8_t* w, int32_t* y) {
  const auto total = static_cast<int64_t>(lists.rows.size());
  const int64_t padded = (n.inner + 3) / 4 * 4;
  const Scratch copies = aligned_bytes(total * padded);
  if (!copies) return memory_error();
  std::vector<const int8_t*> at(total);
  std::vector<int32_t> sums(total);
  const int64_t at_once = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(n.inner, 1));
  const int64_t blocks = (total + at_once - 1) / at_once;
  parallel_for(pool, blocks, worker_count(pool, blocks), [&](int64_t block, int64_t) {
    const int64_t end = std::min(total, (block + 1) * at_once);
    for (int64_t i = block * at_once; i < end; ++i) {
      auto* to = reinterpret_cast<int8_t*>(copies.get()) + i * padded;
      std::memcpy(to, x + lists.rows[i] * n.inner, n.inner);
      std::memset(to + n.inner, 0, padded - n.inner);
      int32_t sum = 0;
      for (int64_t k = 0; k < n.inner; ++k) sum += to[k];
      sums[i] = sum;
      at[i] = to;
    }
  });
  int64_t columns = 0;
  const std::vector<Task> tasks = tasks_of(lists, n, pool.num_threads(), columns);
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t workers = worker_count(pool, count);
  Workspace space(workers, most_rows(lists), columns);
  if (!space.memory) return memory_error();
  parallel_for(pool, count, workers, [&](int64_t task, int64_t worker) {
    const auto [group, column] = tasks[task];
    const int64_t some = std::min(columns, n.features - column), rows = lists.count(group);
    const int64_t first = lists.begin[group];
    auto* results = reinterpret_cast<int32_t*>(space.results(worker));
    grouped::avx512::int8_columns(at.data() + first, sums.data() + first, rows,
                                  w + group * n.inner * n.features + column, n.inner, n.features,
                                  some, space.layout(worker), results, columns);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(y + lists.of(group)[r] * n.features + column, results + r * columns,
                  some * sizeof(int32_t));
    }
  });
  return ffi::Error::Success();
}
#endif

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
    return floats(pool, n, lists, static_cast<const uint16_t*>(x.untyped_data()),
                  static_cast<const uint16_t*>(w.untyped_data()),
                  static_cast<uint16_t*>(y->untyped_data()));
  }
#if defined(__x86_64__)
  if (type == ffi::S8 && y->element_type() == ffi::S32 && isa() == Isa::kAvx512Vnni) {
    return integers(pool, n, lists, x.typed_data<int8_t>(), w.typed_data<int8_t>(),
                    y->typed_data<int32_t>());
  }
#endif
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
