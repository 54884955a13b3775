// conv1d's handler: check every buffer, cut the work into blocks, run them on XLA's threads.
#include "conv1d.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace cmjax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kLongestVector = 16;       // floats
constexpr int64_t kBlockBytes = 320 * 1024;  // of transformed inputs: stay in the second-level cache
constexpr int64_t kRowsAtOnce = 4;           // rows of one task of a transform

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

Memory allocate(int64_t bytes) {
  return Memory(static_cast<char*>(std::aligned_alloc(64, ceil_div(bytes, 64) * 64)));
}

Conv1dKernels kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Vnni:
      return conv1d_avx512();
    case Isa::kAvx2:
      return conv1d_avx2();
    default:
      break;
  }
#endif
  return conv1d_scalar();
}

const Conv1dKernel* kernel_named(std::string_view name, bool wide) {
  const Conv1dKernels all = kernels();
  const Conv1dKernel* table = wide ? all.int16 : all.int8;
  for (int64_t i = 0; i < all.count; ++i) {
    if (name == table[i].algorithm) return &table[i];
  }
  return nullptr;
}

// Blocks of at most kBlockBytes: whole sequences, or equal parts of one.
std::vector<Block> blocks_of(const Conv1d& c, const Conv1dKernel& kernel, int64_t row_bytes) {
  const int64_t tiles = ceil_div(c.out_length, kernel.outputs);
  const int64_t halo = c.dilation * (c.tap_blocks - 1);
  const int64_t most_rows = kBlockBytes / (kernel.points * row_bytes);
  std::vector<Block> blocks;
  if (tiles + halo <= most_rows) {
    const int64_t wanted = most_rows / (tiles + halo);
    const int64_t count = ceil_div(c.batch, wanted);
    const int64_t batches = ceil_div(c.batch, count);
    for (int64_t b = 0; b < c.batch; b += batches) {
      blocks.push_back({b, std::min(batches, c.batch - b), 0, tiles, tiles + halo, nullptr, 0});
    }
  } else {
    const int64_t most = std::max(most_rows - halo, 2 * kMostTiles);
    const int64_t size = ceil_div(tiles, ceil_div(tiles, most));
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t tile = 0; tile < tiles; tile += size) {
        const int64_t count = std::min(size, tiles - tile);
        blocks.push_back({b, 1, tile, count, count + halo, nullptr, 0});
      }
    }
  }
  for (Block& block : blocks) {  // planes a line apart from a power of two, which caches dislike
    block.plane = ceil_div(block.batches * block.rows * row_bytes, 64) * 64 + 64;
  }
  return blocks;
}

void run(ffi::ThreadPool pool, const Conv1d& c, const Conv1dKernel& kernel, int64_t row_bytes) {
  std::vector<Block> blocks = blocks_of(c, kernel, row_bytes);
  const int64_t count = static_cast<int64_t>(blocks.size());
  const int64_t scratch_bytes = kernel.scratch_bytes(c);
  const int64_t threads = worker_count(pool, c.panels * count);
  int64_t v_bytes = 0;
  for (const Block& block : blocks) v_bytes = std::max(v_bytes, kernel.points * block.plane);
  const Memory scratch = allocate(threads * scratch_bytes);
  auto scratch_of = [&](int64_t worker) { return scratch.get() + worker * scratch_bytes; };

  if (threads == 1 || count >= 2 * threads) {  // one worker does the whole of a block, in its cache
    const int64_t workers = worker_count(pool, count);
    const Memory v = allocate(workers * v_bytes);
    parallel_for(pool, count, workers, [&](int64_t i, int64_t worker) {
      Block block = blocks[i];
      block.v = v.get() + worker * v_bytes;
      kernel.transform(c, block, 0, block.rows, scratch_of(worker));
      kernel.multiply(c, block, 0, c.panels, scratch_of(worker));
    });
    return;
  }
  // Too few blocks: share the rows of every block's transform, and then its output panels.
  const Memory v = allocate(count * v_bytes);
  int64_t most_rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    blocks[i].v = v.get() + i * v_bytes;
    most_rows = std::max(most_rows, blocks[i].rows);
  }
  const int64_t transforms = ceil_div(most_rows, kRowsAtOnce);
  parallel_for(pool, count * transforms, threads, [&](int64_t i, int64_t worker) {
    const Block& block = blocks[i / transforms];
    const int64_t row = i % transforms * kRowsAtOnce;
    const int64_t end = std::min(row + kRowsAtOnce, block.rows);
    if (row < end) kernel.transform(c, block, row, end, scratch_of(worker));
  });
  const int64_t parts = std::min(ceil_div(4 * threads, count), ceil_div(c.panels, kMostPanels));
  const int64_t size = ceil_div(ceil_div(c.panels, parts), kMostPanels) * kMostPanels;
  const int64_t products = ceil_div(c.panels, size);
  parallel_for(pool, count * products, threads, [&](int64_t i, int64_t worker) {
    const int64_t panel = i % products * size;
    const int64_t end = std::min(panel + size, c.panels);
    kernel.multiply(c, blocks[i / products], panel, end, scratch_of(worker));
  });
}

bool is_finite(const float* x, int64_t count) {
  return std::all_of(x, x + count, [](float value) { return value - value == 0.0f; });
}

// NaN in the results that a frame of x which is not finite reaches.
void spread_nan(const Conv1d& c) {
  const int64_t channels = c.cin / c.frames;
  for (int64_t at = 0; at < c.batch * c.length; ++at) {
    if (c.odd[at] == 0) continue;
    const int64_t b = at / c.length, folded = at % c.length;
    const float* row = c.x + at * c.cin;
    for (int64_t i = 0; i < c.frames; ++i) {
      if (is_finite(row + i * channels, channels)) continue;
      const int64_t frame = (folded + c.padding) * c.frames + i - c.lead;
      for (int64_t j = 0; j < c.taps; ++j) {
        const int64_t first = frame - j * c.spread;  // of the output's frames, if it is one's first
        if (first < 0 || first % c.frames != 0 || first / c.frames >= c.out_length) continue;
        float* out = c.out + (b * c.out_length + first / c.frames) * c.cout;
        std::fill_n(out, c.cout, std::numeric_limits<float>::quiet_NaN());
      }
    }
  }
}

// Zeros in the frames of every sequence that do not exist: before span[b][0], from span[b][1] on.
void clear_outside(const Conv1d& c, const int32_t* span) {
  for (int64_t b = 0; b < c.batch; ++b) {
    float* out = c.out + b * c.out_length * c.cout;
    const int64_t first = std::clamp<int64_t>(span[2 * b], 0, c.out_length);
    const int64_t end = std::clamp<int64_t>(span[2 * b + 1], first, c.out_length);
    std::fill_n(out, first * c.cout, 0.0f);
    std::fill_n(out + end * c.cout, (c.out_length - end) * c.cout, 0.0f);
  }
}

ffi::Error invalid(const char* what) {
  return ffi::Error::InvalidArgument(std::string("conv1d: ") + what);
}

ffi::Error conv1d(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer filter,
                  ffi::Buffer<ffi::F32> inverse_step, ffi::Buffer<ffi::F32> requant,
                  ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> bias,
                  ffi::Buffer<ffi::S32> span, std::string_view algorithm, int64_t tap_blocks, int64_t dilation,
                  int64_t padding, int64_t input_limit, int64_t zero_point, int64_t operand_limit,
                  int64_t frames, int64_t lead, int64_t spread, int64_t taps, float slope,
                  ffi::ResultBuffer<ffi::F32> out) {
  const bool wide = filter.element_type() == ffi::S16;
  if (!wide && filter.element_type() != ffi::S8) return invalid("filter must be int8 or int16");
  const Conv1dKernel* kernel = kernel_named(algorithm, wide);
  if (kernel == nullptr) return invalid("unknown algorithm");
  const auto in = x.dimensions(), to = out->dimensions(), packed = filter.dimensions();
  if (in.size() != 3 || to.size() != 3 || in[0] != to[0]) {
    return invalid("x and out must be [batch, length, channels]");
  }
  if (tap_blocks < 1 || dilation < 1 || padding < 0) {
    return invalid("tap_blocks and dilation must be at least 1, padding at least 0");
  }
  if (input_limit < 1 || input_limit > 32767 || operand_limit < 1 ||
      operand_limit > (wide ? 32767 : 127)) {
    return invalid("limits must lie in 1..32767, operand_limit of an int8 filter in 1..127");
  }
  if (zero_point < -input_limit - 1 || zero_point > input_limit) {
    return invalid("zero_point must lie in -input_limit - 1 to input_limit");
  }
  if (frames < 1 || in[2] % frames != 0 || lead < 0 || spread < 1 || taps < 1) {
    return invalid("frames must divide the channels, lead be at least 0, spread and taps 1");
  }
  const int64_t group = kGroupBytes / (wide ? 2 : 1);
  Conv1d c = {};
  c.batch = in[0];
  c.length = in[1];
  c.cin = in[2];
  c.out_length = to[1];
  c.cout = to[2];
  c.padding = padding;
  c.tap_blocks = tap_blocks;
  c.dilation = dilation;
  c.depth = ceil_div(c.cin, group) * group;
  c.groups = tap_blocks * (c.depth / group);
  c.panels = ceil_div(c.cout, kPanel);
  if (packed.size() != 5 || packed[0] != kernel->points || packed[1] != c.panels ||
      packed[2] != 1 + c.groups || packed[3] != kPanel || packed[4] != group) {
    return invalid("filter must be packed as [points, panels, 1 + groups, 16, 4 or 2]");
  }
  if (static_cast<int64_t>(inverse_step.element_count()) != c.cin) {
    return invalid("inverse_step must be [cin]");
  }
  if (static_cast<int64_t>(requant.element_count()) != kernel->points) {
    return invalid("requant must be [points]");
  }
  if (static_cast<int64_t>(scale.element_count()) != kernel->points * c.cout) {
    return invalid("scale must be [points, cout]");
  }
  if (static_cast<int64_t>(bias.element_count()) != c.cout) return invalid("bias must be [cout]");
  const int64_t ends = static_cast<int64_t>(span.element_count());
  if (ends != 0 && ends != 2 * c.batch) return invalid("span must be [batch, 2], or empty");
  if (c.batch == 0 || c.out_length == 0 || c.cout == 0) return ffi::Error::Success();

  std::vector<float> steps(ceil_div(c.cin, kLongestVector) * kLongestVector, 0.0f);
  std::copy_n(inverse_step.typed_data(), c.cin, steps.begin());
  const int64_t further = zero_point == 0 ? 0 : 1;  // two's complement has one more below zero
  c.input_low = static_cast<float>(-input_limit - further - zero_point);
  c.input_high = static_cast<float>(input_limit - zero_point);
  std::vector<char> odd(c.batch * c.length, 0);
  c.odd = odd.data();
  c.frames = frames;
  c.lead = lead;
  c.spread = spread;
  c.taps = taps;
  c.operand_limit = static_cast<float>(operand_limit);
  c.slope = slope;
  c.x = x.typed_data();
  c.inverse_step = steps.data();
  c.requant = requant.typed_data();
  c.scale = scale.typed_data();
  c.bias = bias.typed_data();
  c.filter = filter.untyped_data();
  c.out = out->typed_data();
  run(pool, c, *kernel, c.depth * (wide ? 2 : 1));
  spread_nan(c);
  if (ends != 0) clear_outside(c, span.typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(cmjax_conv1d, conv1d,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<std::string_view>("algorithm")
                                  .Attr<int64_t>("tap_blocks")
                                  .Attr<int64_t>("dilation")
                                  .Attr<int64_t>("padding")
                                  .Attr<int64_t>("input_limit")
                                  .Attr<int64_t>("zero_point")
                                  .Attr<int64_t>("operand_limit")
                                  .Attr<int64_t>("frames")
                                  .Attr<int64_t>("lead")
                                  .Attr<int64_t>("spread")
                                  .Attr<int64_t>("taps")
                                  .Attr<float>("slope")
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace cmjax
