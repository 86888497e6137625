// The twin of csrc/cuda/ptx.cuh, whose comments say what each function does, on the emulator.
//
// An asynchronous copy destroys what lies at its destination when it is issued and brings the bytes only when the
// thread waits for them, so that neither a missing wait nor a missing barrier before a buffer's next use goes unseen.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../simt.h"

namespace lvtp::cuda {
namespace {

inline char* dynamic_shared() { return static_cast<char*>(simt::dynamic_shared()); }

template <int kBytes>
void cp_async(void* shared, const void* global, bool real, SIMT_AT) {
  static_assert(kBytes == 4 || kBytes == 16);
  const auto misaligned = (reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % kBytes;
  if (misaligned != 0) simt::fail(SIMT_SITE, "is misaligned");
  simt::copy_async(shared, real ? global : nullptr, kBytes);
}
inline void cp_async_commit() { simt::end_copies(); }
template <int kPending>
void cp_async_wait(SIMT_AT) {
  simt::await_copies(SIMT_SITE, kPending);
}

inline void load_matrices(uint32_t (&word)[4], const void* row, SIMT_AT) {
  const auto& rows = simt::exchange(SIMT_SITE, ~0u, simt::to_bits(row));
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const char* from = simt::from_bits<const char*>(rows[matrix * 8 + simt::lane() / 4]);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) simt::fail(SIMT_SITE, "is misaligned");
    memcpy(&word[matrix], from + simt::lane() % 4 * 4, 4);
  }
}

// Element `at` of a word's numbers. The tensor cores do not look at the last 13 bits of a tf32.
template <class T>
float element(uint32_t word, int at) {
  const auto bits = static_cast<uint16_t>(word >> at * 16);
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float({bits});
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float({bits});
  } else {
    return __uint_as_float(word & ~0x1fffu);
  }
}

// PTX ISA, "Matrix fragments for mma.m16n8k16" and "m16n8k8": which lane holds what.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_AT) {
  struct Operands {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  simt::exchange(SIMT_SITE, ~0u, simt::to_bits(&mine), [](const simt::Deposits& lanes) {
    constexpr int kPerWord = 4 / sizeof(T), kDepth = 8 * kPerWord;
    float rows[16][kDepth], columns[8][kDepth];
    const auto of = [&](int lane) { return *simt::from_bits<Operands*>(lanes[lane]); };
    for (int k = 0; k < kDepth; ++k) {
      const int t = k / kPerWord % 4, half = k / kPerWord / 4;
      for (int r = 0; r < 16; ++r) rows[r][k] = element<T>(of(r % 8 * 4 + t).a[r / 8 + 2 * half], k % kPerWord);
      for (int j = 0; j < 8; ++j) columns[j][k] = element<T>(of(j * 4 + t).b[half], k % kPerWord);
    }
    for (int r = 0; r < 16; ++r) {
      for (int j = 0; j < 8; ++j) {
        float& sum = of(r % 8 * 4 + j / 2).c[r / 8 * 2 + j % 2];
        for (int k = 0; k < kDepth; ++k) sum += rows[r][k] * columns[j][k];
      }
    }
  });
}

inline void team_barrier(unsigned* arrivals, unsigned blocks, SIMT_AT) {
  simt::team_barrier(SIMT_SITE, arrivals, blocks);
}

inline uint32_t to_tf32(float v) {
  const unsigned bits = __float_as_uint(v);
  return v - v == 0.0f ? (bits + 0x1000u) & ~0x1fffu : bits;
}

}  // namespace
}  // namespace lvtp::cuda
