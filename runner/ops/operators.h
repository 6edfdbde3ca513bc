// The operators of libg4_kernels.so as ExecuTorch calls them: all arguments in the order of the schema, then the result.
#pragma once

#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/span.h>

namespace g4 {

using Arguments = executorch::runtime::Span<executorch::runtime::EValue*>;

void attention_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void embedding_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void gelu_mul_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void head_rope_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void linear_float_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void linear_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void norm_add_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void rms_norm_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void sample_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void softcap_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);

}  // namespace g4
