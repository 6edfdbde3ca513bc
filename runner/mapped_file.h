// A whole file as memory, read by the system page by page when it is looked at.
#pragma once

#include <executorch/extension/data_loader/buffer_data_loader.h>

#include <cstddef>
#include <memory>
#include <string>

namespace g4 {

// Lends out parts of the file where they lie. ExecuTorch's own loader makes a mapping of its own for every part that is
// asked for, so two methods that read the same weights would count, and page in, each of them twice.
class MappedFile {
 public:
  // Throws RunnerError when the file cannot be read.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  executorch::runtime::DataLoader* loader() { return loader_.get(); }

 private:
  void* data_;
  size_t size_;
  std::unique_ptr<executorch::extension::BufferDataLoader> loader_;
};

}  // namespace g4
