// Unit vectors and cosines of feature rows, without a normalised copy of the features or a matrix.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "dot.h"

namespace lvtp::cpu {

// 1 / max(||x||, 1e-12) of one row, so that x times it is x^; 0 for a row that is all zero or not finite. `ordinary` is
// false where squares leave fp32 too little room: the norm is then summed in double, and so must be inner products.
struct UnitScale {
  float scale;
  bool ordinary;
};

template <class T>
UnitScale unit_scale(const T* x, int64_t d, Dot<T> dot) {
  constexpr float kSmallest = 1e-20f, kLargest = 1e30f;
  const float square = dot(x, x, d);
  if (square > kSmallest && square < kLargest) return {1.0f / std::sqrt(square), true};
  double exact = 0.0;
  for (int64_t c = 0; c < d; ++c) exact += static_cast<double>(static_cast<float>(x[c])) * static_cast<float>(x[c]);
  if (!std::isfinite(exact) || exact == 0.0) return {0.0f, true};
  return {static_cast<float>(1.0 / std::fmax(std::sqrt(exact), 1e-12)), false};
}

// Cosines of one image's tokens, each computed when asked for.
template <class T>
class Cosines {
 public:
  Cosines(const T* x, int64_t n, int64_t d) : x_(x), d_(d), dot_(best_dot<T>()), scale_(n, {kUnknown, true}) {}

  float operator()(int64_t i, int64_t j) {
    const UnitScale si = scale(i), sj = scale(j);
    if (si.scale == 0.0f || sj.scale == 0.0f) return 0.0f;
    if (si.ordinary && sj.ordinary) return dot_(row(i), row(j), d_) * si.scale * sj.scale;
    double sum = 0.0;
    for (int64_t c = 0; c < d_; ++c) {
      const float a = static_cast<float>(row(i)[c]) * si.scale, b = static_cast<float>(row(j)[c]) * sj.scale;
      sum += static_cast<double>(a) * b;
    }
    return static_cast<float>(sum);
  }

 private:
  static constexpr float kUnknown = -1.0f;

  const T* row(int64_t i) const { return x_ + i * d_; }

  UnitScale scale(int64_t i) {  // found when first needed: most tokens never are
    if (scale_[i].scale == kUnknown) scale_[i] = unit_scale(row(i), d_, dot_);
    return scale_[i];
  }

  const T* x_;
  int64_t d_;
  Dot<T> dot_;
  std::vector<UnitScale> scale_;
};

}  // namespace lvtp::cpu
