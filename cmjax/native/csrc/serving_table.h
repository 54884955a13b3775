// Step times and gauges (cmjax/serving/engine/table.py and gauges.py).
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "serving.h"

namespace cmjax::serving {

// The nodes around a number and their weights; a weight of zero is left out.
struct Cell {
  int count = 1;
  int64_t node[2] = {0, 0};
  double weight[2] = {1.0, 0.0};

  Cell(const double* axis, int64_t size, double x) {
    if (size == 1 || x <= axis[0]) return;
    const int64_t above_x = std::upper_bound(axis, axis + size, x) - axis;
    const int64_t i = std::min(above_x - 1, size - 2);
    const double above = (x - axis[i]) / (axis[i + 1] - axis[i]);
    if (above == 0.0) {
      node[0] = i;
    } else if (above == 1.0) {
      node[0] = i + 1;
    } else {
      count = 2;
      node[0] = i;
      node[1] = i + 1;
      weight[0] = 1.0 - above;
      weight[1] = above;
    }
  }
};

inline double line(const double* nodes, const double* values, int64_t size, double x) {
  if (size == 0) return 0.0;
  const Cell cell(nodes, size, x);
  double found = 0.0;
  for (int i = 0; i < cell.count; ++i) found += cell.weight[i] * values[cell.node[i]];
  return found;
}

inline double step_s(const TableInputs& t, int64_t tokens, double length, int64_t requests,
                     double context, int64_t total, int64_t sequences) {
  const Cell a(t.tokens, t.n_tokens, static_cast<double>(tokens));
  const Cell b(t.length, t.n_length, length);
  const Cell c(t.requests, t.n_requests, static_cast<double>(requests));
  const Cell d(t.context, t.n_context, context);
  double found = 0.0;
  for (int i = 0; i < a.count; ++i) {
    for (int j = 0; j < b.count; ++j) {
      const double ab = a.weight[i] * b.weight[j];
      for (int k = 0; k < c.count; ++k) {
        const double abc = ab * c.weight[k];
        const int64_t base =
            ((a.node[i] * t.n_length + b.node[j]) * t.n_requests + c.node[k]) * t.n_context;
        for (int m = 0; m < d.count; ++m) {
          found += abc * d.weight[m] * t.batch_s[base + d.node[m]];
        }
      }
    }
  }
  found += line(t.dense_tokens, t.dense_s, t.n_dense, static_cast<double>(total));
  found += line(t.rows, t.rows_s, t.n_rows, static_cast<double>(sequences));
  return found + t.constant_s;
}

// Integrals of piecewise constant values over bins of equal width.
struct Gauges {
  double bin_s;
  double since[kGauges] = {};
  double value[kGauges] = {};
  std::vector<double> bins;

  void set(int gauge, double now, double to) {
    if (to == value[gauge]) return;
    advance(gauge, now);
    value[gauge] = to;
  }

  void advance(int gauge, double now) {
    double start = since[gauge];
    since[gauge] = now;
    if (value[gauge] == 0.0) return;
    while (now > bin_s * static_cast<double>(kMostBins)) double_width();
    int64_t at = static_cast<int64_t>(start / bin_s);
    while (start < now) {
      const double edge = static_cast<double>(at + 1) * bin_s;
      const double end = std::min(edge, now);
      if (static_cast<int64_t>(bins.size()) <= at * kGauges) bins.resize((at + 1) * kGauges, 0.0);
      if (end > start) bins[at * kGauges + gauge] += value[gauge] * (end - start);
      start = end;
      ++at;
    }
  }

  void double_width() {
    bin_s *= 2.0;
    const size_t pairs = (bins.size() / kGauges + 1) / 2;
    bins.resize(2 * pairs * kGauges, 0.0);
    for (size_t i = 0; i < pairs; ++i) {
      for (size_t g = 0; g < kGauges; ++g) {
        bins[i * kGauges + g] = bins[2 * i * kGauges + g] + bins[(2 * i + 1) * kGauges + g];
      }
    }
    bins.resize(pairs * kGauges);
  }
};

inline int gap_bin(double gap_s) {
  if (gap_s <= 0.0) return 0;
  int exponent;
  const double mantissa = std::frexp(gap_s, &exponent);
  const int found = (exponent - 1 - kGapLow) * kGapPerOctave +
                    static_cast<int>((mantissa * 2.0 - 1.0) * kGapPerOctave);
  return std::min(std::max(found, 0), kGapBins - 1);
}

}  // namespace cmjax::serving
