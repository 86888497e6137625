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
  // As torch reads it: what is neither "default" nor "avx2" is no limit.
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const bool portable_only = set && std::strcmp(set, "default") == 0;
  const bool avx2_only = set && std::strcmp(set, "avx2") == 0;
  if (portable_only) return Isa::kPortable;
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!avx2_only && fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (fma && __builtin_cpu_supports("avx2")) return Isa::kAvx2;
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
