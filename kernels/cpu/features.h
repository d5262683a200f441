// What instruction sets this CPU and its system offer, and which level the kernels use.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace shoal {

// In order of preference. A machine may have a level without having the ones before it (AVX-512
// without AVX-VNNI; Arm's without any of x86).
enum class CpuLevel { kScalar, kAvx2, kAvxVnni, kAvx512, kAmx, kNeon, kI8mm };
inline constexpr int kNumCpuLevels = 7;

struct CpuFeatures {
  bool avx2 = false;     // AVX2, FMA, F16C
  bool avxvnni = false;  // avx2 and AVX-VNNI
  bool avx512 = false;   // avx2 and AVX-512 F, BW, VL, DQ, VNNI
  bool amx = false;      // avx512 with BF16, and AMX tiles with INT8 and BF16
  bool neon = false;     // aarch64 with NEON dot products (ASIMDDP)
  bool i8mm = false;     // neon and matrix products of int8 (I8MM)

  bool Has(CpuLevel level) const;
};

// x86-64: asks the CPU (CPUID), the system (XCR0), and the kernel for leave to use AMX tiles in
// this process. aarch64: asks the kernel (AT_HWCAP).
CpuFeatures DetectCpuFeatures();

const char* CpuLevelName(CpuLevel level);  // "avx512"
// "scalar, avx2, avx512": the levels of these features.
std::string CpuLevelNames(const CpuFeatures& features);

// `requested` is a level's name, or "" for the environment's SHOAL_CPU, or else the best level
// there is. kInvalidArgument for an unknown name or a level that this machine lacks; names the ones
// it has.
absl::StatusOr<CpuLevel> ChooseCpuLevel(const std::string& requested);

}  // namespace shoal
