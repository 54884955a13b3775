// Copies of tokens in the order of the slots that they go to, and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "rows.h"

namespace cmjax {

// Rows of one slot.
struct SlotRows {
  int64_t start, count;
};

// Copies of tokens in the order of their slots.
struct Sorted {
  std::vector<int32_t> copy;   // of each row, token * copies + number
  std::vector<int32_t> row;    // of each copy
  std::vector<SlotRows> slots; // of each slot
  bool valid = true;
};

inline Sorted sort_by_slot(const int32_t* slots, int64_t count, int64_t total) {
  Sorted found;
  found.slots.assign(total, {0, 0});
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] < 0 || slots[i] >= total) {
      found.valid = false;
      return found;
    }
    ++found.slots[slots[i]].count;
  }
  for (int64_t s = 1; s < total; ++s) {
    found.slots[s].start = found.slots[s - 1].start + found.slots[s - 1].count;
  }
  found.copy.resize(count);
  found.row.resize(count);
  std::vector<int64_t> next(total);
  for (int64_t s = 0; s < total; ++s) next[s] = found.slots[s].start;
  for (int64_t i = 0; i < count; ++i) {
    found.row[i] = static_cast<int32_t>(next[slots[i]]++);
    found.copy[found.row[i]] = static_cast<int32_t>(i);
  }
  return found;
}

// Every token's sum over its copies, `weights` times the rows of them.
inline void weigh(const RowKernels& kernel, const Sorted& sorted, const float* weights,
                  int64_t tokens, int64_t copies, int64_t hidden, const Values& rows,
                  const Values& y) {
  std::vector<float> sum(hidden), room(y.half ? hidden : 0);
  for (int64_t t = 0; t < tokens; ++t) {
    float* to = y.place(t * hidden, sum.data());
    std::memset(to, 0, hidden * sizeof(float));
    for (int64_t c = 0; c < copies; ++c) {
      const int64_t row = sorted.row[t * copies + c];
      const float* from = rows.read(kernel, row * hidden, hidden, room.data());
      kernel.add_scaled(from, weights[t * copies + c], hidden, to);
    }
    y.write(kernel, to, hidden, t * hidden);
  }
}

}  // namespace cmjax
