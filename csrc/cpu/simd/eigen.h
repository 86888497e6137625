// The loops of csrc/cpu/eigen.cpp: Householder's tridiagonal form, its eigenpairs, and the way back.
#pragma once

#include "vector.h"

namespace lvtp::cpu::LVTP_ISA {

// A matrix larger than the first cache costs what moving it costs; reading alone is less than half of that.
template <int64_t kUpdates, class T>
inline void pass(T* tiles, int64_t tile_row, const T* h, const T* w, int64_t stride, const T* u, T* y) {
  using V = Vector<T>;
  constexpr int64_t kRows = LVTP_BYTES == 64 ? 8 : 4;  // at a time: as registers allow
  const int64_t first = tile_row * kTile;
  for (int64_t r0 = 0; r0 < kTile; r0 += kRows) {
    const T *hi = h + first + r0, *wi = w + first + r0;
    V sum[kRows] = {}, ui[kRows];
    for (int64_t r = 0; r < kRows; ++r) ui[r] = V{} + u[first + r0 + r];
    for (int64_t j = 0; j < first + kTile; j += kWidth<T>) {
      T* column = tiles + j / kTile * kTile * kTile + r0 * kTile + j % kTile;
      const V uj = load<V>(u + j);
      V yj = load<V>(y + j), hj[kUpdates + 1], wj[kUpdates + 1];
#pragma GCC unroll 4
      for (int64_t p = 0; p < kUpdates; ++p) {
        hj[p] = load<V>(h + p * stride + j);
        wj[p] = load<V>(w + p * stride + j);
      }
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        V c = load<V>(column + r * kTile);
#pragma GCC unroll 4
        for (int64_t p = 0; p < kUpdates; ++p) {
          c -= hi[p * stride + r] * wj[p];
          c -= wi[p * stride + r] * hj[p];
        }
        if (kUpdates > 0) store(column + r * kTile, c);
        sum[r] += c * uj;
        yj += c * ui[r];
      }
      if (j < first) store(y + j, yj);  // a diagonal tile is its own mirror image
    }
    add_totals<T>(sum, y + first + r0);
  }
}

template <class T>
inline void multiply(T* tiles, int64_t tile_row, const T* u, T* y) {
  pass<0>(tiles, tile_row, u, u, 0, u, y);
}

template <class T>
inline void update_and_multiply(T* tiles, int64_t tile_row, const T* h, const T* w, int64_t stride, const T* u, T* y) {
  pass<EigenLoops<T>::kWaiting>(tiles, tile_row, h, w, stride, u, y);
}

template <class T>
inline void current_row(const T* tiles, int64_t k, const T* h, const T* w, int64_t stride, int64_t waiting, T* row) {
  using V = Vector<T>;
  for (int64_t j = 0; j <= k; j += kWidth<T>) {
    V c = load<V>(tiles + j / kTile * kTile * kTile + k % kTile * kTile + j % kTile);
    for (int64_t p = 0; p < waiting; ++p) {
      c -= h[p * stride + k] * load<V>(w + p * stride + j) + w[p * stride + k] * load<V>(h + p * stride + j);
    }
    store(row + j, c);
  }
}

template <class T>
inline void correct(const T* h, const T* w, int64_t stride, int64_t waiting, const T* u, int64_t size, T* y) {
  using V = Vector<T>;
  for (int64_t p = 0; p < waiting; ++p, h += stride, w += stride) {
    V hu = {}, wu = {};
    for (int64_t j = 0; j < size; j += kWidth<T>) {
      hu += load<V>(h + j) * load<V>(u + j);
      wu += load<V>(w + j) * load<V>(u + j);
    }
    const T of_h = total<T>(wu), of_w = total<T>(hu);
    for (int64_t j = 0; j < size; j += kWidth<T>) {
      store(y + j, load<V>(y + j) - (of_h * load<V>(h + j) + of_w * load<V>(w + j)));
    }
  }
}

template <class T>
inline T dot(const T* a, const T* b, int64_t size) {
  using V = Vector<T>;
  V sum = {};
  for (int64_t j = 0; j < size; j += kWidth<T>) sum += load<V>(a + j) * load<V>(b + j);
  return total<T>(sum);
}

template <class T>
inline void second_vector(const T* y, int64_t stride, const T* h, int64_t size, T* w) {
  using V = Vector<T>;
  V product = {};
  for (int64_t j = 0; j < size; j += kWidth<T>) {
    const V first = load<V>(y + j) + load<V>(y + stride + j);
    const V all = first + (load<V>(y + 2 * stride + j) + load<V>(y + 3 * stride + j));
    store(w + j, all);
    product += all * load<V>(h + j);
  }
  const T half = total<T>(product) / 2;
  for (int64_t j = 0; j < size; j += kWidth<T>) store(w + j, load<V>(w + j) - half * load<V>(h + j));
}

template <class T>
inline void scale(T* x, int64_t size, T factor) {
  for (int64_t j = 0; j < size; ++j) x[j] *= factor;
}

template <class T>
inline void reflect(const T* h, int64_t rows, T* z) {
  using V = Vector<T, 64>;
  constexpr int64_t kLanes = EigenLoops<T>::kLanes;
  V sum[4] = {};
  int64_t j = 0;
  for (; j + 4 <= rows; j += 4) {
    for (int64_t p = 0; p < 4; ++p) sum[p] += h[j + p] * load<V>(z + (j + p) * kLanes);
  }
  for (; j < rows; ++j) sum[0] += h[j] * load<V>(z + j * kLanes);
  const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (j = 0; j < rows; ++j) store(z + j * kLanes, load<V>(z + j * kLanes) - h[j] * all);
}

using Eight = Vector<double, 64>;  // eight eigenpairs at a time
using EightInts = Vector<int64_t, 64>;

inline Eight away_from_zero(Eight q) {
  constexpr double kTiny = 1e-290;
  return (q < kTiny) & (q > -kTiny) ? Eight{} - kTiny : q;
}

// Components decay by hundreds of orders of magnitude; arithmetic on the denormal numbers at the end is slow.
inline Eight without_traces(Eight x) { return (x < 1e-30) & (x > -1e-30) ? Eight{} : x; }

// z, a column a value: (T - value) z = 0 but for one row, the one where what is left over is smallest (the twist).
// Returns Rayleigh's correction of the values.
inline Eight twisted(
    const double* diagonal, const double* beside, int64_t n, Eight value, double* down, double* up, double* z) {
  Eight q = Eight{} + 1.0;
  for (int64_t i = 0; i < n; ++i) {  // pivots of L D L^T, from the top
    q = away_from_zero((diagonal[i] - value) - beside[i] * beside[i] / q);
    store(down + i * 8, q);
  }
  Eight least = Eight{} + 1e300, left_over = {};
  EightInts twist = {};
  q = Eight{} + 1.0;
  double next = 0.0;
  for (int64_t i = n - 1; i >= 0; --i) {  // and of U D U^T, from the bottom
    q = away_from_zero((diagonal[i] - value) - next * next / q);
    store(up + i * 8, q);
    const Eight gamma = load<Eight>(down + i * 8) + q - (diagonal[i] - value);
    const Eight size = gamma < 0.0 ? -gamma : gamma;
    twist = size < least ? EightInts{} + i : twist;
    left_over = size < least ? gamma : left_over;
    least = size < least ? size : least;
    next = beside[i];
  }
  const Eight one = Eight{} + 1.0;
  Eight x = {}, square = {};
  for (int64_t i = n - 1; i >= 0; --i) {
    if (i + 1 < n) x = without_traces(x * (-beside[i + 1] / load<Eight>(down + i * 8)));
    x = twist == i ? one : x;
    square += x * x;
    store(z + i * 8, x);
  }
  x = Eight{};
  for (int64_t i = 0; i < n; ++i) {  // x is 0 down to the twist, whose 1 was stored above
    x = without_traces(x * (-beside[i] / load<Eight>(up + i * 8)));
    square += x * x;
    store(z + i * 8, load<Eight>(z + i * 8) + x);
    x = twist == i ? one : x;
  }
  Eight length;
  for (int lane = 0; lane < 8; ++lane) length[lane] = __builtin_sqrt(square[lane]);
  for (int64_t i = 0; i < n; ++i) store(z + i * 8, load<Eight>(z + i * 8) / length);
  return left_over / square;
}

inline bool at_most_one(EightInts counts) {
  bool all = true;
  for (int lane = 0; lane < 8; ++lane) all = all && counts[lane] <= 1;
  return all;
}

inline void eight_eigenpairs(
    const double* diagonal, const double* beside, int64_t n, double low, double high, int64_t first, double* scratch,
    double* z, double* values) {
  EightInts rank;  // counted from the smallest
  for (int lane = 0; lane < 8; ++lane) rank[lane] = n - 1 - first - lane > 0 ? n - 1 - first - lane : 0;
  Eight lower = Eight{} + low, upper = Eight{} + high;
  EightInts below_lower = {}, below_upper = EightInts{} + n;
  const auto below = [&](Eight middle) {  // eigenvalues below it, by Sturm's count
    EightInts count = {};
    Eight q = Eight{} + 1.0;
    for (int64_t i = 0; i < n; ++i) {
      q = away_from_zero((diagonal[i] - middle) - beside[i] * beside[i] / q);
      count -= q < 0.0;
    }
    return count;
  };
  // To 2^-52 of the range, or until no other eigenvalue is within a bracket's width of it, and six steps more.
  for (int step = 0, alone = 0; step < 52 && alone < 6; ++step) {
    const Eight middle = 0.5 * (lower + upper);
    const EightInts count = below(middle), high_half = count > rank;
    upper = high_half ? middle : upper;
    lower = high_half ? lower : middle;
    below_upper = high_half ? count : below_upper;
    below_lower = high_half ? below_lower : count;
    bool isolated = at_most_one(below_upper - below_lower);
    if (isolated && alone == 0) {
      const Eight width = upper - lower;
      isolated = at_most_one(below(upper + width) - below(lower - width));
    }
    alone = isolated ? alone + 1 : 0;
  }
  // Twice, because the first vector improves the eigenvalue, as far as its bracket allows. One at the bracket's end, as
  // 0 is where a bisection has tried it, is held there.
  Eight value = 0.5 * (lower + upper);
  for (int round = 0; round < 2; ++round) {
    const Eight better = value + twisted(diagonal, beside, n, value, scratch, scratch + n * 8, z);
    const Eight capped = better < upper ? better : upper;
    value = capped > lower ? capped : lower;
  }
  store(values, value);
}

}  // namespace lvtp::cpu::LVTP_ISA
