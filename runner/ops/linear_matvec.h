// One row of activations times rows of a packed weight, for vectors of up to 32 bytes; a part of linear_kernel.cpp.

// Codes of a vector's worth of weights, from byte `at` of half `half` of a block on.
template <typename F>
G4_INLINE VecInt unpack_codes(const WeightChunk& w, int block, int half, int at) {
  if constexpr (F::kBits == 8) return load<VecInt>(w.codes + 64 * block + 32 * half + at);
  VecWord codes = (load<VecWord>(w.codes + 32 * block + at) >> (4 * half)) & 0x0f0f0f0f;
  if constexpr (F::kBits == 6) {
    const VecWord high = load<VecWord>(w.high + 32 * (block / 2) + at);
    codes |= ((high >> (2 * (2 * (block % 2) + half))) & 0x03030303) << 4;
  }
  return (VecInt)codes;
}

// A vector covers one group, or two of 16. Their values, in every lane or in the first lane of each.
template <typename F, bool kEveryLane, typename V, typename T>
G4_INLINE V spread(const T* values) {
  if constexpr (4 * kLanes <= F::kGroup) {
    if constexpr (kEveryLane) return V{} + values[0];
    return V{values[0]};
  } else {
    if constexpr (kEveryLane) {
      return V{values[0], values[0], values[0], values[0], values[1], values[1], values[1], values[1]};
    }
    return V{values[0], 0, 0, 0, values[1], 0, 0, 0};
  }
}

struct RowSum {
  Vec sums[2] = {};
  Vec minimum = {};  // in the odd lanes
  float minima = 0;

  template <typename F>
  float total() const {
    float total = sum_lanes(sums[0] + sums[1]) + minima;
    if (F::kMin) {
      for (int lane = 1; lane < kLanes; lane += 2) total += minimum[lane];
    }
    return total;
  }

  template <typename F>
  G4_INLINE void add(const WeightChunk& w, const ActivationChunk& x, int blocks) {
    constexpr int kSpread = F::kGroup == 32 && F::kMin ? 2 : 1;
    float scales[kMostGroups];
    find_scales<F>(w, x, blocks, scales);
#pragma GCC unroll 8
    for (int run = 0; run < 2 * blocks; ++run) {
      for (int at = 0; at < kRun; at += 4 * kLanes) {
        const int group = (kRun * run + at) / F::kGroup;
        VecInt dot = {};
        if (has_zero_point<F>() && at % F::kGroup == 0) dot = spread<F, false, VecInt>(x.offsets + group);
        dot = dot4<F::kBits>(dot, unpack_codes<F>(w, run / 2, run % 2, at), load<VecInt>(x.codes + kRun * run + at));
        sums[run % 2] = multiply_add(to_float(dot), spread<F, true, Vec>(scales + kSpread * group), sums[run % 2]);
      }
    }
  }

 private:
  // The activations' factors times the groups' scales. Adds what the minima contribute.
  template <typename F>
  G4_INLINE void find_scales(const WeightChunk& w, const ActivationChunk& x, int blocks, float* scales) {
    const bool as_factors_lie = F::kMin == (F::kGroup == 32) && blocks == kChunk / kBlock;
    if (as_factors_lie) {
      const Vec step = F::kMin ? half_to_float(pair_lanes(load_word(w.step))) : half_to_float(VecInt{} + w.step[0]);
      for (int i = 0; i < kMostGroups; i += kLanes) {
        const VecInt sub = __builtin_convertvector(load<VecQuarter>(w.sub + i), VecInt);
        const Vec levels = to_float(sub) * step * load<Vec>(x.factors + i);
        store(scales + i, levels);
        if (F::kMin) minimum += levels;
      }
      return;
    }
    constexpr int kSpread = F::kGroup == 32 && F::kMin ? 2 : 1;
    const float step = half_to_float(w.step[0]), step_min = half_to_float(w.step[F::kMin]);
    for (int g = 0; g < blocks * (kBlock / F::kGroup); ++g) {
      scales[kSpread * g] = step * w.sub[g * F::kLevels] * x.scale<F>(0, g);
      if (F::kMin) minima += step_min * w.sub[g * F::kLevels + F::kMin] * x.total<F>(0, g);
    }
  }

  // The low half of a word in the even lanes, the high half in the odd lanes.
  static G4_INLINE VecInt pair_lanes(uint32_t word) {
    VecInt even;
    for (int lane = 0; lane < kLanes; ++lane) even[lane] = lane % 2 == 0 ? 0xffff : 0;
    const VecInt both = VecInt{} + (int32_t)word;
    return (both & even) | ((both >> 16) & ~even);
  }
};

template <typename F>
G4_INLINE void add_chunk(RowSum& sum, const WeightChunk& w, const ActivationChunk& x, int blocks) {
  sum.add<F>(w, x, blocks);
}
