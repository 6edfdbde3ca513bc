// CRC-32 (RFC 1952) by carry-less multiplication: several times faster than zlib's tables.
//
// A CRC is the remainder of a polynomial over GF(2). 64 bytes that lie n bits before the end of what was read may be
// replaced by others with the same remainder: their product with x^n mod P. So 64 bytes are carried along ("folded")
// over the data, 128 bits at a time, and only the last 64 go through a table.
// V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009.

#include <array>
#include <cstdint>
#include <cstring>

#define G4_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;  // bits reflected: the highest is the constant term

constexpr std::array<uint32_t, 256> Table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
    table[byte] = value;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kTable = Table();

uint32_t ByTable(uint32_t value, const uint8_t* data, size_t count) {
  for (; count > 0; --count, ++data) value = (value >> 8) ^ kTable[(value ^ *data) & 255];
  return value;
}

// x^bits mod P, reflected. A product of reflected numbers is one bit short: they are kept shifted by it.
constexpr int64_t Power(int bits) {
  uint32_t value = 0x80000000;
  for (int i = 0; i < bits; ++i) value = (value >> 1) ^ (value & 1 ? kPolynomial : 0);
  return static_cast<int64_t>(static_cast<uint64_t>(value) << 1);
}

constexpr int kLanes = 4;
constexpr size_t kStride = 16 * kLanes;

__attribute__((target("pclmul,sse4.1"))) uint32_t ByFolding(uint32_t value, const uint8_t* data, size_t count) {
  const __m128i factors = _mm_set_epi64x(Power(8 * kStride - 32), Power(8 * kStride + 32));
  __m128i carried[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    carried[lane] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + lane);
  }
  carried[0] = _mm_xor_si128(carried[0], _mm_cvtsi32_si128(static_cast<int>(value)));
  for (data += kStride, count -= kStride; count >= kStride; data += kStride, count -= kStride) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + lane);
      const __m128i low = _mm_clmulepi64_si128(carried[lane], factors, 0x00);
      const __m128i high = _mm_clmulepi64_si128(carried[lane], factors, 0x11);
      carried[lane] = _mm_xor_si128(_mm_xor_si128(low, high), next);
    }
  }
  uint8_t rest[kStride];
  std::memcpy(rest, carried, kStride);
  return ByTable(ByTable(0, rest, kStride), data, count);
}

}  // namespace

G4_EXPORT int g4_crc32_is_fast() { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }

// Continue `crc` over more data, as zlib's crc32 does; only where it is fast.
G4_EXPORT uint32_t g4_crc32(uint32_t crc, const uint8_t* data, size_t count) {
  return ~(count < kStride ? ByTable(~crc, data, count) : ByFolding(~crc, data, count));
}

#else

G4_EXPORT int g4_crc32_is_fast() { return 0; }

#endif
