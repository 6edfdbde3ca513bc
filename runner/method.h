// One loaded method with its inputs and outputs in place, wherever the program wants them.
#pragma once

#include "contract.h"
#include "memory.h"

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/core/device_memory_buffer.h>
#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace g4 {

class LoadedMethod {
 public:
  // `memory` provides the planned buffers and outlives this object. Throws RunnerError.
  LoadedMethod(const executorch::runtime::Program& program, const char* name, PlannedMemory& memory,
               const executorch::runtime::NamedDataMap* weights);

  // Sets input `index` from host memory, copying it to the device where the program expects it.
  void set_input(size_t index, const void* data, const std::vector<int32_t>& sizes);
  void execute();
  // Copies output `index` of `bytes` bytes to host memory.
  void get_output(size_t index, void* data, size_t bytes);
  // Output `index` of a constant method: a number or an i64 tensor; anything else gives no values.
  std::vector<int64_t> integers(size_t index);

 private:
  void place_inputs();
  void place_outputs();
  [[noreturn]] void fail(const std::string& what, executorch::runtime::Error error) const;

  std::string name_;
  executorch::extension::MallocMemoryAllocator method_allocator_;
  executorch::extension::MallocMemoryAllocator temporary_allocator_;
  std::optional<executorch::runtime::MemoryManager> manager_;
  std::optional<executorch::runtime::Method> method_;
  // Input buffers on a device keep their addresses for the life of the method: recorded CUDA graphs hold them.
  std::vector<executorch::runtime::DeviceMemoryBuffer> device_inputs_;
  std::vector<executorch::runtime::DeviceMemoryBuffer> device_outputs_;
  std::vector<std::vector<uint8_t>> host_outputs_;
};

}  // namespace g4
