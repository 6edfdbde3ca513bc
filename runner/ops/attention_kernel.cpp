// Compiled once per instruction set: see vectors.h.
#include "attention_kernel.h"
#include "vectors.h"

#include <math.h>
#include <string.h>

namespace g4 {
namespace {

static_assert(kKeyBlock % kLanes == 0, "the block of scores is a whole number of vectors");

// e^x for x <= 0, relative error below 2e-7; 0 for x below -87, where float has no normal numbers left.
inline Vec exp_nonpositive(Vec x) {
  const VecInt representable = x >= -87.0f;
  const Reduced reduced = reduce((Vec)((VecInt)x & representable));
  const Vec power = scale_by_power(exp_slope(reduced.f) * reduced.f + 1.0f, reduced.shifted);
  return (Vec)((VecInt)power & representable);
}

// scores[r][j] = q[r] . keys[j] for two keys at once: eight independent chains of multiply-adds.
inline void dot_pair(const float* const* q, const float* const* keys, int64_t head_dim, float* scores) {
  Vec sum[kTileRows][2] = {};
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    const Vec first = load(keys[0] + d), second = load(keys[1] + d);
    for (int r = 0; r < kTileRows; ++r) {
      const Vec query = load(q[r] + d);
      sum[r][0] += query * first;
      sum[r][1] += query * second;
    }
  }
  float lanes[kTileRows * 2 * kLanes], totals[kTileRows * 2];
  memcpy(lanes, sum, sizeof(lanes));
  horizontal_sums<kLanes, kTileRows * 2>(lanes, totals);
  for (int r = 0; r < kTileRows; ++r) {
    for (int j = 0; j < 2; ++j) {
      float total = totals[r * 2 + j];
      for (int64_t tail = d; tail < head_dim; ++tail) total += q[r][tail] * keys[j][tail];
      scores[r * kKeyBlock + j] = total;
    }
  }
}

// acc[r] += weights[r][j] * values[j] for two keys, in the order of the keys. Walks whole rows: the accumulators stay in
// the first-level cache, and values are read once, in a row, as prefetchers like it.
inline void accumulate_pair(const float* const* values, const float* weights, int64_t head_dim, float* acc) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    const Vec first = load(values[0] + d), second = load(values[1] + d);
    for (int r = 0; r < kTileRows; ++r) {
      Vec sum = load(acc + r * head_dim + d);
      sum += weights[r * kKeyBlock] * first;
      sum += weights[r * kKeyBlock + 1] * second;
      store(acc + r * head_dim + d, sum);
    }
  }
  for (; d < head_dim; ++d) {
    for (int r = 0; r < kTileRows; ++r) {
      acc[r * head_dim + d] += weights[r * kKeyBlock] * values[0][d];
      acc[r * head_dim + d] += weights[r * kKeyBlock + 1] * values[1][d];
    }
  }
}

inline void rescale(float scale, int64_t head_dim, float* acc) {
  if (scale == 1.0f) return;
  for (int64_t d = 0; d < head_dim; ++d) acc[d] *= scale;
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

// The keys and values of the positions block + [from, to), and which of those there are.
struct KeyBlock {
  int64_t block, from, to;
  const float* keys[kKeyBlock];
  const float* values[kKeyBlock];

  // Keys are processed in pairs; a pair that is only half inside reads its inner key twice, and the copy is masked.
  int64_t first_pair() const { return from & ~int64_t{1}; }
  int64_t last_pair() const { return (to - 1) & ~int64_t{1}; }

  KeyBlock(const AttentionProblem& problem, int64_t kv_head, int64_t start, int64_t begin, int64_t end)
      : block(start),
        from(begin > start ? begin - start : 0),
        to(end - start < kKeyBlock ? end - start : kKeyBlock) {
    const int64_t head_dim = problem.head_dim, head = kv_head * problem.slots * head_dim;
    int64_t slot = (block + from) % problem.slots;
    for (int64_t j = from; j < to; ++j) {
      keys[j] = problem.k + head + slot * head_dim;
      values[j] = problem.v + head + slot * head_dim;
      if (++slot == problem.slots) slot = 0;
    }
    keys[first_pair()] = keys[from];
    values[first_pair()] = values[from];
    keys[last_pair() + 1] = keys[to - 1];
    values[last_pair() + 1] = values[to - 1];
  }
};

// kTileRows rows that go through a block of keys together. A short tile repeats its last row, so that the loops have
// constant bounds; the copies are computed and dropped.
struct Tile {
  const float* q[kTileRows];
  int64_t first[kTileRows], last[kTileRows];

  Tile(const AttentionProblem& problem, int64_t kv_head, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t source = row + (r < rows ? r : rows - 1);
      q[r] = problem.q_row(kv_head, source);
      first[r] = problem.first_visible(source);
      last[r] = problem.last_visible(source);
    }
  }

  void attend(const KeyBlock& keys, int64_t head_dim, float* maxima, float* sums, float* acc) const {
    alignas(64) float scores[kTileRows * kKeyBlock];
    for (int64_t j = keys.first_pair(); j <= keys.last_pair(); j += 2) dot_pair(q, keys.keys + j, head_dim, scores + j);
    for (int64_t r = 0; r < kTileRows; ++r) {
      float* row_scores = scores + r * kKeyBlock;
      const int64_t from = first[r] - keys.block > keys.from ? first[r] - keys.block : keys.from;
      const int64_t to = last[r] + 1 - keys.block < keys.to ? last[r] + 1 - keys.block : keys.to;
      for (int64_t j = 0; j < kKeyBlock; ++j) row_scores[j] = j >= from && j < to ? row_scores[j] : -INFINITY;
      rescale(reweight(row_scores, maxima[r], sums[r]), head_dim, acc + r * head_dim);
    }
    for (int64_t j = keys.first_pair(); j <= keys.last_pair(); j += 2) {
      accumulate_pair(keys.values + j, scores + j, head_dim, acc);
    }
  }
};

void attend_split(const AttentionProblem& problem, int64_t kv_head, int64_t row, int64_t rows, int64_t split,
                  float* partial) {
  const int64_t head_dim = problem.head_dim;
  float* maxima = partial;
  float* sums = maxima + kRowBlock;
  float* acc = sums + kRowBlock;
  memset(partial, 0, partial_floats(head_dim) * sizeof(float));
  for (int64_t r = 0; r < kRowBlock; ++r) maxima[r] = -INFINITY;

  // Positions ascend with the rows, so the first row sees the oldest key and the last row the newest.
  const int64_t oldest = problem.first_visible(row), newest = problem.last_visible(row + rows - 1);
  const int64_t begin = oldest > split * kSplitKeys ? oldest : split * kSplitKeys;
  const int64_t end = newest + 1 < (split + 1) * kSplitKeys ? newest + 1 : (split + 1) * kSplitKeys;
  for (int64_t block = begin / kKeyBlock * kKeyBlock; block < end; block += kKeyBlock) {
    const KeyBlock keys(problem, kv_head, block, begin, end);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Tile tile(problem, kv_head, row + r, rows - r);
      tile.attend(keys, head_dim, maxima + r, sums + r, acc + r * head_dim);
    }
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
