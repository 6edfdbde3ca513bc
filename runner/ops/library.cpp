// Registers our operators with the process's ExecuTorch when the library is loaded.
#include "operators.h"

#include <executorch/runtime/kernel/operator_registry.h>

#include <cstring>

namespace g4 {
namespace {

using executorch::runtime::Error;
using executorch::runtime::Kernel;

const Kernel kOperators[] = {
    Kernel("g4::cpu_attention.out", attention_out_boxed),
    Kernel("g4::cpu_embedding.out", embedding_out_boxed),
    Kernel("g4::cpu_gelu_mul.out", gelu_mul_out_boxed),
    Kernel("g4::cpu_head_rope.out", head_rope_out_boxed),
    Kernel("g4::cpu_linear.out", linear_out_boxed),
    Kernel("g4::cpu_linear_float.out", linear_float_out_boxed),
    Kernel("g4::cpu_norm_add.out", norm_add_out_boxed),
    Kernel("g4::cpu_rms_norm.out", rms_norm_out_boxed),
    Kernel("g4::cpu_softcap.out", softcap_out_boxed),
    Kernel("g4::sample.out", sample_out_boxed),
};

bool is_registered(const char* name) {
  for (const Kernel& kernel : executorch::runtime::get_registered_kernels()) {
    if (std::strcmp(kernel.name_, name) == 0) return true;
  }
  return false;
}

// A process can meet this library twice, from a wheel and from a build folder; registering a name twice aborts.
bool register_missing() {
  for (const Kernel& kernel : kOperators) {
    if (!is_registered(kernel.name_) && executorch::runtime::register_kernel(kernel) != Error::Ok) return false;
  }
  return true;
}

const bool registered = register_missing();

}  // namespace
}  // namespace g4

extern "C" __attribute__((visibility("default"))) int g4_kernels_registered() { return g4::registered; }
