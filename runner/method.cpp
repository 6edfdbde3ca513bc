#include "method.h"

#include "error.h"
#include "log.h"

#include <executorch/runtime/core/device_allocator.h>

#include <cstring>

namespace g4 {
namespace {

using executorch::aten::Tensor;
using executorch::extension::TensorPtr;
using executorch::runtime::DeviceAllocator;
using executorch::runtime::DeviceMemoryBuffer;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Method;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Program;
using executorch::runtime::etensor::Device;

DeviceAllocator& allocator_of(Device device) {
  DeviceAllocator* const allocator = executorch::runtime::get_device_allocator(device.type());
  if (allocator == nullptr) {
    throw RunnerError("The program wants tensors on a device whose backend library offers no memory.");
  }
  return *allocator;
}

DeviceMemoryBuffer allocate_on(Device device, size_t bytes) {
  auto buffer = DeviceMemoryBuffer::create(bytes, device.type(), device.index());
  if (!buffer.ok()) throw RunnerError("The device refused " + std::to_string(bytes) + " bytes for a tensor.");
  return std::move(*buffer);
}

// MethodMeta does not say on which device a tensor lives; the loaded method's own values do.
const Tensor& input_tensor(const Method& method, size_t index) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return method.get_input(index).toTensor();
#pragma GCC diagnostic pop
}

}  // namespace

LoadedMethod::LoadedMethod(const Program& program, const char* name, PlannedMemory& memory,
                           const NamedDataMap* weights)
    : name_(name) {
  const auto meta = program.method_meta(name);
  if (!meta.ok()) fail("cannot be read", meta.error());
  manager_.emplace(&method_allocator_, memory.allocator_for(*meta), &temporary_allocator_);
  clear_complaint();
  auto method = program.load_method(name, &*manager_, /*event_tracer=*/nullptr, weights);
  if (!method.ok() && method.error() == Error::InvalidState && weights == nullptr) {
    throw RunnerError("model.pte needs weights, and no .ptd file lies beside it.",
                      "Copy the whole bundle again, or export it again: g4 export --force");
  }
  if (!method.ok()) fail("cannot be loaded", method.error());
  method_.emplace(std::move(*method));
  place_inputs();
  place_outputs();
}

void LoadedMethod::place_inputs() {
  for (size_t i = 0; i < method_->inputs_size(); ++i) {
    const Tensor& input = input_tensor(*method_, i);
    device_inputs_.push_back(input.device().is_cpu() ? DeviceMemoryBuffer()
                                                     : allocate_on(input.device(), input.nbytes()));
  }
}

void LoadedMethod::place_outputs() {
  const auto meta = method_->method_meta();
  for (size_t i = 0; i < method_->outputs_size(); ++i) {
    const auto tag = meta.output_tag(i);
    if (!tag.ok() || *tag != executorch::runtime::Tag::Tensor) continue;  // a constant method that returns a number
    const auto info = meta.output_tensor_meta(i);
    if (!info.ok()) fail("has an output that cannot be read", info.error());
    if (info->is_memory_planned() || info->nbytes() == 0) continue;
    const Device device = method_->get_output(i).toTensor().device();
    void* data;
    if (device.is_cpu()) {
      data = host_outputs_.emplace_back(info->nbytes()).data();
    } else {
      data = device_outputs_.emplace_back(allocate_on(device, info->nbytes())).data();
    }
    // Constants returned as they are have memory of their own, which is no failure.
    const Error error = method_->set_output_data_ptr(data, info->nbytes(), i);
    if (error != Error::Ok && meta.num_inputs() > 0) fail("has an output without memory", error);
  }
}

void LoadedMethod::set_input(size_t index, const void* data, const std::vector<int32_t>& sizes) {
  const Tensor& input = input_tensor(*method_, index);
  void* place = const_cast<void*>(data);
  TensorPtr tensor = executorch::extension::from_blob(place, sizes, input.scalar_type());
  if (DeviceMemoryBuffer& buffer = device_inputs_[index]; buffer.data() != nullptr) {
    const Device device = input.device();
    const Error copied =
        allocator_of(device).copy_host_to_device(buffer.data(), data, tensor->nbytes(), device.index());
    if (copied != Error::Ok) fail("could not copy an input to the device", copied);
    tensor = executorch::extension::from_blob(buffer.data(), sizes, input.scalar_type(), device);
  }
  if (const Error error = method_->set_input(EValue(*tensor), index); error != Error::Ok) {
    fail("refused input " + std::to_string(index), error);
  }
}

void LoadedMethod::execute() {
  clear_complaint();
  if (const Error error = method_->execute(); error != Error::Ok) fail("failed while running", error);
}

void LoadedMethod::get_output(size_t index, void* data, size_t bytes) {
  const Tensor& output = method_->get_output(index).toTensor();
  const Device device = output.device();
  if (device.is_cpu()) {
    std::memcpy(data, output.const_data_ptr(), bytes);
    return;
  }
  const Error copied =
      allocator_of(device).copy_device_to_host(data, output.const_data_ptr(), bytes, device.index());
  if (copied != Error::Ok) fail("could not copy an output from the device", copied);
}

std::vector<int64_t> LoadedMethod::integers(size_t index) {
  const EValue& value = method_->get_output(index);
  if (value.isInt()) return {value.toInt()};
  if (!value.isTensor() || value.toTensor().scalar_type() != ScalarType::Long) return {};
  std::vector<int64_t> values(static_cast<size_t>(value.toTensor().numel()));
  get_output(index, values.data(), values.size() * sizeof(int64_t));
  return values;
}

void LoadedMethod::fail(const std::string& what, Error error) const {
  const char* hint = "";
  if (error == Error::OperatorMissing) hint = "The program was exported for another version of g4: g4 export --force";
  if (error == Error::MemoryAllocationFailed) hint = "Free some memory, or export with a shorter context (--ctx).";
  throw RunnerError("`" + name_ + "` of model.pte " + what + " (" + explain(error) + ").", hint);
}

}  // namespace g4
