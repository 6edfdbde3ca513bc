// Compiled once per instruction set with G4_KERNEL (the name of the table) and G4_LANES (floats per vector) defined.
// Everything here has internal linkage and nothing from the standard library is instantiated: a function shared between
// the copies could be taken from the one whose instructions this machine lacks.
#include "attention_kernel.h"

#include <math.h>
#include <string.h>

namespace g4 {
namespace {

constexpr int kLanes = G4_LANES;
static_assert(kKeyBlock % kLanes == 0, "the block of scores is a whole number of vectors");

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VecInt __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef float Vec4 __attribute__((vector_size(4 * sizeof(float))));

inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, Vec x) { memcpy(p, &x, sizeof(x)); }

inline float horizontal_sum(Vec x) {
  Vec4 part[kLanes / 4];
  memcpy(part, &x, sizeof(x));
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

// e^x for x <= 0, relative error below 2e-7; 0 for x below -87, where float has no normal numbers left.
inline Vec exp_nonpositive(Vec x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const VecInt representable = x >= -87.0f;
  const Vec clamped = (Vec)((VecInt)x & representable);
  const Vec shifted = clamped * kLog2E + kRound;
  const Vec n = shifted - kRound;
  const Vec f = (clamped - n * kLn2High) - n * kLn2Low;
  // Taylor coefficients suffice on |f| <= ln(2) / 2.
  Vec p = f * (1.0f / 5040) + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const VecInt exponent = (VecInt)shifted << 23;
  return (Vec)(((VecInt)p + exponent) & representable);
}

// scores[r][j] = q[r] . k[j] for two keys at once: eight independent chains of multiply-adds.
template <int kKeys>
inline void dot_block(const float* const* q, const float* const* keys, int64_t head_dim, float* scores) {
  Vec sum[kRowBlock][kKeys] = {};
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vec key[kKeys];
    for (int j = 0; j < kKeys; ++j) key[j] = load(keys[j] + d);
    for (int r = 0; r < kRowBlock; ++r) {
      const Vec query = load(q[r] + d);
      for (int j = 0; j < kKeys; ++j) sum[r][j] += query * key[j];
    }
  }
  for (int r = 0; r < kRowBlock; ++r) {
    for (int j = 0; j < kKeys; ++j) {
      float total = horizontal_sum(sum[r][j]);
      for (int64_t tail = d; tail < head_dim; ++tail) total += q[r][tail] * keys[j][tail];
      scores[r * kKeyBlock + j] = total;
    }
  }
}

// acc[r] = acc[r] * scale[r] + sum over keys [begin, end) of weights[r][j] * values[j]
inline void accumulate_values(const float* const* values, int64_t begin, int64_t end, const float* weights,
                              const float* scale, int64_t head_dim, float* acc) {
  constexpr int kUnroll = 2;
  int64_t d = 0;
  for (; d + kUnroll * kLanes <= head_dim; d += kUnroll * kLanes) {
    Vec sum[kRowBlock][kUnroll];
    for (int r = 0; r < kRowBlock; ++r) {
      for (int u = 0; u < kUnroll; ++u) sum[r][u] = load(acc + r * head_dim + d + u * kLanes) * scale[r];
    }
    for (int64_t j = begin; j < end; ++j) {
      Vec value[kUnroll];
      for (int u = 0; u < kUnroll; ++u) value[u] = load(values[j] + d + u * kLanes);
      for (int r = 0; r < kRowBlock; ++r) {
        for (int u = 0; u < kUnroll; ++u) sum[r][u] += weights[r * kKeyBlock + j] * value[u];
      }
    }
    for (int r = 0; r < kRowBlock; ++r) {
      for (int u = 0; u < kUnroll; ++u) store(acc + r * head_dim + d + u * kLanes, sum[r][u]);
    }
  }
  for (; d < head_dim; ++d) {
    for (int r = 0; r < kRowBlock; ++r) {
      float sum = acc[r * head_dim + d] * scale[r];
      for (int64_t j = begin; j < end; ++j) sum += weights[r * kKeyBlock + j] * values[j][d];
      acc[r * head_dim + d] = sum;
    }
  }
}

// Turns the scores of one row into weights relative to its new maximum; returns the factor for what it has so far.
inline float reweight(float* scores, float& maximum, float& sum) {
  float highest = maximum;
  for (int64_t j = 0; j < kKeyBlock; ++j) highest = scores[j] > highest ? scores[j] : highest;
  if (highest == -INFINITY) {
    memset(scores, 0, kKeyBlock * sizeof(float));
    return 1.0f;
  }
  Vec total = {};
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    const Vec weight = exp_nonpositive(load(scores + j) - highest);
    store(scores + j, weight);
    total += weight;
  }
  const float scale = highest == maximum ? 1.0f : expf(maximum - highest);
  sum = sum * scale + horizontal_sum(total);
  maximum = highest;
  return scale;
}

void attend_split(const AttentionProblem& problem, int64_t kv_head, int64_t row, int64_t rows, int64_t split,
                  float* partial) {
  const int64_t head_dim = problem.head_dim;
  float* maxima = partial;
  float* sums = maxima + kRowBlock;
  float* acc = sums + kRowBlock;
  memset(partial, 0, partial_floats(head_dim) * sizeof(float));

  // A short block repeats its last row, so that the loops have constant bounds; the copies are computed and dropped.
  const float* q[kRowBlock];
  int64_t first[kRowBlock], last[kRowBlock];
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t r = 0; r < kRowBlock; ++r) {
    const int64_t source = row + (r < rows ? r : rows - 1);
    maxima[r] = -INFINITY;
    q[r] = problem.q_row(kv_head, source);
    first[r] = problem.first_visible(source);
    last[r] = problem.last_visible(source);
    begin = first[r] < begin ? first[r] : begin;
    end = last[r] + 1 > end ? last[r] + 1 : end;
  }
  begin = begin > split * kSplitKeys ? begin : split * kSplitKeys;
  end = end < (split + 1) * kSplitKeys ? end : (split + 1) * kSplitKeys;

  const float* k = problem.k + kv_head * problem.slots * head_dim;
  const float* v = problem.v + kv_head * problem.slots * head_dim;
  for (int64_t block = begin / kKeyBlock * kKeyBlock; block < end; block += kKeyBlock) {
    const int64_t from = begin > block ? begin - block : 0;
    const int64_t to = end - block < kKeyBlock ? end - block : kKeyBlock;
    const float* keys[kKeyBlock];
    const float* values[kKeyBlock];
    int64_t slot = (block + from) % problem.slots;
    for (int64_t j = from; j < to; ++j) {
      keys[j] = k + slot * head_dim;
      values[j] = v + slot * head_dim;
      if (++slot == problem.slots) slot = 0;
    }
    alignas(64) float scores[kRowBlock * kKeyBlock];
    int64_t j = from;
    for (; j + 2 <= to; j += 2) dot_block<2>(q, keys + j, head_dim, scores + j);
    if (j < to) dot_block<1>(q, keys + j, head_dim, scores + j);

    float scale[kRowBlock];
    for (int64_t r = 0; r < kRowBlock; ++r) {
      float* row_scores = scores + r * kKeyBlock;
      for (int64_t i = 0; i < kKeyBlock; ++i) {
        if (i < from || i >= to || block + i < first[r] || block + i > last[r]) row_scores[i] = -INFINITY;
      }
      scale[r] = reweight(row_scores, maxima[r], sums[r]);
    }
    accumulate_values(values, from, to, scores, scale, head_dim, acc);
  }
}

void merge(float* into, const float* from, int64_t head_dim) {
  for (int64_t r = 0; r < kRowBlock; ++r) {
    const float maximum = into[r] > from[r] ? into[r] : from[r];
    if (maximum == -INFINITY) continue;
    const float old_scale = into[r] == maximum ? 1.0f : expf(into[r] - maximum);
    const float new_scale = from[r] == maximum ? 1.0f : expf(from[r] - maximum);
    into[r] = maximum;
    float& sum = into[kRowBlock + r];
    sum = sum * old_scale + from[kRowBlock + r] * new_scale;
    float* acc = into + 2 * kRowBlock + r * head_dim;
    const float* other = from + 2 * kRowBlock + r * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) acc[d] = acc[d] * old_scale + other[d] * new_scale;
  }
}

void finish(const AttentionProblem& problem, int64_t kv_head, int64_t row, int64_t rows, const float* partial) {
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = partial[kRowBlock + r];
    const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
    const float* acc = partial + 2 * kRowBlock + r * problem.head_dim;
    float* out = problem.out_row(kv_head, row + r);
    for (int64_t d = 0; d < problem.head_dim; ++d) out[d] = acc[d] * inverse;
  }
}

}  // namespace

const AttentionKernel G4_KERNEL = {attend_split, merge, finish};

}  // namespace g4
