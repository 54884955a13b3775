// What the serving event loop is told and says: plain arrays, the layout of
// cmjax/serving/engine/native.py. The meaning of every field stands in cmjax/serving/engine/inputs.py.
#pragma once
#include <cstdint>

namespace cmjax::serving {

constexpr int kFixed = 20;
constexpr int kGauges = 6;
constexpr int64_t kMostBins = 4096;
constexpr int kGapLow = -20, kGapPerOctave = 128, kGapBins = 32 * 128;
constexpr int64_t kMostSteps = 64;
constexpr int64_t kNever = int64_t{1} << 62;
constexpr int64_t kProgressEvery = 1 << 16;
enum Role : int32_t { kPrefill, kDecode, kColocated };
enum Routing : int64_t { kAnyIdle, kLeastLoaded, kRoundRobin, kCacheAware };
enum Admitting : int64_t { kNone, kLate, kEarly, kPredictive };
enum Ended : int32_t { kOpen, kCompleted, kRejected, kRejectedLate };

struct TableInputs {
  const double *tokens, *length, *requests, *context, *batch_s;
  int64_t n_tokens, n_length, n_requests, n_context;
  const double *dense_tokens, *dense_s;
  int64_t n_dense;
  const double *rows, *rows_s;
  int64_t n_rows;
  int64_t decode_tokens;
  double constant_s;
};

struct Inputs {
  int64_t n;
  const double* arrival_s;
  const int64_t *prompt, *output, *steps, *growth, *block_start;
  const int32_t* block;

  int64_t workers;
  const int32_t *role, *table, *ranks;
  const int64_t *max_requests, *max_tokens, *chunk, *capacity, *waste, *keeps;
  const double *start_s, *pause_every_s, *pause_s;

  int64_t stores, blocks, block_tokens, nodes;
  const int32_t* node;
  const int64_t *memory, *disk;
  double memory_s, disk_s, latency_s;

  int64_t n_tables;
  const TableInputs* tables;

  int64_t router, admission;
  double slo_ttft_s;
  int64_t decode_limit;
  double prefill_tokens_per_s, handover_s, handover_latency_s;
  int64_t links, clients;
  double think_s;
  int64_t losses;
  const double* loss_s;
  const int32_t* loss_worker;
  const double* back_s;
  double bin_s;
  int64_t record;
};

struct Outputs {
  int32_t* ended;
  double *arrival_s, *scheduled_s, *first_s, *decode_s, *last_s;
  int64_t *hit_blocks, *hit_tokens;
  int32_t *retries, *prefill_worker, *decode_worker;
  int64_t *gaps, *peak_kv;
  double* busy_s;
};

// Called now and then with the requests that have ended; true stops the run.
using Progress = int32_t (*)(int64_t);

}  // namespace cmjax::serving
