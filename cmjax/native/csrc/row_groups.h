// Which rows of a buffer meet which matrix of a stack: group g has the rows from starts[g] on,
// counts[g] of them; without `starts`, those that follow the rows of group g - 1. Rows of zeros can
// be left out: a product of zeros is known.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace cmjax {

struct RowGroups {
  std::vector<int32_t> rows;    // of all groups, one group after the other
  std::vector<int64_t> begin;   // of each group in `rows`, and the end
  std::vector<int32_t> skipped; // rows of groups that were left out
  bool valid = true;

  int64_t groups() const { return static_cast<int64_t>(begin.size()) - 1; }
  int64_t count(int64_t group) const { return begin[group + 1] - begin[group]; }
  const int32_t* of(int64_t group) const { return rows.data() + begin[group]; }
};

inline bool all_zero(const uint8_t* bytes, int64_t size) {
  if (size == 0) return true;
  return bytes[0] == 0 && std::memcmp(bytes, bytes + 1, size - 1) == 0;
}

// `x` has `total` rows of `row_bytes`; without `skip` it is not read. A group with negative rows,
// or with rows beyond the buffer, makes the result invalid.
inline RowGroups row_groups(const int32_t* starts, const int32_t* counts, int64_t groups,
                            int64_t total, const void* x, int64_t row_bytes, bool skip) {
  RowGroups found;
  found.begin.reserve(groups + 1);
  found.begin.push_back(0);
  int64_t next = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = starts == nullptr ? next : starts[g], count = counts[g];
    next = start + count;
    if (start < 0 || count < 0 || start + count > total) {
      found.valid = false;
      return found;
    }
    for (int64_t r = start; r < start + count; ++r) {
      const bool zero = skip && all_zero(static_cast<const uint8_t*>(x) + r * row_bytes, row_bytes);
      (zero ? found.skipped : found.rows).push_back(static_cast<int32_t>(r));
    }
    found.begin.push_back(static_cast<int64_t>(found.rows.size()));
  }
  return found;
}

}  // namespace cmjax
