// Causal attention: of prompts, of the newest tokens over a cache, and over a cache of latents. Keys
// and values are read where they lie, as far as they are seen.
//
// A task has some queries of a sequence and the heads that share its keys. What one of them does not
// see must not matter to it, whatever it holds, though it may to another; so where a score or a
// result is not finite, a task is done again query by query, and then what is not finite is looked
// for.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;
using attention::kKeys;
using attention::Kind;

struct Kernels {
  decltype(&attention::scalar::scores) scores;
  decltype(&attention::scalar::scaled) scaled;
  decltype(&attention::scalar::softmax) softmax;
  decltype(&attention::scalar::round_to_half) round_to_half;
  decltype(&attention::scalar::weigh) weigh;
  decltype(&attention::scalar::to_float) to_float;
  decltype(&attention::scalar::to_half) to_half;
};

Kernels kernels() {
#define CMJAX_KERNELS_OF(space)                                                           \
  {&space::scores, &space::scaled, &space::softmax, &space::round_to_half, &space::weigh, \
   &space::to_float, &space::to_half}
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Vnni) return CMJAX_KERNELS_OF(attention::avx512);
  if (isa() == Isa::kAvx2) return CMJAX_KERNELS_OF(attention::avx2);
#endif
  return CMJAX_KERNELS_OF(attention::scalar);
#undef CMJAX_KERNELS_OF
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int64_t bytes_of(Kind kind) { return kind == Kind::kFloat ? 4 : kind == Kind::kHalf ? 2 : 1; }

int64_t padded(int64_t size) { return (size + kKeys - 1) / kKeys * kKeys; }

// What lies in memory for every token of a sequence and head: [sequences, tokens, heads, dim]; int8
// steps with the value of one, [sequences, tokens, heads].
struct Entries {
  Kind kind;
  const void* data;
  int64_t heads, dim;
  const float* steps;

  int64_t stride() const { return heads * dim; }
  const void* at(int64_t token, int64_t head) const {
    return static_cast<const uint8_t*>(data) + (token * stride() + head * dim) * bytes_of(kind);
  }
  float step(int64_t token, int64_t head) const { return steps[token * heads + head]; }
  bool broken(int64_t token, int64_t head) const {
    if (steps != nullptr && !std::isfinite(step(token, head))) return true;
    const void* from = at(token, head);
    for (int64_t d = 0; d < dim; ++d) {
      if (kind == Kind::kFloat && !std::isfinite(static_cast<const float*>(from)[d])) return true;
      if (kind == Kind::kHalf && (static_cast<const uint16_t*>(from)[d] & 0x7f80) == 0x7f80) {
        return true;
      }
    }
    return false;
  }
};

// Rows of queries, or of results: [sequences, queries, heads, dim], float or bfloat16.
struct Rows {
  bool half;
  void* data;
  int64_t dim;
};

struct Problem {
  int64_t sequences, queries, heads, tokens, kv_heads;
  Rows queries_of[2];  // the second, of keys in two parts, may be of no elements
  Entries keys[2];
  Entries values;
  const int32_t* lengths;  // or none: all tokens
  float scale;
  int64_t window;  // or -1
  bool rounds;     // weights have the dtype of the values
  Rows results;
};

// Keys [from, to) that a query sees.
struct Seen {
  int64_t from, to;
};

Seen seen_by(const Problem& p, int64_t sequence, int64_t query) {
  const int64_t length = p.lengths == nullptr ? p.tokens : p.lengths[sequence];
  const int64_t end = length - p.queries + query + 1;
  const int64_t to = std::clamp<int64_t>(end, 0, p.tokens);
  const int64_t from = p.window < 0 ? 0 : std::clamp<int64_t>(end - p.window, 0, to);
  return {from, to};
}

// Heads [head, head + heads) of queries [query, query + queries); the heads share one key head.
struct Task {
  int64_t sequence, head, heads, query, queries;
};

// Memory of a worker.
struct Workspace {
  float *scratch, *rows, *weights, *found;
  std::vector<const float*> at;
};

class Attention {
 public:
  Attention(const Problem& problem, int64_t most_rows)
      : p_(problem),
        kernel_(kernels()),
        rows_(most_rows),
        few_(most_rows <= attention::kFewRows),
        dims_(p_.keys[0].dim + p_.keys[1].dim),
        weights_(padded(p_.tokens)),
        found_(padded(p_.values.dim) + kKeys),
        scratch_(attention::scratch_floats(std::max(p_.keys[0].dim, p_.keys[1].dim))) {}

  int64_t floats() const { return scratch_ + kKeys + rows_ * (dims_ + weights_ + found_); }

  void run(const Task& task, float* memory) const {
    Workspace space;
    const auto address = reinterpret_cast<uintptr_t>(memory);
    space.scratch = memory + (64 - address % 64) % 64 / sizeof(float);
    space.rows = space.scratch + scratch_;
    space.weights = space.rows + rows_ * dims_;
    space.found = space.weights + rows_ * weights_;
    if (task.queries > 1 && attend(task, false, space)) return;
    for (int64_t i = 0; i < task.queries; ++i) {
      Task one = task;
      one.query += i, one.queries = 1;
      attend(one, true, space);
    }
  }

 private:
  // False, without results, where something is not finite; with `alone` that is settled.
  bool attend(const Task& task, bool alone, Workspace& space) const {
    const int64_t rows = task.queries * task.heads;
    const int64_t kv_head = task.head / (p_.heads / p_.kv_heads);
    const int64_t first = task.sequence * p_.tokens;
    Seen all = seen_by(p_, task.sequence, task.query);
    all.to = seen_by(p_, task.sequence, task.query + task.queries - 1).to;
    const int64_t keys = all.to - all.from, stride = padded(keys);
    for (int64_t t = 0; t < keys; t += kKeys) score(task, first + all.from + t, kv_head,
                                                    std::min(kKeys, keys - t), t, stride, space);
    for (int64_t r = 0; r < rows; ++r) {
      Seen seen = seen_by(p_, task.sequence, task.query + r / task.heads);
      seen.from -= all.from, seen.to -= all.from;
      float* row = space.weights + r * stride;
      if (!kernel_.scaled(row + seen.from, seen.to - seen.from, p_.scale)) {
        if (!alone) return false;
        // A score that is not finite has overflowed, or is of a key that is not.
        if (any(seen, [&](int64_t t) {
              return std::isnan(row[t]) ||
                     (!std::isfinite(row[t]) && broken_key(first + all.from + t, kv_head));
            })) {
          std::fill(row, row + stride, kNan);
          continue;
        }
      }
      kernel_.softmax(row, seen.from, seen.to, stride);
      if (p_.rounds) kernel_.round_to_half(row, stride);
      if (p_.values.steps != nullptr) {
        for (int64_t t = 0; t < keys; ++t) row[t] *= p_.values.step(first + all.from + t, kv_head);
      }
    }
    space.at.resize(rows);
    for (int64_t r = 0; r < rows; ++r) space.at[r] = space.weights + r * stride;
    kernel_.weigh(p_.values.kind, space.at.data(), rows, p_.values.at(first + all.from, kv_head),
                  p_.values.stride(), keys, p_.values.dim, space.scratch, space.found, found_);
    for (int64_t r = 0; r < rows; ++r) {
      float* found = space.found + r * found_;
      if (std::all_of(found, found + p_.values.dim, [](float v) { return std::isfinite(v); })) {
        continue;
      }
      if (!alone) return false;
      if (any({0, keys}, [&](int64_t t) { return p_.values.broken(first + all.from + t, kv_head); })) {
        std::fill(found, found + p_.values.dim, kNan);
      }
    }
    for (int64_t r = 0; r < rows; ++r) write(task, r, space.found + r * found_);
    return true;
  }

  // Scores of at most kKeys keys from `token` on, as column `at` of the rows of scores.
  void score(const Task& task, int64_t token, int64_t kv_head, int64_t keys, int64_t at,
             int64_t stride, Workspace& space) const {
    const int64_t rows = task.queries * task.heads;
    space.at.resize(rows);
    for (int part = 0; part < 2; ++part) {
      const Entries& entries = p_.keys[part];
      if (entries.dim == 0) continue;
      float* queries = space.rows + (part == 0 ? 0 : rows * p_.keys[0].dim);
      for (int64_t r = 0; r < rows; ++r) {
        space.at[r] = queries + r * entries.dim;
        if (at == 0) read(p_.queries_of[part], row_of(task, r), queries + r * entries.dim);
      }
      kernel_.scores(entries.kind, space.at.data(), rows, entries.at(token, kv_head),
                     entries.stride(), keys, entries.dim, part > 0, few_, space.scratch,
                     space.weights + at, stride);
      if (entries.steps == nullptr) continue;
      for (int64_t r = 0; r < rows; ++r) {
        float* row = space.weights + r * stride + at;
        for (int64_t t = 0; t < keys; ++t) row[t] *= entries.step(token + t, kv_head);
      }
    }
  }

  template <typename Test>
  static bool any(Seen tokens, const Test& test) {
    for (int64_t t = tokens.from; t < tokens.to; ++t) {
      if (test(t)) return true;
    }
    return false;
  }

  bool broken_key(int64_t token, int64_t kv_head) const {
    return p_.keys[0].broken(token, kv_head) ||
           (p_.keys[1].dim > 0 && p_.keys[1].broken(token, kv_head));
  }

  int64_t row_of(const Task& task, int64_t r) const {
    const int64_t query = task.query + r / task.heads, head = task.head + r % task.heads;
    return (task.sequence * p_.queries + query) * p_.heads + head;
  }

  void read(const Rows& from, int64_t row, float* to) const {
    if (from.half) {
      kernel_.to_float(static_cast<const uint16_t*>(from.data) + row * from.dim, from.dim, to);
    } else {
      const float* begin = static_cast<const float*>(from.data) + row * from.dim;
      std::copy(begin, begin + from.dim, to);
    }
  }

  void write(const Task& task, int64_t r, const float* from) const {
    const Rows& to = p_.results;
    const int64_t at = row_of(task, r) * to.dim;
    if (to.half) {
      kernel_.to_half(from, to.dim, static_cast<uint16_t*>(to.data) + at);
    } else {
      std::copy(from, from + to.dim, static_cast<float*>(to.data) + at);
    }
  }

  const Problem& p_;
  const Kernels kernel_;
  const int64_t rows_;
  const bool few_;  // of a whole task: queries that are done again add in the same order
  const int64_t dims_, weights_, found_, scratch_;
};

// Blocks of queries, of as many rows as keep their scores in the second cache, or fewer heads where
// workers would have nothing to do.
ffi::Error attend(ffi::ThreadPool& pool, const Problem& p) {
  constexpr int64_t kRows = 64, kScores = 1 << 17;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t most = std::clamp<int64_t>(kScores / padded(p.tokens), 1, kRows);
  const int64_t queries = std::clamp<int64_t>(most / group, 1, p.queries);
  const int64_t blocks = p.sequences * p.kv_heads * ((p.queries + queries - 1) / queries);
  const int64_t parts = std::clamp<int64_t>(pool.num_threads() / std::max<int64_t>(blocks, 1), 1, group);
  const int64_t heads = (group + parts - 1) / parts;
  std::vector<Task> tasks;
  for (int64_t s = 0; s < p.sequences; ++s) {
    for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
      for (int64_t h = 0; h < group; h += heads) {
        for (int64_t q = 0; q < p.queries; q += queries) {
          tasks.push_back({s, kv * group + h, std::min(heads, group - h), q,
                           std::min(queries, p.queries - q)});
        }
      }
    }
  }
  std::reverse(tasks.begin(), tasks.end());  // of a prompt, the last queries see most
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t workers = worker_count(pool, count);
  const Attention attention(p, queries * heads);
  const int64_t each = attention.floats();
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[workers * each]);
  if (!memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention: memory");
  parallel_for(pool, count, workers, [&](int64_t task, int64_t worker) {
    attention.run(tasks[task], memory.get() + worker * each);
  });
  return ffi::Error::Success();
}

// Whether keys or values have a dtype that is read, and which.
bool kind_of(ffi::DataType type, Kind& kind) {
  if (type != ffi::F32 && type != ffi::BF16 && type != ffi::S8) return false;
  kind = type == ffi::F32 ? Kind::kFloat : type == ffi::BF16 ? Kind::kHalf : Kind::kInt8;
  return true;
}

bool is_float(ffi::DataType type) { return type == ffi::F32 || type == ffi::BF16; }

ffi::Error dtype_error() {
  return ffi::Error::InvalidArgument("attention: no kernel for these dtypes");
}

ffi::Error causal(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> k_steps,
                  ffi::Buffer<ffi::F32> v_steps, ffi::Result<ffi::AnyBuffer> y, float scale,
                  int64_t window) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), ys = y->dimensions();
  if (qs.size() != 4 || ks.size() != 4 || vs.size() != 4 || ys.size() != 4) {
    return ffi::Error::InvalidArgument(
        "attention: q, k, v and the result must be [sequences, length, heads, d]");
  }
  const bool given = lengths.element_count() != 0;
  if (ks[0] != qs[0] || ks[3] != qs[3] || vs[0] != qs[0] || vs[1] != ks[1] || vs[2] != ks[2] ||
      ys[0] != qs[0] || ys[1] != qs[1] || ys[2] != qs[2] || ys[3] != vs[3] || ks[2] < 1 ||
      qs[2] % ks[2] != 0 ||
      (given && lengths.element_count() != static_cast<size_t>(qs[0]))) {
    return ffi::Error::InvalidArgument(
        "attention: shapes of q, k, v, lengths and the result do not fit each other");
  }
  const auto type = q.element_type(), kept = k.element_type();
  const bool stepped = kept == ffi::S8;
  const size_t steps = stepped ? static_cast<size_t>(ks[0] * ks[1] * ks[2]) : 0;
  Kind kind;
  if (!is_float(type) || y->element_type() != type || (kept != type && !stepped) ||
      v.element_type() != kept || !kind_of(kept, kind) || k_steps.element_count() != steps ||
      v_steps.element_count() != steps) {
    return dtype_error();
  }
  const bool half = type == ffi::BF16;
  const auto steps_of = [stepped](ffi::Buffer<ffi::F32>& given) {
    return stepped ? given.typed_data() : nullptr;
  };
  const Entries none{Kind::kFloat, nullptr, 1, 0, nullptr};
  return attend(pool, {qs[0], qs[1], qs[2], ks[1], ks[2],
                       {{half, q.untyped_data(), qs[3]}, {half, nullptr, 0}},
                       {{kind, k.untyped_data(), ks[2], ks[3], steps_of(k_steps)}, none},
                       {kind, v.untyped_data(), vs[2], vs[3], steps_of(v_steps)},
                       given ? lengths.typed_data() : nullptr, scale, window, kind == Kind::kHalf,
                       {half, y->untyped_data(), vs[3]}});
}

ffi::Error latent(ffi::ThreadPool pool, ffi::AnyBuffer q_latent, ffi::AnyBuffer q_rope,
                  ffi::AnyBuffer latent, ffi::AnyBuffer rope, ffi::Buffer<ffi::S32> lengths,
                  ffi::Buffer<ffi::F32> steps, ffi::Result<ffi::AnyBuffer> y, float scale) {
  const auto qs = q_latent.dimensions(), rs = q_rope.dimensions(), ls = latent.dimensions();
  const auto ks = rope.dimensions(), ys = y->dimensions();
  if (qs.size() != 4 || rs.size() != 4 || ls.size() != 3 || ks.size() != 3 || ys.size() != 4 ||
      !std::equal(qs.begin(), qs.begin() + 3, rs.begin()) || !std::equal(qs.begin(), qs.end(), ys.begin()) ||
      ls[0] != qs[0] || ks[0] != qs[0] || ks[1] != ls[1] || ls[2] != qs[3] || ks[2] != rs[3] ||
      lengths.element_count() != static_cast<size_t>(qs[0])) {
    return ffi::Error::InvalidArgument(
        "latent_attention: queries and the result must be [sequences, queries, heads, d], the "
        "cache [sequences, length, d], lengths [sequences]");
  }
  Kind kind, rope_kind;
  const bool stepped = latent.element_type() == ffi::S8;
  if (!is_float(q_latent.element_type()) || !is_float(q_rope.element_type()) ||
      y->element_type() != q_latent.element_type() || !kind_of(latent.element_type(), kind) ||
      !is_float(rope.element_type()) || !kind_of(rope.element_type(), rope_kind) ||
      steps.element_count() != (stepped ? static_cast<size_t>(ls[0] * ls[1]) : 0)) {
    return dtype_error();
  }
  const Entries entries{kind, latent.untyped_data(), 1, ls[2],
                        stepped ? steps.typed_data() : nullptr};
  const auto rows = [](ffi::AnyBuffer& buffer, int64_t dim) {
    return Rows{buffer.element_type() == ffi::BF16, buffer.untyped_data(), dim};
  };
  return attend(pool, {qs[0], qs[1], qs[2], ls[1], 1,
                       {rows(q_latent, qs[3]), rows(q_rope, rs[3])},
                       {entries, {rope_kind, rope.untyped_data(), 1, ks[2], nullptr}},
                       entries, lengths.typed_data(), scale, -1, kind == Kind::kHalf,
                       {y->element_type() == ffi::BF16, y->untyped_data(), qs[3]}});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_attention, causal,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_latent_attention, latent,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"));

}  // namespace cmjax
