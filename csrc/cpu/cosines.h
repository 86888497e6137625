// Unit vectors and cosines of feature rows, without a normalised copy of the features or a matrix.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "dot.h"
#include "simd.h"
#include "team.h"

namespace lvtp::cpu {

// `size` values as fp32 -> out. (A cast is a call to a slow function for each.)
inline void to_float(const float* x, int64_t size, float* out) { std::copy_n(x, size, out); }
inline void to_float(const c10::Half* x, int64_t size, float* out) {
  simd().from_half(reinterpret_cast<const uint16_t*>(x), size, out);
}
inline void to_float(const c10::BFloat16* x, int64_t size, float* out) {
  simd().from_bfloat16(reinterpret_cast<const uint16_t*>(x), size, out);
}

// 1 / max(||x||, 1e-12) of one row, so that x times it is x^; 0 for a row that is all zero or not finite. `ordinary` is
// false where squares leave fp32 too little room: the norm is then summed in double, and so must be inner products.
struct UnitScale {
  float scale;
  bool ordinary;
};

template <class T>
UnitScale unit_scale(const T* x, int64_t d, Dots<T> dots) {
  constexpr float kSmallest = 1e-20f, kLargest = 1e30f;
  const float square = dot(dots, x, x, d);
  if (square > kSmallest && square < kLargest) return {1.0f / std::sqrt(square), true};
  double exact = 0.0;
  for (int64_t c = 0; c < d; ++c) exact += static_cast<double>(static_cast<float>(x[c])) * static_cast<float>(x[c]);
  if (!std::isfinite(exact) || exact == 0.0) return {0.0f, true};
  return {static_cast<float>(1.0 / std::fmax(std::sqrt(exact), 1e-12)), false};
}

// Cosines of one image's tokens, each computed when asked for: a source for the engine in greedy.h.
template <class T>
class Cosines {
 public:
  static constexpr bool kGuesses = true;

  Cosines(const T* x, int64_t n, int64_t d, Team* team = nullptr)
      : x_(x), d_(d), team_(team), dots_(best_dots<T>()), scale_(n, {kUnknown, true}) {}

  // Of token j to the picks added as number begin to end - 1 -> out.
  void to(int32_t j, int64_t begin, int64_t end, float* out) {
    const int64_t pieces = (end - begin + kTile - 1) / kTile;
    const auto piece = [&](int64_t i) {
      const int64_t first = begin + (end - begin) * i / pieces, last = begin + (end - begin) * (i + 1) / pieces;
      some(j, &picks_[first], last - first, out + (first - begin));
    };
    scale(j);  // before two threads look for it; those of picks are known since they were compared themselves
    run((end - begin) * d_ >= kWorthSharing ? team_ : nullptr, pieces, piece);
  }
  int64_t batch() const { return team_ ? 64 : 8; }

  // For the engine's own work on several tokens: how many, and with which threads.
  size_t tries() const { return team_ && d_ >= 2048 ? 4 : 1; }
  template <class F>
  void run(int64_t count, const F& f) {
    run(team_, count, f);
  }

  void start() {  // a loop of its own: no picks yet
    picks_.clear();
    sketches_.clear();
  }

  void add(int32_t token) {  // as a pick
    const auto number = static_cast<int64_t>(picks_.size());
    if (number % kTile == 0) sketches_.resize(sketches_.size() + kSketch * kTile);
    picks_.push_back(token);
    float sketch[kSketch];
    sketch_of(token, sketch);
    float* block = &sketches_[number / kTile * kSketch * kTile];
    for (int64_t c = 0; c < kSketch; ++c) block[c * kTile + number % kTile] = sketch[c];
  }

  // Which of the picks begin to end - 1 token j resembles most, going by a few of the features.
  int64_t guess(int32_t j, int64_t begin, int64_t end) const {
    float sketch[kSketch], estimate[kTile];
    sketch_of(j, sketch);
    int64_t best = begin;
    float most = -INFINITY;
    for (int64_t block = begin / kTile; block * kTile < end; ++block) {
      simd().cross_row(sketch, &sketches_[block * kSketch * kTile], kSketch, estimate);
      for (int64_t p = std::max(begin, block * kTile); p < std::min(end, (block + 1) * kTile); ++p) {
        if (estimate[p % kTile] > most) {
          most = estimate[p % kTile];
          best = p;
        }
      }
    }
    return best;
  }

 private:
  static constexpr float kUnknown = -1.0f;
  static constexpr int64_t kSketch = 48;
  static constexpr int64_t kWorthSharing = 65536;  // products: some 5 us

  const T* row(int64_t i) const { return x_ + i * d_; }

  UnitScale scale(int64_t i) {  // found when first needed: most tokens never are
    if (scale_[i].scale == kUnknown) scale_[i] = unit_scale(row(i), d_, dots_);
    return scale_[i];
  }

  template <class F>
  static void run(Team* team, int64_t count, const F& f) {
    if (team) return team->run(count, f);
    for (int64_t i = 0; i < count; ++i) f(i);
  }

  // At most kTile at once.
  void some(int32_t j, const int32_t* tokens, int64_t count, float* out) {
    const T* rows[kTile];
    const UnitScale sj = scale(j);
    for (int64_t p = 0; p < count; ++p) rows[p] = row(tokens[p]);
    dots_(row(j), rows, count, d_, out);
    for (int64_t p = 0; p < count; ++p) {
      const UnitScale sp = scale(tokens[p]);
      if (sj.scale == 0.0f || sp.scale == 0.0f) {
        out[p] = 0.0f;
      } else if (sj.ordinary && sp.ordinary) {
        out[p] = out[p] * sj.scale * sp.scale;
      } else {
        double sum = 0.0;
        for (int64_t c = 0; c < d_; ++c) {
          const float a = static_cast<float>(row(j)[c]) * sj.scale, b = static_cast<float>(rows[p][c]) * sp.scale;
          sum += static_cast<double>(a) * b;
        }
        out[p] = static_cast<float>(sum);
      }
    }
  }

  // kSketch features from four places of the row, to length 1.
  void sketch_of(int64_t i, float* sketch) const {
    constexpr int64_t kPiece = kSketch / 4;
    std::fill_n(sketch, kSketch, 0.0f);
    for (int64_t piece = 0; piece < 4; ++piece) {
      const int64_t first = std::max<int64_t>(0, d_ - kPiece) * piece / 3;
      to_float(row(i) + first, std::min(kPiece, d_), sketch + piece * kPiece);
    }
    float square = 0.0f;
    for (int64_t c = 0; c < kSketch; ++c) square += sketch[c] * sketch[c];
    const float scale = square > 0.0f && square < INFINITY ? 1.0f / std::sqrt(square) : 0.0f;
    for (int64_t c = 0; c < kSketch; ++c) sketch[c] = scale > 0.0f ? sketch[c] * scale : 0.0f;
  }

  const T* x_;
  int64_t d_;
  Team* team_;
  Dots<T> dots_;
  std::vector<UnitScale> scale_;
  std::vector<float> sketches_;  // [blocks of kTile tokens][kSketch][kTile]
  std::vector<int32_t> picks_;
};

}  // namespace lvtp::cpu
