#include "eigen.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace lvtp::cpu {
namespace {

// Householder's form T = Q^T C Q: C is changed to (I - h h^T) C (I - h h^T) for one h after the other.
template <class T>
struct Tridiagonal {
  int64_t n;
  std::vector<double> diagonal, beside;  // beside[k] couples k - 1 and k
  Array<T> reflectors;                   // h of step k is reflector(k)[0, k), filled up to whole tiles with zeros

  explicit Tridiagonal(int64_t n) : n(n), diagonal(n), beside(n), reflectors(Tiles<T>::offset(strips(n))) {}
  T* reflector(int64_t k) const {
    return reflectors.get() + Tiles<T>::offset(k / kTile) + k % kTile * (k / kTile + 1) * kTile;
  }
};

// Turns row[0, k) into an h such that I - h h^T leaves of it only the last element. Returns what that becomes. A row
// whose square is negligible is rounding, as all are of a matrix of low rank after a few steps: h = 0 then, before
// squares leave the range of T.
template <class T>
double reflector_of(T* row, int64_t k, double negligible, const EigenLoops<T>& loops) {
  const int64_t size = strips(k) * kTile;
  const double last = row[k - 1];
  row[k - 1] = 0;
  const double square = loops.dot(row, row, size);
  if (square <= negligible) {
    std::fill_n(row, size, T(0));
    return last;
  }
  const double norm = std::sqrt(square + last * last), after = last > 0 ? -norm : norm, own = last - after;
  row[k - 1] = static_cast<T>(own);
  loops.scale(row, size, static_cast<T>(std::sqrt(2.0 / (square + own * own))));
  return after;
}

constexpr int64_t kParts = 4;  // pieces of a step, and so the threads that can share one
// A step of a smaller matrix is over in the time that two threads need to exchange its vectors: at 576 rows 4.2 ms on
// two threads and 4.0 ms on one, Xeon (Sapphire Rapids), 2026-11.
constexpr int64_t kWorthSharing = 1024;

// The first tile row of a part: every part has about as many tiles, whoever computes it.
int64_t part_begin(int64_t tile_rows, int64_t part) {
  return std::lround(std::sqrt(static_cast<double>(part) / kParts) * static_cast<double>(tile_rows));
}

// From the last row up. With u the h of this step, y = C u and w = y - u (u.y) / 2, the step is C -= u w^T + w u^T.
// Updates wait until kWaiting of them can be made in one pass through the matrix, which makes that step's product, too;
// the steps between only read it. 576 rows, one thread, Xeon (Sapphire Rapids), 2026-11: 3.1 ms where every step wrote
// it, 2.7 ms so, and no less with more of them.
template <class T>
Tridiagonal<T> tridiagonal(Team& team, const Tiles<T>& matrix) {
  const auto& loops = simd().eigen<T>();
  constexpr int64_t kWaiting = EigenLoops<T>::kWaiting;
  Tridiagonal<T> out(matrix.rows);
  const int64_t n = matrix.rows, size = strips(n) * kTile;
  const auto h = zeros<T>(kWaiting * size), w = zeros<T>(kWaiting * size);
  const Array<T> partial(kParts * size);
  double trace = 0.0;
  for (int64_t i = 0; i < n; ++i) trace += matrix.strip(i / kTile)[(i / kTile * kTile + i % kTile) * kTile + i % kTile];
  const double negligible = std::pow(1e-3 * std::numeric_limits<T>::epsilon() * trace, 2);
  int64_t waiting = 0;
  for (int64_t k = n - 1; k >= 1; --k) {
    T* u = out.reflector(k);
    loops.current_row(matrix.strip(k / kTile), k, h.get(), w.get(), size, waiting, u);
    out.diagonal[k] = u[k];
    std::fill(u + k, u + (k / kTile + 1) * kTile, T(0));
    out.beside[k] = reflector_of(u, k, negligible, loops);

    const int64_t tile_rows = strips(k), active = tile_rows * kTile;
    const bool update = waiting == kWaiting;
    const auto multiply = [&](int64_t part) {
      T* y = partial.get() + part * size;
      std::fill_n(y, active, T(0));
      for (int64_t t = part_begin(tile_rows, part); t < part_begin(tile_rows, part + 1); ++t) {
        if (update) {
          loops.update_and_multiply(matrix.strip(t), t, h.get(), w.get(), size, u, y);
        } else {
          loops.multiply(matrix.strip(t), t, u, y);
        }
      }
    };
    if (n >= kWorthSharing) {
      team.run(kParts, multiply);
    } else {
      for (int64_t part = 0; part < kParts; ++part) multiply(part);
    }
    if (update) waiting = 0;
    loops.correct(h.get(), w.get(), size, waiting, u, active, partial.get());
    T *next_h = h.get() + waiting * size, *next_w = w.get() + waiting * size;
    loops.second_vector(partial.get(), size, u, active, next_w);
    std::fill(next_w + k, next_w + active, T(0));
    std::copy_n(u, active, next_h);
    ++waiting;
  }
  T first[kTile];
  loops.current_row(matrix.strip(0), 0, h.get(), w.get(), size, waiting, first);
  out.diagonal[0] = first[0];
  return out;
}

// Equal eigenvalues have no vectors of their own; noise far below the accuracy of the matrix tells them apart, so that
// they get different ones, and the same in every run.
void separate(std::vector<double>& diagonal, double norm) {
  uint64_t state = 1;
  for (double& d : diagonal) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    d += (static_cast<double>(state >> 33) * 0x1p-31 - 0.5) * 1e-11 * norm;
  }
}

}  // namespace

template <class T>
Eigenvectors<T> leading_eigenvectors(Team& team, const Tiles<T>& matrix, int64_t count) {
  auto form = tridiagonal(team, matrix);
  const int64_t n = form.n;
  Eigenvectors<T> vectors(n, count);
  // Gershgorin: no eigenvalue is larger.
  double norm = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double next = i + 1 < n ? std::fabs(form.beside[i + 1]) : 0.0;
    norm = std::max(norm, std::fabs(form.diagonal[i]) + std::fabs(form.beside[i]) + next);
  }
  if (norm == 0.0) return vectors;  // a zero matrix: no vector is better than another
  separate(form.diagonal, norm);

  team.run((count + 7) / 8, [&](int64_t piece) {
    const Array<double> scratch(2 * n * 8), z(n * 8);
    double values[8];
    const int64_t first = piece * 8;
    simd().eight_eigenpairs(
        form.diagonal.data(), form.beside.data(), n, -1.001 * norm, 1.001 * norm, first, scratch.get(), z.get(),
        values);
    for (int64_t g = first; g < std::min(first + 8, count); ++g) {
      vectors.eigenvalues[g] = values[g - first];
      for (int64_t i = 0; i < n; ++i) vectors(i, g) = static_cast<T>(z[i * 8 + g - first]);
    }
  });
  team.run(vectors.blocks(), [&](int64_t b) {
    for (int64_t k = 1; k < n; ++k) simd().eigen<T>().reflect(form.reflector(k), k, vectors.block(b));
  });
  return vectors;
}

template Eigenvectors<float> leading_eigenvectors(Team&, const Tiles<float>&, int64_t);
template Eigenvectors<double> leading_eigenvectors(Team&, const Tiles<double>&, int64_t);

}  // namespace lvtp::cpu
