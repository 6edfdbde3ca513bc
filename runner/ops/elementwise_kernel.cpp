// Compiled once per instruction set: see vectors.h.
#include "elementwise_kernel.h"
#include "vectors.h"

#include <math.h>

namespace g4 {
namespace {

inline Vec all(float x) { return Vec{} + x; }

// A whole vector of a row, and the shorter one at its end.
struct Whole {
  Vec load(const float* p) const { return g4::load(p); }
  void store(float* p, Vec x) const { g4::store(p, x); }
};

struct Rest {
  int64_t count;

  Vec load(const float* p) const {
    Vec x = {};
    memcpy(&x, p, count * sizeof(float));
    return x;
  }
  void store(float* p, Vec x) const { memcpy(p, &x, count * sizeof(float)); }
};

// work(i, part) for every vector that begins at value i.
template <typename Work>
inline void for_each_vector(int64_t count, Work work) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) work(i, Whole{});
  if (i < count) work(i, Rest{count - i});
}

// Several sums, because an addition takes longer than the loads that feed it.
inline float sum_of_squares(const float* x, int64_t count) {
  constexpr int kSums = 4;
  Vec sums[kSums] = {};
  int64_t done = 0;
  for (; done + kSums * kLanes <= count; done += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) {
      const Vec value = load(x + done + s * kLanes);
      sums[s] += value * value;
    }
  }
  for_each_vector(count - done, [&](int64_t i, auto part) {
    const Vec value = part.load(x + done + i);
    sums[0] += value * value;
  });
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The RMS norm of a row, vector by vector.
class Normal {
 public:
  Normal(const float* x, const float* weight, float eps, int64_t columns)
      : x_(x), weight_(weight), factor_(1.0f / sqrtf(sum_of_squares(x, columns) / columns + eps)) {}

  template <typename Part>
  Vec operator()(int64_t i, Part part) const {
    const Vec normal = part.load(x_ + i) * factor_;
    return weight_ == nullptr ? normal : normal * part.load(weight_ + i);
  }

 private:
  const float* x_;
  const float* weight_;
  float factor_;
};

void rms_norm(const float* x, const float* weight, float eps, int64_t columns, float* out) {
  const Normal normal(x, weight, eps, columns);
  for_each_vector(columns, [&](int64_t i, auto part) { part.store(out + i, normal(i, part)); });
}

void norm_add(const float* x, const float* weight, float eps, const float* residual, float scale, int64_t columns,
              float* out) {
  const Normal normal(x, weight, eps, columns);
  for_each_vector(columns, [&](int64_t i, auto part) {
    part.store(out + i, (part.load(residual + i) + normal(i, part)) * scale);
  });
}

void norm_rotate(const float* x, const float* weight, float eps, const float* cos, const float* sin, int64_t head_dim,
                 float* out) {
  const Normal normal(x, weight, eps, head_dim);
  const int64_t half = head_dim / 2;
  for_each_vector(half, [&](int64_t i, auto part) {
    const Vec first = normal(i, part), second = normal(half + i, part);
    const Vec c = part.load(cos + i), s = part.load(sin + i);
    part.store(out + i, first * c - second * s);
    part.store(out + half + i, second * c + first * s);
  });
}

// The upper 12 bits of a significand: products of two such numbers are exact.
inline Vec upper(Vec x) { return (Vec)((VecInt)x & ~0xFFF); }

// gelu(x) = x / (1 + 2^e) with e = x * (a + b * x^2), a = -2 sqrt(2 / pi) / ln(2) and b = 0.044715 a. Where 2^e is large,
// an error of e is a relative error of the result, so e is computed as a sum of two floats: relative error below 1e-6.
inline Vec gelu(Vec x) {
  constexpr float kUpperA = -2.3017578125f, kLowerA = -4.50385644e-4f;
  constexpr float kUpperB = -0.102935791015625f, kLowerB = -7.4485643e-6f;
  // Below -10.04 the result has nearly left float's range; from 10 on it is x. In between 2^e is a normal number.
  const VecInt vanishes = x < -10.04f;
  const Vec z = vanishes ? all(-10.04f) : x > 10.0f ? all(10.0f) : x;
  const Vec z_upper = upper(z), z_lower = z - z_upper;
  const Vec square = z * z;
  const Vec square_upper = upper(square), square_lower = (z_upper * z_upper - square_upper) + z_lower * (z + z_upper);
  const Vec slope_upper = upper(kUpperA + kUpperB * square_upper);
  const Vec slope_lower = ((kUpperA - slope_upper) + kUpperB * square_upper) +
                          (kUpperB * square_lower + (kLowerA + kLowerB * square));
  const Vec e_upper = z_upper * slope_upper;
  const Vec e_lower = z_upper * slope_lower + z_lower * (slope_upper + slope_lower);
  const Vec shifted = e_upper + kRound;
  const Vec f = ((e_upper - (shifted - kRound)) + e_lower) * 0.693147181f;
  const Vec result = x / (1.0f + scale_by_power(exp_slope(f) * f + 1.0f, shifted));
  return vanishes ? all(0.0f) : result;
}

void gelu_mul(const float* gate, const float* up, int64_t count, float* out) {
  for_each_vector(count, [&](int64_t i, auto part) {
    part.store(out + i, gelu(part.load(gate + i)) * part.load(up + i));
  });
}

// tanh(x) = -m / (2 + m) with m = e^(-2 |x|) - 1, which keeps its digits where x is small.
inline Vec tanh(Vec x) {
  constexpr int32_t kSign = INT32_MIN;
  constexpr float kOne = 20.0f;  // from here on tanh is 1 in float32
  const Vec magnitude = (Vec)((VecInt)x & ~kSign);
  const Reduced reduced = reduce(-2.0f * (magnitude > kOne ? all(kOne) : magnitude));
  const Vec power = scale_by_power(all(1.0f), reduced.shifted);
  const Vec m = exp_slope(reduced.f) * reduced.f * power + (power - 1.0f);
  return (Vec)((VecInt)(-m / (2.0f + m)) | ((VecInt)x & kSign));
}

void softcap(const float* x, float cap, int64_t count, float* out) {
  const float inverse = 1.0f / cap;
  for_each_vector(count, [&](int64_t i, auto part) { part.store(out + i, tanh(part.load(x + i) * inverse) * cap); });
}

}  // namespace

const ElementwiseKernel G4_KERNEL = {rms_norm, norm_add, norm_rotate, gelu_mul, softcap};

}  // namespace g4
