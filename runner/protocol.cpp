#include "protocol.h"

#include "error.h"
#include "threads.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <map>

namespace g4 {
namespace {

constexpr const char* kSeeDocumentation = "docs/runner-protocol.md describes the requests.";

bool is_name(std::string_view text) {
  if (text.empty() || text.size() > 64) return false;
  for (const char c : text) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '-' && c != '_' && c != '.') return false;
  }
  return true;
}

// Part of a line as it may appear in a message: short, and printable.
std::string excerpt(std::string_view text) {
  std::string shown;
  for (const char c : text.substr(0, 40)) shown += c >= 0x20 && c < 0x7f ? c : '?';
  return text.size() > 40 ? shown + "..." : shown;
}

std::string_view next_field(std::string_view& rest, char separator) {
  const size_t end = rest.find(separator);
  const std::string_view field = rest.substr(0, end);
  rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
  return field;
}

// The key=value pairs of one request, which must all be taken by its command.
class Arguments {
 public:
  Arguments(std::string_view command, std::string_view rest) : command_(command) {
    while (!rest.empty()) {
      std::string_view field = next_field(rest, ' ');
      if (field.empty()) continue;
      if (field.find('=') == std::string_view::npos) {
        throw RunnerError("`" + excerpt(field) + "` is not of the form key=value.", kSeeDocumentation);
      }
      const std::string key(next_field(field, '='));
      if (!values_.emplace(key, field).second) throw RunnerError("`" + excerpt(key) + "` is given twice.");
    }
  }

  std::optional<std::string_view> take(const std::string& key) {
    const auto found = values_.find(key);
    if (found == values_.end()) return std::nullopt;
    const std::string_view value = found->second;
    values_.erase(found);
    return value;
  }

  std::string_view require(const std::string& key) {
    const auto value = take(key);
    if (!value) throw RunnerError("`" + command_ + "` needs " + key + "=...", kSeeDocumentation);
    return *value;
  }

  void finish() const {
    if (!values_.empty()) {
      throw RunnerError("`" + command_ + "` knows no `" + excerpt(values_.begin()->first) + "`.", kSeeDocumentation);
    }
  }

 private:
  std::string command_;
  std::map<std::string, std::string_view> values_;
};

std::string session_name(std::string_view text) {
  if (!is_name(text)) {
    throw RunnerError("`" + excerpt(text) + "` is not a session name: 1 to 64 of A-Z a-z 0-9 - _ .");
  }
  return std::string(text);
}

int64_t request_id(Arguments& arguments, std::optional<int64_t>& id) {
  const int64_t value = parse_integer(arguments.require("id"), "id");
  if (value < 0) throw RunnerError("id must be 0 or more.");
  id = value;
  return value;
}

Command parse_generate(Arguments& arguments, const std::vector<int64_t>& default_stop_ids, std::optional<int64_t>& id) {
  GenerateCommand command;
  command.id = request_id(arguments, id);
  command.session = session_name(arguments.take("session").value_or("default"));
  Request& request = command.request;
  request.tokens = parse_ids(arguments.require("tokens"), "tokens");
  request.stop_ids = default_stop_ids;
  if (const auto text = arguments.take("stop")) request.stop_ids = parse_ids(*text, "stop");
  if (const auto text = arguments.take("max_new_tokens")) request.max_new_tokens = parse_integer(*text, "max_new_tokens");
  if (const auto text = arguments.take("temperature")) request.sampling.temperature = parse_number(*text, "temperature");
  if (const auto text = arguments.take("top_k")) request.sampling.top_k = parse_integer(*text, "top_k");
  if (const auto text = arguments.take("top_p")) request.sampling.top_p = parse_number(*text, "top_p");
  if (const auto text = arguments.take("min_p")) request.sampling.min_p = parse_number(*text, "min_p");
  if (const auto text = arguments.take("seed")) request.sampling.seed = parse_integer(*text, "seed");
  if (const auto text = arguments.take("chunk")) request.chunk = parse_integer(*text, "chunk");
  request.logits_file = arguments.take("logits").value_or("");
  return command;
}

std::string quote(std::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", c);
      quoted += escape;
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

template <typename Value, typename Render>
std::string list(const std::vector<Value>& values, Render render) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? "," : "") + render(values[i]);
  return text + "]";
}

}  // namespace

Command parse_command(std::string_view line, const std::vector<int64_t>& default_stop_ids, std::optional<int64_t>& id) {
  for (const char c : line) {
    if (c < 0x20 || c > 0x7e) throw RunnerError("The request holds a byte that is not printable ASCII.", kSeeDocumentation);
  }
  std::string_view rest = line;
  const std::string_view name = next_field(rest, ' ');
  constexpr std::array<std::string_view, 5> kNames{"generate", "cancel", "close", "info", "quit"};
  if (std::find(kNames.begin(), kNames.end(), name) == kNames.end()) {
    throw RunnerError("`" + excerpt(name) + "` is not a request; there are generate, cancel, close, info and quit.",
                      kSeeDocumentation);
  }
  Arguments arguments(name, rest);
  Command command = InfoCommand{};
  if (name == "generate") command = parse_generate(arguments, default_stop_ids, id);
  if (name == "cancel") command = CancelCommand{request_id(arguments, id)};
  if (name == "close") command = CloseCommand{session_name(arguments.require("session"))};
  if (name == "quit") command = QuitCommand{};
  arguments.finish();
  return command;
}

int64_t parse_integer(std::string_view text, const std::string& what) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw RunnerError(what + " is `" + excerpt(text) + "`, not a whole number.");
  }
  return value;
}

float parse_number(std::string_view text, const std::string& what) {
  float value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) {
    throw RunnerError(what + " is `" + excerpt(text) + "`, not a number.");
  }
  return value;
}

std::vector<int64_t> parse_ids(std::string_view text, const std::string& what) {
  std::vector<int64_t> ids;
  if (text.empty()) return ids;
  if (text.back() == ',') throw RunnerError(what + " ends with a comma.");
  while (!text.empty()) ids.push_back(parse_integer(next_field(text, ','), what));
  return ids;
}

Json& Json::add_raw(std::string_view key, const std::string& value) {
  members_ += (members_.empty() ? "" : ",") + quote(key) + ":" + value;
  return *this;
}

Json& Json::add(std::string_view key, std::string_view value) { return add_raw(key, quote(value)); }
Json& Json::add(std::string_view key, int64_t value) { return add_raw(key, std::to_string(value)); }
Json& Json::add(std::string_view key, std::optional<int64_t> value) {
  return add_raw(key, value ? std::to_string(*value) : "null");
}

Json& Json::add(std::string_view key, std::optional<double> value) {
  char text[32] = "null";
  if (value && std::isfinite(*value)) std::snprintf(text, sizeof(text), "%.6g", *value);
  return add_raw(key, text);
}

Json& Json::add(std::string_view key, const std::vector<int64_t>& values) {
  return add_raw(key, list(values, [](int64_t value) { return std::to_string(value); }));
}

Json& Json::add(std::string_view key, const std::vector<std::string>& values) {
  return add_raw(key, list(values, quote));
}

Json& add_stats(Json& json, const Stats& stats, double load_seconds) {
  return json.add("prompt_tokens", stats.prompt_tokens)
      .add("reused_tokens", stats.reused_tokens)
      .add("generated_tokens", stats.generated_tokens)
      .add("load_s", std::optional<double>(load_seconds))
      .add("ttft_s", stats.ttft_s)
      .add("prefill_tok_s", stats.prefill_tok_s)
      .add("decode_tok_s", stats.decode_tok_s)
      .add("peak_host_bytes", peak_host_bytes())
      .add("peak_device_bytes", std::optional<int64_t>());
}

Json& add_contract(Json& json, const Engine& engine) {
  const Contract& contract = engine.contract();
  return json.add("version", G4_VERSION)
      .add("protocol", kProtocolVersion)
      .add("contract_version", kContractVersion)
      .add("context_length", contract.context_length)
      .add("prefill_chunk", contract.prefill_chunk)
      .add("vocab_size", contract.vocab_size)
      .add("window", contract.window)
      .add("ring_slots", contract.ring_slots)
      .add("eos_ids", contract.eos_ids)
      .add("bos_id", contract.bos_id)
      .add("backends", engine.backends())
      .add("threads", thread_count())
      .add("load_s", std::optional<double>(engine.load_seconds()));
}

}  // namespace g4
