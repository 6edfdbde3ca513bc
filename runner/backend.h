// Delegates: the shared libraries of ExecuTorch that a program names.
#pragma once

#include <string>

namespace g4 {

// Loads the library of a backend (the delegate id of a program) and sets its options. Throws RunnerError.
void load_backend(const std::string& backend);

// Whether programs of this backend keep the KV cache inside the delegate, out of the planned memory.
bool keeps_state(const std::string& backend);

}  // namespace g4
