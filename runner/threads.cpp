#include "threads.h"

#include "error.h"

#include <cstddef>
#include <string>

// The executorch wheel exports its thread pool but ships no header for it; these are the parts used here.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t num_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace g4 {
namespace {

using executorch::extension::threadpool::get_threadpool;

constexpr int64_t kMostThreads = 1024;

}  // namespace

int64_t thread_count() { return static_cast<int64_t>(get_threadpool()->get_thread_count()); }

void use_threads(int64_t count) {
  if (count < 1 || count > kMostThreads) {
    throw RunnerError("--threads must be from 1 to " + std::to_string(kMostThreads) + ".");
  }
  if (!get_threadpool()->_unsafe_reset_threadpool(static_cast<uint32_t>(count))) {
    throw RunnerError("ExecuTorch refused to compute with " + std::to_string(count) + " threads.");
  }
}

}  // namespace g4
