// Serving the protocol: one thread reads requests, so that a cancel is seen at once; the caller's thread answers them.
#pragma once

#include "engine.h"
#include "protocol.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>

namespace g4 {

// Whole lines to a file descriptor, from any thread. When the other end is gone the process ends quietly.
class LineWriter {
 public:
  explicit LineWriter(int descriptor) : descriptor_(descriptor) {}
  void write(const Json& json);

 private:
  std::mutex mutex_;
  int descriptor_;
};

class Server {
 public:
  Server(Engine& engine, int input, LineWriter& output) : engine_(engine), input_(input), output_(output) {}

  // Answers until `quit` or, after everything asked for has been answered, the end of the input.
  void run();

 private:
  struct Pending {
    GenerateCommand command;
    std::shared_ptr<std::atomic<bool>> cancelled;
  };
  using Job = std::variant<Pending, CloseCommand, InfoCommand>;

  void read_requests();
  void handle_line(std::string_view line);
  void dispatch(Command command);
  void enqueue(Job job);
  void stop(bool at_once);
  bool next_job(Job& job);

  void answer(const Pending& pending);
  void answer(const CloseCommand& command);
  void answer(const InfoCommand& command);
  void report(const std::exception& error, std::optional<int64_t> id);

  Engine& engine_;
  int input_;
  LineWriter& output_;
  std::map<std::string, std::unique_ptr<Session>> sessions_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  std::map<int64_t, std::shared_ptr<std::atomic<bool>>> in_flight_;
  bool stopping_ = false;
};

// The reply to a failure, with its hint when it has one.
Json error_reply(const std::exception& error, std::optional<int64_t> id);

}  // namespace g4
