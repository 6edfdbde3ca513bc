#include "session.h"

#include "error.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>

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

// A file or FIFO that rows of logits are appended to, in the machine's byte order.
class LogitsFile {
 public:
  LogitsFile(const std::string& path, int64_t vocab_size)
      : path_(path), row_(static_cast<size_t>(vocab_size)),
        descriptor_(open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) {
    if (descriptor_ < 0) fail();
  }
  ~LogitsFile() { close(descriptor_); }
  LogitsFile(const LogitsFile&) = delete;
  LogitsFile& operator=(const LogitsFile&) = delete;

  void append(Engine& engine) {
    engine.read_logits(row_.data());
    const char* const bytes = reinterpret_cast<const char*>(row_.data());
    for (size_t done = 0; done < row_.size() * sizeof(float);) {
      const ssize_t count = write(descriptor_, bytes + done, row_.size() * sizeof(float) - done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) fail();
      done += static_cast<size_t>(count);
    }
  }

 private:
  [[noreturn]] void fail() const { throw RunnerError(path_ + " cannot be written: " + std::strerror(errno) + "."); }

  std::string path_;
  std::vector<float> row_;
  int descriptor_;
};

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
  if (request.chunk && (*request.chunk < 1 || *request.chunk > contract.prefill_chunk)) {
    throw RunnerError("chunk must be from 1 to " + std::to_string(contract.prefill_chunk) + ".");
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

int64_t Session::advance(const int64_t* tokens, int64_t count, const Sampling& sampling, LogitsFile* logits) {
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
  if (logits != nullptr) logits->append(engine_);
  return token;
}

// Feeds the rest of the prompt; gives the first new token, or nothing when cancelled on the way.
std::optional<int64_t> Session::prefill(const Request& request, const std::atomic<bool>& cancelled,
                                        LogitsFile* logits) {
  std::optional<int64_t> token;
  const int64_t chunk = request.chunk.value_or(engine_.contract().prefill_chunk);
  const auto total = static_cast<int64_t>(request.tokens.size());
  while (length() < total) {
    if (cancelled) return std::nullopt;
    const int64_t count = std::min(chunk, total - length());
    token = advance(request.tokens.data() + length(), count, request.sampling, logits);
  }
  return token;
}

Outcome Session::generate(const Request& request, const std::function<void(int64_t)>& on_token,
                          const std::atomic<bool>& cancelled) {
  check(request);
  std::optional<LogitsFile> file;
  if (!request.logits_file.empty()) file.emplace(request.logits_file, engine_.contract().vocab_size);
  LogitsFile* const logits = file ? &*file : nullptr;
  const Stopwatch whole;
  if (!engine_.activate(*state_)) rewind(0);
  rewind(reusable(request.tokens));

  Outcome outcome{{}, "cancelled", {}};
  Stats& stats = outcome.stats;
  stats.prompt_tokens = static_cast<int64_t>(request.tokens.size());
  stats.reused_tokens = length();

  std::optional<int64_t> token = prefill(request, cancelled, logits);
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
    token = advance(&*token, 1, request.sampling, logits);
    ++steps;
  }
  stats.generated_tokens = static_cast<int64_t>(outcome.tokens.size());
  if (steps > 0) stats.decode_tok_s = static_cast<double>(steps) / decoding.seconds();
  return outcome;
}

}  // namespace g4
