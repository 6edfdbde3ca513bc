// What a user can act on: one sentence and a hint. Anything else that is thrown is a bug.
#pragma once

#include <stdexcept>
#include <string>

namespace g4 {

class RunnerError : public std::runtime_error {
 public:
  explicit RunnerError(const std::string& message, std::string hint = "")
      : std::runtime_error(message), hint_(std::move(hint)) {}
  const std::string& hint() const { return hint_; }

 private:
  std::string hint_;
};

}  // namespace g4
