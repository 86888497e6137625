// What the CPU kernels share: masks, dispatch on dtype, checks of values.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../tensors.h"
#include "cosines.h"
#include "simd.h"
#include "team.h"

namespace lvtp::cpu {

// The row of a [B, N] bool mask that belongs to one image; without a mask every token is present.
struct Mask {
  OptionalTensor tensor;
  int64_t n;
  Mask(const OptionalTensor& mask, int64_t n) : tensor(ready(mask)), n(n) {}
  bool operator()(int64_t image, int64_t token) const { return !tensor || data<bool>(*tensor)[image * n + token]; }
  std::vector<int32_t> tokens(int64_t image) const {  // the real ones, ascending
    std::vector<int32_t> real;
    real.reserve(n);
    for (int64_t j = 0; j < n; ++j) {
      if ((*this)(image, j)) real.push_back(static_cast<int32_t>(j));
    }
    return real;
  }
};

// fn(pointer of the tensor's element type) for the three feature dtypes.
template <class F>
void with_features(const Tensor& x, const F& fn) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return fn(data<c10::Half>(x));
    case ScalarType::BFloat16: return fn(data<c10::BFloat16>(x));
    default: return fn(data<float>(x));
  }
}

// Label values of the real tokens, in [0, groups), or just not negative where there is no bound. Only a CPU kernel may
// do this: its tensors are in reach, and no GPU is waited for.
inline void check_labels(
    const char* op, const Tensor& labels, const OptionalTensor& mask, std::optional<int64_t> groups = std::nullopt) {
  const auto l = ready(labels);
  const Mask present(mask, l.size(1));
  const std::string bound = groups ? std::to_string(*groups) : "G";
  for (int64_t i = 0; i < l.numel(); ++i) {
    const int64_t label = data<int64_t>(l)[i];
    const bool fits = label >= 0 && (!groups || label < *groups);
    checks::require(fits || !present(0, i), op, "labels", "in [0, " + bound + ")", label);
  }
}

// The ops that others are made of; arguments already checked.
Tensor mean_similarity(const Tensor& features, const OptionalTensor& mask);
std::pair<Tensor, Tensor> psca(
    const Tensor& features, int64_t groups, const std::string& center, const OptionalTensor& mask);

}  // namespace lvtp::cpu
