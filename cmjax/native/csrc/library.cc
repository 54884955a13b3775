// What Python asks of the library before it registers a kernel.
#include "isa.h"
#include "xla/ffi/api/c_api.h"

// The XLA FFI version this library was compiled against. A library newer than the running jaxlib
// would be refused by XLA with "Unable to initialize backend 'cpu'", which breaks all of JAX.
extern "C" int cmjax_ffi_api_major() { return XLA_FFI_API_MAJOR; }
extern "C" int cmjax_ffi_api_minor() { return XLA_FFI_API_MINOR; }

extern "C" bool cmjax_multiplies_bfloat16() { return cmjax::multiplies_bfloat16(); }

extern "C" const char* cmjax_isa() {
  switch (cmjax::isa()) {
    case cmjax::Isa::kAvx512Vnni:
      return "avx512_vnni";
    case cmjax::Isa::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}
