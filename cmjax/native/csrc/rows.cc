#include "rows.h"

namespace cmjax {

RowKernels row_kernels() {
#define CMJAX_KERNELS_OF(space)                                                             \
  {&space::to_float, &space::to_half, &space::rms_norm, &space::rotate, &space::quantize,   \
   &space::swiglu, &space::rescale, &space::add_scaled}
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Vnni) return CMJAX_KERNELS_OF(rows::avx512);
  if (isa() == Isa::kAvx2) return CMJAX_KERNELS_OF(rows::avx2);
#endif
  return CMJAX_KERNELS_OF(rows::scalar);
#undef CMJAX_KERNELS_OF
}

}  // namespace cmjax
