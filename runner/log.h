// ExecuTorch's log: kept quiet, and its first complaint remembered for our error messages.
#pragma once

#include <executorch/runtime/core/error.h>

#include <string>

namespace g4 {

// Routes ExecuTorch's log here. Call once, before anything else. With G4_RUNNER_LOG=1 all of it goes to stderr;
// otherwise only what precedes an abort does.
void capture_executorch_log();

// Forgets the complaint; call before an operation whose failure will be explained.
void clear_complaint();

// "NotFound: kernel 'x' not found." — the error's name and what ExecuTorch first said about it.
std::string explain(executorch::runtime::Error error);

}  // namespace g4
