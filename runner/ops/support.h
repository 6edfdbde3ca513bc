// What our operators share: checks of their arguments and the thread pool.
#pragma once

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cstdint>
#include <initializer_list>

namespace g4 {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

// Contiguous float32.
inline bool is_float(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float && executorch::runtime::tensor_is_default_dim_order(tensor);
}

// Gives a result its shape; false when it is of another type or cannot have this shape.
inline bool make_room(Tensor& out, executorch::aten::ArrayRef<SizesType> sizes) {
  return is_float(out) && executorch::runtime::resize_tensor(out, sizes) == Error::Ok;
}

inline bool make_room(Tensor& out, std::initializer_list<int64_t> sizes) {
  const executorch::aten::ArrayRef<int64_t> list(sizes.begin(), sizes.size());
  return is_float(out) && executorch::runtime::resize_tensor(out, list) == Error::Ok;
}

inline Tensor& refuse(KernelRuntimeContext& context, Tensor& out, const char* reason) {
  ET_LOG(Error, "%s", reason);
  context.fail(Error::InvalidArgument);
  return out;
}

// Calls work(begin, end) for parts of 0 ... count - 1, on all threads of the pool unless `serial`.
inline void run(int64_t count, bool serial, executorch::runtime::FunctionRef<void(int64_t, int64_t)> work) {
  if (serial) {
    work(0, count);
  } else {
    executorch::extension::parallel_for(0, count, 1, work);
  }
}

}  // namespace g4
