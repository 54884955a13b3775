// The memory of a DFSMN block with AVX-512.
#include "fsmn.h"

namespace cmjax {
namespace {

constexpr int64_t kBytes = 64;

#include "fsmn_frames.inc"

}  // namespace

void fsmn_avx512(const Memory& m) { memory_of<1>(m); }

}  // namespace cmjax
