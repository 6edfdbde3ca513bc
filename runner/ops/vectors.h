// Vectors for the inner loops that are compiled once per instruction set, with G4_KERNEL (the name of the table) and
// G4_LANES (floats per vector) defined; see CMakeLists.txt.
// Everything in such a source has internal linkage, which is why this header has it, too, and nothing from the standard
// library is instantiated: a function shared between the copies could be taken from the one whose instructions this
// machine lacks.
#pragma once

#include <stdint.h>
#include <string.h>

namespace g4 {
namespace {

constexpr int kLanes = G4_LANES;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t VecInt __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, Vec x) { memcpy(p, &x, sizeof(x)); }

// The sums of kCount vectors at once: halves are added pairwise until every lane is the sum of one vector.
template <int kWidth, int kCount>
inline void horizontal_sums(const float* vectors, float* sums) {
  if constexpr (kWidth == 1) {
    memcpy(sums, vectors, kCount * sizeof(float));
  } else {
    float halved[kCount * kWidth / 2];
    for (int i = 0; i < kCount; ++i) {
      for (int lane = 0; lane < kWidth / 2; ++lane) {
        halved[i * kWidth / 2 + lane] = vectors[i * kWidth + lane] + vectors[i * kWidth + lane + kWidth / 2];
      }
    }
    horizontal_sums<kWidth / 2, kCount>(halved, sums);
  }
}

inline float horizontal_sum(Vec x) {
  float lanes[kLanes], sum;
  store(lanes, x);
  horizontal_sums<kLanes, 1>(lanes, &sum);
  return sum;
}

// 1.5 * 2^23: adding it to a small number leaves the nearest integer in the low bits.
constexpr float kRound = 12582912.0f;

// x = n ln(2) + f with n = shifted - kRound an integer and |f| <= ln(2) / 2. The two parts of ln(2) keep f's digits.
struct Reduced {
  Vec shifted, f;
};

inline Reduced reduce(Vec x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Vec shifted = x * kLog2E + kRound;
  const Vec n = shifted - kRound;
  return {shifted, (x - n * kLn2High) - n * kLn2Low};
}

// (e^f - 1) / f for |f| <= ln(2) / 2, where Taylor coefficients suffice.
inline Vec exp_slope(Vec f) {
  Vec p = f * (1.0f / 5040) + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  return p * f + 1.0f;
}

// x * 2^n for shifted = n + kRound, where x and the result are normal numbers.
inline Vec scale_by_power(Vec x, Vec shifted) { return (Vec)((VecInt)x + ((VecInt)shifted << 23)); }

}  // namespace
}  // namespace g4
