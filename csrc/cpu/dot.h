// Inner products of feature rows, fp32 accumulation, for the processor at hand.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace lvtp::cpu {

// out[r] = a . rows[r], r in [0, count). For one processor the result depends on nothing but the values of the two
// rows.
template <class T>
using Dots = void (*)(const T* a, const T* const* rows, int64_t count, int64_t d, float* out);

// The fastest kernel this processor runs, chosen once.
template <class T>
Dots<T> best_dots();

template <class T>
float dot(Dots<T> dots, const T* a, const T* b, int64_t d) {
  float out;
  dots(a, &b, 1, d, &out);
  return out;
}

}  // namespace lvtp::cpu
