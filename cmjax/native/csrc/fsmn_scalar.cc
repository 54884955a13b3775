// The memory of a DFSMN block in plain C++, for machines that have no kernel of their own.
#include "fsmn.h"

namespace cmjax {
namespace {

constexpr int64_t kBytes = 16;

#include "fsmn_frames.inc"

}  // namespace

void fsmn_scalar(const Memory& m) { memory_of<1>(m); }

}  // namespace cmjax
