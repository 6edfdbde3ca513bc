#include "contract.h"

#include "error.h"
#include "log.h"

#include <algorithm>
#include <cstring>

namespace g4 {
namespace {

using executorch::runtime::MethodMeta;
using executorch::runtime::Program;
using executorch::runtime::Result;
using executorch::runtime::Tag;
using executorch::runtime::TensorInfo;

[[noreturn]] void refuse(const std::string& difference) {
  throw RunnerError("model.pte does not follow method contract " + std::to_string(kContractVersion) + ": " +
                        difference + ".",
                    "Export the model again with this version: g4 export --force");
}

void require_method(const Program& program, const char* name) {
  for (size_t i = 0; i < program.num_methods(); ++i) {
    const auto present = program.get_method_name(i);
    if (present.ok() && std::strcmp(*present, name) == 0) return;
  }
  refuse("it has no method `" + std::string(name) + "`");
}

std::string dtype_name(executorch::aten::ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long: return "i64";
    case ScalarType::Float: return "f32";
    default: return "dtype " + std::to_string(static_cast<int>(dtype));
  }
}

std::string describe(executorch::aten::ScalarType dtype, const std::vector<int32_t>& sizes) {
  std::string text = dtype_name(dtype) + " [";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::vector<int32_t> expected_sizes(const TensorSpec& spec, int64_t tokens, int64_t vocab_size) {
  std::vector<int32_t> sizes(spec.shape.begin(), spec.shape.begin() + spec.dims);
  for (int32_t& size : sizes) {
    if (size == kTokensOfCall) size = static_cast<int32_t>(tokens);
    if (size == kVocabulary) size = static_cast<int32_t>(vocab_size);
  }
  return sizes;
}

void check_tensor(const std::string& where, const TensorSpec& spec, Result<Tag> tag, const Result<TensorInfo>& info,
                  int64_t tokens, int64_t vocab_size) {
  if (!tag.ok() || *tag != Tag::Tensor || !info.ok()) refuse(where + " is not a tensor");
  const std::vector<int32_t> sizes(info->sizes().begin(), info->sizes().end());
  const std::string expected = describe(spec.dtype, expected_sizes(spec, tokens, vocab_size));
  const std::string found = describe(info->scalar_type(), sizes);
  if (found != expected) refuse(where + " (" + spec.name + ") is " + found + " where " + expected + " belongs");
}

void check_count(const std::string& method, const char* kind, size_t found, size_t expected) {
  if (found != expected) {
    refuse("`" + method + "` has " + std::to_string(found) + " " + kind + " where " + std::to_string(expected) +
           " belong");
  }
}

void check_method(const Program& program, const char* name, int64_t tokens, int64_t vocab_size) {
  require_method(program, name);
  const auto meta = program.method_meta(name);
  if (!meta.ok()) refuse("`" + std::string(name) + "` cannot be read (" + explain(meta.error()) + ")");
  check_count(name, "inputs", meta->num_inputs(), kInputs.size());
  check_count(name, "outputs", meta->num_outputs(), kOutputs.size());
  for (size_t i = 0; i < kInputs.size(); ++i) {
    check_tensor("input " + std::to_string(i) + " of `" + name + "`", kInputs[i], meta->input_tag(i),
                 meta->input_tensor_meta(i), tokens, vocab_size);
  }
  for (size_t i = 0; i < kOutputs.size(); ++i) {
    check_tensor("output " + std::to_string(i) + " of `" + name + "`", kOutputs[i], meta->output_tag(i),
                 meta->output_tensor_meta(i), tokens, vocab_size);
  }
}

int64_t read_number(const Program& program, const ConstantReader& read, const char* name, int64_t least,
                    int64_t most = INT32_MAX) {
  require_method(program, name);
  const std::vector<int64_t> values = read(name);
  if (values.size() != 1) refuse("`" + std::string(name) + "` is not one number");
  if (values[0] < least || values[0] > most) {
    refuse("`" + std::string(name) + "` is " + std::to_string(values[0]) + ", outside " + std::to_string(least) +
           " ... " + std::to_string(most));
  }
  return values[0];
}

}  // namespace

Contract read_contract(const Program& program, const ConstantReader& read) {
  require_method(program, "g4_contract_version");
  const std::vector<int64_t> version = read("g4_contract_version");
  if (version.size() != 1 || version[0] != kContractVersion) {
    refuse("its version is " + (version.size() == 1 ? std::to_string(version[0]) : "not a number"));
  }
  Contract contract;
  contract.context_length = read_number(program, read, "get_max_context_len", 1);
  contract.prefill_chunk = read_number(program, read, "get_max_prefill_chunk", kMinPrefillTokens);
  contract.vocab_size = read_number(program, read, "get_vocab_size", 1);
  contract.window = read_number(program, read, "get_window", 0);
  contract.ring_slots = read_number(program, read, "get_ring_slots", 0);
  contract.bos_id = read_number(program, read, "get_bos_id", -1, contract.vocab_size - 1);
  require_method(program, "get_eos_ids");
  contract.eos_ids = read("get_eos_ids");
  for (const int64_t id : contract.eos_ids) {
    if (id < 0 || id >= contract.vocab_size) refuse("`get_eos_ids` holds " + std::to_string(id));
  }
  // A query needs its window, and the rest of its chunk is written before it is answered.
  const int64_t needed = contract.window + contract.prefill_chunk - 1;
  if (contract.window > 0 && contract.ring_slots < std::min(needed, contract.context_length)) {
    refuse("`get_ring_slots` is " + std::to_string(contract.ring_slots) + ", too few for a window of " +
           std::to_string(contract.window) + " and chunks of " + std::to_string(contract.prefill_chunk));
  }
  return contract;
}

void check_methods(const Program& program, const Contract& contract) {
  check_method(program, kPrefill, contract.prefill_chunk, contract.vocab_size);
  check_method(program, kDecode, 1, contract.vocab_size);
}

}  // namespace g4
