// Vectors of one instruction set for linear_kernel.cpp: GCC's vector extensions, and intrinsics where those fall short.
// Included by one translation unit per instruction set; everything has internal linkage.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace g4 {
namespace {

constexpr int kLanes = G4_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecWord __attribute__((vector_size(kLanes * 4)));
typedef int16_t VecShort __attribute__((vector_size(kLanes * 4)));
typedef int8_t VecQuarter __attribute__((vector_size(kLanes)));

// For the parts of an inner loop: what is not inlined goes through memory.
#define G4_INLINE inline __attribute__((always_inline))

template <typename V>
inline V load(const void* p) {
  V x;
  memcpy(&x, p, sizeof(x));
  return x;
}

template <typename V>
inline void store(void* p, V x) {
  memcpy(p, &x, sizeof(x));
}

inline uint32_t load_word(const void* p) {
  uint32_t word;
  memcpy(&word, p, sizeof(word));
  return word;
}

// GCC deletes calls of functions that do nothing but prefetch: they must be inlined.
// To the second-level cache: the first is too small for what is far ahead.
G4_INLINE void prefetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

inline Vec to_float(VecInt x) { return __builtin_convertvector(x, Vec); }

// The one place where a multiplication and an addition may round once: the build turns contraction off.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512VNNI__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512VNNI__)
inline float sum_lanes(Vec x) { return _mm512_reduce_add_ps((__m512)x); }
inline float highest_lane(Vec x) { return _mm512_reduce_max_ps((__m512)x); }
inline int32_t sum_16(const int32_t* values) { return _mm512_reduce_add_epi32(_mm512_loadu_si512(values)); }
#else
inline float sum_lanes(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline float highest_lane(Vec x) {
  float highest = x[0];
  for (int i = 1; i < kLanes; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

inline int32_t sum_16(const int32_t* values) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += values[i];
  return sum;
}
#endif

// 8-bit codes are signed; an instruction that multiplies unsigned codes only gets them 128 higher.
#if defined(__AVX512VNNI__)
constexpr bool kUnsignedCodes = true;
#else
constexpr bool kUnsignedCodes = false;
#endif

// sum + the products of four weight codes and four activations in every lane. kBits tells the range of the codes:
// 0..15, 0..63, and of 8 bits -128..127 or, where kUnsignedCodes, 0..255. Activations are -127..127.
template <int kBits>
inline VecInt dot4(VecInt sum, VecInt codes, VecInt x) {
#if defined(__AVX512VNNI__)
  return (VecInt)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#elif defined(__AVX2__)
  // Two products fit into 16 bits: 63 * 127 * 2 = 16002 and 128 * 127 * 2 = 32512. Signed codes lend their sign to x.
  const __m256i unsigned_codes = kBits == 8 ? _mm256_abs_epi8((__m256i)codes) : (__m256i)codes;
  const __m256i factors = kBits == 8 ? _mm256_sign_epi8((__m256i)x, (__m256i)codes) : (__m256i)x;
  const __m256i pairs = _mm256_maddubs_epi16(unsigned_codes, factors);
  return sum + (VecInt)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  // Even and odd bytes as 16-bit lanes: two products fit as they do above.
  const VecShort c = (VecShort)codes, y = (VecShort)x;
  const VecShort pairs = ((c << 8) >> 8) * ((y << 8) >> 8) + (c >> 8) * (y >> 8);
  return sum + (((VecInt)pairs << 16) >> 16) + ((VecInt)pairs >> 16);
#endif
}

// float16 in the low halves of the lanes. Infinity and NaN, which no weight holds, become large numbers.
inline Vec half_to_float(VecInt halves) {
  const Vec magnitude = (Vec)((halves & 0x7fff) << 13) * 0x1p112f;
  return (Vec)((VecInt)magnitude | ((halves & 0x8000) << 16));
}

inline float half_to_float(uint16_t half) { return half_to_float(VecInt{half})[0]; }

// transposed[i][r] = the i-th of `count` words of row r; rows lie `stride` bytes apart, except that those from
// `existing` on repeat the last one.
inline void transpose_words_plain(const uint8_t* first, int64_t stride, int64_t existing, int count,
                                  VecInt* transposed) {
  for (int r = 0; r < kLanes; ++r) {
    const uint8_t* const row = first + stride * (r < existing ? r : existing - 1);
    for (int i = 0; i < count; ++i) memcpy((char*)(transposed + i) + 4 * r, row + 4 * i, 4);
  }
}

#if defined(__AVX512VNNI__)
// The same for up to 16 words by shuffles: pairs, quads, then 128-bit lanes of four rows each.
inline void transpose_words_16(const uint8_t* first, int64_t stride, int64_t existing, int count,
                               VecInt* transposed) {
  const __mmask16 mask = count >= 16 ? 0xffff : (1 << count) - 1;
  __m512i rows[16], quads[16];
  for (int r = 0; r < 16; ++r) {
    rows[r] = _mm512_maskz_loadu_epi32(mask, first + stride * (r < existing ? r : existing - 1));
  }
  for (int r = 0; r < 16; r += 4) {
    const __m512i a = _mm512_unpacklo_epi32(rows[r], rows[r + 1]), b = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[r + 2], rows[r + 3]);
    const __m512i d = _mm512_unpackhi_epi32(rows[r + 2], rows[r + 3]);
    quads[r] = _mm512_unpacklo_epi64(a, c);
    quads[r + 1] = _mm512_unpackhi_epi64(a, c);
    quads[r + 2] = _mm512_unpacklo_epi64(b, d);
    quads[r + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // quads[4 q + i] holds, in 128-bit lane l, word 4 l + i of rows 4 q .. 4 q + 3.
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0xdd);
    transposed[i] = (VecInt)_mm512_shuffle_i32x4(a, c, 0x88);
    transposed[4 + i] = (VecInt)_mm512_shuffle_i32x4(b, d, 0x88);
    transposed[8 + i] = (VecInt)_mm512_shuffle_i32x4(a, c, 0xdd);
    transposed[12 + i] = (VecInt)_mm512_shuffle_i32x4(b, d, 0xdd);
  }
}
#endif

}  // namespace
}  // namespace g4
