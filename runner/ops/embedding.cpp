// g4::cpu_embedding.out(tokens, codes, high, sub, step, factor, *, out): rows of a packed table in float32. The
// definition is dequantize in gemma4cli/kernels/quantized_matmul/format.py; this follows it in the same float32 steps.
#include "operators.h"
#include "packed_weight.h"
#include "support.h"

#include <cstring>

namespace g4 {
namespace {

float half_to_float(uint16_t half) {
  // The bits of a float 2^112 times smaller; a half has 5 bits of exponent, a float 8.
  const uint32_t bits = (half & 0x7fffu) << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof(magnitude));
  magnitude *= 0x1p112f;
  return half & 0x8000 ? -magnitude : magnitude;
}

int code_at(const LinearWeight& weight, int64_t row, int64_t k) {
  if (weight.bits == 8) return static_cast<int8_t>(weight.codes[row * weight.codes_stride() + k]);
  const int64_t half = k % 64 / 32, byte = k % 32;
  int code = weight.codes[row * weight.codes_stride() + k / 64 * 32 + byte] >> (4 * half) & 15;
  if (weight.bits == 6) {
    code |= (weight.high[row * weight.high_stride() + k / 128 * 32 + byte] >> (2 * (k % 128 / 32)) & 3) << 4;
  }
  return code;
}

void dequantize_row(const LinearWeight& weight, int64_t row, float factor, float* out) {
  const int64_t levels = weight.levels();
  const int8_t* const sub = weight.sub + row * weight.sub_stride();
  const uint16_t* const step = weight.step + row * weight.step_stride();
  const int zero = weight.has_min || weight.bits == 8 ? 0 : 1 << (weight.bits - 1);
  for (int64_t first = 0; first < weight.columns; first += weight.group) {
    const int64_t group = first / weight.group * levels, chunk = first / kChunk * levels;
    const float scale = sub[group] * half_to_float(step[chunk]);
    const float minimum = weight.has_min ? sub[group + 1] * half_to_float(step[chunk + 1]) : 0.0f;
    for (int64_t k = first; k < first + weight.group; ++k) {
      out[k] = (scale * static_cast<float>(code_at(weight, row, k) - zero) - minimum) * factor;
    }
  }
}

Tensor& embedding_out(KernelRuntimeContext& context, const Tensor& tokens, Arguments four, double factor, Tensor& out) {
  const auto weight = packed_weight(four, 0);
  if (!weight || tokens.dim() != 2 || tokens.scalar_type() != ScalarType::Long || tokens.size(0) != 1) {
    return refuse(context, out, "g4::cpu_embedding was called with tensors that do not fit together");
  }
  if (!make_room(out, {1, tokens.size(1), weight->columns})) {
    return refuse(context, out, "g4::cpu_embedding was called with an output of another shape than its result");
  }
  for (int64_t t = 0; t < tokens.size(1); ++t) {
    const int64_t token = tokens.const_data_ptr<int64_t>()[t];
    if (token < 0 || token >= weight->rows) {
      return refuse(context, out, "g4::cpu_embedding was called with a token outside its table");
    }
    float* const row = out.mutable_data_ptr<float>() + t * weight->columns;
    dequantize_row(*weight, token, static_cast<float>(factor), row);
  }
  return out;
}

}  // namespace

void embedding_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  embedding_out(context, arguments[0]->toTensor(), {arguments.data() + 1, 4}, arguments[5]->toDouble(),
                arguments[6]->toTensor());
}

}  // namespace g4
