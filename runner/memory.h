// Planned memory of the methods, and the part of it that belongs to a session.
#pragma once

#include <executorch/runtime/core/device_memory_buffer.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/method_meta.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace g4 {

// Index of the planned buffer with the mutable state shared by all methods (ExecuTorch's memory id 2).
constexpr size_t kStateBuffer = 1;

// A file in memory with one session's KV cache. Pages that were never written cost nothing.
class StatePages {
 public:
  explicit StatePages(size_t bytes);
  ~StatePages();
  StatePages(const StatePages&) = delete;
  StatePages& operator=(const StatePages&) = delete;
  int descriptor() const { return descriptor_; }

 private:
  int descriptor_;
};

// A fixed range of addresses at which the pages of any session can appear: programs keep the pointers they were loaded
// with, so sessions are exchanged by mapping other pages there, which copies nothing.
class StateArena {
 public:
  explicit StateArena(size_t bytes);
  ~StateArena();
  StateArena(const StateArena&) = delete;
  StateArena& operator=(const StateArena&) = delete;

  size_t size() const { return bytes_; }
  uint8_t* data() const { return base_; }
  void show(const StatePages& pages);

 private:
  size_t bytes_;
  uint8_t* base_;
};

// The planned buffers of several methods. Buffers 0 (activations) and kStateBuffer are shared by all methods, as large as
// the largest needs; others belong to one method.
class PlannedMemory {
 public:
  explicit PlannedMemory(const std::vector<executorch::runtime::MethodMeta>& methods);

  // The allocator to load a method with; lives as long as this object.
  executorch::runtime::HierarchicalAllocator* allocator_for(const executorch::runtime::MethodMeta& method);

  // Null when the shared state is not in host memory.
  StateArena* state() const { return state_.get(); }

 private:
  struct Plan {
    std::vector<executorch::runtime::Span<uint8_t>> spans;
    std::vector<executorch::runtime::etensor::Device> devices;
    std::unique_ptr<executorch::runtime::HierarchicalAllocator> allocator;
  };
  executorch::runtime::Span<uint8_t> allocate(size_t bytes, executorch::runtime::etensor::Device device);

  std::unique_ptr<StateArena> state_;
  std::map<size_t, size_t> shared_bytes_;
  std::map<size_t, executorch::runtime::Span<uint8_t>> shared_;
  std::vector<std::unique_ptr<uint8_t[]>> host_;
  std::vector<executorch::runtime::DeviceMemoryBuffer> device_;
  std::vector<std::unique_ptr<Plan>> plans_;
};

// Highest resident memory of this process so far, in bytes.
int64_t peak_host_bytes();

}  // namespace g4
