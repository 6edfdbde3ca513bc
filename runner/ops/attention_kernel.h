// The inner loops of g4::cpu_attention, compiled once per instruction set (see ops/CMakeLists.txt) and chosen at run time.
#pragma once

#include <cstdint>

namespace g4 {

// Shapes and pointers of one call; every tensor is contiguous float32, `positions` is int64.
struct AttentionProblem {
  const float* q;            // [heads, queries, head_dim]
  const float* k;            // [kv_heads, slots, head_dim]
  const float* v;            // [kv_heads, slots, head_dim]
  float* out;                // [queries, heads, head_dim]
  const int64_t* positions;  // [queries]
  int64_t heads, kv_heads, queries, head_dim, slots;
  int64_t window;  // 0 means that every earlier position is visible
  int64_t last;    // the position in the newest slot: positions[queries - 1]

  int64_t group() const { return heads / kv_heads; }
  // A row is one (query, head of the group) pair of a KV head, numbered query by query.
  int64_t rows() const { return queries * group(); }
  const float* q_row(int64_t kv_head, int64_t row) const {
    return q + (head(kv_head, row) * queries + row / group()) * head_dim;
  }
  // Queries first, as the output projection reads them.
  float* out_row(int64_t kv_head, int64_t row) const {
    return out + (row / group() * heads + head(kv_head, row)) * head_dim;
  }

  // Positions first ... last of the keys that the query of a row sees. Older ones have left the cache.
  int64_t last_visible(int64_t row) const { return positions[row / group()]; }
  int64_t first_visible(int64_t row) const {
    const int64_t oldest = last - slots + 1 > 0 ? last - slots + 1 : 0;
    const int64_t first = window > 0 ? last_visible(row) - window + 1 : 0;
    return first > oldest ? first : oldest;
  }

 private:
  int64_t head(int64_t kv_head, int64_t row) const { return kv_head * group() + row % group(); }
};

// Rows that share each load of a key or value into registers.
constexpr int64_t kTileRows = 4;
// Rows that share each load of a block of keys into the cache.
constexpr int64_t kRowBlock = 16;
// Keys between two updates of the running maximum.
constexpr int64_t kKeyBlock = 64;
// Keys per partial result. Splits and key blocks start at multiples of absolute positions, so that the order of additions
// for a row, and with it every bit of the result, depends neither on the number of threads nor on the chunk it is in.
constexpr int64_t kSplitKeys = 512;

// Online softmax of up to kRowBlock rows: maxima, sums and unnormalized outputs, in that order.
constexpr int64_t partial_floats(int64_t head_dim) { return kRowBlock * (2 + head_dim); }

struct AttentionKernel {
  // Writes the partial result of rows [row, row + rows) over the positions of one split.
  void (*attend_split)(const AttentionProblem&, int64_t kv_head, int64_t row, int64_t rows, int64_t split,
                       float* partial);
  // Adds a later split's partial result to an earlier one.
  void (*merge)(float* into, const float* from, int64_t head_dim);
  // Normalizes a partial result into the output; a row that saw no key becomes zero.
  void (*finish)(const AttentionProblem&, int64_t kv_head, int64_t row, int64_t rows, const float* partial);
};

extern const AttentionKernel kAttentionPortable;
#if defined(__x86_64__)
extern const AttentionKernel kAttentionAvx2;
extern const AttentionKernel kAttentionAvx512;
#endif

}  // namespace g4
