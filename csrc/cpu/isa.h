// Which instruction sets this process may use, decided once.
#pragma once

#include <string>

// Exported from _C.so for the pybind11 module, which links against it.
#define FASTATTN_API __attribute__((visibility("default")))

namespace fastattn {

// In order: each level includes the ones before it.
//   kAvx512      F, DQ, BW, VL (Skylake-SP, 2017)
//   kAvx512Bf16  + AVX512-BF16 and VBMI (Zen 4 and later, where vdpbf16ps runs at twice the fp32 FMA rate; Cooper Lake)
//   kAmx         + AMX-TILE, AMX-BF16 (Sapphire Rapids and later)
//   kAmxEmulated AMX's kernels with the tiles in memory (tile.h): for tests, runs where kAvx512Bf16 does, never chosen
//   by itself
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kAmxEmulated = 5 };
constexpr int kIsaCount = 6;

FASTATTN_API const char* isa_name(Isa isa);  // "scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"
FASTATTN_API bool isa_from_name(const std::string& name, Isa* isa);

// The best level that CPUID, XCR0 (the OS saves the registers) and, for AMX, the kernel's permission allow.
FASTATTN_API Isa best_isa();
FASTATTN_API bool isa_available(Isa isa);

// The level in force: FASTATTN_ISA if set and available, else best_isa(). FASTATTN_ISA naming a level this
// machine lacks, or no level at all, leaves best_isa() in force and is reported by isa_message().
FASTATTN_API Isa current_isa();
FASTATTN_API void set_isa(Isa isa);  // throws std::invalid_argument unless isa_available(); not while kernels run
FASTATTN_API const std::string& isa_message();

}  // namespace fastattn
