// The agreement with exported programs, in C++. gemma4cli/export/contract.py is its source; a test compares the two.
#pragma once

#include <executorch/runtime/executor/program.h>

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace g4 {

constexpr int64_t kContractVersion = 1;
constexpr int64_t kMinPrefillTokens = 2;

constexpr const char* kPrefill = "prefill";
constexpr const char* kDecode = "decode";

// Dimensions that are not numbers.
constexpr int32_t kTokensOfCall = -1;  // 1 in decode, up to the prefill chunk in prefill
constexpr int32_t kVocabulary = -2;

struct TensorSpec {
  const char* name;
  executorch::aten::ScalarType dtype;
  int dims;
  std::array<int32_t, 2> shape;
};

using executorch::aten::ScalarType;

constexpr std::array<TensorSpec, 7> kInputs{{
    {"tokens", ScalarType::Long, 2, {1, kTokensOfCall}},
    {"input_pos", ScalarType::Long, 1, {kTokensOfCall, 0}},
    {"temperature", ScalarType::Float, 1, {1, 0}},
    {"top_k", ScalarType::Long, 1, {1, 0}},
    {"top_p", ScalarType::Float, 1, {1, 0}},
    {"min_p", ScalarType::Float, 1, {1, 0}},
    {"seed", ScalarType::Long, 1, {1, 0}},
}};

constexpr std::array<TensorSpec, 2> kOutputs{{
    {"token", ScalarType::Long, 1, {1, 0}},
    {"logits", ScalarType::Float, 2, {1, kVocabulary}},
}};

// What one program promises: the values of its constant methods.
struct Contract {
  int64_t context_length;  // get_max_context_len
  int64_t prefill_chunk;   // get_max_prefill_chunk
  int64_t vocab_size;      // get_vocab_size
  int64_t window;          // get_window; 0 without sliding layers
  int64_t ring_slots;      // get_ring_slots; 0 without sliding layers
  int64_t bos_id;          // get_bos_id
  std::vector<int64_t> eos_ids;  // get_eos_ids
};

// Reads a constant method: a number gives one value, a tensor all of its own.
using ConstantReader = std::function<std::vector<int64_t>(const char* method)>;

// Both throw RunnerError with one sentence that names what differs.
Contract read_contract(const executorch::runtime::Program& program, const ConstantReader& read);
void check_methods(const executorch::runtime::Program& program, const Contract& contract);

}  // namespace g4
