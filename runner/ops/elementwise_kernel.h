// The inner loops between linear layers and attention, compiled once per instruction set (see CMakeLists.txt) and chosen
// at run time.
#pragma once

#include <cstdint>

namespace g4 {

// Everything is contiguous float32. A null weight stands for ones.
struct ElementwiseKernel {
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t columns, float* out);
  // (residual + rms_norm(x)) * scale
  void (*norm_add)(const float* x, const float* weight, float eps, const float* residual, float scale, int64_t columns,
                   float* out);
  // The RMS norm of one head, rotated by the head_dim / 2 angles of its position.
  void (*norm_rotate)(const float* x, const float* weight, float eps, const float* cos, const float* sin,
                      int64_t head_dim, float* out);
  void (*gelu_mul)(const float* gate, const float* up, int64_t count, float* out);
  void (*softcap)(const float* x, float cap, int64_t count, float* out);
};

extern const ElementwiseKernel kElementwisePortable;
#if defined(__x86_64__)
extern const ElementwiseKernel kElementwiseAvx2;
extern const ElementwiseKernel kElementwiseAvx512;
#endif

}  // namespace g4
