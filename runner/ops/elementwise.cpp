// g4::cpu_rms_norm, cpu_norm_add, cpu_head_rope, cpu_gelu_mul and cpu_softcap: what lies between linear layers and
// attention. Python's side, with the formulas, is gemma4cli/kernels/cpu_elementwise.
//
// Threads share rows or blocks of fixed size, so their number changes no bit of a result.
#include "elementwise_kernel.h"
#include "instruction_set.h"
#include "operators.h"
#include "support.h"

#include <algorithm>
#include <optional>

namespace g4 {
namespace {

// Below this many values, which take 10 to 50 microseconds, waking the thread pool costs more than it saves.
constexpr int64_t kSerialValues = 1 << 16;
// Values per unit of work where there are no rows to respect.
constexpr int64_t kBlock = 4096;

const ElementwiseKernel* const kKernels[] = G4_VARIANTS(kElementwise);

const ElementwiseKernel& kernel() { return *kKernels[instruction_set()]; }

int64_t last_size(const Tensor& tensor) { return tensor.dim() > 0 ? tensor.size(tensor.dim() - 1) : 0; }

bool is_row(const Tensor& tensor, int64_t columns) {
  return tensor.dim() == 1 && is_float(tensor) && tensor.size(0) == columns;
}

bool is_row_or_none(const std::optional<Tensor>& tensor, int64_t columns) {
  return !tensor.has_value() || is_row(*tensor, columns);
}

bool is_like(const Tensor& tensor, const Tensor& other) {
  return is_float(tensor) && tensor.sizes().equals(other.sizes());
}

const float* values_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

// work(first, last) for parts of `units` that hold `values` values together.
template <typename Work>
void share(int64_t units, int64_t values, Work work) {
  run(units, values < kSerialValues || executorch::extension::get_thread_count() == 1, work);
}

// work(row) for every row of x.
template <typename Work>
void for_each_row(const Tensor& x, Work work) {
  share(x.numel() / last_size(x), x.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
}

// work(start, count) for every part of x.
template <typename Work>
void for_each_block(const Tensor& x, Work work) {
  const int64_t count = x.numel();
  share((count + kBlock - 1) / kBlock, count, [&](int64_t begin, int64_t end) {
    work(begin * kBlock, std::min(end * kBlock, count) - begin * kBlock);
  });
}

Tensor& rms_norm_out(KernelRuntimeContext& context, const Tensor& x, const std::optional<Tensor>& weight, double eps,
                     Tensor& out) {
  const int64_t columns = last_size(x);
  if (columns == 0 || !is_float(x) || !is_row_or_none(weight, columns) || !make_room(out, x.sizes())) {
    return refuse(context, out, "g4::cpu_rms_norm was called with tensors that do not fit together");
  }
  const float* const from = x.const_data_ptr<float>();
  const float* const factors = values_or_null(weight);
  float* const to = out.mutable_data_ptr<float>();
  for_each_row(x, [&](int64_t row) {
    kernel().rms_norm(from + row * columns, factors, eps, columns, to + row * columns);
  });
  return out;
}

Tensor& norm_add_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, double eps,
                     const Tensor& residual, const std::optional<Tensor>& scale, Tensor& out) {
  const int64_t columns = last_size(x);
  if (columns == 0 || !is_float(x) || !is_row(weight, columns) || !is_like(residual, x) || !is_row_or_none(scale, 1) ||
      !make_room(out, x.sizes())) {
    return refuse(context, out, "g4::cpu_norm_add was called with tensors that do not fit together");
  }
  const float* const from = x.const_data_ptr<float>();
  const float* const factors = weight.const_data_ptr<float>();
  const float* const base = residual.const_data_ptr<float>();
  const float factor = scale.has_value() ? *scale->const_data_ptr<float>() : 1.0f;
  float* const to = out.mutable_data_ptr<float>();
  for_each_row(x, [&](int64_t row) {
    const int64_t start = row * columns;
    kernel().norm_add(from + start, factors, eps, base + start, factor, columns, to + start);
  });
  return out;
}

bool are_angles(const std::optional<Tensor>& angles, int64_t tokens, int64_t head_dim) {
  return angles->dim() == 2 && is_float(*angles) && angles->size(0) == tokens && 2 * angles->size(1) == head_dim;
}

bool head_rope_fits(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& cos,
                    const std::optional<Tensor>& sin, int64_t heads) {
  if (x.dim() != 3 || !is_float(x) || x.size(0) != 1 || heads < 1 || x.size(2) == 0 || x.size(2) % heads != 0) {
    return false;
  }
  const int64_t tokens = x.size(1), head_dim = x.size(2) / heads;
  const bool angles_fit = cos.has_value() == sin.has_value() &&
                          (!cos.has_value() || (are_angles(cos, tokens, head_dim) && are_angles(sin, tokens, head_dim)));
  return angles_fit && is_row_or_none(weight, head_dim);
}

Tensor& head_rope_out(KernelRuntimeContext& context, const Tensor& x, const std::optional<Tensor>& weight, double eps,
                      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t heads, Tensor& out) {
  if (!head_rope_fits(x, weight, cos, sin, heads)) {
    return refuse(context, out, "g4::cpu_head_rope was called with tensors that do not fit together");
  }
  const int64_t tokens = x.size(1), head_dim = x.size(2) / heads;
  if (!make_room(out, {1, heads, tokens, head_dim})) {
    return refuse(context, out, "g4::cpu_head_rope was called with an output of another shape or type than its result");
  }
  const float* const from = x.const_data_ptr<float>();
  const float* const factors = values_or_null(weight);
  const float* const cosines = values_or_null(cos);
  const float* const sines = values_or_null(sin);
  float* const to = out.mutable_data_ptr<float>();
  // Token by token: all heads of a token use the same angles.
  share(tokens * heads, x.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t token = index / heads, head = index % heads, angles = token * head_dim / 2;
      float* const row = to + (head * tokens + token) * head_dim;
      if (cosines == nullptr) {
        kernel().rms_norm(from + index * head_dim, factors, eps, head_dim, row);
      } else {
        kernel().norm_rotate(from + index * head_dim, factors, eps, cosines + angles, sines + angles, head_dim, row);
      }
    }
  });
  return out;
}

Tensor& gelu_mul_out(KernelRuntimeContext& context, const Tensor& gate, const Tensor& up, Tensor& out) {
  if (!is_float(gate) || !is_like(up, gate) || !make_room(out, gate.sizes())) {
    return refuse(context, out, "g4::cpu_gelu_mul was called with tensors that do not fit together");
  }
  const float* const from = gate.const_data_ptr<float>();
  const float* const factors = up.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  for_each_block(gate, [&](int64_t start, int64_t count) {
    kernel().gelu_mul(from + start, factors + start, count, to + start);
  });
  return out;
}

Tensor& softcap_out(KernelRuntimeContext& context, const Tensor& x, double cap, Tensor& out) {
  if (!is_float(x) || !(cap > 0) || !make_room(out, x.sizes())) {
    return refuse(context, out, "g4::cpu_softcap needs float32 tensors of one shape and a cap above 0");
  }
  const float* const from = x.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  for_each_block(x, [&](int64_t start, int64_t count) { kernel().softcap(from + start, cap, count, to + start); });
  return out;
}

}  // namespace

void rms_norm_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  rms_norm_out(context, arguments[0]->toTensor(), arguments[1]->toOptional<Tensor>(), arguments[2]->toDouble(),
               arguments[3]->toTensor());
}

void norm_add_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  norm_add_out(context, arguments[0]->toTensor(), arguments[1]->toTensor(), arguments[2]->toDouble(),
               arguments[3]->toTensor(), arguments[4]->toOptional<Tensor>(), arguments[5]->toTensor());
}

void head_rope_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  head_rope_out(context, arguments[0]->toTensor(), arguments[1]->toOptional<Tensor>(), arguments[2]->toDouble(),
                arguments[3]->toOptional<Tensor>(), arguments[4]->toOptional<Tensor>(), arguments[5]->toInt(),
                arguments[6]->toTensor());
}

void gelu_mul_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  gelu_mul_out(context, arguments[0]->toTensor(), arguments[1]->toTensor(), arguments[2]->toTensor());
}

void softcap_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  softcap_out(context, arguments[0]->toTensor(), arguments[1]->toDouble(), arguments[2]->toTensor());
}

}  // namespace g4
