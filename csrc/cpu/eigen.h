// The leading eigenvectors of a symmetric matrix, directly: no iteration whose convergence would depend on the matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "gram.h"
#include "team.h"

namespace lvtp::cpu {

// Eigenvectors of length 1, largest eigenvalue first; vector g of the matrix is column g of [rows, count].
template <class T>
struct Eigenvectors {
  static constexpr int64_t kLanes = EigenLoops<T>::kLanes;
  int64_t rows, count;
  Array<T> values;  // blocks of kLanes columns, [rows][kLanes]
  std::vector<double> eigenvalues;

  Eigenvectors(int64_t rows, int64_t count)
      : rows(rows), count(count), values(zeros<T>(blocks() * rows * kLanes)), eigenvalues(count) {}
  int64_t blocks() const { return (count + kLanes - 1) / kLanes; }
  T* block(int64_t b) const { return values.get() + b * rows * kLanes; }
  T& operator()(int64_t i, int64_t g) const { return block(g / kLanes)[i * kLanes + g % kLanes]; }
};

// `matrix` is overwritten. Deterministic for any number of threads. Householder's tridiagonal form, its largest
// eigenvalues by bisection, their vectors by twisted factorization (Dhillon & Parlett 2004), and back. In the accuracy
// of T for matrices, such as Gram matrices, whose large eigenvalues matter.
template <class T>
Eigenvectors<T> leading_eigenvectors(Team& team, const Tiles<T>& matrix, int64_t count);

}  // namespace lvtp::cpu
