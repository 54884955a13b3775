// Which instruction set the kernels use, decided once when the library is first asked.
#pragma once

namespace cmjax {

// In increasing order: every machine that has one has those before it.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2 };

// The best instruction set of this CPU, or the lower one that the environment variable
// CMJAX_NATIVE_ISA (scalar, avx2 or avx512_vnni) asks for.
Isa isa();

// Whether this CPU also multiplies bfloat16 as it is (AVX512_BF16), and CMJAX_NATIVE_ISA asks for
// nothing less.
bool multiplies_bfloat16();

}  // namespace cmjax
