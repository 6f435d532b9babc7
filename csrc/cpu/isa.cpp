#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastattn {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"};

#if defined(__x86_64__)

// XGETBV(0): which register files the operating system saves on a context switch.
unsigned long long xcr0() {
  unsigned eax, edx;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (static_cast<unsigned long long>(edx) << 32) | eax;
}

constexpr bool bit(unsigned long long word, int index) { return (word >> index) & 1; }

// Linux hands out the 8 KiB of tile state on request only (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA = 18); asking
// again is harmless.
bool request_amx_permission() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;
  const bool osxsave = bit(ecx, 27), fma = bit(ecx, 12), f16c = bit(ecx, 29);
  if (!osxsave || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;
  const unsigned features_b = ebx, features_c = ecx, features_d = edx;
  unsigned sub_eax = 0;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) sub_eax = eax;
  const unsigned long long state = xcr0();

  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  const bool avx2 = ymm && fma && f16c && bit(features_b, 5) && bit(features_b, 8);  // and BMI2
  if (!avx2) return Isa::kScalar;
  // F, DQ, BW, VL: Skylake-SP. VBMI is Ice Lake's and is not required.
  const bool avx512 = zmm && bit(features_b, 16) && bit(features_b, 17) && bit(features_b, 30) && bit(features_b, 31);
  if (!avx512) return Isa::kAvx2;
  const bool avx512_bf16 = bit(sub_eax, 5), vbmi = bit(features_c, 1);
  if (!avx512_bf16 || !vbmi) return Isa::kAvx512;
  const bool amx = tiles && bit(features_d, 24) && bit(features_d, 22);
  return amx && request_amx_permission() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
Isa detect() { return Isa::kScalar; }
#endif

struct Choice {
  Isa isa = best_isa();
  std::string message = "chosen by CPUID";
  Choice() {
    const char* forced = std::getenv("FASTATTN_ISA");
    if (forced == nullptr || *forced == '\0') return;
    Isa wanted;
    if (!isa_from_name(forced, &wanted)) {
      message = std::string("FASTATTN_ISA=") + forced +
                " is not one of scalar, avx2, avx512, avx512_bf16, amx, amx_emulated: ignored";
    } else if (!isa_available(wanted)) {
      message = std::string("FASTATTN_ISA=") + forced + " is not available on this machine: ignored";
    } else {
      isa = wanted;
      message = std::string("forced by FASTATTN_ISA=") + forced;
    }
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

std::atomic<int>& current() {
  static std::atomic<int> instance{static_cast<int>(choice().isa)};
  return instance;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_from_name(const std::string& name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name == kNames[i]) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

bool isa_available(Isa isa) { return isa == Isa::kAmxEmulated ? best_isa() >= Isa::kAvx512Bf16 : isa <= best_isa(); }

Isa current_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void set_isa(Isa isa) {
  if (!isa_available(isa)) {
    throw std::invalid_argument(std::string("isa '") + isa_name(isa) + "' is not available here; the best is '" +
                                isa_name(best_isa()) + "'");
  }
  current().store(static_cast<int>(isa), std::memory_order_relaxed);
}

const std::string& isa_message() { return choice().message; }

}  // namespace fastattn

// The same facts for Python without the pybind11 module (fastattn/ops/_library.py, through ctypes).
extern "C" {
FASTATTN_API const char* fastattn_best_isa() { return fastattn::isa_name(fastattn::best_isa()); }
FASTATTN_API const char* fastattn_current_isa() { return fastattn::isa_name(fastattn::current_isa()); }
FASTATTN_API const char* fastattn_isa_message() { return fastattn::isa_message().c_str(); }
}
