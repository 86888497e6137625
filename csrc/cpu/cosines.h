// Cosines of one image's tokens, each computed when asked for: neither a normalised copy of the features nor a matrix.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "dot.h"

namespace lvtp::cpu {

template <class T>
class Cosines {
 public:
  Cosines(const T* x, int64_t n, int64_t d) : x_(x), d_(d), dot_(best_dot<T>()), scale_(n, kUnknown) {}

  float operator()(int64_t i, int64_t j) {
    const float si = scale(i), sj = scale(j);
    if (si == 0.0f || sj == 0.0f) return 0.0f;
    if (si == kExtreme || sj == kExtreme) return extreme_cosine(i, j);
    return dot_(row(i), row(j), d_) * si * sj;
  }

 private:
  // scale_[i] is 1 / max(||x_i||, 1e-12), or 0 for a token that is all zero or not finite, found when first needed.
  // Squares beyond these bounds leave fp32 too little room: such tokens take the slow way, in double.
  static constexpr float kUnknown = -1.0f, kExtreme = -2.0f, kSmallest = 1e-20f, kLargest = 1e30f;

  const T* row(int64_t i) const { return x_ + i * d_; }

  float scale(int64_t i) {
    float& known = scale_[i];
    if (known == kUnknown) {
      const float square = dot_(row(i), row(i), d_);
      known = square > kSmallest && square < kLargest ? 1.0f / std::sqrt(square) : extreme_scale(i);
    }
    return known;
  }

  float extreme_scale(int64_t i) const {
    const double square = exact_dot(i, i);
    return std::isfinite(square) && square > 0.0 ? kExtreme : 0.0f;
  }

  float extreme_cosine(int64_t i, int64_t j) const {
    const double norms = std::fmax(std::sqrt(exact_dot(i, i)), 1e-12) * std::fmax(std::sqrt(exact_dot(j, j)), 1e-12);
    return static_cast<float>(exact_dot(i, j) / norms);
  }

  double exact_dot(int64_t i, int64_t j) const {
    double sum = 0.0;
    for (int64_t c = 0; c < d_; ++c) {
      sum += static_cast<double>(static_cast<float>(row(i)[c])) * static_cast<float>(row(j)[c]);
    }
    return sum;
  }

  const T* x_;
  int64_t d_;
  Dot<T> dot_;
  std::vector<float> scale_;
};

}  // namespace lvtp::cpu
