#include "backend.h"

#include "contract.h"
#include "error.h"
#include "log.h"

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>

#include <dlfcn.h>

#include <array>
#include <filesystem>

namespace g4 {
namespace {

using executorch::runtime::BackendOptions;
using executorch::runtime::Error;

struct Backend {
  const char* name;
  const char* library;
  bool keeps_state;
  const char* hint;
};

constexpr std::array<Backend, 2> kBackends{{
    {"XnnpackBackend", "libexecutorch_backend_xnnpack.so", false, "Install it again: pip install executorch==1.5.1"},
    {"CudaBackend", "libexecutorch_backend_cuda.so", true,
     "The CUDA delegate is in ExecuTorch's cu130 wheel, on PyTorch's own package index, and not in the one on PyPI."},
}};

const Backend* find(const std::string& name) {
  for (const Backend& backend : kBackends) {
    if (name == backend.name) return &backend;
  }
  return nullptr;
}

// The folder of the libexecutorch.so that this process uses: a backend must register itself with that one.
std::filesystem::path library_folder() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&executorch::runtime::get_backend_class), &info);
  return std::filesystem::path(info.dli_fname).parent_path();
}

void set_cuda_options() {
  BackendOptions<2> options;
  Error error = options.set_option("enable_cuda_graph_for_method", kDecode);
  if (error == Error::Ok) error = options.set_option("weight_sharing_across_methods", true);
  if (error == Error::Ok) error = executorch::runtime::set_option("CudaBackend", options.view());
  if (error != Error::Ok) throw RunnerError("CudaBackend refused its options (" + explain(error) + ").");
}

}  // namespace

void load_backend(const std::string& name) {
  const Backend* const backend = find(name);
  if (backend == nullptr) {
    throw RunnerError("model.pte needs the backend " + name + ", which g4-runner does not know.",
                      "Export for a backend it knows: g4 export --backend cpu");
  }
  if (executorch::runtime::get_backend_class(name.c_str()) == nullptr) {
    const std::string path = library_folder() / backend->library;
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      throw RunnerError("model.pte needs " + name + ", whose library cannot be loaded: " + dlerror() + ".",
                        backend->hint);
    }
  }
  const auto* const registered = executorch::runtime::get_backend_class(name.c_str());
  if (registered == nullptr || !registered->is_available()) {
    throw RunnerError("model.pte needs " + name + ", which says that it cannot run on this machine.", backend->hint);
  }
  if (name == "CudaBackend") set_cuda_options();
}

bool keeps_state(const std::string& name) {
  const Backend* const backend = find(name);
  return backend != nullptr && backend->keeps_state;
}

}  // namespace g4
