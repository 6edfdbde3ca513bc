// How many threads ExecuTorch's kernels and delegates compute with on the CPU.
#pragma once

#include <cstdint>

namespace g4 {

int64_t thread_count();

// Call before a program is loaded: delegates keep the pool they were loaded with. Throws RunnerError.
void use_threads(int64_t count);

}  // namespace g4
