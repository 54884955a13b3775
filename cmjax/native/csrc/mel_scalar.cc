// Mel energies in plain C++, for machines that have no kernel of their own.
#include "mel.h"

namespace cmjax {
namespace {

constexpr int64_t kLanes = 4;

#include "mel_frames.inc"

}  // namespace

MelKernel mel_scalar() { return {kLanes, run}; }

}  // namespace cmjax
