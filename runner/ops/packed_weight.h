// The packed weight among an operator's arguments.
#pragma once

#include "linear_kernel.h"
#include "operators.h"

#include <optional>

namespace g4 {

// The weight that four arguments hold: codes, high (a tensor or nothing), sub and step. Their shapes say in which
// format; `columns` is 0 if nothing else tells it. Empty when they do not fit together.
std::optional<LinearWeight> packed_weight(Arguments four, int64_t columns);

}  // namespace g4
