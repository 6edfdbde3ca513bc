// g4-runner: runs a bundle. With --tokens it answers one prompt; without, it serves the protocol on stdin and stdout.
#include "engine.h"
#include "error.h"
#include "log.h"
#include "protocol.h"
#include "server.h"
#include "session.h"
#include "threads.h"

#include <getopt.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>

namespace {

using g4::Engine;
using g4::Json;
using g4::RunnerError;

constexpr int kFailure = 1;
constexpr int kUsage = 2;

constexpr const char* kHelp = R"(Usage: g4-runner --bundle DIR [--tokens IDS] [options]

Run a bundle made by `g4 export`. Works on token ids; `g4 run` adds the text.
Without --tokens it serves requests on stdin (docs/runner-protocol.md).

  --bundle DIR           folder with model.pte and its *.ptd
  --tokens IDS           prompt as token ids: 2,105,...
  --tokens-file FILE     the same from a file (- is stdin), for long prompts
  --max-new-tokens N     stop after N tokens (default: until the context is full)
  --temperature X        0 is greedy (default: 0)
  --top-k N              keep the N most probable tokens (default: 0, off)
  --top-p X              keep the tokens that make up X of the probability (default: 1, off)
  --min-p X              keep tokens at least X times as probable as the best (default: 0, off)
  --seed N               seed of the noise (default: 0)
  --stop IDS             token ids that end the answer (default: the model's own)
  --threads N            compute with N threads (default: one per fast core)
  --json                 print one JSON document with tokens and statistics
  --version, --help

Examples:
  g4-runner --bundle bundles/demo --tokens 2,105,2364 --max-new-tokens 32
  g4-runner --bundle bundles/demo --tokens 2,105 --temperature 1 --seed 7 --json

G4_RUNNER_LOG=1 shows ExecuTorch's log on stderr. Exit status: 0, 1 for a failure, 2 for wrong usage.
)";

class UsageError : public RunnerError {
 public:
  explicit UsageError(const std::string& message) : RunnerError(message, "See g4-runner --help") {}
};

struct Options {
  std::string bundle;
  bool one_shot = false;
  bool json = false;
  bool default_stop = true;
  g4::Request request;
};

enum Flag { kBundle = 1, kTokens, kTokensFile, kMaxNewTokens, kTemperature, kTopK, kTopP, kMinP, kSeed, kStop, kThreads,
            kJson, kVersion, kHelpFlag };

constexpr option kFlags[] = {
    {"bundle", required_argument, nullptr, kBundle},
    {"tokens", required_argument, nullptr, kTokens},
    {"tokens-file", required_argument, nullptr, kTokensFile},
    {"max-new-tokens", required_argument, nullptr, kMaxNewTokens},
    {"temperature", required_argument, nullptr, kTemperature},
    {"top-k", required_argument, nullptr, kTopK},
    {"top-p", required_argument, nullptr, kTopP},
    {"min-p", required_argument, nullptr, kMinP},
    {"seed", required_argument, nullptr, kSeed},
    {"stop", required_argument, nullptr, kStop},
    {"threads", required_argument, nullptr, kThreads},
    {"json", no_argument, nullptr, kJson},
    {"version", no_argument, nullptr, kVersion},
    {"help", no_argument, nullptr, kHelpFlag},
    {nullptr, 0, nullptr, 0},
};

std::string read_tokens_file(const std::string& path) {
  std::ifstream file;
  if (path != "-") {
    file.open(path);
    if (!file) throw RunnerError(path + " cannot be read.");
  }
  std::istream& stream = path == "-" ? std::cin : file;
  std::string text{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  return text;
}

void apply(Options& options, int flag, const std::string& value) {
  g4::Request& request = options.request;
  switch (flag) {
    case kBundle: options.bundle = value; return;
    case kTokens: request.tokens = g4::parse_ids(value, "--tokens"); options.one_shot = true; return;
    case kTokensFile:
      request.tokens = g4::parse_ids(read_tokens_file(value), "--tokens-file");
      options.one_shot = true;
      return;
    case kMaxNewTokens: request.max_new_tokens = g4::parse_integer(value, "--max-new-tokens"); return;
    case kTemperature: request.sampling.temperature = g4::parse_number(value, "--temperature"); return;
    case kTopK: request.sampling.top_k = g4::parse_integer(value, "--top-k"); return;
    case kTopP: request.sampling.top_p = g4::parse_number(value, "--top-p"); return;
    case kMinP: request.sampling.min_p = g4::parse_number(value, "--min-p"); return;
    case kSeed: request.sampling.seed = g4::parse_integer(value, "--seed"); return;
    case kStop: request.stop_ids = g4::parse_ids(value, "--stop"); options.default_stop = false; return;
    case kThreads: g4::use_threads(g4::parse_integer(value, "--threads")); return;
    case kJson: options.json = true; return;
    case kVersion: std::puts("g4-runner " G4_VERSION); std::exit(0);
    case kHelpFlag: std::fputs(kHelp, stdout); std::exit(0);
    default: throw UsageError("There is no such option, or its value is missing.");
  }
}

Options parse_options(int argc, char** argv) {
  Options options;
  opterr = 0;
  for (int flag; (flag = getopt_long(argc, argv, "", kFlags, nullptr)) != -1;) {
    try {
      apply(options, flag, optarg == nullptr ? "" : optarg);
    } catch (const UsageError&) {
      throw UsageError("`" + std::string(argv[optind - 1]) + "` is not an option, or its value is missing.");
    } catch (const RunnerError& error) {
      throw UsageError(error.what());
    }
  }
  if (optind < argc) throw UsageError("`" + std::string(argv[optind]) + "` is not an option.");
  if (options.bundle.empty()) throw UsageError("--bundle is missing.");
  return options;
}

// Prints token ids as they come, or one document at the end.
int answer_once(Options& options) {
  Engine engine(options.bundle);
  if (options.default_stop) options.request.stop_ids = engine.contract().eos_ids;
  g4::Session session(engine);
  const char* separator = "";
  const auto on_token = [&](int64_t token) {
    if (options.json) return;
    std::printf("%s%lld", separator, static_cast<long long>(token));
    std::fflush(stdout);
    separator = " ";
  };
  const g4::Outcome outcome = session.generate(options.request, on_token, std::atomic<bool>(false));
  if (options.json) {
    Json document;
    document.add("tokens", outcome.tokens).add("finish_reason", outcome.finish_reason);
    std::puts(g4::add_stats(document, outcome.stats, engine.load_seconds()).text().c_str());
  } else {
    std::puts("");
  }
  return 0;
}

int serve(const Options& options) {
  // Only replies may reach stdout; whatever a library prints goes to stderr.
  const int replies = dup(STDOUT_FILENO);
  dup2(STDERR_FILENO, STDOUT_FILENO);
  g4::LineWriter output(replies);
  try {
    Engine engine(options.bundle);
    Json ready;
    ready.add("event", "ready");
    output.write(g4::add_contract(ready, engine));
    g4::Server(engine, STDIN_FILENO, output).run();
    return 0;
  } catch (const std::exception& error) {
    output.write(g4::error_reply(error, std::nullopt));
    return kFailure;
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  g4::capture_executorch_log();
  try {
    Options options = parse_options(argc, argv);
    return options.one_shot ? answer_once(options) : serve(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    const auto* const known = dynamic_cast<const RunnerError*>(&error);
    if (known != nullptr && !known->hint().empty()) std::fprintf(stderr, "hint: %s\n", known->hint().c_str());
    return dynamic_cast<const UsageError*>(&error) != nullptr ? kUsage : kFailure;
  }
}
