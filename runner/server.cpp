#include "server.h"

#include "error.h"

#include <unistd.h>

#include <array>
#include <cerrno>
#include <thread>

namespace g4 {

void LineWriter::write(const Json& json) {
  const std::string line = json.text() + "\n";
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t done = 0; done < line.size();) {
    const ssize_t count = ::write(descriptor_, line.data() + done, line.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) _exit(0);  // nobody listens any more
    done += static_cast<size_t>(count);
  }
}

Json error_reply(const std::exception& error, std::optional<int64_t> id) {
  Json reply;
  reply.add("event", "error").add("id", id).add("message", error.what());
  const auto* const known = dynamic_cast<const RunnerError*>(&error);
  if (known != nullptr && !known->hint().empty()) reply.add("hint", known->hint());
  return reply;
}

void Server::run() {
  std::thread reader([this] { read_requests(); });
  for (Job job; next_job(job);) {
    std::visit([this](const auto& work) { answer(work); }, job);
  }
  reader.join();
}

void Server::read_requests() {
  std::string line;
  bool oversized = false;
  std::array<char, 1 << 16> buffer;
  for (;;) {
    const ssize_t count = read(input_, buffer.data(), buffer.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    std::string_view rest(buffer.data(), static_cast<size_t>(count));
    while (!rest.empty()) {
      const size_t end = rest.find('\n');
      if (!oversized) line += rest.substr(0, end);
      if (line.size() > kMaxLineBytes) {
        oversized = true;
        line.clear();
      }
      if (end == std::string_view::npos) break;
      rest.remove_prefix(end + 1);
      if (oversized) {
        report(RunnerError("The request is longer than " + std::to_string(kMaxLineBytes) + " bytes."), std::nullopt);
      } else if (!line.empty()) {
        handle_line(line);
      }
      line.clear();
      oversized = false;
      if (const std::lock_guard<std::mutex> lock(mutex_); stopping_) return;
    }
  }
  if (!line.empty()) handle_line(line);
  stop(false);
}

void Server::handle_line(std::string_view line) {
  std::optional<int64_t> id;
  try {
    dispatch(parse_command(line, engine_.contract().eos_ids, id));
  } catch (const std::exception& error) {
    report(error, id);
  }
}

void Server::dispatch(Command command) {
  if (auto* generate = std::get_if<GenerateCommand>(&command)) {
    auto cancelled = std::make_shared<std::atomic<bool>>(false);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!in_flight_.emplace(generate->id, cancelled).second) {
        throw RunnerError("Request " + std::to_string(generate->id) + " is still being answered.");
      }
    }
    enqueue(Pending{std::move(*generate), cancelled});
  } else if (const auto* cancel = std::get_if<CancelCommand>(&command)) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // An id that is not in flight has just been answered: no error, or the answer would be followed by one.
    if (const auto found = in_flight_.find(cancel->id); found != in_flight_.end()) *found->second = true;
  } else if (auto* close = std::get_if<CloseCommand>(&command)) {
    enqueue(std::move(*close));
  } else if (std::holds_alternative<InfoCommand>(command)) {
    enqueue(InfoCommand{});
  } else {
    stop(true);
  }
}

void Server::enqueue(Job job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  jobs_.push_back(std::move(job));
  changed_.notify_one();
}

void Server::stop(bool at_once) {
  const std::lock_guard<std::mutex> lock(mutex_);
  stopping_ = true;
  if (at_once) {
    jobs_.clear();
    for (auto& [id, cancelled] : in_flight_) *cancelled = true;
  }
  changed_.notify_one();
}

bool Server::next_job(Job& job) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
  if (jobs_.empty()) return false;
  job = std::move(jobs_.front());
  jobs_.pop_front();
  return true;
}

void Server::answer(const Pending& pending) {
  const int64_t id = pending.command.id;
  try {
    auto& session = sessions_[pending.command.session];
    if (session == nullptr) session = std::make_unique<Session>(engine_);
    const auto on_token = [&](int64_t token) {
      output_.write(Json().add("event", "token").add("id", id).add("token", token));
    };
    const Outcome outcome = session->generate(pending.command.request, on_token, *pending.cancelled);
    Json reply;
    reply.add("event", "done").add("id", id).add("finish_reason", outcome.finish_reason);
    add_stats(reply, outcome.stats, engine_.load_seconds());
    output_.write(reply);
  } catch (const std::exception& error) {
    report(error, id);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  in_flight_.erase(id);
}

void Server::answer(const CloseCommand& command) {
  if (sessions_.erase(command.session) == 0) {
    report(RunnerError("There is no session `" + command.session + "`."), std::nullopt);
    return;
  }
  output_.write(Json().add("event", "closed").add("session", command.session));
}

void Server::answer(const InfoCommand&) {
  std::vector<std::string> names;
  std::vector<int64_t> lengths;
  for (const auto& [name, session] : sessions_) {
    names.push_back(name);
    lengths.push_back(session->length());
  }
  Json reply;
  reply.add("event", "info");
  add_contract(reply, engine_).add("sessions", names).add("session_tokens", lengths);
  output_.write(reply.add("peak_host_bytes", peak_host_bytes()));
}

void Server::report(const std::exception& error, std::optional<int64_t> id) { output_.write(error_reply(error, id)); }

}  // namespace g4
