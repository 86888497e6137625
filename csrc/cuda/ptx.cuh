// What only PTX can say: asynchronous copies into shared memory, the tensor cores' fragments, and blocks that wait for
// each other. All of it is there from sm_80 on. The emulator has a twin of the functions with assembly,
// tests/emulation/include/ptx.h.
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
// `real` and is not read. They are there for this thread after cp_async_wait, for others after a barrier that follows.
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

// Four matrices of 8 rows of 16 bytes in shared memory; lane l says where row l % 8 of matrix l / 8 lies. Lane 4 g + t
// gets the t-th four bytes of row g of each.
__device__ inline void load_matrices(uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b^T, 16 x 8, over 32 bytes of depth: 16 numbers of 16 bits, or 8 of fp32, which are read as tf32. Of a: the
// first halves of rows 0-7 and of rows 8-15, then their second halves; of b: the two halves of rows 0-7; each as
// load_matrices gives it. Lane 4 g + t has columns 2 t and 2 t + 1 of c's row g, then of row g + 8.
#define LVTP_MMA(shape_and_types)                                                                                     \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <class T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == sizeof(float)) {
    LVTP_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<T, __half>) {
    LVTP_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    LVTP_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
}
#undef LVTP_MMA

// Until as many blocks as `blocks` are here, which share `arrivals`, zero before their first time; each then sees what
// the others wrote before. All threads of a block take part. Only for a launch whose blocks are there at a time.
__device__ inline void team_barrier(unsigned* arrivals, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned all = (atomicAdd(arrivals, 1u) / blocks + 1) * blocks;
    unsigned now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrivals) : "memory");
    } while (static_cast<int>(now - all) < 0);
  }
  __syncthreads();
}

// The nearest tf32, as bits: fp32 with 10 instead of 23 bits of fraction.
__device__ inline uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

}  // namespace
}  // namespace lvtp::cuda

#endif

namespace lvtp::cuda {
namespace {

// 16 rows of 32 bytes, as a warp holds them for mma: as its a, or as the b of two, the first of which takes words 0
// and 1.
struct Fragment {
  uint32_t word[4];
};

// Which of the rows, and which half of it, a lane points load_matrices to.
struct LanePlace {
  int row, half;
};
__device__ inline LanePlace place_in_a(int lane) { return {lane % 16, lane / 16}; }
__device__ inline LanePlace place_in_b(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

__device__ inline Fragment load_fragment(const void* half_row) {
  Fragment f;
  load_matrices(f.word, half_row);
  return f;
}

}  // namespace
}  // namespace lvtp::cuda
