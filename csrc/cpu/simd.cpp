#include "simd.h"

#include <cstdlib>
#include <cstring>

namespace lvtp::cpu {

namespace portable {
extern const Simd loops;
}
#ifdef LVTP_X86
namespace avx2 {
extern const Simd loops;
}
namespace avx512 {
extern const Simd loops;
}
#endif

static Isa find_isa() {
#ifdef LVTP_X86
  __builtin_cpu_init();
  const char* most = std::getenv("ATEN_CPU_CAPABILITY");
  const auto allowed = [&](const char* capability) {
    return !most || std::strcmp(most, "avx512") == 0 || std::strcmp(most, capability) == 0;
  };
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (allowed("avx512") && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (allowed("avx2") && fma && __builtin_cpu_supports("avx2")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

Isa isa() {
  static const Isa found = find_isa();
  return found;
}

const Simd& simd() {
#ifdef LVTP_X86
  if (isa() == Isa::kAvx512) return avx512::loops;
  if (isa() == Isa::kAvx2) return avx2::loops;
#endif
  return portable::loops;
}

}  // namespace lvtp::cpu
