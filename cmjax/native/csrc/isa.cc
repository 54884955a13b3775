#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace cmjax {
namespace {

Isa best_of_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::kScalar;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    return Isa::kAvx512Vnni;
  }
  return Isa::kAvx2;
#else
  return Isa::kScalar;
#endif
}

Isa decide() {
  const Isa best = best_of_cpu();
  const char* wanted = std::getenv("CMJAX_NATIVE_ISA");
  if (wanted == nullptr) return best;
  Isa limit = best;
  if (std::strcmp(wanted, "scalar") == 0) limit = Isa::kScalar;
  if (std::strcmp(wanted, "avx2") == 0) limit = Isa::kAvx2;
  return limit < best ? limit : best;
}

bool decide_bfloat16() {
#if defined(CMJAX_AVX512_BF16)
  return std::getenv("CMJAX_NATIVE_ISA") == nullptr && isa() == Isa::kAvx512Vnni &&
         __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

Isa isa() {
  static const Isa decided = decide();
  return decided;
}

bool multiplies_bfloat16() {
  static const bool decided = decide_bfloat16();
  return decided;
}

}  // namespace cmjax
