// g4::cpu_attention.out(q, k_cache, v_cache, input_pos, window, *, out): attention over a ring or flat cache whose cost follows
// the positions that a query sees and not the slots that are allocated. Python's side is gemma4cli/kernels/cpu_attention.
#include "attention_kernel.h"
#include "instruction_set.h"
#include "operators.h"
#include "support.h"

#include <algorithm>
#include <memory>

namespace g4 {
namespace {

// Below this many multiply-adds, waking the thread pool costs more than it saves.
constexpr int64_t kSerialWork = 1 << 16;

const AttentionKernel* const kKernels[] = G4_VARIANTS(kAttention);

bool is_cache_of(const Tensor& q, const Tensor& cache) {
  return cache.dim() == 4 && is_float(cache) && cache.size(0) == 1 && cache.size(1) > 0 && cache.size(2) > 0 &&
         cache.size(3) == q.size(3) && q.size(1) % cache.size(1) == 0;
}

// The whole signature of the operator, so that a program built for another one fails and does not read past a tensor.
bool arguments_fit(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions, int64_t window) {
  return q.dim() == 4 && is_float(q) && q.size(0) == 1 && q.size(2) > 0 && is_cache_of(q, k) && is_cache_of(q, v) &&
         k.size(1) == v.size(1) && k.size(2) == v.size(2) && positions.dim() == 1 &&
         positions.scalar_type() == ScalarType::Long && positions.size(0) == q.size(2) && window >= 0;
}

bool positions_ascend(const AttentionProblem& problem) {
  for (int64_t t = 0; t < problem.queries; ++t) {
    if (problem.positions[t] < (t == 0 ? 0 : problem.positions[t - 1])) return false;
  }
  return true;
}

// One block of rows of one KV head and the splits it sees.
struct Block {
  int64_t kv_head, row, rows, first_split, last_split;

  Block(const AttentionProblem& problem, int64_t index) {
    const int64_t blocks = (problem.rows() + kRowBlock - 1) / kRowBlock;
    kv_head = index / blocks;
    row = index % blocks * kRowBlock;
    rows = std::min(kRowBlock, problem.rows() - row);
    first_split = problem.first_visible(row) / kSplitKeys;
    last_split = std::max(first_split, problem.last_visible(row + rows - 1) / kSplitKeys);
  }

  static int64_t count(const AttentionProblem& problem) {
    return problem.kv_heads * ((problem.rows() + kRowBlock - 1) / kRowBlock);
  }
};

// Enough blocks for every thread: each block walks its splits one after the other.
void attend_by_block(const AttentionKernel& kernel, const AttentionProblem& problem, bool serial) {
  const int64_t floats = partial_floats(problem.head_dim);
  run(Block::count(problem), serial, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[2 * floats]);
    float* const total = scratch.get();
    float* const partial = total + floats;
    for (int64_t index = begin; index < end; ++index) {
      const Block block(problem, index);
      kernel.attend_split(problem, block.kv_head, block.row, block.rows, block.first_split, total);
      for (int64_t split = block.first_split + 1; split <= block.last_split; ++split) {
        kernel.attend_split(problem, block.kv_head, block.row, block.rows, split, partial);
        kernel.merge(total, partial, problem.head_dim);
      }
      kernel.finish(problem, block.kv_head, block.row, block.rows, total);
    }
  });
}

// Few rows and many keys (decode): the splits of a block run in parallel and are merged afterwards, in the same order.
void attend_by_split(const AttentionKernel& kernel, const AttentionProblem& problem, int64_t splits) {
  const int64_t floats = partial_floats(problem.head_dim);
  const int64_t blocks = Block::count(problem);
  const std::unique_ptr<float[]> partials(new float[blocks * splits * floats]);
  run(blocks * splits, false, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Block block(problem, index / splits);
      const int64_t split = block.first_split + index % splits;
      if (split > block.last_split) continue;
      kernel.attend_split(problem, block.kv_head, block.row, block.rows, split, partials.get() + index * floats);
    }
  });
  for (int64_t index = 0; index < blocks; ++index) {
    const Block block(problem, index);
    float* const total = partials.get() + index * splits * floats;
    for (int64_t split = 1; split <= block.last_split - block.first_split; ++split) {
      kernel.merge(total, total + split * floats, problem.head_dim);
    }
    kernel.finish(problem, block.kv_head, block.row, block.rows, total);
  }
}

void attend(const AttentionProblem& problem) {
  const AttentionKernel& kernel = *kKernels[instruction_set()];
  const int64_t blocks = Block::count(problem);
  int64_t splits = 1;
  for (int64_t index = 0; index < (problem.rows() + kRowBlock - 1) / kRowBlock; ++index) {
    const Block block(problem, index);
    splits = std::max(splits, block.last_split - block.first_split + 1);
  }
  const int64_t keys = problem.last_visible(problem.rows() - 1) - problem.first_visible(0) + 1;
  const int64_t threads = executorch::extension::get_thread_count();
  const bool serial = threads == 1 || problem.kv_heads * problem.rows() * keys * problem.head_dim < kSerialWork;
  if (serial || splits == 1 || blocks >= 2 * threads) {
    attend_by_block(kernel, problem, serial);
  } else {
    attend_by_split(kernel, problem, splits);
  }
}

Tensor& attention_out(KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
                      const Tensor& input_pos, int64_t window, Tensor& out) {
  if (!arguments_fit(q, k, v, input_pos, window)) {
    return refuse(context, out, "g4::cpu_attention was called with tensors that do not fit together");
  }
  if (!make_room(out, {1, q.size(2), q.size(1), q.size(3)})) {
    return refuse(context, out, "g4::cpu_attention was called with an output of another shape or type than its result");
  }
  const int64_t* positions = input_pos.const_data_ptr<int64_t>();
  const AttentionProblem problem{
      q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(),
      out.mutable_data_ptr<float>(), positions, q.size(1), k.size(1), q.size(2), q.size(3), k.size(2), window,
      positions[q.size(2) - 1]};
  if (!positions_ascend(problem)) {
    return refuse(context, out, "g4::cpu_attention needs positions that start at 0 or later and never decrease");
  }
  attend(problem);
  return out;
}

}  // namespace

void attention_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  attention_out(context, arguments[0]->toTensor(), arguments[1]->toTensor(), arguments[2]->toTensor(),
                arguments[3]->toTensor(), arguments[4]->toInt(), arguments[5]->toTensor());
}

}  // namespace g4
