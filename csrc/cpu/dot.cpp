#include "dot.h"

#include <type_traits>

#include "simd.h"

#ifdef LVTP_X86
#include <immintrin.h>
#endif

namespace lvtp::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Any processor. Partial sums in lanes, so that the compiler may vectorise without a licence to reorder anything else.
template <class T>
float dot_portable(const T* a, const T* b, int64_t d) {
  constexpr int64_t kLanes = 32;
  float lane[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += static_cast<float>(a[c + l]) * static_cast<float>(b[c + l]);
  }
  float sum = 0.0f;
  for (; c < d; ++c) sum += static_cast<float>(a[c]) * static_cast<float>(b[c]);
  for (const float l : lane) sum += l;
  return sum;
}

#ifdef LVTP_X86

#define LVTP_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LVTP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")))
#define LVTP_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

LVTP_AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
LVTP_AVX2 inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LVTP_AVX2 inline __m256 load8(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

template <class T>
LVTP_AVX2 float dot_avx2(const T* a, const T* b, int64_t d) {
  __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t c = 0;
  for (; c + 32 <= d; c += 32) {
    s0 = _mm256_fmadd_ps(load8(a + c), load8(b + c), s0);
    s1 = _mm256_fmadd_ps(load8(a + c + 8), load8(b + c + 8), s1);
    s2 = _mm256_fmadd_ps(load8(a + c + 16), load8(b + c + 16), s2);
    s3 = _mm256_fmadd_ps(load8(a + c + 24), load8(b + c + 24), s3);
  }
  for (; c + 8 <= d; c += 8) s0 = _mm256_fmadd_ps(load8(a + c), load8(b + c), s0);
  alignas(32) float lane[8];
  _mm256_store_ps(lane, _mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
  float sum = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  for (; c < d; ++c) sum += static_cast<float>(a[c]) * static_cast<float>(b[c]);
  return sum;
}

LVTP_AVX512 inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
LVTP_AVX512 inline __m512 load16(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LVTP_AVX512 inline __m512 load16(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <class T>
LVTP_AVX512 float dot_avx512(const T* a, const T* b, int64_t d) {
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t c = 0;
  for (; c + 64 <= d; c += 64) {
    s0 = _mm512_fmadd_ps(load16(a + c), load16(b + c), s0);
    s1 = _mm512_fmadd_ps(load16(a + c + 16), load16(b + c + 16), s1);
    s2 = _mm512_fmadd_ps(load16(a + c + 32), load16(b + c + 32), s2);
    s3 = _mm512_fmadd_ps(load16(a + c + 48), load16(b + c + 48), s3);
  }
  for (; c + 16 <= d; c += 16) s0 = _mm512_fmadd_ps(load16(a + c), load16(b + c), s0);
  float sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
  for (; c < d; ++c) sum += static_cast<float>(a[c]) * static_cast<float>(b[c]);
  return sum;
}

LVTP_AVX512_BF16 inline __m512bh load32(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// The bf16 dot of the chip: pairs of products at once, no conversion.
LVTP_AVX512_BF16 float dot_avx512_bf16(const BFloat16* a, const BFloat16* b, int64_t d) {
  __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
  int64_t c = 0;
  for (; c + 128 <= d; c += 128) {
    s0 = _mm512_dpbf16_ps(s0, load32(a + c), load32(b + c));
    s1 = _mm512_dpbf16_ps(s1, load32(a + c + 32), load32(b + c + 32));
    s2 = _mm512_dpbf16_ps(s2, load32(a + c + 64), load32(b + c + 64));
    s3 = _mm512_dpbf16_ps(s3, load32(a + c + 96), load32(b + c + 96));
  }
  for (; c + 32 <= d; c += 32) s0 = _mm512_dpbf16_ps(s0, load32(a + c), load32(b + c));
  float sum = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
  for (; c < d; ++c) sum += static_cast<float>(a[c]) * static_cast<float>(b[c]);
  return sum;
}

#endif  // LVTP_X86

template <class T>
Dot<T> choose() {
#ifdef LVTP_X86
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) return dot_avx512_bf16;
  }
  if (isa() == Isa::kAvx512) return dot_avx512<T>;
  if (isa() == Isa::kAvx2) return dot_avx2<T>;
#endif
  return dot_portable<T>;
}

}  // namespace

template <class T>
Dot<T> best_dot() {
  static const Dot<T> dot = choose<T>();
  return dot;
}

template Dot<float> best_dot<float>();
template Dot<Half> best_dot<Half>();
template Dot<BFloat16> best_dot<BFloat16>();

}  // namespace lvtp::cpu
