// What only PTX can say: asynchronous copies into shared memory, and the tensor cores' fragments. All of it is there
// from sm_80 on. The emulator has a twin of this file, tests/emulation/include/ptx.h, with the same functions.
#pragma once

#ifndef __CUDACC__
#include <ptx.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace lvtp::cuda {
namespace {

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

__device__ inline unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// kBytes (4 or 16, and both addresses a multiple of it) into shared memory: those of `global`, or zeros where it is not
// `real`. They are there for this thread after cp_async_wait, for others after a barrier that follows.
template <int kBytes>
__device__ inline void cp_async(void* shared, const void* global, bool real) {
  static_assert(kBytes == 4 || kBytes == 16);
  const int bytes = real ? kBytes : 0;
  if constexpr (kBytes == 16) {  // .cg: past L1, as no other block of this multiprocessor will want them
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  }
}

// Ends a group of this thread's copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups of this thread but the last kPending have arrived.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 rows of 32 bytes, as a warp holds them: of 16-bit numbers 16 x 16, of 32-bit ones 16 x 8. Lane 4 g + t has the
// t-th word of row g's first half, of row g + 8's, and of the second halves of the two.
struct Fragment {
  uint32_t word[4];
};

// `half_row`: where 16 bytes lie in shared memory, in lanes 0-7 those of rows 0-7, in lanes 8-15 of rows 8-15, in lanes
// 16-31 the second halves of these.
__device__ inline Fragment load_fragment(const void* half_row) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.word[0]), "=r"(f.word[1]), "=r"(f.word[2]), "=r"(f.word[3])
               : "r"(shared_address(half_row)));
  return f;
}

// c += a b^T over 32 bytes of depth, c 16 x 8: lane 4 g + t has columns 2 t and 2 t + 1 of rows g and g + 8. b is rows
// kHalf * 8 to kHalf * 8 + 7 of a fragment. T is what the words hold; float is read as tf32.
#define LVTP_MMA(shape_and_types)                                                                                     \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[kHalf]),                  \
                 "r"(b.word[kHalf + 2]))

template <class T, int kHalf>
__device__ inline void mma(float (&c)[4], const Fragment& a, const Fragment& b) {
  if constexpr (sizeof(T) == sizeof(float)) {
    LVTP_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, __half>) {
    LVTP_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    LVTP_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
}
#undef LVTP_MMA

// The nearest tf32, as bits: fp32 with 10 instead of 23 bits of fraction.
__device__ inline uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

}  // namespace
}  // namespace lvtp::cuda

#endif
