// The loaded model: weights, methods and the memory they run in. Knows nothing of conversations; sessions do.
#pragma once

#include "contract.h"
#include "mapped_file.h"
#include "memory.h"

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/executor/program.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace g4 {

// Sampling of one request; the defaults are greedy with every filter off.
struct Sampling {
  float temperature = 0;
  int64_t top_k = 0;
  float top_p = 1;
  float min_p = 0;
  int64_t seed = 0;
};

// One session's share of the engine's memory.
class SessionState {
 private:
  friend class Engine;
  int64_t number_ = 0;  // never used twice, unlike an address
  std::unique_ptr<StatePages> pages_;  // null when the KV cache lives inside a delegate
};

class LoadedMethod;

class Engine {
 public:
  // Loads `folder`/model.pte and every *.ptd beside it. Throws RunnerError when anything about them is not as agreed.
  explicit Engine(const std::string& folder);
  ~Engine();

  const Contract& contract() const { return contract_; }
  const std::vector<std::string>& backends() const { return backends_; }
  double load_seconds() const { return load_seconds_; }

  std::unique_ptr<SessionState> new_session_state();

  // Makes `state` the one that `step` works on. Returns false when what it held is gone: programs that keep their KV
  // cache inside a delegate have room for one session, which starts over after another has run.
  bool activate(SessionState& state);

  // Runs `count` tokens at positions first_position ... and returns the token sampled after the last of them.
  // count is 1 (decode) or 2 ... prefill_chunk (prefill).
  int64_t step(const int64_t* tokens, int64_t count, int64_t first_position, const Sampling& sampling);

  // Copies the vocab_size logits that the last step's token was sampled from.
  void read_logits(float* logits);

 private:
  void load_program(const std::string& folder);
  executorch::runtime::DataLoader* open_weights(const std::string& path);
  void load_backends();
  void load_methods();
  std::vector<int64_t> read_constant(const char* method) const;

  std::vector<std::unique_ptr<executorch::runtime::DataLoader>> loaders_;
  std::vector<std::unique_ptr<MappedFile>> mapped_;
  std::vector<std::unique_ptr<executorch::runtime::NamedDataMap>> data_;
  const executorch::runtime::NamedDataMap* weights_ = nullptr;
  std::optional<executorch::runtime::Program> program_;
  Contract contract_;
  std::vector<std::string> backends_;
  std::unique_ptr<PlannedMemory> memory_;
  std::unique_ptr<LoadedMethod> prefill_;
  std::unique_ptr<LoadedMethod> decode_;
  LoadedMethod* last_executed_ = nullptr;
  bool state_in_arena_ = false;
  int64_t states_created_ = 0;
  int64_t active_state_ = 0;
  double load_seconds_ = 0;
};

}  // namespace g4
