#include "log.h"

#include <executorch/runtime/platform/platform.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace g4 {
namespace {

std::mutex mutex;
std::string first_complaint;
bool verbose = false;

void emit(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*, size_t line, const char* message,
          size_t length) {
  const std::lock_guard<std::mutex> lock(mutex);
  // What failed first is the cause; what follows repeats it on the way up.
  if ((level == kError || level == kFatal) && first_complaint.empty()) first_complaint.assign(message, length);
  if (verbose || level == kFatal) {
    std::fprintf(stderr, "%c %s:%zu %.*s\n", static_cast<char>(level), file, line, static_cast<int>(length), message);
  }
}

}  // namespace

void capture_executorch_log() {
  const char* setting = std::getenv("G4_RUNNER_LOG");
  verbose = setting != nullptr && std::strcmp(setting, "1") == 0;
  executorch::runtime::register_pal(executorch::runtime::PalImpl::create(emit, __FILE__));
}

void clear_complaint() {
  const std::lock_guard<std::mutex> lock(mutex);
  first_complaint.clear();
}

std::string explain(executorch::runtime::Error error) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::string text = executorch::runtime::to_string(error);
  if (const size_t scope = text.rfind(':'); scope != std::string::npos) text.erase(0, scope + 1);
  return first_complaint.empty() ? text : text + ": " + first_complaint;
}

}  // namespace g4
