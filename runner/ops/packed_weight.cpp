#include "packed_weight.h"

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

namespace g4 {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;

bool is_packed(const Tensor& tensor, ScalarType type, int64_t rows) {
  return tensor.dim() >= 2 && tensor.scalar_type() == type && tensor.size(0) == rows &&
         executorch::runtime::tensor_is_default_dim_order(tensor);
}

// Sets bits, columns and group of a format that the shapes belong to. By shapes alone, 8-bit weights in groups of 16
// with up to 128 columns would be 4-bit ones in groups of 32; see reference.py.
bool find_format(int64_t words, int64_t groups, int64_t steps, int64_t columns, LinearWeight& weight) {
  const int candidates[] = {weight.high == nullptr ? 4 : 6, weight.high == nullptr ? 8 : 6};
  for (const int bits : candidates) {
    const int64_t k = words * (bits == 8 ? 4 : 8);
    const bool divides = k > 0 && k % (bits == 6 ? 2 * kBlock : kBlock) == 0;
    const bool is_32 = groups * 32 == k, is_16 = groups * 16 == k;
    weight.bits = bits;
    weight.columns = k;
    weight.group = is_32 ? 32 : 16;
    if (divides && (is_32 || is_16) && steps == weight.chunks() && (columns == 0 || columns == k)) return true;
  }
  return false;
}

}  // namespace

std::optional<LinearWeight> packed_weight(Arguments four, int64_t columns) {
  const Tensor& codes = four[0]->toTensor();
  const Tensor* const high = four[1]->isNone() ? nullptr : &four[1]->toTensor();
  const Tensor& sub = four[2]->toTensor();
  const Tensor& step = four[3]->toTensor();
  const int64_t rows = codes.dim() == 2 ? codes.size(0) : 0;
  const bool are_pairs = sub.dim() == 3 && step.dim() == 3 && sub.size(2) == 2 && step.size(2) == 2;
  const bool levels_fit = are_pairs || (sub.dim() == 2 && step.dim() == 2);
  if (rows == 0 || !is_packed(codes, ScalarType::Int, rows) || !is_packed(sub, ScalarType::Char, rows) ||
      !is_packed(step, ScalarType::Half, rows) || !levels_fit) {
    return std::nullopt;
  }
  const bool high_fits = high == nullptr || (is_packed(*high, ScalarType::Int, rows) && high->dim() == 2 &&
                                             high->size(1) * 2 == codes.size(1));
  if (!high_fits) return std::nullopt;
  LinearWeight weight{};
  weight.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  weight.high = high == nullptr ? nullptr : static_cast<const uint8_t*>(high->const_data_ptr());
  weight.sub = static_cast<const int8_t*>(sub.const_data_ptr());
  weight.step = static_cast<const uint16_t*>(step.const_data_ptr());
  weight.rows = rows;
  weight.has_min = sub.dim() == 3;
  if (!find_format(codes.size(1), sub.size(1), step.size(1), columns, weight)) return std::nullopt;
  return weight;
}

}  // namespace g4
