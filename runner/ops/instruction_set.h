// Inner loops are compiled once per instruction set, each copy into a table of functions; this says which table to use.
#pragma once

namespace g4 {

// AVX2 with FMA; AVX-512 with VNNI, as from Ice Lake, Cascade Lake and Zen 4 on.
enum InstructionSet { kPortable, kAvx2, kAvx512 };

// The best that this machine has, unless a test or a measurement has chosen another.
InstructionSet instruction_set();

// The addresses of an operator's tables, indexed by the instruction set.
#if defined(__x86_64__)
#define G4_VARIANTS(tables) {&tables##Portable, &tables##Avx2, &tables##Avx512}
#else
#define G4_VARIANTS(tables) {&tables##Portable}
#endif

}  // namespace g4
