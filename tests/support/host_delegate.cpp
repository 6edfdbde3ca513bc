// A delegate that calls itself CudaBackend and keeps to the host, for tests of the runner's way with devices.
//
// Its "device" is memory that nobody may touch but the delegate and its copies: the host's hands get a fault. Its model
// adds up what it has read, position by position, so that an input that is missing, late or swapped changes the token.
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/core/device_allocator.h>
#include <executorch/runtime/platform/log.h>

#include <sys/mman.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <variant>
#include <vector>

namespace {

using executorch::runtime::ArrayRef;
using executorch::runtime::BackendExecutionContext;
using executorch::runtime::BackendInitContext;
using executorch::runtime::BackendOption;
using executorch::runtime::BackendOptionContext;
using executorch::runtime::CompileSpec;
using executorch::runtime::DelegateHandle;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::Result;
using executorch::runtime::Span;
using executorch::runtime::etensor::DeviceIndex;
using executorch::runtime::etensor::DeviceType;
using executorch::runtime::etensor::Tensor;

constexpr size_t kDeviceBytes = 16 << 20;
constexpr size_t kAlignment = 256;

class Device final : public executorch::runtime::DeviceAllocator {
 public:
  Device() : base_(static_cast<char*>(mmap(nullptr, kDeviceBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {}

  Result<void*> allocate(size_t bytes, DeviceIndex, size_t) override {
    void* const place = base_ + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (used_ > kDeviceBytes) return Error::MemoryAllocationFailed;
    return place;
  }
  void deallocate(void*, DeviceIndex) override {}

  Error copy_host_to_device(void* to, const void* from, size_t bytes, DeviceIndex) override {
    return copy(to, from, bytes, holds(to) && !holds(from));
  }
  Error copy_device_to_host(void* to, const void* from, size_t bytes, DeviceIndex) override {
    return copy(to, from, bytes, !holds(to) && holds(from));
  }
  DeviceType device_type() const override { return DeviceType::CUDA; }

  bool holds(const void* place) const { return place >= base_ && place < base_ + kDeviceBytes; }
  void open() { mprotect(base_, kDeviceBytes, PROT_READ | PROT_WRITE); }
  void close() { mprotect(base_, kDeviceBytes, PROT_NONE); }

 private:
  Error copy(void* to, const void* from, size_t bytes, bool right_way) {
    if (!right_way) return Error::InvalidArgument;
    open();
    std::memcpy(to, from, bytes);
    close();
    return Error::Ok;
  }

  char* base_;
  size_t used_ = 0;
};

Device device;
std::vector<int64_t> state;  // what was read at each position; both methods have the same, as with the real delegate

class HostDelegate final : public executorch::runtime::BackendInterface {
 public:
  bool is_available() const override { return true; }

  Error set_option(BackendOptionContext&, const Span<BackendOption>& options) override {
    for (const BackendOption& option : options) {
      using Text = std::array<char, executorch::runtime::kMaxOptionValueLength>;
      const auto* const text = std::get_if<Text>(&option.value);
      const auto* const flag = std::get_if<bool>(&option.value);
      graphs_ |= !std::strcmp(option.key, "enable_cuda_graph_for_method") && text && !std::strcmp(text->data(), "decode");
      sharing_ |= !std::strcmp(option.key, "weight_sharing_across_methods") && flag && *flag;
    }
    return Error::Ok;
  }

  Result<DelegateHandle*> init(BackendInitContext&, FreeableBuffer*, ArrayRef<CompileSpec>) const override {
    if (!graphs_ || !sharing_) return Error::InvalidState;
    if (std::getenv("HOST_DELEGATE_FULL") != nullptr) {
      ET_LOG(Error, "The device is full");
      ET_LOG(Error, "Weights cannot be loaded");
      return Error::MemoryAllocationFailed;
    }
    return static_cast<DelegateHandle*>(nullptr);
  }

  Error execute(BackendExecutionContext&, DelegateHandle*, Span<EValue*> args) const override {
    for (EValue* argument : args) {
      const Tensor& tensor = argument->toTensor();
      if (tensor.device_type() != DeviceType::CUDA || !device.holds(tensor.const_data_ptr())) {
        return Error::InvalidArgument;
      }
    }
    device.open();
    run(args);
    device.close();
    return Error::Ok;
  }

 private:
  static void run(Span<EValue*> args) {
    const auto input = [&](size_t i) { return args[i]->toTensor(); };
    const auto count = static_cast<size_t>(input(0).numel());
    for (size_t i = 0; i < count; ++i) {
      const auto position = static_cast<size_t>(input(1).const_data_ptr<int64_t>()[i]);
      if (state.size() <= position) state.resize(position + 1);
      state[position] = input(0).const_data_ptr<int64_t>()[i];
    }
    const auto last = static_cast<size_t>(input(1).const_data_ptr<int64_t>()[count - 1]);
    int64_t sum = 7 * input(3).const_data_ptr<int64_t>()[0] + 11 * input(6).const_data_ptr<int64_t>()[0];
    sum += static_cast<int64_t>(64 * input(2).const_data_ptr<float>()[0]);
    sum += 3 * static_cast<int64_t>(64 * input(4).const_data_ptr<float>()[0]);
    sum += 5 * static_cast<int64_t>(64 * input(5).const_data_ptr<float>()[0]);
    for (size_t i = 0; i <= last; ++i) sum += static_cast<int64_t>(i + 1) * (state[i] + 1);
    const auto vocabulary = static_cast<int64_t>(input(8).numel());
    const int64_t token = sum % vocabulary;
    *input(7).mutable_data_ptr<int64_t>() = token;
    for (int64_t i = 0; i < vocabulary; ++i) {
      input(8).mutable_data_ptr<float>()[i] = -static_cast<float>(std::abs(i - token));
    }
  }

  bool graphs_ = false;
  bool sharing_ = false;
};

HostDelegate delegate;

[[maybe_unused]] const bool registered = [] {
  executorch::runtime::register_device_allocator(&device);
  return executorch::runtime::register_backend({"CudaBackend", &delegate}) == Error::Ok;
}();

}  // namespace
