#include "krylov.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace lvtp::cpu {
namespace {

constexpr int64_t kTileSize = kTile * kTile;

// Vectors come in blocks of kTile columns, [rows][kTile], rows filled up to whole tiles: the layout of a panel.
class BlockLanczos {
 public:
  BlockLanczos(Team& team, const Panels& a, int64_t most)
      : team_(team), a_(a), rows_(strips(a.rows) * kTile), parts_(zeros<float>(kParts * a.depth * kTile)) {
    blocks_.reserve(most / kTile + 1);
  }

  const Array<float>& block(int64_t j) const { return blocks_[j]; }
  int64_t rows() const { return rows_; }

  // The first block: A A^T times noise, the same in every run.
  void start() {
    Array<float> noise = zeros<float>(rows_ * kTile);
    uint64_t state = 1;
    for (int64_t i = 0; i < a_.rows * kTile; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      noise[i] = static_cast<float>(static_cast<int32_t>(state >> 32)) * 0x1p-31f;
    }
    Array<float> first(rows_ * kTile);
    multiply(noise, first);
    orthonormalize(first);
    blocks_.push_back(std::move(first));
  }

  // One block more. coupling [j + 1] tiles: (A A^T Q_j)^T Q_i for i <= j. Returns R of the new block, Q_{j+1} R = what
  // A A^T Q_j has outside the blocks so far.
  std::vector<double> extend(float* coupling) {
    const auto count = static_cast<int64_t>(blocks_.size());
    Array<float> next(rows_ * kTile);
    multiply(blocks_.back(), next);
    std::vector<float> out(count * kTileSize);
    for (int pass = 0; pass < 2; ++pass) {  // the second removes what rounding left of the first
      team_.run(count, [&](int64_t i) {
        float* tile = out.data() + i * kTileSize;
        simd().cross(blocks_[i].get(), next.get(), rows_, tile);
        for (int64_t r = 0; r < kTile; ++r) {
          for (int64_t c = 0; c < kTile && pass == 0; ++c)
            coupling[i * kTileSize + c * kTile + r] = tile[r * kTile + c];
        }
        for (int64_t e = 0; e < kTileSize; ++e) tile[e] = -tile[e];
      });
      team_.run(kParts, [&](int64_t part) {
        const int64_t begin = rows_ / kTile * part / kParts * kTile, end = rows_ / kTile * (part + 1) / kParts * kTile;
        for (int64_t i = 0; i < count; ++i) {
          simd().add_product(
              blocks_[i].get() + begin * kTile, out.data() + i * kTileSize, end - begin, next.get() + begin * kTile);
        }
      });
    }
    auto r = orthonormalize(next);
    blocks_.push_back(std::move(next));
    return r;
  }

 private:
  static constexpr int64_t kParts = 4;  // partial sums, and so the threads that can share a product

  // y = A (A^T x). A thread works on the same rows of A in both halves, and they stay in its cache.
  void multiply(const Array<float>& x, const Array<float>& y) {
    const int64_t size = a_.depth * kTile, tiles = rows_ / kTile;
    const auto strips_of = [&](int64_t part, const auto& strip) {
      for (int64_t s = tiles * part / kParts; s < tiles * (part + 1) / kParts; ++s) strip(s);
    };
    team_.run(kParts, [&](int64_t part) {
      float* z = parts_.get() + part * size;
      std::fill_n(z, size, 0.0f);
      strips_of(part, [&](int64_t s) { simd().add_product(a_.strip(s), x.get() + s * kTileSize, a_.depth, z); });
    });
    team_.run(kParts, [&](int64_t part) {
      float* z = parts_.get();
      for (int64_t i = size * part / kParts; i < size * (part + 1) / kParts; ++i) {
        z[i] = (z[i] + z[size + i]) + (z[2 * size + i] + z[3 * size + i]);
      }
    });
    team_.run(kParts, [&](int64_t part) {
      strips_of(part, [&](int64_t s) { simd().cross(a_.strip(s), parts_.get(), a_.depth, y.get() + s * kTileSize); });
    });
  }

  // x <- Q, x = Q R with R upper triangular, by Cholesky's factor of x^T x, twice. A column that depends on those
  // before it becomes zero, and takes no part from then on.
  std::vector<double> orthonormalize(Array<float>& x) {
    std::vector<double> all(kTileSize);
    for (int64_t i = 0; i < kTile; ++i) all[i * kTile + i] = 1.0;
    for (int pass = 0; pass < 2; ++pass) {
      float gram[kTileSize], inverse[kTileSize];
      simd().cross(x.get(), x.get(), rows_, gram);
      double r[kTile][kTile] = {}, inv[kTile][kTile] = {};
      for (int64_t j = 0; j < kTile; ++j) {
        double pivot = gram[j * kTile + j];
        for (int64_t k = 0; k < j; ++k) pivot -= r[k][j] * r[k][j];
        const bool independent = pivot > 1e-6 * gram[j * kTile + j] && pivot > 1e-30;
        r[j][j] = independent ? std::sqrt(pivot) : 0.0;
        for (int64_t c = j + 1; c < kTile && independent; ++c) {
          double sum = gram[j * kTile + c];
          for (int64_t k = 0; k < j; ++k) sum -= r[k][j] * r[k][c];
          r[j][c] = sum / r[j][j];
        }
        if (!independent) continue;
        inv[j][j] = 1.0 / r[j][j];
        for (int64_t i = 0; i < j; ++i) {
          double sum = 0.0;
          for (int64_t k = i; k < j; ++k) sum += inv[i][k] * r[k][j];
          inv[i][j] = -sum / r[j][j];
        }
      }
      for (int64_t i = 0; i < kTileSize; ++i) inverse[i] = static_cast<float>(inv[i / kTile][i % kTile]);
      Array<float> q = zeros<float>(rows_ * kTile);
      simd().add_product(x.get(), inverse, rows_, q.get());
      std::swap(x, q);
      std::vector<double> product(kTileSize);
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t k = i; k < kTile; ++k) {
          for (int64_t c = 0; c < kTile; ++c) product[i * kTile + c] += r[i][k] * all[k * kTile + c];
        }
      }
      all = product;
    }
    return all;
  }

  Team& team_;
  const Panels& a_;
  int64_t rows_;
  Array<float> parts_;
  std::vector<Array<float>> blocks_;
};

// By how much the first `count` Ritz vectors s of the basis miss being within an angle of 0.01 of eigenvectors: 0 if
// none does, and up to 1 for each. The residual R s, and what rounding in fp32 adds to it, over the gap to the next
// eigenvalue bounds the angle. `ritz` has count + 1 of them.
double missing(const Eigenvectors<float>& ritz, const std::vector<double>& r, int64_t count) {
  const double rounding = 1e-7 * ritz.eigenvalues[0];
  double sum_of_angles = 0.0;
  for (int64_t g = 0; g < count; ++g) {
    double square = 0.0;
    for (int64_t i = 0; i < kTile; ++i) {
      double sum = 0.0;
      for (int64_t k = i; k < kTile; ++k) sum += r[i * kTile + k] * ritz(ritz.rows - kTile + k, g);
      square += sum * sum;
    }
    double gap = ritz.eigenvalues[g] - ritz.eigenvalues[g + 1];
    if (g > 0) gap = std::min(gap, ritz.eigenvalues[g - 1] - ritz.eigenvalues[g]);
    const double residual = std::sqrt(square) + rounding;
    if (!(residual <= 0.01 * gap)) sum_of_angles += residual < gap ? residual / gap : 1.0;
  }
  return sum_of_angles;
}

}  // namespace

std::optional<Eigenvectors<float>> leading_eigenvectors_of_gram(
    Team& team, const Panels& a, int64_t count, int64_t most) {
  constexpr int64_t kLanes = Eigenvectors<float>::kLanes;
  static_assert(kLanes == kTile, "a block of eigenvectors is a block of the basis");
  most = most / kTile * kTile;
  if (count + 2 * kTile > most) return std::nullopt;
  BlockLanczos lanczos(team, a, most);
  lanczos.start();
  Tiles<float> projected(most);
  double before = 2.0 * static_cast<double>(count);
  for (int64_t size = kTile; size <= most; size += kTile) {
    const int64_t j = size / kTile - 1;
    const auto r = lanczos.extend(projected.strip(j));
    if (size < count + 2 * kTile) continue;
    Tiles<float> matrix(size);
    std::copy_n(projected.values.get(), matrix.size, matrix.values.get());
    auto ritz = leading_eigenvectors(team, matrix, count + 1);
    const double left = missing(ritz, r, count);
    if (left > 0.9 * before) return std::nullopt;  // hardly any progress: the rest lies too close together
    before = left;
    if (left > 0.0) continue;

    Eigenvectors<float> out(a.rows, count);
    team.run(out.blocks(), [&](int64_t b) {
      Array<float> sum = zeros<float>(lanczos.rows() * kTile);
      for (int64_t i = 0; i <= j; ++i) {
        simd().add_product(lanczos.block(i).get(), ritz.block(b) + i * kTileSize, lanczos.rows(), sum.get());
      }
      std::copy_n(sum.get(), a.rows * kLanes, out.block(b));
    });
    std::copy_n(ritz.eigenvalues.begin(), count, out.eigenvalues.begin());
    return out;
  }
  return std::nullopt;
}

}  // namespace lvtp::cpu
