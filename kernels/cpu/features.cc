#include "kernels/cpu/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <cstdint>
#include <cstdlib>

#include "absl/strings/str_cat.h"

namespace shoal {

#if defined(__x86_64__)
namespace {

struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid ReadCpuid(uint32_t leaf, uint32_t subleaf) {
  Cpuid r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx,
                    &r.edx);  // zeros when the leaf is unknown
  return r;
}

bool Bit(uint32_t word, int bit) { return (word >> bit & 1) != 0; }

// XCR0: which register files the system saves. Only readable when CPUID.1:ECX.OSXSAVE is set.
uint64_t ReadXcr0() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives tile data only to processes that ask (Documentation/arch/x86/xstate.rst).
bool RequestTilePermission() {
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

}  // namespace

CpuFeatures DetectCpuFeatures() {
  CpuFeatures f;
  const Cpuid l1 = ReadCpuid(1, 0);
  if (!Bit(l1.ecx, 27)) return f;  // OSXSAVE
  const uint64_t xcr0 = ReadXcr0();
  const bool ymm_saved = (xcr0 & 0x6) == 0x6;
  const bool zmm_saved = (xcr0 & 0xe6) == 0xe6;
  const bool tiles_saved = (xcr0 & 0x60000) == 0x60000;
  const Cpuid l7 = ReadCpuid(7, 0);
  const Cpuid l7_1 = ReadCpuid(7, 1);
  const bool fma = Bit(l1.ecx, 12), f16c = Bit(l1.ecx, 29);
  f.avx2 = ymm_saved && Bit(l7.ebx, 5) && fma && f16c;
  f.avxvnni = f.avx2 && Bit(l7_1.eax, 4);
  const bool avx512_fdq = Bit(l7.ebx, 16) && Bit(l7.ebx, 17);
  const bool avx512_bwvl = Bit(l7.ebx, 30) && Bit(l7.ebx, 31);
  f.avx512 = f.avx2 && zmm_saved && avx512_fdq && avx512_bwvl && Bit(l7.ecx, 11);
  const bool tiles = Bit(l7.edx, 24) && Bit(l7.edx, 25) && Bit(l7.edx, 22);  // tile, int8, bf16
  f.amx = f.avx512 && tiles_saved && tiles && Bit(l7_1.eax, 5) && RequestTilePermission();
  return f;
}
#elif defined(__aarch64__)
CpuFeatures DetectCpuFeatures() {
  CpuFeatures f;
  f.neon = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  f.i8mm = f.neon && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
  return f;
}
#else
CpuFeatures DetectCpuFeatures() { return {}; }
#endif

bool CpuFeatures::Has(CpuLevel level) const {
  switch (level) {
    case CpuLevel::kScalar:
      return true;
    case CpuLevel::kAvx2:
      return avx2;
    case CpuLevel::kAvxVnni:
      return avxvnni;
    case CpuLevel::kAvx512:
      return avx512;
    case CpuLevel::kAmx:
      return amx;
    case CpuLevel::kNeon:
      return neon;
    case CpuLevel::kI8mm:
      return i8mm;
  }
  return false;
}

const char* CpuLevelName(CpuLevel level) {
  switch (level) {
    case CpuLevel::kScalar:
      return "scalar";
    case CpuLevel::kAvx2:
      return "avx2";
    case CpuLevel::kAvxVnni:
      return "avxvnni";
    case CpuLevel::kAvx512:
      return "avx512";
    case CpuLevel::kAmx:
      return "amx";
    case CpuLevel::kNeon:
      return "neon";
    case CpuLevel::kI8mm:
      return "i8mm";
  }
  return "unknown";
}

std::string CpuLevelNames(const CpuFeatures& features) {
  std::string names;
  for (int i = 0; i < kNumCpuLevels; ++i) {
    const CpuLevel level = static_cast<CpuLevel>(i);
    if (features.Has(level)) {
      absl::StrAppend(&names, names.empty() ? "" : ", ", CpuLevelName(level));
    }
  }
  return names;
}

absl::StatusOr<CpuLevel> ChooseCpuLevel(const std::string& requested) {
  const CpuFeatures features = DetectCpuFeatures();
  const char* env = std::getenv("SHOAL_CPU");
  const bool from_env = requested.empty() && env != nullptr;
  const std::string name = from_env ? env : requested;
  if (name.empty()) {
    int best = kNumCpuLevels - 1;
    while (!features.Has(static_cast<CpuLevel>(best))) --best;
    return static_cast<CpuLevel>(best);
  }
  const char* origin = from_env ? "SHOAL_CPU: " : "";
  for (int i = 0; i < kNumCpuLevels; ++i) {
    const CpuLevel level = static_cast<CpuLevel>(i);
    if (name != CpuLevelName(level)) continue;
    if (features.Has(level)) return level;
    return absl::InvalidArgumentError(
        absl::StrCat(origin, "this machine has no ", name, "; it has: ", CpuLevelNames(features)));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      origin, "unknown CPU level \"", name, "\"; this machine has: ", CpuLevelNames(features)));
}

}  // namespace shoal
