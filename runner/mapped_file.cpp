#include "mapped_file.h"

#include "error.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace g4 {

MappedFile::MappedFile(const std::string& path) : data_(MAP_FAILED), size_(0) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status {};
  if (descriptor >= 0 && fstat(descriptor, &status) == 0) {
    size_ = static_cast<size_t>(status.st_size);
    data_ = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
  }
  const int reason = size_ == 0 && descriptor >= 0 ? ENODATA : errno;  // no page of an empty file can be mapped
  if (descriptor >= 0) close(descriptor);
  if (data_ == MAP_FAILED) throw RunnerError(path + " cannot be read (" + std::strerror(reason) + ").");
  madvise(data_, size_, MADV_WILLNEED);  // a hint: read on while the rest is being loaded
  loader_ = std::make_unique<executorch::extension::BufferDataLoader>(data_, size_);
}

MappedFile::~MappedFile() { munmap(data_, size_); }

}  // namespace g4
