// The operators of libg4_kernels.so as ExecuTorch calls them: all arguments in the order of the schema, then the result.
#pragma once

#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/span.h>

namespace g4 {

using Arguments = executorch::runtime::Span<executorch::runtime::EValue*>;

void attention_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);
void sample_out_boxed(executorch::runtime::KernelRuntimeContext& context, Arguments arguments);

}  // namespace g4
