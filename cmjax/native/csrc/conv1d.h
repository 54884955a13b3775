// 1-D convolution of 8- or 16-bit integers by Toom-Cook algorithms; direct is the algorithm F(1,1).
//
//   xi[t,c]    = clip(round(x[t,c] * inverse_step[c]), input_low, input_high)
//   v[p,t,c]   = clip(round(sum_j BT[p,j] xi[m t + j, c] * requant[p]), operand_limit)
//   acc[p,t,o] = sum over tap blocks j, channels c of u[p, (j, c), o] v[p, t + dilation j, c]
//   y[m t + i, o] = activation(sum_p AT[i,p] (float(acc[p,t,o]) * scale[p,o]) + bias[o])
//
// One pipeline, compiled for three instruction sets. Every rounding is to nearest even and none is
// saved by a fused operation, so all three give the same bits. What is not finite in x counts as 0,
// and an output that one of its taps meets it in is NaN.
#pragma once

#include <cstdint>

namespace cmjax {

// Filters lie as [point][panel][1 + groups][kPanel][bytes of a group]: an output panel is 16
// channels, a group 4 bytes of consecutive input channels (four of int8, two of int16), padded with
// zeros in every tap block. The first row of a panel holds 16 int32, where its accumulators start:
// for int8 the operand v is offset by 128 to unsigned, so -128 times the sum of the column. That is
// a multiple of 128, and the lowest bit says that some pair of rows could saturate `vpmaddubsw`.
constexpr int64_t kPanel = 16;
constexpr int64_t kGroupBytes = 4;
constexpr int64_t kRowBytes = kPanel * kGroupBytes;
constexpr int64_t kMostPanels = 2;  // output panels of one register tile, at most
constexpr int64_t kMostTiles = 8;   // rows of one register tile, at most

// One call. Pointers are to the caller's buffers; `inverse_step` is padded to whole vectors.
struct Conv1d {
  int64_t batch, length, cin, cout, out_length;
  int64_t padding;     // frames of zeros before x
  int64_t tap_blocks;  // of the algorithm's taps
  int64_t dilation;    // tiles from one tap block to the next
  int64_t depth;       // input channels, padded to whole groups
  int64_t groups;      // of all tap blocks
  int64_t panels;
  float input_low, input_high, operand_limit, slope;
  // The taps of output t meet frames t * frames + lead + j * spread, j < taps, of a signal that had
  // `frames` of its frames folded into one.
  int64_t frames, lead, spread, taps;
  char* odd;  // [batch][length], frames of x that are not finite, marked as they are met
  const float* x;
  const float* inverse_step;
  const float* requant;
  const float* scale;
  const float* bias;
  const void* filter;
  float* out;
};

// Consecutive tiles of `batches` sequences and their transformed inputs, [point][sequence][row].
struct Block {
  int64_t batch, batches;
  int64_t tile, tiles;  // of each sequence
  int64_t rows;         // tiles and what further tap blocks meet
  char* v;
  int64_t plane;        // bytes from point to point
};

// One algorithm at one operand type for one instruction set.
struct Conv1dKernel {
  const char* algorithm;
  int64_t outputs, points, window;  // m, n, m + r - 1
  // Fill rows [row, end) of every sequence of the block.
  void (*transform)(const Conv1d&, const Block&, int64_t row, int64_t end, void* scratch);
  // Outputs of panels [panel, end).
  void (*multiply)(const Conv1d&, const Block&, int64_t panel, int64_t end, void* scratch);
  int64_t (*scratch_bytes)(const Conv1d&);  // aligned to 64, of one worker
};

struct Conv1dKernels {
  const Conv1dKernel *int8, *int16;
  int64_t count;
};

Conv1dKernels conv1d_scalar();
Conv1dKernels conv1d_avx2();
Conv1dKernels conv1d_avx512();

}  // namespace cmjax
