// g4::sample.out(logits, position, temperature, top_k, top_p, min_p, seed, *, out): the next token of each row.
// The definition is gemma4cli/model/sampling.py; this follows it in the same float32 steps and draws the same noise, but
// computes exponentials and noise only for the tokens that are still in the running. Python's side is
// gemma4cli/kernels/cpu_sampling.
#include "operators.h"

#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace g4 {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

namespace {

constexpr float kRange = 26.0f;
constexpr int kHalvings = 24;
constexpr float kNever = std::numeric_limits<float>::lowest();

struct Settings {
  int64_t position;
  float temperature;
  int64_t top_k;
  float top_p;
  float min_p;
  int64_t seed;
};

struct Candidate {
  int64_t token;
  float score;
  float mass;
};

// Scrambles 32 bits.
uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21F0AAADu;
  x ^= x >> 15;
  x *= 0x735A2D97u;
  return x ^ (x >> 15);
}

class Noise {
 public:
  Noise(int64_t seed, int64_t position) {
    const uint64_t bits = static_cast<uint64_t>(seed);
    key_ = mix(static_cast<uint32_t>(bits) + 0x9E3779B9u);
    key_ = mix((key_ ^ static_cast<uint32_t>(bits >> 32)) + 0x85EBCA6Bu);
    key_ = mix((key_ ^ static_cast<uint32_t>(position)) + 0xC2B2AE35u);
    second_ = mix(key_ + 0x27D4EB2Fu);
  }

  // Gumbel noise of one token.
  float operator()(int64_t token) const {
    const uint32_t hashed = mix(mix(static_cast<uint32_t>(token) ^ key_) + second_);
    const float uniform = (static_cast<float>(hashed) + 0.5f) * 0x1p-32f;
    return -std::log(-std::log1p(-std::min(uniform, 1.0f - 0x1p-24f)));
  }

 private:
  uint32_t key_;
  uint32_t second_;
};

// The largest t, up to the bisection's resolution, for which `reached(t)`; kNever when none is in range.
template <typename Reached>
float threshold(Reached reached) {
  float low = -kRange;
  float step = kRange;
  for (int halving = 0; halving < kHalvings; ++halving) {
    step *= 0.5f;
    if (reached(low + step)) low += step;
  }
  return low > -kRange ? low : kNever;
}

int64_t argmax(const float* values, int64_t count) {
  return std::max_element(values, values + count) - values;
}

int64_t count_from(const std::vector<float>& scores, float least) {
  int64_t count = 0;
  for (const float score : scores) count += score >= least;
  return count;
}

int64_t draw(const float* logits, int64_t count, const Settings& settings) {
  const int64_t best = argmax(logits, count);
  if (!(settings.temperature > 0.0f)) return best;

  const float highest = std::clamp(logits[best], -1e38f, 1e38f);
  const float temperature = std::max(settings.temperature, 1e-30f);
  std::vector<float> scores(count);
  for (int64_t token = 0; token < count; ++token) {
    scores[token] = (std::clamp(logits[token], -1e38f, 1e38f) - highest) / temperature;
  }

  float least = kNever;
  if (settings.top_k > 0 && settings.top_k < count) {
    least = threshold([&](float t) { return count_from(scores, t) >= settings.top_k; });
  }
  std::vector<Candidate> candidates;
  double total = 0.0;
  for (int64_t token = 0; token < count; ++token) {
    if (scores[token] < least) continue;
    candidates.push_back({token, scores[token], std::exp(scores[token])});
    total += candidates.back().mass;
  }

  if (settings.top_p < 1.0f) {
    const double wanted = static_cast<double>(settings.top_p) * total;
    const float enough = threshold([&](float t) {
      double mass = 0.0;
      for (const Candidate& candidate : candidates) mass += candidate.score >= t ? candidate.mass : 0.0f;
      return mass >= wanted;
    });
    least = std::max(least, enough);
  }

  const Noise noise(settings.seed, settings.position);
  int64_t chosen = best;
  float highest_draw = -std::numeric_limits<float>::infinity();
  for (const Candidate& candidate : candidates) {
    if (candidate.score < least || candidate.mass < settings.min_p) continue;
    const float drawn = candidate.score + noise(candidate.token);
    if (drawn > highest_draw) {
      highest_draw = drawn;
      chosen = candidate.token;
    }
  }
  return chosen;
}

bool is_row_of(const Tensor& tensor, ScalarType type, int64_t rows) {
  return tensor.dim() == 1 && tensor.size(0) == rows && tensor.scalar_type() == type;
}

Tensor& sample_out(
    KernelRuntimeContext& context, const Tensor& logits, const Tensor& position, const Tensor& temperature,
    const Tensor& top_k, const Tensor& top_p, const Tensor& min_p, const Tensor& seed, Tensor& out) {
  const int64_t rows = logits.dim() == 2 ? logits.size(0) : 0;
  const bool fits = rows > 0 && logits.size(1) > 0 && logits.scalar_type() == ScalarType::Float &&
                    executorch::runtime::tensor_is_default_dim_order(logits) &&
                    is_row_of(position, ScalarType::Long, rows) && is_row_of(temperature, ScalarType::Float, rows) &&
                    is_row_of(top_k, ScalarType::Long, rows) && is_row_of(top_p, ScalarType::Float, rows) &&
                    is_row_of(min_p, ScalarType::Float, rows) && is_row_of(seed, ScalarType::Long, rows) &&
                    is_row_of(out, ScalarType::Long, rows);
  if (!fits) {
    ET_LOG(Error, "g4::sample was called with tensors that do not match its signature");
    context.fail(Error::InvalidArgument);
    return out;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Settings settings{
        position.const_data_ptr<int64_t>()[row], temperature.const_data_ptr<float>()[row],
        top_k.const_data_ptr<int64_t>()[row],    top_p.const_data_ptr<float>()[row],
        min_p.const_data_ptr<float>()[row],      seed.const_data_ptr<int64_t>()[row]};
    out.mutable_data_ptr<int64_t>()[row] =
        draw(logits.const_data_ptr<float>() + row * logits.size(1), logits.size(1), settings);
  }
  return out;
}

}  // namespace

void sample_out_boxed(KernelRuntimeContext& context, Arguments arguments) {
  sample_out(context, arguments[0]->toTensor(), arguments[1]->toTensor(), arguments[2]->toTensor(),
             arguments[3]->toTensor(), arguments[4]->toTensor(), arguments[5]->toTensor(), arguments[6]->toTensor(),
             arguments[7]->toTensor());
}

}  // namespace g4
