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
void dots_portable(const T* a, const T* const* rows, int64_t count, int64_t d, float* out) {
  constexpr int64_t kLanes = 32;
  for (int64_t r = 0; r < count; ++r) {
    const T* b = rows[r];
    float lane[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) lane[l] += static_cast<float>(a[c + l]) * static_cast<float>(b[c + l]);
    }
    float sum = 0.0f;
    for (; c < d; ++c) sum += static_cast<float>(a[c]) * static_cast<float>(b[c]);
    for (const float l : lane) sum += l;
    out[r] = sum;
  }
}

#ifdef LVTP_X86

#define LVTP_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LVTP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")))
#define LVTP_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// Sum of what is left of a row after the last whole vector.
template <class T>
float dot_rest(const T* a, const T* b, int64_t from, int64_t d) {
  float sum = 0.0f;
  for (int64_t c = from; c < d; ++c) sum += static_cast<float>(a[c]) * static_cast<float>(b[c]);
  return sum;
}

LVTP_AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
LVTP_AVX2 inline __m256 load8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LVTP_AVX2 inline __m256 load8(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// In the kernels below a vector of `a` is loaded once for several rows; the four sums of a row, which hide the latency
// of the addition, are the same however many rows there are.
template <class T, int Rows>
LVTP_AVX2 void some_dots_avx2(const T* a, const T* const* rows, int64_t d, float* out) {
  __m256 sum[Rows][4] = {};
  int64_t c = 0;
  for (; c + 32 <= d; c += 32) {
    for (int q = 0; q < 4; ++q) {
      const __m256 v = load8(a + c + 8 * q);
      for (int r = 0; r < Rows; ++r) sum[r][q] = _mm256_fmadd_ps(v, load8(rows[r] + c + 8 * q), sum[r][q]);
    }
  }
  for (; c + 8 <= d; c += 8) {
    for (int r = 0; r < Rows; ++r) sum[r][0] = _mm256_fmadd_ps(load8(a + c), load8(rows[r] + c), sum[r][0]);
  }
  for (int r = 0; r < Rows; ++r) {
    alignas(32) float lane[8];
    _mm256_store_ps(lane, _mm256_add_ps(_mm256_add_ps(sum[r][0], sum[r][1]), _mm256_add_ps(sum[r][2], sum[r][3])));
    const float all = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    out[r] = all + dot_rest(a, rows[r], c, d);
  }
}

template <class T>
LVTP_AVX2 void dots_avx2(const T* a, const T* const* rows, int64_t count, int64_t d, float* out) {
  int64_t r = 0;
  for (; r + 2 <= count; r += 2) some_dots_avx2<T, 2>(a, rows + r, d, out + r);
  for (; r < count; ++r) some_dots_avx2<T, 1>(a, rows + r, d, out + r);
}

LVTP_AVX512 inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
LVTP_AVX512 inline __m512 load16(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LVTP_AVX512 inline __m512 load16(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <class T, int Rows>
LVTP_AVX512 void some_dots_avx512(const T* a, const T* const* rows, int64_t d, float* out) {
  __m512 sum[Rows][4] = {};
  int64_t c = 0;
  for (; c + 64 <= d; c += 64) {
    for (int q = 0; q < 4; ++q) {
      const __m512 v = load16(a + c + 16 * q);
      for (int r = 0; r < Rows; ++r) sum[r][q] = _mm512_fmadd_ps(v, load16(rows[r] + c + 16 * q), sum[r][q]);
    }
  }
  for (; c + 16 <= d; c += 16) {
    for (int r = 0; r < Rows; ++r) sum[r][0] = _mm512_fmadd_ps(load16(a + c), load16(rows[r] + c), sum[r][0]);
  }
  for (int r = 0; r < Rows; ++r) {
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]), _mm512_add_ps(sum[r][2], sum[r][3]));
    out[r] = _mm512_reduce_add_ps(all) + dot_rest(a, rows[r], c, d);
  }
}

template <class T>
LVTP_AVX512 void dots_avx512(const T* a, const T* const* rows, int64_t count, int64_t d, float* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) some_dots_avx512<T, 4>(a, rows + r, d, out + r);
  for (; r < count; ++r) some_dots_avx512<T, 1>(a, rows + r, d, out + r);
}

LVTP_AVX512_BF16 inline __m512bh load32(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// The bf16 dot of the chip: pairs of products at once, no conversion.
template <int Rows>
LVTP_AVX512_BF16 void some_dots_avx512_bf16(const BFloat16* a, const BFloat16* const* rows, int64_t d, float* out) {
  __m512 sum[Rows][4] = {};
  int64_t c = 0;
  for (; c + 128 <= d; c += 128) {
    for (int q = 0; q < 4; ++q) {
      const __m512bh v = load32(a + c + 32 * q);
      for (int r = 0; r < Rows; ++r) sum[r][q] = _mm512_dpbf16_ps(sum[r][q], v, load32(rows[r] + c + 32 * q));
    }
  }
  for (; c + 32 <= d; c += 32) {
    for (int r = 0; r < Rows; ++r) sum[r][0] = _mm512_dpbf16_ps(sum[r][0], load32(a + c), load32(rows[r] + c));
  }
  for (int r = 0; r < Rows; ++r) {
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]), _mm512_add_ps(sum[r][2], sum[r][3]));
    out[r] = _mm512_reduce_add_ps(all) + dot_rest(a, rows[r], c, d);
  }
}

LVTP_AVX512_BF16 void dots_avx512_bf16(
    const BFloat16* a, const BFloat16* const* rows, int64_t count, int64_t d, float* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) some_dots_avx512_bf16<4>(a, rows + r, d, out + r);
  for (; r < count; ++r) some_dots_avx512_bf16<1>(a, rows + r, d, out + r);
}

#endif  // LVTP_X86

template <class T>
Dots<T> choose() {
#ifdef LVTP_X86
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) return dots_avx512_bf16;
  }
  if (isa() == Isa::kAvx512) return dots_avx512<T>;
  if (isa() == Isa::kAvx2) return dots_avx2<T>;
#endif
  return dots_portable<T>;
}

}  // namespace

template <class T>
Dots<T> best_dots() {
  static const Dots<T> dots = choose<T>();
  return dots;
}

template Dots<float> best_dots<float>();
template Dots<Half> best_dots<Half>();
template Dots<BFloat16> best_dots<BFloat16>();

}  // namespace lvtp::cpu
