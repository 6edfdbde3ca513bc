// libg4_codes.so: GGUF's usual block formats taken apart into codes, integer scales and steps, for Python (ctypes).
//
// g4_split_…: per block, of what gemma4cli/quant/gguf/blocks.py describes:
//   codes  4-bit types: two codes per byte, the even column in the low nibble; others: a signed byte each, centred
//   sub    an integer scale, or scale and minimum, per group; absent for Q4_0, Q4_1 and Q8_0
//   step   the float16 step, or the steps of scale and minimum, as bits
// g4_pack_…: the same `sub` and `step`, and the GPU's layout of codes (gemma4cli/kernels/quantized_matmul/format.py).
// Its order of nibbles is Q4_K's own, so that most bytes are copied:
//   codes  two codes per byte, 32 columns apart; for Q8_0 a signed byte each
//   high   of Q5_K and Q6_K, the upper two bits of four codes per byte, 32 columns apart
// Source of the formats: ggml's ggml-common.h. No arithmetic but on integers.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// One copy of each loop for AVX2; the loader picks.
#define G4_LOOPS __attribute__((target_clones("avx2", "default")))
#else
#define G4_LOOPS
#endif
#define G4_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Bytes whose nibbles are codes `width` apart -> bytes of neighbours.
template <int width>
inline void PairNibbles(const uint8_t* __restrict packed, uint8_t* __restrict codes) {
  for (int i = 0; i < width / 2; ++i) {
    const unsigned even = packed[2 * i], odd = packed[2 * i + 1];
    codes[i] = static_cast<uint8_t>((even & 15) | (odd << 4));
    codes[width / 2 + i] = static_cast<uint8_t>((even >> 4) | (odd & 0xF0));
  }
}

// Bytes whose high nibbles are codes 2 `width` after the low ones' -> bytes of which they are `width` after.
template <int width>
inline void ExchangeNibbles(const uint8_t* __restrict first, const uint8_t* __restrict second,
                            uint8_t* __restrict codes) {
  for (int i = 0; i < width; ++i) {
    codes[i] = static_cast<uint8_t>((first[i] & 15) | (second[i] << 4));
    codes[width + i] = static_cast<uint8_t>((first[i] >> 4) | (second[i] & 0xF0));
  }
}

// 12 bytes of 6-bit scales and minima of 8 groups -> (scale, minimum) x 8; four groups in a word at a time.
inline void SixBitPairs(const uint8_t* packed, int8_t* pairs) {
  uint32_t words[3];
  std::memcpy(words, packed, sizeof words);
  constexpr uint32_t kSix = 0x3F3F3F3F, kLow = 0x0F0F0F0F, kTop = 0x30303030;
  const uint32_t levels[4] = {words[0] & kSix, (words[2] & kLow) | ((words[0] >> 2) & kTop),  //
                              words[1] & kSix, ((words[2] >> 4) & kLow) | ((words[1] >> 2) & kTop)};
  uint8_t bytes[16];
  std::memcpy(bytes, levels, sizeof levels);
  for (int group = 0; group < 8; ++group) {
    pairs[2 * group] = static_cast<int8_t>(bytes[group]);
    pairs[2 * group + 1] = static_cast<int8_t>(bytes[8 + group]);
  }
}

}  // namespace

G4_EXPORT G4_LOOPS void g4_split_q4_0(const uint8_t* block, int64_t count, uint8_t* codes, int8_t*, uint8_t* step) {
  for (; count > 0; --count, block += 18, codes += 16, step += 2) {
    std::memcpy(step, block, 2);
    PairNibbles<16>(block + 2, codes);
  }
}

G4_EXPORT G4_LOOPS void g4_split_q4_1(const uint8_t* block, int64_t count, uint8_t* codes, int8_t*, uint8_t* step) {
  for (; count > 0; --count, block += 20, codes += 16, step += 4) {
    std::memcpy(step, block, 4);
    step[3] ^= 0x80;  // an offset that is added -> a minimum that is subtracted, as the K-quants have it
    PairNibbles<16>(block + 4, codes);
  }
}

G4_EXPORT G4_LOOPS void g4_split_q8_0(const uint8_t* block, int64_t count, uint8_t* codes, int8_t*, uint8_t* step) {
  for (; count > 0; --count, block += 34, codes += 32, step += 2) {
    std::memcpy(step, block, 2);
    std::memcpy(codes, block + 2, 32);
  }
}

G4_EXPORT G4_LOOPS void g4_split_q4_k(const uint8_t* block, int64_t count, uint8_t* codes, int8_t* sub, uint8_t* step) {
  for (; count > 0; --count, block += 144, codes += 128, sub += 16, step += 4) {
    std::memcpy(step, block, 4);
    SixBitPairs(block + 4, sub);
    for (int run = 0; run < 4; ++run) PairNibbles<32>(block + 16 + 32 * run, codes + 32 * run);
  }
}

G4_EXPORT G4_LOOPS void g4_split_q5_k(const uint8_t* block, int64_t count, uint8_t* codes, int8_t* sub, uint8_t* step) {
  for (; count > 0; --count, block += 176, codes += 256, sub += 16, step += 4) {
    std::memcpy(step, block, 4);
    SixBitPairs(block + 4, sub);
    // Bit g of byte i is the fifth bit of code i of group g; it adds 16, which centring takes away again.
    const uint8_t* high = block + 16;
    for (int pair = 0; pair < 4; ++pair) {
      const uint8_t* low = block + 48 + 32 * pair;
      uint8_t* out = codes + 64 * pair;
      for (int i = 0; i < 32; ++i) {
        const unsigned fifths = high[i] >> (2 * pair);
        out[i] = static_cast<uint8_t>(((low[i] & 15) | ((fifths & 1) << 4)) - 16);
        out[32 + i] = static_cast<uint8_t>(((low[i] >> 4) | ((fifths & 2) << 3)) - 16);
      }
    }
  }
}

G4_EXPORT G4_LOOPS void g4_split_q6_k(const uint8_t* block, int64_t count, uint8_t* codes, int8_t* sub, uint8_t* step) {
  for (; count > 0; --count, block += 210, codes += 256, sub += 16, step += 2) {
    std::memcpy(step, block + 208, 2);
    std::memcpy(sub, block + 192, 16);
    for (int half = 0; half < 2; ++half) {
      const uint8_t *low = block + 64 * half, *high = block + 128 + 32 * half;
      uint8_t* out = codes + 128 * half;
      for (int i = 0; i < 32; ++i) {
        const unsigned first = low[i], second = low[32 + i], top = high[i];
        out[i] = static_cast<uint8_t>(((first & 15) | ((top & 3) << 4)) - 32);
        out[32 + i] = static_cast<uint8_t>(((second & 15) | ((top & 12) << 2)) - 32);
        out[64 + i] = static_cast<uint8_t>(((first >> 4) | (top & 48)) - 32);
        out[96 + i] = static_cast<uint8_t>(((second >> 4) | ((top & 192) >> 2)) - 32);
      }
    }
  }
}

// `count` is even, as columns come by 64: GGUF's byte i holds weights i and 16 + i of a block of 32.
G4_EXPORT G4_LOOPS void g4_pack_q4_0(const uint8_t* block, int64_t count, uint8_t* codes, uint8_t*, int8_t*,
                                     uint8_t* step) {
  for (; count > 0; count -= 2, block += 36, codes += 32, step += 4) {
    std::memcpy(step, block, 2);
    std::memcpy(step + 2, block + 18, 2);
    ExchangeNibbles<16>(block + 2, block + 20, codes);
  }
}

G4_EXPORT void g4_pack_q8_0(const uint8_t* block, int64_t count, uint8_t* codes, uint8_t*, int8_t* sub, uint8_t* step) {
  g4_split_q8_0(block, count, codes, sub, step);
}

G4_EXPORT G4_LOOPS void g4_pack_q4_k(const uint8_t* block, int64_t count, uint8_t* codes, uint8_t*, int8_t* sub,
                                     uint8_t* step) {
  for (; count > 0; --count, block += 144, codes += 128, sub += 16, step += 4) {
    std::memcpy(step, block, 4);
    SixBitPairs(block + 4, sub);
    std::memcpy(codes, block + 16, 128);
  }
}

G4_EXPORT G4_LOOPS void g4_pack_q5_k(const uint8_t* block, int64_t count, uint8_t* codes, uint8_t* high, int8_t* sub,
                                     uint8_t* step) {
  for (; count > 0; --count, block += 176, codes += 128, high += 64, sub += 16, step += 4) {
    std::memcpy(step, block, 4);
    SixBitPairs(block + 4, sub);
    for (int i = 0; i < 32; ++i) {
      for (int half = 0; half < 2; ++half) {
        unsigned fifths = (block[16 + i] >> (4 * half)) & 15;  // of four groups; two bits for each
        fifths = (fifths | (fifths << 2)) & 0x33;
        high[32 * half + i] = static_cast<uint8_t>((fifths | (fifths << 1)) & 0x55);
      }
    }
    std::memcpy(codes, block + 48, 128);
  }
}

G4_EXPORT G4_LOOPS void g4_pack_q6_k(const uint8_t* block, int64_t count, uint8_t* codes, uint8_t* high, int8_t* sub,
                                     uint8_t* step) {
  for (; count > 0; --count, block += 210, codes += 128, high += 64, sub += 16, step += 2) {
    std::memcpy(step, block + 208, 2);
    std::memcpy(sub, block + 192, 16);
    std::memcpy(high, block + 128, 64);
    for (int half = 0; half < 2; ++half) ExchangeNibbles<32>(block + 64 * half, block + 64 * half + 32, codes + 64 * half);
  }
}
