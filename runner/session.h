// One conversation: which tokens its KV cache holds, and the loop that continues it.
#pragma once

#include "engine.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace g4 {

struct Request {
  std::vector<int64_t> tokens;            // the whole conversation
  std::optional<int64_t> max_new_tokens;  // absent: until the context is full
  Sampling sampling;
  std::vector<int64_t> stop_ids;
  std::optional<int64_t> chunk;           // most tokens of the prompt per step; absent: as many as the program takes
  std::string logits_file;                // every step appends its V float32 logits to it; empty: nobody wants them
};

// Rates and times that were not measured are absent.
struct Stats {
  int64_t prompt_tokens = 0;
  int64_t reused_tokens = 0;
  int64_t generated_tokens = 0;
  std::optional<double> ttft_s;
  std::optional<double> prefill_tok_s;  // over the tokens really computed
  std::optional<double> decode_tok_s;   // over the steps after the first token
};

struct Outcome {
  std::vector<int64_t> tokens;  // without the stop id
  const char* finish_reason;    // stop, length, context or cancelled
  Stats stats;
};

class LogitsFile;

class Session {
 public:
  explicit Session(Engine& engine) : engine_(engine), state_(engine.new_session_state()) {}

  // Answers the conversation, calling `on_token` for each new token; looks at `cancelled` between tokens and between
  // chunks of the prompt. Throws RunnerError for a request that cannot be served.
  Outcome generate(const Request& request, const std::function<void(int64_t)>& on_token,
                   const std::atomic<bool>& cancelled);

  int64_t length() const { return static_cast<int64_t>(held_.size()); }

 private:
  void check(const Request& request) const;
  int64_t reusable(const std::vector<int64_t>& tokens) const;
  void rewind(int64_t length);
  int64_t advance(const int64_t* tokens, int64_t count, const Sampling& sampling, LogitsFile* logits);
  std::optional<int64_t> prefill(const Request& request, const std::atomic<bool>& cancelled, LogitsFile* logits);

  Engine& engine_;
  std::unique_ptr<SessionState> state_;
  std::vector<int64_t> held_;  // the tokens whose keys and values the cache holds, by position
  int64_t written_ = 0;        // one past the highest position written since position 0 was
};

}  // namespace g4
