// The inner loops of g4::cpu_linear and g4::cpu_linear_float, compiled once per instruction set (ops/CMakeLists.txt)
// and chosen at run time.
#pragma once

#include <cstdint>

namespace g4 {

// A chunk is the weights of a row that share one step; the last chunk of a row may be shorter.
constexpr int64_t kChunk = 256;
// A block is 64 weights: the low nibbles of 32 bytes, then the high nibbles. The columns are a whole number of blocks.
constexpr int64_t kBlock = 64;
// Activations are rounded to int8 in runs that share one scale.
constexpr int64_t kRun = 32;
constexpr int64_t kMostGroups = kChunk / 16;

// A packed weight as gemma4cli/kernels/quantized_matmul/format.py lays it out.
struct LinearWeight {
  const uint8_t* codes;
  const uint8_t* high;  // null unless 6-bit
  const int8_t* sub;
  const uint16_t* step;  // float16
  int64_t rows, columns;
  int bits, group;
  bool has_min;

  int64_t chunks() const { return (columns + kChunk - 1) / kChunk; }
  int64_t levels() const { return has_min ? 2 : 1; }
  // Bytes of one row.
  int64_t codes_stride() const { return bits == 8 ? columns : columns / 2; }
  int64_t high_stride() const { return columns / 4; }
  int64_t sub_stride() const { return columns / group * levels(); }
  int64_t step_stride() const { return chunks() * levels(); }  // in values, not bytes
};

// Rows of activations as int8, for one weight format. Everything of a chunk lies together: row r of chunk c has its 256
// codes at codes + (c * rows + r) * 256, in the kernel's own order, and its 16 values at the same place of the others.
struct Activations {
  int64_t rows, columns;
  int8_t* codes;
  // Weights in groups of 32: lane 2 g is the scale of group g and lane 2 g + 1 minus its scale times the sum of its
  // codes, as the scale and the minimum of a weight's group lie; in groups of 16: lane g is the scale of group g.
  float* factors;
  float* totals;     // groups of 16: minus the scale times the sum of the codes of group g
  int32_t* offsets;  // minus the weight's zero point times the sum of the codes of group g

  int64_t chunks() const { return (columns + kChunk - 1) / kChunk; }
};

struct LinearKernel {
  // Rows of the weight that one call of `matmul` multiplies.
  int64_t row_block;
  // From this many rows of activations on, `matmul` is faster than `matvec` row by row.
  int64_t least_matmul_rows;
  // Rounds rows [first, last) of x, contiguous.
  void (*quantize)(const LinearWeight&, const Activations&, const float* x, int64_t first, int64_t last);
  // out[n] = activations[row] . weight[n] for n in [first, last).
  void (*matvec)(const LinearWeight&, const Activations&, int64_t row, int64_t first, int64_t last, float* out);
  // out[m * weight.rows + n] for n in [first, first + row_block) that exist and m in [row, row + rows).
  // `sums` is room for rows * row_block floats.
  void (*matmul)(const LinearWeight&, const Activations&, int64_t row, int64_t rows, int64_t first, float* sums,
                 float* out);
  // out[m * rows + n] = x[m] . weight[n] in float32, for n in [first, last).
  void (*matmul_float)(const float* x, int64_t x_rows, const float* weight, int64_t rows, int64_t columns,
                       int64_t first, int64_t last, float* out);
};

extern const LinearKernel kLinearPortable;
#if defined(__x86_64__)
extern const LinearKernel kLinearAvx2;
extern const LinearKernel kLinearAvx512;
#endif

}  // namespace g4
