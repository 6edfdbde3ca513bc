#include "engine.h"

#include "backend.h"
#include "error.h"
#include "log.h"
#include "method.h"

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/named_data_map/merged_data_map.h>
#include <executorch/runtime/platform/runtime.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <numeric>
#include <utility>

namespace g4 {
namespace {

using executorch::extension::FlatTensorDataMap;
using executorch::extension::MmapDataLoader;
using executorch::extension::merged_data_map::MergedDataMap;
using executorch::runtime::DataLoader;
using executorch::runtime::Error;
using executorch::runtime::MethodMeta;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Program;
using executorch::runtime::Span;

namespace fs = std::filesystem;

constexpr const char* kMethods[] = {kPrefill, kDecode};
constexpr const char* kFetchAgain = "The bundle is damaged or incomplete; export it again: g4 export --force";

std::unique_ptr<MmapDataLoader> open_file(const fs::path& path) {
  clear_complaint();
  auto loader = MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock);
  if (!loader.ok()) throw RunnerError(path.string() + " cannot be read (" + explain(loader.error()) + ").");
  return std::make_unique<MmapDataLoader>(std::move(*loader));
}

std::vector<fs::path> weight_files(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".ptd") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

Engine::Engine(const std::string& folder) {
  const auto start = std::chrono::steady_clock::now();
  executorch::runtime::runtime_init();
  load_program(folder);
  contract_ = read_contract(*program_, [this](const char* name) { return read_constant(name); });
  check_methods(*program_, contract_);
  load_backends();
  load_methods();
  load_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Engine::~Engine() = default;

void Engine::load_program(const std::string& folder) {
  const fs::path model = fs::path(folder) / "model.pte";
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) throw RunnerError(folder + " is not a folder.", "Name a bundle: --bundle DIR");
  if (!fs::is_regular_file(model, ignored)) {
    throw RunnerError(folder + " is not a bundle: it has no model.pte.", "Make one: g4 export");
  }
  loaders_.push_back(open_file(model));
  auto program = Program::load(loaders_.back().get(), Program::Verification::InternalConsistency);
  if (!program.ok()) {
    throw RunnerError(model.string() + " is not a valid ExecuTorch program (" + explain(program.error()) + ").",
                      kFetchAgain);
  }
  program_.emplace(std::move(*program));

  std::vector<const NamedDataMap*> maps;
  for (const fs::path& file : weight_files(folder)) {
    auto map = FlatTensorDataMap::load(open_weights(file));
    if (!map.ok()) {
      throw RunnerError(file.string() + " is not a valid weight file (" + explain(map.error()) + ").", kFetchAgain);
    }
    data_.push_back(std::make_unique<FlatTensorDataMap>(std::move(*map)));
    maps.push_back(data_.back().get());
  }
  if (maps.size() > 1) {
    auto merged = MergedDataMap::load(Span<const NamedDataMap*>(maps.data(), maps.size()));
    if (!merged.ok()) throw RunnerError("The .ptd files contradict each other (" + explain(merged.error()) + ").", kFetchAgain);
    data_.push_back(std::make_unique<MergedDataMap>(std::move(*merged)));
  }
  if (!data_.empty()) weights_ = data_.back().get();
}

DataLoader* Engine::open_weights(const std::string& path) {
  const bool delegates = std::any_of(std::begin(kMethods), std::end(kMethods), [this](const char* name) {
    const auto meta = program_->method_meta(name);
    return meta.ok() && meta->num_backends() > 0;
  });
  if (!delegates) {  // operators read weights in place, as long as the program lives
    mapped_.push_back(std::make_unique<MappedFile>(path));
    return mapped_.back()->loader();
  }
  // A delegate takes every weight once, to the device or repacked; what it has taken need not stay mapped.
  loaders_.push_back(open_file(path));
  return loaders_.back().get();
}

std::vector<int64_t> Engine::read_constant(const char* name) const {
  const auto meta = program_->method_meta(name);
  if (!meta.ok() || meta->num_inputs() != 0 || meta->num_outputs() != 1) return {};
  PlannedMemory memory({*meta});
  LoadedMethod method(*program_, name, memory, weights_);
  method.execute();
  return method.integers(0);
}

void Engine::load_backends() {
  for (const char* name : kMethods) {
    const MethodMeta meta = program_->method_meta(name).get();
    for (size_t i = 0; i < meta.num_backends(); ++i) {
      const std::string backend = meta.get_backend_name(i).get();
      if (std::find(backends_.begin(), backends_.end(), backend) != backends_.end()) continue;
      load_backend(backend);
      backends_.push_back(backend);
    }
  }
}

void Engine::load_methods() {
  const MethodMeta prefill = program_->method_meta(kPrefill).get();
  const MethodMeta decode = program_->method_meta(kDecode).get();
  memory_ = std::make_unique<PlannedMemory>(std::vector<MethodMeta>{prefill, decode});
  prefill_ = std::make_unique<LoadedMethod>(*program_, kPrefill, *memory_, weights_);
  decode_ = std::make_unique<LoadedMethod>(*program_, kDecode, *memory_, weights_);

  const bool delegate_keeps_state =
      std::any_of(backends_.begin(), backends_.end(), [](const std::string& name) { return keeps_state(name); });
  state_in_arena_ = memory_->state() != nullptr && !delegate_keeps_state;
  const auto state_bytes = [](const MethodMeta& meta) {
    return meta.num_memory_planned_buffers() > kStateBuffer ? meta.memory_planned_buffer_size(kStateBuffer).get() : 0;
  };
  if (!delegate_keeps_state && (!state_in_arena_ || state_bytes(prefill) != state_bytes(decode))) {
    throw RunnerError("model.pte does not follow method contract 1: `prefill` and `decode` do not share a KV cache.",
                      "Export the model again with this version: g4 export --force");
  }
}

std::unique_ptr<SessionState> Engine::new_session_state() {
  auto state = std::make_unique<SessionState>();
  state->number_ = ++states_created_;
  if (state_in_arena_) state->pages_ = std::make_unique<StatePages>(memory_->state()->size());
  return state;
}

bool Engine::activate(SessionState& state) {
  if (active_state_ == state.number_) return true;
  active_state_ = state.number_;
  if (!state_in_arena_) return false;
  memory_->state()->show(*state.pages_);
  return true;
}

int64_t Engine::step(const int64_t* tokens, int64_t count, int64_t first_position, const Sampling& sampling) {
  LoadedMethod& method = count == 1 ? *decode_ : *prefill_;
  std::vector<int64_t> positions(static_cast<size_t>(count));
  std::iota(positions.begin(), positions.end(), first_position);
  const auto length = static_cast<int32_t>(count);
  method.set_input(0, tokens, {1, length});
  method.set_input(1, positions.data(), {length});
  method.set_input(2, &sampling.temperature, {1});
  method.set_input(3, &sampling.top_k, {1});
  method.set_input(4, &sampling.top_p, {1});
  method.set_input(5, &sampling.min_p, {1});
  method.set_input(6, &sampling.seed, {1});
  method.execute();
  last_executed_ = &method;
  int64_t token = 0;
  method.get_output(0, &token, sizeof(token));
  if (token < 0 || token >= contract_.vocab_size) {
    throw RunnerError("model.pte sampled token " + std::to_string(token) + ", outside its vocabulary of " +
                      std::to_string(contract_.vocab_size) + ".");
  }
  return token;
}

void Engine::read_logits(float* logits) {
  last_executed_->get_output(1, logits, static_cast<size_t>(contract_.vocab_size) * sizeof(float));
}

}  // namespace g4
