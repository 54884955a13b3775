// The memory of a DFSMN block with AVX2.
#include "fsmn.h"

namespace cmjax {
namespace {

constexpr int64_t kBytes = 32;

#include "fsmn_frames.inc"

}  // namespace

void fsmn_avx2(const Memory& m) { memory_of<1>(m); }

}  // namespace cmjax
