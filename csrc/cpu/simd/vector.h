// Vectors as wide as the instruction set that this is compiled for, by the compiler's vector types: one source, any
// processor. Nothing here may be shared between the compilations (an inline function of a standard header, say, could
// reach a processor without the instructions), so there are no includes but plain ones and no names outside LVTP_ISA.
#pragma once

#include <cstdint>
#include <utility>

#include "../simd.h"

#if defined(__AVX512F__)
#define LVTP_BYTES 64
#elif defined(__AVX2__)
#define LVTP_BYTES 32
#else
#define LVTP_BYTES 16
#endif

namespace lvtp::cpu::LVTP_ISA {

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));  // loads from anywhere
};
template <class T, int Bytes = LVTP_BYTES>
using Vector = typename VectorOf<T, Bytes>::type;
template <class T>
constexpr int64_t kWidth = LVTP_BYTES / sizeof(T);

template <class V, class T>
inline V load(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
template <class V, class T>
inline void store(T* p, V v) {
  *reinterpret_cast<V*>(p) = v;
}

// Sums of neighbouring lanes: a's, then b's.
template <class V, int... Lane>
inline V pair_sums(V a, V b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, 2 * Lane...) + __builtin_shufflevector(a, b, (2 * Lane + 1)...);
}

// out[r] += the sum of the lanes of v[r]: of all at once, because one by one costs a shuffle and a sum a lane.
template <class T, int64_t kCount>
inline void add_totals(Vector<T> (&v)[kCount], T* out) {
  constexpr std::make_integer_sequence<int, kWidth<T>> lanes{};
  int64_t count = kCount;
#pragma GCC unroll 4
  for (int64_t summed = 1; summed < kWidth<T>; summed *= 2) {
    if (count == 1) {
      v[0] = pair_sums(v[0], v[0], lanes);
      continue;
    }
    count /= 2;
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) v[i] = pair_sums(v[2 * i], v[2 * i + 1], lanes);
  }
  for (int64_t r = 0; r < kCount; ++r) out[r] += v[r / kWidth<T>][r % kWidth<T>];
}

// The sum of the lanes, in a fixed order.
template <class T>
inline T total(Vector<T> v) {
  T sum = 0;
  for (int64_t lane = 0; lane < kWidth<T>; ++lane) sum += v[lane];
  return sum;
}

}  // namespace lvtp::cpu::LVTP_ISA
