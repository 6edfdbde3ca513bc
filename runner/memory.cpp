#include "memory.h"

#include "error.h"
#include "log.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <new>
#include <string>

namespace g4 {
namespace {

using executorch::runtime::DeviceMemoryBuffer;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MethodMeta;
using executorch::runtime::Span;
using executorch::runtime::etensor::Device;

[[noreturn]] void fail(const char* what, size_t bytes) {
  throw RunnerError(std::string(what) + " of " + std::to_string(bytes) + " bytes failed: " + std::strerror(errno) + ".",
                    "Free some memory, or export with a shorter context (--ctx).");
}

bool is_shared(size_t index) { return index <= kStateBuffer; }

}  // namespace

StatePages::StatePages(size_t bytes) : descriptor_(memfd_create("g4-session", MFD_CLOEXEC)) {
  if (descriptor_ < 0) fail("Opening a KV cache", bytes);
  if (ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) {
    close(descriptor_);
    fail("Reserving a KV cache", bytes);
  }
}

StatePages::~StatePages() { close(descriptor_); }

StateArena::StateArena(size_t bytes) : bytes_(bytes) {
  void* const base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) fail("Reserving addresses for a KV cache", bytes_);
  base_ = static_cast<uint8_t*>(base);
}

StateArena::~StateArena() { munmap(base_, bytes_); }

void StateArena::show(const StatePages& pages) {
  void* const mapped =
      mmap(base_, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, pages.descriptor(), 0);
  if (mapped == MAP_FAILED) fail("Mapping a KV cache", bytes_);
}

PlannedMemory::PlannedMemory(const std::vector<MethodMeta>& methods) {
  for (const MethodMeta& method : methods) {
    for (size_t i = 0; i < std::min(method.num_memory_planned_buffers(), kStateBuffer + 1); ++i) {
      shared_bytes_[i] = std::max(shared_bytes_[i], static_cast<size_t>(method.memory_planned_buffer_size(i).get()));
    }
  }
}

Span<uint8_t> PlannedMemory::allocate(size_t bytes, Device device) {
  if (device.is_cpu()) {
    host_.emplace_back(new (std::nothrow) uint8_t[bytes]());
    if (host_.back() == nullptr) fail("Allocating a buffer", bytes);
    return {host_.back().get(), bytes};
  }
  auto buffer = DeviceMemoryBuffer::create(bytes, device.type(), device.index());
  if (!buffer.ok()) {
    throw RunnerError("The device refused " + std::to_string(bytes) + " bytes (" + explain(buffer.error()) + ").",
                      "Free device memory, or export with a shorter context (--ctx).");
  }
  device_.push_back(std::move(*buffer));
  return device_.back().as_span();
}

HierarchicalAllocator* PlannedMemory::allocator_for(const MethodMeta& method) {
  auto plan = std::make_unique<Plan>();
  bool on_device = false;
  for (size_t i = 0; i < method.num_memory_planned_buffers(); ++i) {
    const Device device = method.memory_planned_buffer_device(i).get();
    const size_t bytes = static_cast<size_t>(method.memory_planned_buffer_size(i).get());
    on_device |= !device.is_cpu();
    plan->devices.push_back(device);
    if (!is_shared(i)) {
      plan->spans.push_back(allocate(bytes, device));
      continue;
    }
    if (shared_.count(i) == 0 && i == kStateBuffer && device.is_cpu() && shared_bytes_[i] > 0) {
      state_ = std::make_unique<StateArena>(shared_bytes_[i]);
      shared_[i] = {state_->data(), state_->size()};
    } else if (shared_.count(i) == 0) {
      shared_[i] = allocate(shared_bytes_[i], device);
    }
    plan->spans.push_back(shared_[i]);
  }
  const Span<Span<uint8_t>> spans(plan->spans.data(), plan->spans.size());
  plan->allocator = on_device ? std::make_unique<HierarchicalAllocator>(
                                    spans, Span<const Device>(plan->devices.data(), plan->devices.size()))
                              : std::make_unique<HierarchicalAllocator>(spans);
  plans_.push_back(std::move(plan));
  return plans_.back()->allocator.get();
}

int64_t peak_host_bytes() {
  // Not getrusage: its maximum survives exec, so a child would report the size of the Python that started it.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
  }
  return 0;
}

}  // namespace g4
