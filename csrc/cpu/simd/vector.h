// Vectors as wide as the instruction set that this is compiled for, by the compiler's vector types: one source, any
// processor. Nothing here may be shared between the compilations (an inline function of a standard header, say, could
// reach a processor without the instructions), so there are no includes but plain ones and no names outside LVTP_ISA.
#pragma once

#include <cstdint>

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

// The sum of the lanes, in a fixed order.
template <class T>
inline T total(Vector<T> v) {
  T sum = 0;
  for (int64_t lane = 0; lane < kWidth<T>; ++lane) sum += v[lane];
  return sum;
}

}  // namespace lvtp::cpu::LVTP_ISA
