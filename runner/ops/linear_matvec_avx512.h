// One row of activations times rows of a packed weight with AVX-512 VNNI; a part of linear_kernel.cpp.


// Which words and bytes of a short last chunk exist.
struct ChunkMasks {
  __mmask16 codes[4];
  __mmask16 high;
  __mmask32 sub;
};

constexpr uint64_t low_bits(int count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

template <typename F>
constexpr ChunkMasks masks_of(int blocks) {
  ChunkMasks masks{};
  const uint64_t words = low_bits(blocks * (F::kBits == 8 ? 16 : 8));
  for (int i = 0; i < 4; ++i) masks.codes[i] = static_cast<__mmask16>(words >> (16 * i));
  masks.high = static_cast<__mmask16>(low_bits(4 * blocks));
  masks.sub = static_cast<__mmask32>(low_bits(blocks * F::kSubBytes / 4));
  return masks;
}

// The codes of a chunk as unsigned bytes, in the order of the activations (word_position).
template <typename F>
G4_INLINE void unpack_chunk(const WeightChunk& w, const ChunkMasks& masks, __m512i* codes) {
  if constexpr (F::kBits == 8) {
    for (int i = 0; i < 4; ++i) {
      const __m512i loaded = _mm512_maskz_loadu_epi32(masks.codes[i], w.codes + 64 * i);
      codes[i] = _mm512_xor_si512(loaded, _mm512_set1_epi8(-128));
    }
    return;
  }
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i first = _mm512_maskz_loadu_epi32(masks.codes[0], w.codes);
  const __m512i second = _mm512_maskz_loadu_epi32(masks.codes[1], w.codes + 64);
  // The first 16 bytes of each block, and the last.
  const __m512i bytes[2] = {_mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xdd)};
  for (int i = 0; i < 2; ++i) {
    codes[i] = _mm512_and_si512(bytes[i], low);
    codes[2 + i] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), low);
  }
  if constexpr (F::kBits == 6) {
    // Blocks 0 and 2 have their bits 4 and 5 at bits 0 and 1 (low half) or 2 and 3 (high half), blocks 1 and 3 four
    // higher. Rotations bring them to their place; what crosses a byte is masked.
    const __m512i both = _mm512_maskz_loadu_epi32(masks.high, w.high);
    const __m512i place = _mm512_set1_epi8(0x30);
    const __m512i turns[2] = {_mm512_set_epi64(0, 0, 0x400000004, 0x400000004, 0, 0, 0x400000004, 0x400000004),
                              _mm512_set_epi64(0x1e0000001e, 0x1e0000001e, 0x200000002, 0x200000002, 0x1e0000001e,
                                               0x1e0000001e, 0x200000002, 0x200000002)};
    const __m512i pairs[2] = {_mm512_shuffle_i32x4(both, both, 0xa0), _mm512_shuffle_i32x4(both, both, 0xf5)};
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 2; ++i) {
        const __m512i turned = _mm512_rolv_epi32(pairs[i], turns[half]);
        // place ? turned : codes
        codes[2 * half + i] = _mm512_ternarylogic_epi32(place, turned, codes[2 * half + i], 0xca);
      }
    }
  }
}

G4_INLINE __m512 broadcast_halves(uint32_t pair) { return _mm512_cvtph_ps(_mm256_set1_epi32(static_cast<int>(pair))); }

// The activations' factors times the groups' scales, group g of 32 in lane 2 g and of 16 in lane g. Adds to `minimum`
// what the minima contribute, of groups of 32 in the odd lanes only.
template <typename F>
G4_INLINE __m512 chunk_scales(const WeightChunk& w, const ActivationChunk& x, const ChunkMasks& masks,
                              __m512& minimum) {
  const __m512 factors = _mm512_loadu_ps(x.factors);
  if constexpr (F::kGroup == 32 && F::kMin) {
    const __m512 sub = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(masks.sub, w.sub)));
    const __m512 levels = _mm512_mul_ps(_mm512_mul_ps(sub, broadcast_halves(load_word(w.step))), factors);
    minimum = _mm512_add_ps(minimum, levels);
    return levels;
  }
  const __m512 step = broadcast_halves(w.step[0] * 0x10001u);
  if constexpr (F::kGroup == 32) {
    const __m512i sub = _mm512_cvtepi8_epi64(_mm_maskz_loadu_epi8(masks.sub, w.sub));
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sub), step), factors);
  }
  if constexpr (!F::kMin) {
    const __m512i sub = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(masks.sub, w.sub));
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sub), step), factors);
  }
  const __m256i both = _mm256_maskz_loadu_epi8(masks.sub, w.sub);
  const __m512i sub = _mm512_cvtepi16_epi32(_mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8));
  const __m512i sub_min = _mm512_cvtepi16_epi32(_mm256_srai_epi16(both, 8));
  const __m512 minima = _mm512_mul_ps(_mm512_cvtepi32_ps(sub_min), broadcast_halves(w.step[F::kMin] * 0x10001u));
  minimum = _mm512_fmadd_ps(minima, _mm512_loadu_ps(x.totals), minimum);
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sub), step), factors);
}

// How the lanes of the dot products of a chunk belong to its groups. Blocks taken together in groups of 32 add their
// two vectors of a half, so that there are two sums, otherwise four.
template <typename F>
struct Lanes {
  static constexpr bool kFolded = F::kBits != 8 && F::kGroup == 32;
  static constexpr int kSums = kFolded ? 2 : 4;

  static constexpr int group(int sum, int lane) {
    if (kFolded) return 2 * (lane / 4) + sum;
    if (F::kBits == 8) return (64 * sum + 4 * lane) / F::kGroup;
    return 4 * (lane / 4) + sum;  // sums: first and last 16 of the low half, then of the high half
  }
  static constexpr bool leads_group(int sum, int lane) { return lane == 0 || group(sum, lane) != group(sum, lane - 1); }
};

struct LaneIndex {
  alignas(64) int32_t lanes[16];
};

// The group of each lane of a sum, times `spread`.
template <typename F>
constexpr LaneIndex group_index(int sum, int spread) {
  LaneIndex index{};
  for (int lane = 0; lane < 16; ++lane) index.lanes[lane] = spread * Lanes<F>::group(sum, lane);
  return index;
}

template <typename F>
constexpr __mmask16 leading_lanes(int sum) {
  __mmask16 mask = 0;
  for (int lane = 0; lane < 16; ++lane) mask |= Lanes<F>::leads_group(sum, lane) << lane;
  return mask;
}

// The scales of the groups that the lanes of a sum belong to.
template <typename F, int kSum>
G4_INLINE __m512 lane_scales(__m512 scales) {
  if constexpr (F::kBits != 8) {
    return _mm512_permute_ps(scales, 0x55 * (Lanes<F>::kFolded ? 2 * kSum : kSum));
  } else {
    static constexpr LaneIndex kIndex = group_index<F>(kSum, F::kGroup == 32 ? 2 : 1);
    return _mm512_permutexvar_ps(_mm512_load_si512(kIndex.lanes), scales);
  }
}

// What a sum starts from: the correction for the zero point in the first lane of each group.
template <typename F, int kSum>
G4_INLINE __m512i first_dot(const ActivationChunk& x) {
  if constexpr (!has_zero_point<F>()) {
    return _mm512_setzero_si512();
  } else {
    static constexpr LaneIndex kIndex = group_index<F>(kSum, 1);
    const __m512i offsets = _mm512_loadu_si512(x.offsets);
    return _mm512_maskz_permutexvar_epi32(leading_lanes<F>(kSum), _mm512_load_si512(kIndex.lanes), offsets);
  }
}

template <typename F, int kSum>
G4_INLINE __m512 add_dot(const __m512i* codes, const ActivationChunk& x, __m512 scales, __m512 sum) {
  __m512i dot = first_dot<F, kSum>(x);
  constexpr int kFirst = Lanes<F>::kFolded ? 2 * kSum : kSum;
  dot = _mm512_dpbusd_epi32(dot, codes[kFirst], _mm512_loadu_si512(x.codes + 64 * kFirst));
  if constexpr (Lanes<F>::kFolded) {
    dot = _mm512_dpbusd_epi32(dot, codes[kFirst + 1], _mm512_loadu_si512(x.codes + 64 * (kFirst + 1)));
  }
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), lane_scales<F, kSum>(scales), sum);
}

struct RowSum {
  __m512 sum = _mm512_setzero_ps();
  __m512 minimum = _mm512_setzero_ps();

  template <typename F>
  G4_INLINE void add(const WeightChunk& w, const ActivationChunk& x, const ChunkMasks& masks) {
    __m512i codes[4];
    unpack_chunk<F>(w, masks, codes);
    const __m512 scales = chunk_scales<F>(w, x, masks, minimum);
    sum = add_dot<F, 0>(codes, x, scales, sum);
    sum = add_dot<F, 1>(codes, x, scales, sum);
    if constexpr (!Lanes<F>::kFolded) {
      sum = add_dot<F, 2>(codes, x, scales, sum);
      sum = add_dot<F, 3>(codes, x, scales, sum);
    }
  }

  template <typename F>
  float total() const {
    const __mmask16 minima = !F::kMin ? 0 : F::kGroup == 32 ? 0xaaaa : 0xffff;
    return _mm512_reduce_add_ps(_mm512_mask_add_ps(sum, minima, sum, minimum));
  }
};

template <typename F>
G4_INLINE void add_chunk(RowSum& sum, const WeightChunk& w, const ActivationChunk& x, int blocks) {
  sum.add<F>(w, x, masks_of<F>(blocks));
}
