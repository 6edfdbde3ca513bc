#include "session.h"

#include "error.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace g4 {
namespace {

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

void require(bool good, const char* sentence) {
  if (!good) throw RunnerError(sentence);
}

}  // namespace

void Session::check(const Request& request) const {
  const Contract& contract = engine_.contract();
  require(!request.tokens.empty(), "The prompt is empty.");
  if (static_cast<int64_t>(request.tokens.size()) >= contract.context_length) {
    throw RunnerError("The conversation has " + std::to_string(request.tokens.size()) +
                          " tokens, but the context holds " + std::to_string(contract.context_length) +
                          " including the answer.",
                      "Shorten the prompt, or export with a longer context (--ctx).");
  }
  for (size_t i = 0; i < request.tokens.size(); ++i) {
    if (request.tokens[i] < 0 || request.tokens[i] >= contract.vocab_size) {
      throw RunnerError("Token " + std::to_string(request.tokens[i]) + " at position " + std::to_string(i) +
                        " is outside the vocabulary of " + std::to_string(contract.vocab_size) + ".");
    }
  }
  const Sampling& sampling = request.sampling;
  require(!request.max_new_tokens || *request.max_new_tokens >= 1, "max_new_tokens must be at least 1.");
  require(std::isfinite(sampling.temperature) && sampling.temperature >= 0, "temperature must be 0 (greedy) or more.");
  require(sampling.top_k >= 0 && sampling.top_k <= INT32_MAX, "top_k must be 0 (off) or more.");
  require(sampling.top_p > 0 && sampling.top_p <= 1, "top_p must be above 0 and at most 1 (off).");
  require(sampling.min_p >= 0 && sampling.min_p < 1, "min_p must be from 0 (off) to below 1.");
  require(sampling.seed >= 0, "seed must be from 0 to 2^63 - 1.");
}

// The number of leading tokens that need not be computed again. The last one always is: its logits are wanted.
//
// The query at position n sees positions n - window + 1 ... n - 1 of the sliding layers. A ring of R slots lost position
// x when x + R was written, which a rewind does not undo. So n works if n - window + 1 + R >= written, that is, if at
// most R - window + 1 = prefill_chunk positions are taken back; before the first wrap (written <= R), always.
int64_t Session::reusable(const std::vector<int64_t>& tokens) const {
  const auto limit = std::min(held_.size(), tokens.size() - 1);
  const auto length = std::mismatch(tokens.begin(), tokens.begin() + static_cast<int64_t>(limit), held_.begin()).first -
                      tokens.begin();
  const Contract& contract = engine_.contract();
  if (contract.window == 0) return length;
  const int64_t oldest_needed = std::max<int64_t>(0, length - contract.window + 1);
  return oldest_needed + contract.ring_slots >= written_ ? length : 0;
}

void Session::rewind(int64_t length) {
  held_.resize(static_cast<size_t>(length));
  if (length == 0) written_ = 0;
}

int64_t Session::advance(const int64_t* tokens, int64_t count, const Sampling& sampling) {
  const int64_t position = length();
  int64_t token;
  try {
    token = engine_.step(tokens, count, position, sampling);
  } catch (...) {
    rewind(0);  // nobody knows what the cache holds now
    throw;
  }
  held_.insert(held_.end(), tokens, tokens + count);
  written_ = std::max(written_, length());
  return token;
}

// Feeds the rest of the prompt; gives the first new token, or nothing when cancelled on the way.
std::optional<int64_t> Session::prefill(const Request& request, const std::atomic<bool>& cancelled) {
  std::optional<int64_t> token;
  const auto total = static_cast<int64_t>(request.tokens.size());
  while (length() < total) {
    if (cancelled) return std::nullopt;
    const int64_t count = std::min(engine_.contract().prefill_chunk, total - length());
    token = advance(request.tokens.data() + length(), count, request.sampling);
  }
  return token;
}

Outcome Session::generate(const Request& request, const std::function<void(int64_t)>& on_token,
                          const std::atomic<bool>& cancelled) {
  check(request);
  const Stopwatch whole;
  if (!engine_.activate(*state_)) rewind(0);
  rewind(reusable(request.tokens));

  Outcome outcome{{}, "cancelled", {}};
  Stats& stats = outcome.stats;
  stats.prompt_tokens = static_cast<int64_t>(request.tokens.size());
  stats.reused_tokens = length();

  std::optional<int64_t> token = prefill(request, cancelled);
  if (token) {
    stats.ttft_s = whole.seconds();
    stats.prefill_tok_s = static_cast<double>(stats.prompt_tokens - stats.reused_tokens) / *stats.ttft_s;
  }
  const Stopwatch decoding;
  int64_t steps = 0;
  while (token) {
    if (std::find(request.stop_ids.begin(), request.stop_ids.end(), *token) != request.stop_ids.end()) {
      outcome.finish_reason = "stop";
      break;
    }
    outcome.tokens.push_back(*token);
    on_token(*token);
    const auto generated = static_cast<int64_t>(outcome.tokens.size());
    if (request.max_new_tokens && generated == *request.max_new_tokens) {
      outcome.finish_reason = "length";
      break;
    }
    if (stats.prompt_tokens + generated == engine_.contract().context_length) {
      outcome.finish_reason = "context";
      break;
    }
    if (cancelled) break;
    token = advance(&*token, 1, request.sampling);
    ++steps;
  }
  stats.generated_tokens = static_cast<int64_t>(outcome.tokens.size());
  if (steps > 0) stats.decode_tok_s = static_cast<double>(steps) / decoding.seconds();
  return outcome;
}

}  // namespace g4
