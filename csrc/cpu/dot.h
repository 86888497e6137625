// Inner products of feature rows, fp32 accumulation, for the processor at hand.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace lvtp::cpu {

template <class T>
using Dot = float (*)(const T* a, const T* b, int64_t d);

// The fastest kernel this processor runs, chosen once. For one processor the result depends on nothing but the values.
template <class T>
Dot<T> best_dot();

}  // namespace lvtp::cpu
