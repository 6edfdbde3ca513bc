// The line protocol: docs/runner-protocol.md is its description.
#pragma once

#include "session.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace g4 {

constexpr int64_t kProtocolVersion = 1;
// A line this long holds a prompt of more than a million tokens.
constexpr size_t kMaxLineBytes = 8u << 20;

struct GenerateCommand {
  int64_t id;
  std::string session;
  Request request;
};
struct CancelCommand {
  int64_t id;
};
struct CloseCommand {
  std::string session;
};
struct InfoCommand {};
struct QuitCommand {};

using Command = std::variant<GenerateCommand, CancelCommand, CloseCommand, InfoCommand, QuitCommand>;

// Parses one line without its newline. `default_stop_ids` serve requests that name none. `id` receives the request's id as
// soon as it is known, so that the reply to a faulty request can carry it. Throws RunnerError.
Command parse_command(std::string_view line, const std::vector<int64_t>& default_stop_ids, std::optional<int64_t>& id);

// Whole numbers separated by commas; `what` names them in the error. Also used for the command line.
std::vector<int64_t> parse_ids(std::string_view text, const std::string& what);
int64_t parse_integer(std::string_view text, const std::string& what);
float parse_number(std::string_view text, const std::string& what);

// One JSON object in the making.
class Json {
 public:
  Json& add(std::string_view key, std::string_view value);
  Json& add(std::string_view key, const char* value) { return add(key, std::string_view(value)); }
  Json& add(std::string_view key, int64_t value);
  Json& add(std::string_view key, std::optional<int64_t> value);
  Json& add(std::string_view key, std::optional<double> value);
  Json& add(std::string_view key, const std::vector<int64_t>& values);
  Json& add(std::string_view key, const std::vector<std::string>& values);
  std::string text() const { return "{" + members_ + "}"; }

 private:
  Json& add_raw(std::string_view key, const std::string& value);
  std::string members_;
};

Json& add_stats(Json& json, const Stats& stats, double load_seconds);
Json& add_contract(Json& json, const Engine& engine);

}  // namespace g4
