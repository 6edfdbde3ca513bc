// g4::cpu_linear.out(x, codes, high, sub, step, *, out) and g4::cpu_linear_float.out(x, weight, *, out): linear layers
// that read their weights where they are stored. Python's side is gemma4cli/kernels/cpu_linear.
#include "instruction_set.h"
#include "linear_kernel.h"
#include "operators.h"
#include "packed_weight.h"
#include "support.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace g4 {
namespace {

using executorch::runtime::FunctionRef;

// Below this many multiply-adds, waking the thread pool costs more than it saves.
constexpr int64_t kSerialWork = 1 << 17;
// Parts per thread: enough that one which is held up does not hold up the rest, few enough that each part is long, as
// kernels prefetch what follows theirs.
constexpr int64_t kPartsPerThread = 8;
// Rows of the weight that one part has at least.
constexpr int64_t kLeastRows = 32;
// Rows of activations that go through the weight together: what they sum up stays in the second-level cache.
constexpr int64_t kMatmulRows = 252;
constexpr int64_t kMostDims = 8;

const LinearKernel* const kKernels[] = G4_VARIANTS(kLinear);

const LinearKernel& selected_kernel() { return *kKernels[instruction_set()]; }

// Calls work(begin, end) for parts of at least `least` of [0, count), which threads take as they become free. Each result
// is computed whole by one call, so that no bit of it depends on the number of threads.
void share(int64_t count, int64_t least, bool serial, FunctionRef<void(int64_t, int64_t)> work) {
  const int64_t threads =
      serial ? 1 : std::min(executorch::extension::get_thread_count(), (count + least - 1) / least);
  if (threads <= 1) {
    work(0, count);
    return;
  }
  const int64_t grain = std::max(least, count / (threads * kPartsPerThread));
  std::atomic<int64_t> next{0};
  executorch::extension::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(grain); begin < count; begin = next.fetch_add(grain)) {
      work(begin, std::min(count, begin + grain));
    }
  });
}

// The activations of one call, in one allocation; every part starts at a cache line.
class ActivationBuffer {
 public:
  ActivationBuffer(int64_t rows, int64_t columns) : activations_{rows, columns, nullptr, nullptr, nullptr, nullptr} {
    const int64_t chunks = rows * activations_.chunks();
    const int64_t codes = chunks * kChunk, values = chunks * kMostGroups;
    memory_.reset(static_cast<int8_t*>(std::aligned_alloc(kLine, codes + 3 * values * sizeof(float))));
    if (memory_ == nullptr) return;
    activations_.codes = memory_.get();
    activations_.factors = reinterpret_cast<float*>(memory_.get() + codes);
    activations_.totals = activations_.factors + values;
    activations_.offsets = reinterpret_cast<int32_t*>(activations_.totals + values);
  }

  explicit operator bool() const { return memory_ != nullptr; }
  const Activations& operator*() const { return activations_; }

 private:
  static constexpr size_t kLine = 64;
  struct Free {
    void operator()(int8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<int8_t, Free> memory_;
  Activations activations_;
};

void multiply(const LinearKernel& kernel, const LinearWeight& weight, const Activations& x, bool serial, float* out) {
  if (x.rows < kernel.least_matmul_rows) {
    share(weight.rows, kLeastRows, serial, [&](int64_t begin, int64_t end) {
      for (int64_t row = 0; row < x.rows; ++row) kernel.matvec(weight, x, row, begin, end, out + row * weight.rows);
    });
    return;
  }
  const int64_t blocks = (weight.rows + kernel.row_block - 1) / kernel.row_block;
  for (int64_t row = 0; row < x.rows; row += kMatmulRows) {
    const int64_t rows = std::min(kMatmulRows, x.rows - row);
    share(blocks, 1, serial, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> sums(new float[rows * kernel.row_block]);
      for (int64_t block = begin; block < end; ++block) {
        kernel.matmul(weight, x, row, rows, block * kernel.row_block, sums.get(), out);
      }
    });
  }
}

bool linear(const LinearWeight& weight, const float* x, int64_t rows, float* out) {
  const LinearKernel& kernel = selected_kernel();
  const ActivationBuffer buffer(rows, weight.columns);
  if (!buffer) return false;
  share(rows, 1, rows * weight.columns < kSerialWork, [&](int64_t begin, int64_t end) {
    kernel.quantize(weight, *buffer, x, begin, end);
  });
  multiply(kernel, weight, *buffer, rows * weight.rows * weight.columns < kSerialWork, out);
  return true;
}

bool are_activations(const Tensor& tensor) { return is_float(tensor) && tensor.dim() > 0 && tensor.dim() <= kMostDims; }

// Gives `out` the shape of x with `columns` as its last size.
bool resize_like(Tensor& out, const Tensor& x, int64_t columns) {
  SizesType sizes[kMostDims];
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) sizes[dim] = x.size(dim);
  sizes[x.dim() - 1] = static_cast<SizesType>(columns);
  return make_room(out, {sizes, static_cast<size_t>(x.dim())});
}

Tensor& linear_out(KernelRuntimeContext& context, const Tensor& x, Arguments four, Tensor& out) {
  const int64_t columns = are_activations(x) ? x.size(x.dim() - 1) : 0;
  const auto weight = columns > 0 ? packed_weight(four, columns) : std::nullopt;
  if (!weight) return refuse(context, out, "g4::cpu_linear was called with tensors that do not fit together");
  if (!resize_like(out, x, weight->rows)) {
    return refuse(context, out, "g4::cpu_linear was called with an output of another shape than its result");
  }
  const int64_t rows = x.numel() / columns;
  if (rows > 0 && !linear(*weight, x.const_data_ptr<float>(), rows, out.mutable_data_ptr<float>())) {
    ET_LOG(Error, "g4::cpu_linear found no memory for its activations");
    context.fail(Error::MemoryAllocationFailed);
  }
  return out;
}

Tensor& linear_float_out(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, Tensor& out) {
  const int64_t columns = are_activations(x) ? x.size(x.dim() - 1) : 0;
  if (columns == 0 || !is_float(weight) || weight.dim() != 2 || weight.size(1) != columns) {
    return refuse(context, out, "g4::cpu_linear_float was called with tensors that do not fit together");
  }
  if (!resize_like(out, x, weight.size(0))) {
    return refuse(context, out, "g4::cpu_linear_float was called with an output of another shape than its result");
  }
  const int64_t rows = x.numel() / columns;
  share(weight.size(0), kLeastRows, x.numel() * weight.size(0) < kSerialWork, [&](int64_t begin, int64_t end) {
    selected_kernel().matmul_float(x.const_data_ptr<float>(), rows, weight.const_data_ptr<float>(), weight.size(0),
                                   columns, begin, end, out.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace

void linear_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  linear_out(context, arguments[0]->toTensor(), {arguments.data() + 1, 4}, arguments[5]->toTensor());
}

void linear_float_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  linear_float_out(context, arguments[0]->toTensor(), arguments[1]->toTensor(), arguments[2]->toTensor());
}

}  // namespace g4
