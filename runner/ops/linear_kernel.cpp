// Compiled once per instruction set with G4_KERNEL (the name of the table) defined, without contraction: activations
// must round to the same codes everywhere. Everything here has internal linkage and nothing from the standard library
// is instantiated: a function shared between the copies could be taken from the one whose instructions this machine
// lacks.
#include "linear_kernel.h"

#include "linear_vector.h"

namespace g4 {
namespace {

template <int kBitsOf, int kGroupOf, bool kMinOf>
struct Format {
  static constexpr int kBits = kBitsOf, kGroup = kGroupOf;
  static constexpr bool kMin = kMinOf;
  static constexpr int kLevels = kMin ? 2 : 1;
  static constexpr int kGroups = kChunk / kGroup;
  static constexpr int kCodesBytes = kBits == 8 ? kChunk : kChunk / 2;  // of a chunk
  static constexpr int kHighBytes = kBits == 6 ? kChunk / 4 : 0;
  static constexpr int kSubBytes = kGroups * kLevels;
};

int zero_point(const LinearWeight& weight) {
  if (weight.bits == 8) return kUnsignedCodes ? 128 : 0;
  return weight.has_min ? 0 : 1 << (weight.bits - 1);
}

template <typename F>
constexpr bool has_zero_point() {
  return F::kBits == 8 ? kUnsignedCodes : !F::kMin;
}

// ----------------------------------------------------------------------------------------------------- activations

// Where the four activations that meet word j (0..7) of half h of block b lie in their chunk. 512-bit vectors take the
// first 16 weights of the same half of all four blocks together, then the last 16: what a lane adds up then belongs to
// one group, and a shuffle within 128 bits spreads the groups' scales.
constexpr bool takes_blocks_together(int bits) { return kLanes == 16 && bits != 8; }

constexpr int word_position(int bits, int block, int half, int word) {
  return takes_blocks_together(bits) ? 128 * half + 64 * (word / 4) + 16 * block + 4 * (word % 4)
                                     : 64 * block + 32 * half + 4 * word;
}

inline Vec magnitude(Vec x) { return (Vec)((VecInt)x & 0x7fffffff); }

// Rounds 32 activations; returns their scale.
inline float quantize_run(const float* x, int8_t* codes, int32_t* values) {
  constexpr int kVectors = kRun / kLanes;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer, ties to even, at the end
  Vec highest = magnitude(load<Vec>(x));
  for (int i = 1; i < kVectors; ++i) {
    const Vec candidate = magnitude(load<Vec>(x + i * kLanes));
    highest = candidate > highest ? candidate : highest;
  }
  const float scale = highest_lane(highest) / 127;
  const bool is_zero = scale < 0x1p-126f;  // its reciprocal could be infinite
  const float inverse = is_zero ? 0.0f : 1 / scale;
  for (int i = 0; i < kVectors; ++i) {
    const Vec shifted = load<Vec>(x + i * kLanes) * inverse + kRound;
    const VecInt rounded = (VecInt)shifted - (VecInt)(Vec{} + kRound);
    store(values + i * kLanes, rounded);
    store(codes + i * kLanes, __builtin_convertvector(rounded, VecQuarter));
  }
  return is_zero ? 0.0f : scale;
}

// Rounds the `columns` activations of one chunk; what lies past them is zero.
inline void quantize_chunk(const LinearWeight& weight, const Activations& to, int64_t place, const float* x,
                           int64_t columns) {
  const int zero = zero_point(weight);
  int8_t* const codes = to.codes + place * kChunk;
  float* const factors = to.factors + place * kMostGroups;
  float* const totals = to.totals + place * kMostGroups;
  int32_t* const offsets = to.offsets + place * kMostGroups;
  for (int run = 0; run < kChunk / kRun; ++run) {
    int8_t run_codes[kRun] = {};
    int32_t values[kRun] = {};
    const float scale = run * kRun < columns ? quantize_run(x + run * kRun, run_codes, values) : 0.0f;
    memcpy(codes + word_position(weight.bits, run / 2, run % 2, 0), run_codes, kRun / 2);
    memcpy(codes + word_position(weight.bits, run / 2, run % 2, 4), run_codes + kRun / 2, kRun / 2);
    const int32_t sums[2] = {sum_16(values), sum_16(values + kRun / 2)};
    factors[2 * run] = scale;
    if (weight.group == kRun) {
      factors[2 * run + 1] = -scale * (sums[0] + sums[1]);
      offsets[run] = -zero * (sums[0] + sums[1]);
    } else {
      factors[2 * run + 1] = scale;
      for (int i = 0; i < 2; ++i) {
        totals[2 * run + i] = -scale * sums[i];
        offsets[2 * run + i] = -zero * sums[i];
      }
    }
  }
}

void quantize(const LinearWeight& weight, const Activations& to, const float* x, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    for (int64_t chunk = 0; chunk < to.chunks(); ++chunk) {
      const float* const from = x + row * to.columns + chunk * kChunk;
      quantize_chunk(weight, to, chunk * to.rows + row, from, to.columns - chunk * kChunk);
    }
  }
}

// What belongs to one chunk of one row of activations.
struct ActivationChunk {
  const int8_t* codes;
  const float* factors;
  const float* totals;
  const int32_t* offsets;

  ActivationChunk(const Activations& x, int64_t chunk, int64_t row) {
    const int64_t place = chunk * x.rows + row;
    codes = x.codes + place * kChunk;
    factors = x.factors + place * kMostGroups;
    totals = x.totals + place * kMostGroups;
    offsets = x.offsets + place * kMostGroups;
  }

  // Asks for a part of the next kRows rows, which is the whole after all groups.
  template <typename F, int kRows>
  G4_INLINE void prefetch_next(int group) const {
    constexpr int kBytes = kRows * kChunk / F::kGroups;
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(codes + kRows * kChunk + group * kBytes + i);
    if (group < kRows) __builtin_prefetch(factors + (kRows + group) * kMostGroups);
  }

  // To the same row's next chunk.
  G4_INLINE void advance(int64_t rows) {
    codes += rows * kChunk;
    factors += rows * kMostGroups;
    totals += rows * kMostGroups;
    offsets += rows * kMostGroups;
  }

  template <typename F>
  float scale(int64_t row, int group) const {
    return factors[row * kMostGroups + (F::kGroup == kRun ? 2 * group : group)];
  }

  // Minus the scale times the sum of the group's codes.
  template <typename F>
  float total(int64_t row, int group) const {
    return F::kGroup == kRun ? factors[row * kMostGroups + 2 * group + 1] : totals[row * kMostGroups + group];
  }
};

constexpr int64_t kLine = 64;  // of a cache
// Bytes of codes between what is read and what is prefetched.
constexpr int64_t kAhead = 16384;

// What belongs to one chunk of one row of a weight.
struct WeightChunk {
  const uint8_t* codes;
  const uint8_t* high;
  const int8_t* sub;
  const uint16_t* step;

  template <typename F>
  static WeightChunk at(const LinearWeight& weight, int64_t row, int64_t chunk) {
    return {weight.codes + row * weight.codes_stride() + chunk * F::kCodesBytes,
            F::kBits == 6 ? weight.high + row * weight.high_stride() + chunk * F::kHighBytes : nullptr,
            weight.sub + row * weight.sub_stride() + chunk * F::kSubBytes,
            weight.step + row * weight.step_stride() + chunk * F::kLevels};
  }

  // Asks for the chunk. Prefetching past the weight is harmless.
  template <typename F>
  G4_INLINE void prefetch() const {
    for (int64_t i = 0; i < F::kCodesBytes; i += kLine) prefetch_line(codes + i);
    if (F::kBits == 6) prefetch_line(high);
    prefetch_line(sub);
  }

  // To the next chunk of the row.
  template <typename F>
  G4_INLINE void advance() {
    codes += F::kCodesBytes;
    high += F::kHighBytes;
    sub += F::kSubBytes;
    step += F::kLevels;
  }
};

// Blocks of the chunk: 4, except that the last chunk of a row may have fewer.
inline int blocks_in(int64_t columns, int64_t chunk) {
  const int64_t left = columns / kBlock - chunk * (kChunk / kBlock);
  return left < kChunk / kBlock ? static_cast<int>(left) : kChunk / kBlock;
}

// ------------------------------------------------------------------------------------------ one row of activations

#if defined(__AVX512VNNI__)
#include "linear_matvec_avx512.h"
#else
#include "linear_matvec.h"
#endif

// A slab is the chunks whose activations stay in the first-level cache while rows of the weight stream through it.
constexpr int64_t kMostSlabChunks = 48;
// Rows that go through a slab before the next one.
constexpr int64_t kSlabRows = 32;

// Adds chunks [from, to) of one row.
template <typename F>
inline void add_chunks(const LinearWeight& weight, const Activations& x, int64_t x_row, int64_t row, int64_t from,
                       int64_t to, RowSum& total) {
  // Whole rows ahead, as the rows that follow go through the same slab.
  const int64_t rows_ahead = (kAhead + weight.codes_stride() - 1) / weight.codes_stride();
  RowSum sum = total;
  WeightChunk w = WeightChunk::at<F>(weight, row, from);
  WeightChunk ahead = WeightChunk::at<F>(weight, row + rows_ahead, from);
  ActivationChunk activations(x, from, x_row);
  const int64_t whole = weight.columns / kChunk;
  for (int64_t chunk = from; chunk < (to < whole ? to : whole); ++chunk) {
    ahead.prefetch<F>();
    add_chunk<F>(sum, w, activations, kChunk / kBlock);
    w.advance<F>();
    ahead.advance<F>();
    activations.advance(x.rows);
  }
  if (to > whole) add_chunk<F>(sum, w, activations, weight.columns % kChunk / kBlock);
  total = sum;
}

template <typename F>
void matvec_as(const LinearWeight& weight, const Activations& x, int64_t x_row, int64_t first, int64_t last,
               float* out) {
  const int64_t chunks = x.chunks(), slabs = (chunks + kMostSlabChunks - 1) / kMostSlabChunks;
  for (int64_t row = first; row < last; row += kSlabRows) {
    const int64_t rows = last - row < kSlabRows ? last - row : kSlabRows;
    RowSum sums[kSlabRows];
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t from = slab * chunks / slabs, to = (slab + 1) * chunks / slabs;
      for (int64_t r = 0; r < rows; ++r) add_chunks<F>(weight, x, x_row, row + r, from, to, sums[r]);
    }
    for (int64_t r = 0; r < rows; ++r) out[row + r] = sums[r].template total<F>();
  }
}

// ---------------------------------------------------------------------------------------- many rows of activations

// Rows of activations that share each load of weights into registers.
constexpr int kTileRows = kLanes == 16 ? 6 : 3;
// Vectors of weight rows that share each load of an activation.
constexpr int kTileVectors = 2;
constexpr int kRowBlock = kTileVectors * kLanes;

// One chunk of kRowBlock rows of a weight, unpacked: a lane per row.
struct WeightTile {
  VecInt codes[kChunk / 4][kTileVectors];  // four weights of each row
  Vec scales[kMostGroups][kTileVectors];
  Vec minima[kMostGroups][kTileVectors];
};

inline void transpose_words(const uint8_t* first, int64_t stride, int64_t existing, int count, VecInt* transposed) {
#if defined(__AVX512VNNI__)
  for (int i = 0; i < count; i += 16) {
    if (count - i < 8) {
      transpose_words_plain(first + 4 * i, stride, existing, count - i, transposed + i);
    } else {
      transpose_words_16(first + 4 * i, stride, existing, count - i, transposed + i);
    }
  }
#else
  transpose_words_plain(first, stride, existing, count, transposed);
#endif
}

template <typename F>
inline void unpack_codes(const WeightChunk& w, const LinearWeight& weight, int64_t existing, int blocks, int v,
                         WeightTile& tile) {
  VecInt words[F::kCodesBytes / 4];
  transpose_words(w.codes, weight.codes_stride(), existing, blocks * (F::kBits == 8 ? 16 : 8), words);
  if constexpr (F::kBits == 8) {
    const int flip = kUnsignedCodes ? static_cast<int>(0x80808080) : 0;
    for (int i = 0; i < 16 * blocks; ++i) tile.codes[i][v] = words[i] ^ flip;
    return;
  }
  VecInt high[16];
  if (F::kBits == 6) transpose_words(w.high, weight.high_stride(), existing, 4 * blocks, high);
#pragma GCC unroll 4
  for (int block = 0; block < kChunk / kBlock; ++block) {
    if (block >= blocks) break;
#pragma GCC unroll 8
    for (int word = 0; word < 8; ++word) {
      for (int half = 0; half < 2; ++half) {
        VecInt codes = (words[8 * block + word] >> (4 * half)) & 0x0f0f0f0f;
        if (F::kBits == 6) {
          const int shift = 2 * (2 * (block % 2) + half);
          codes |= ((high[8 * (block / 2) + word] >> shift) & 0x03030303) << 4;
        }
        tile.codes[16 * block + 8 * half + word][v] = codes;
      }
    }
  }
}

template <typename F>
inline void unpack_levels(const WeightChunk& w, const LinearWeight& weight, int64_t existing, int blocks, int v,
                          WeightTile& tile) {
  VecInt words[F::kSubBytes / 4];
  if (blocks == kChunk / kBlock) {
    transpose_words_plain((const uint8_t*)w.sub, weight.sub_stride(), existing, F::kSubBytes / 4, words);
  } else {
    uint8_t padded[kLanes][F::kSubBytes] = {};
    for (int r = 0; r < kLanes; ++r) {
      const int8_t* const row = w.sub + weight.sub_stride() * (r < existing ? r : existing - 1);
      memcpy(padded[r], row, blocks * F::kSubBytes / 4);
    }
    transpose_words_plain(padded[0], F::kSubBytes, kLanes, F::kSubBytes / 4, words);
  }
  int32_t halves[F::kLevels][kLanes];
  for (int r = 0; r < kLanes; ++r) {
    const uint16_t* const step = w.step + weight.step_stride() * (r < existing ? r : existing - 1);
    for (int level = 0; level < F::kLevels; ++level) halves[level][r] = step[level];
  }
  const Vec step = half_to_float(load<VecInt>(halves[0])), step_min = half_to_float(load<VecInt>(halves[F::kMin]));
#pragma GCC unroll 32
  for (int i = 0; i < F::kSubBytes; ++i) {
    const Vec sub = to_float((words[i / 4] << (24 - 8 * (i % 4))) >> 24);
    if (F::kMin && i % 2 == 1) {
      tile.minima[i / 2][v] = sub * step_min;
    } else {
      tile.scales[i / F::kLevels][v] = sub * step;
    }
  }
}

template <typename F>
inline void unpack(const LinearWeight& weight, int64_t first, int64_t chunk, WeightTile& tile) {
  const int blocks = blocks_in(weight.columns, chunk);
  for (int v = 0; v < kTileVectors; ++v) {
    // Rows past the last repeat it; their results are dropped.
    const int64_t row = first + v * kLanes < weight.rows ? first + v * kLanes : weight.rows - 1;
    const WeightChunk w = WeightChunk::at<F>(weight, row, chunk);
    unpack_codes<F>(w, weight, weight.rows - row, blocks, v, tile);
    unpack_levels<F>(w, weight, weight.rows - row, blocks, v, tile);
  }
}

G4_INLINE void prefetch_bytes(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) prefetch_line(static_cast<const char*>(from) + i);
}

// Asks for a part of the next kRowBlock rows, which is the whole after all chunks. In the order of memory: the chunks
// of the rows lie too far apart.
template <typename F>
G4_INLINE void prefetch_next(const LinearWeight& weight, int64_t first, int64_t chunk) {
  const WeightChunk w = WeightChunk::at<F>(weight, first + kRowBlock, chunk * kRowBlock);
  prefetch_bytes(w.codes, kRowBlock * F::kCodesBytes);
  prefetch_bytes(w.high, kRowBlock * F::kHighBytes);
  prefetch_bytes(w.sub, kRowBlock * F::kSubBytes);
  prefetch_bytes(w.step, kRowBlock * F::kLevels * 2);
}

// sums[r][n] += the part of kRows results that comes from one chunk.
template <typename F, int kRows>
inline void multiply(const WeightTile& tile, const ActivationChunk& x, int blocks, float* sums) {
  Vec sum[kRows][kTileVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = load<Vec>(sums + r * kRowBlock + v * kLanes);
  }
  for (int g = 0; g < blocks * (kBlock / F::kGroup); ++g) {
    const int run = g * F::kGroup / kRun, word = g * F::kGroup % kRun / 4;
    const int8_t* const codes = x.codes + word_position(F::kBits, run / 2, run % 2, word);
    x.prefetch_next<F, kRows>(g);
    VecInt dot[kRows][kTileVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) {
        dot[r][v] = VecInt{};
        if (has_zero_point<F>()) dot[r][v] += x.offsets[r * kMostGroups + g];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < F::kGroup / 4; ++i) {
      const VecInt* const weights = tile.codes[g * (F::kGroup / 4) + i];
      for (int r = 0; r < kRows; ++r) {
        const VecInt four = VecInt{} + (int)load_word(codes + r * kChunk + word_position(F::kBits, 0, 0, i));
        for (int v = 0; v < kTileVectors; ++v) dot[r][v] = dot4<F::kBits>(dot[r][v], weights[v], four);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) {
        sum[r][v] = multiply_add(to_float(dot[r][v]) * x.scale<F>(r, g), tile.scales[g][v], sum[r][v]);
        if (F::kMin) sum[r][v] = multiply_add(Vec{} + x.total<F>(r, g), tile.minima[g][v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) store(sums + r * kRowBlock + v * kLanes, sum[r][v]);
  }
}

// The rows that no whole tile has left.
template <typename F, int kRows>
inline void multiply_rest(const WeightTile& tile, const ActivationChunk& x, int blocks, int64_t rows, float* sums) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply<F, kRows>(tile, x, blocks, sums);
    multiply_rest<F, kRows - 1>(tile, x, blocks, rows, sums);
  }
}

template <typename F>
void matmul_as(const LinearWeight& weight, const Activations& x, int64_t row, int64_t rows, int64_t first,
               float* sums, float* out) {
  memset(sums, 0, rows * kRowBlock * sizeof(float));
  for (int64_t chunk = 0; chunk < weight.chunks(); ++chunk) {
    WeightTile tile;
    unpack<F>(weight, first, chunk, tile);
    prefetch_next<F>(weight, first, chunk);
    const int blocks = blocks_in(weight.columns, chunk);
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
      multiply<F, kTileRows>(tile, ActivationChunk(x, chunk, row + r), blocks, sums + r * kRowBlock);
    }
    const ActivationChunk rest(x, chunk, row + r);
    multiply_rest<F, kTileRows - 1>(tile, rest, blocks, rows - r, sums + r * kRowBlock);
  }
  const int64_t existing = weight.rows - first < kRowBlock ? weight.rows - first : kRowBlock;
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(out + (row + r) * weight.rows + first, sums + r * kRowBlock, existing * sizeof(float));
  }
}

// --------------------------------------------------------------------------------------------------------- formats

template <typename Call>
inline void with_format(const LinearWeight& weight, Call call) {
  const bool wide = weight.group == 32, minimum = weight.has_min;
  switch (weight.bits) {
    case 4:
      if (wide) return minimum ? call(Format<4, 32, true>{}) : call(Format<4, 32, false>{});
      return minimum ? call(Format<4, 16, true>{}) : call(Format<4, 16, false>{});
    case 6:
      if (wide) return minimum ? call(Format<6, 32, true>{}) : call(Format<6, 32, false>{});
      return minimum ? call(Format<6, 16, true>{}) : call(Format<6, 16, false>{});
    default:
      if (wide) return minimum ? call(Format<8, 32, true>{}) : call(Format<8, 32, false>{});
      return minimum ? call(Format<8, 16, true>{}) : call(Format<8, 16, false>{});
  }
}

void matvec(const LinearWeight& weight, const Activations& x, int64_t row, int64_t first, int64_t last, float* out) {
  with_format(weight, [&](auto format) { matvec_as<decltype(format)>(weight, x, row, first, last, out); });
}

void matmul(const LinearWeight& weight, const Activations& x, int64_t row, int64_t rows, int64_t first, float* sums,
            float* out) {
  with_format(weight, [&](auto format) { matmul_as<decltype(format)>(weight, x, row, rows, first, sums, out); });
}

// ------------------------------------------------------------------------------------------------- float32 weights

constexpr int kFloatRows = 4;

// sums[i] = x . rows[i]
inline void dot_float(const float* x, const float* const* rows, int64_t columns, float* sums) {
  Vec sum[kFloatRows][2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= columns; k += 2 * kLanes) {
    for (int i = 0; i < kFloatRows; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int64_t at = k + half * kLanes;
        sum[i][half] = multiply_add(load<Vec>(x + at), load<Vec>(rows[i] + at), sum[i][half]);
      }
    }
  }
  for (int i = 0; i < kFloatRows; ++i) {
    sums[i] = sum_lanes(sum[i][0] + sum[i][1]);
    for (int64_t tail = k; tail < columns; ++tail) sums[i] += x[tail] * rows[i][tail];
  }
}

void matmul_float(const float* x, int64_t x_rows, const float* weight, int64_t rows, int64_t columns, int64_t first,
                  int64_t last, float* out) {
  for (int64_t row = first; row < last; row += kFloatRows) {
    const float* tile[kFloatRows];
    // A short tile repeats its last row, so that the loops have constant bounds.
    for (int64_t i = 0; i < kFloatRows; ++i) tile[i] = weight + (row + i < last ? row + i : last - 1) * columns;
    for (int64_t m = 0; m < x_rows; ++m) {
      float sums[kFloatRows];
      dot_float(x + m * columns, tile, columns, sums);
      for (int64_t i = 0; i < kFloatRows && row + i < last; ++i) out[m * rows + row + i] = sums[i];
    }
  }
}

}  // namespace

const LinearKernel G4_KERNEL = {kRowBlock, kLanes == 16 ? 7 : 2, quantize, matvec, matmul, matmul_float};

}  // namespace g4
