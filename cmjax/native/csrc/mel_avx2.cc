// Mel energies with AVX2.
#include "mel.h"

namespace cmjax {
namespace {

constexpr int64_t kLanes = 8;

#include "mel_frames.inc"

}  // namespace

MelKernel mel_avx2() { return {kLanes, run}; }

}  // namespace cmjax
