#include "common.h"
#include "gram.h"
#include "team.h"

namespace lvtp::cpu {

// Tiles (s, 0), ..., (s, s) -> their places in the matrix [n, n], and their mirror images'.
static void place(const float* tiles, int64_t s, int64_t n, float* out) {
  float mirrored[kTile * kTile];
  const int64_t rows = std::min(kTile, n - s * kTile);
  for (int64_t t = 0; t <= s; ++t) {
    const float* tile = tiles + t * kTile * kTile;
    const int64_t columns = std::min(kTile, n - t * kTile);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(tile + r * kTile, columns, out + (s * kTile + r) * n + t * kTile);
    if (t == s) continue;  // a diagonal tile is its own mirror image
    simd().transpose(tile, kTile, kTile, mirrored);
    for (int64_t c = 0; c < columns; ++c)
      std::copy_n(mirrored + c * kTile, rows, out + (t * kTile + c) * n + s * kTile);
  }
}

// One image: x [n, d] -> out [n, n]. Half the work of a product of two matrices, because only one half is computed.
template <class T>
static void cosine_similarity(Team& team, const T* x, int64_t n, int64_t d, float* out) {
  const Panels panels(n, d);
  team.run(strips(n), [&](int64_t s) {
    const Array<float> block = zeros<float>(kTile * d);
    for (int64_t i = s * kTile; i < std::min(n, (s + 1) * kTile); ++i) {
      const float scale = unit_scale(x + i * d, d, best_dots<T>()).scale;
      if (scale == 0.0f) continue;  // all zero or not finite: resembles nothing
      float* row = block.get() + (i - s * kTile) * d;
      to_float(x + i * d, d, row);
      for (int64_t c = 0; c < d; ++c) row[c] *= scale;
    }
    simd().transpose(block.get(), d, d, panels.strip(s));
  });
  team.run(strips(n), [&](int64_t piece) {
    const int64_t s = strips(n) - 1 - piece;  // the longest first
    const Array<float> tiles((s + 1) * kTile * kTile);
    simd().gram_strip(panels.values.get(), d, s, tiles.get());
    place(tiles.get(), s, n, out);
  });
}

// [B, N, D] -> fp32 [B, N, N].
static Tensor cosine_similarity_op(Tensor features) {
  checks::cosine_similarity(features);
  const auto x = ready(features);
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2);
  auto out = empty(x, {b, n, n}, ScalarType::Float);
  auto* matrices = data_out<float>(out);
  with_features(x, [&](const auto* p) {
    Team::for_each_image(b, [&](int64_t image, Team& team) {
      cosine_similarity(team, p + image * n * d, n, d, matrices + image * n * n);
    });
  });
  return out;
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) {
  m.impl("cosine_similarity", LVTP_KERNEL("cosine_similarity", &lvtp::cpu::cosine_similarity_op));
}
