#include "instruction_set.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace g4 {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

bool runs_here(InstructionSet set) {
#if defined(__x86_64__)
  if (set == kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  }
  if (set == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return set == kPortable;
}

InstructionSet best() {
  for (const InstructionSet set : {kAvx512, kAvx2}) {
    if (runs_here(set)) return set;
  }
  return kPortable;
}

std::atomic<InstructionSet>& selected() {
  static std::atomic<InstructionSet> set{best()};
  return set;
}

}  // namespace

InstructionSet instruction_set() { return selected(); }

}  // namespace g4

// For tests and measurements: use one instruction set ("avx512", "avx2", "portable"; null chooses the best again).
// Returns 0, and changes nothing, when this machine lacks it.
extern "C" __attribute__((visibility("default"))) int g4_select_instruction_set(const char* name) {
  if (name == nullptr) {
    g4::selected() = g4::best();
    return 1;
  }
  for (const g4::InstructionSet set : {g4::kPortable, g4::kAvx2, g4::kAvx512}) {
    if (std::strcmp(g4::kNames[set], name) == 0 && g4::runs_here(set)) {
      g4::selected() = set;
      return 1;
    }
  }
  return 0;
}
