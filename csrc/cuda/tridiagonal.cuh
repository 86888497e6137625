// Householder's tridiagonal form of symmetric matrices: the kernels of the first half of eigen.cu.
#pragma once

#include "device.cuh"
#include "eigen.h"
#include "ptx.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kMostWarps = 8, kMostThreads = 32 * kMostWarps;
constexpr int kMostParts = 128;  // blocks that share a step
constexpr int kAlone = 128;      // rows from which on one block takes all steps: nobody waits for another block then

// Images whose vectors are known already are left out. `settled` may be null.
__device__ inline bool is_settled(const int* settled, int64_t image) {
  return settled != nullptr && settled[image] != 0;
}

// One image's matrix C, and what becomes of it.
struct Form {
  int n;
  double* matrix;  // [n + 2, n]; step k leaves its reflector in row k + 1, which no later step needs; row n + 1 is zero
  double* vectors;

  LVTP_HD static int64_t size(int64_t n) { return 4 * n + 2 * kMostParts + 1; }
  __device__ Form(double* matrices, double* forms, int64_t image, int n)
      : n(n), matrix(matrices + image * eigen_matrix_size(n)), vectors(forms + image * size(n)) {}

  __device__ double* row(int i) const { return matrix + static_cast<int64_t>(i) * n; }
  __device__ double* reflector(int k) const { return row(k + 1); }
  __device__ double* diagonal() const { return vectors; }
  __device__ double* beside() const { return vectors + n; }  // [k] couples k - 1 and k
  // Of step k and, until it is over, of the one before: y = C u [n], and pieces of u . y.
  __device__ double* product(int k) const { return vectors + (2 + k % 2) * static_cast<int64_t>(n); }
  __device__ double* partial(int k) const { return vectors + 4 * static_cast<int64_t>(n) + k % 2 * kMostParts; }
  __device__ double& trace() const { return vectors[size(n) - 1]; }
};

// The trace, and zeros for the step that the first one looks back on. A block an image.
__global__ void __launch_bounds__(kMostThreads) begin(const int* settled, double* matrices, double* forms, int n) {
  if (is_settled(settled, blockIdx.x)) return;
  const Form f(matrices, forms, blockIdx.x, n);
  __shared__ double warps[kMostWarps];
  double sum = 0.0;
  for (int i = threadIdx.x; i < n; i += kMostThreads) {
    sum += f.row(i)[i];
    f.reflector(n)[i] = f.product(n)[i] = 0.0;
  }
  for (int p = threadIdx.x; p < kMostParts; p += kMostThreads) f.partial(n)[p] = 0.0;
  sum = block_sum(sum, warps);
  if (threadIdx.x == 0) f.trace() = sum;
}

// The sum over kLanes neighbouring threads, in each of them.
template <int kLanes>
__device__ double sum_of_lanes(double v) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// A step of Householder's form T = Q^T C Q, from the last row up: step k leaves of row k but the diagonal and one
// element beside it. With u its reflector, y = C u and w = y - u (u . y) / 2, a step is C -= u w^T + w u^T; that is put
// off until the next one multiplies the matrix, so that it is read and written once a step. Here h and w are those of
// the step before, and u is of this one.
struct Step {
  const double *h, *y, *row;
  int k;
  double half, hk, wk, own, scale;  // the last two once they are known

  struct Column {
    double h, w, left;  // left: row k as the step before leaves it
  };
  __device__ Column column(int j) const {
    const double hj = h[j], w = y[j] - half * hj;
    return {hj, w, row[j] - hk * w - wk * hj};
  }
  __device__ double u(int j, const Column& c) const { return scale * (j == k - 1 ? own : c.left); }
};

// What the step before leaves of a row of C, and a thread's part of its product with u. Loads come in batches, which
// take the time of one.
template <int kLanes>
__device__ double update_row(const Step& s, int i, double* __restrict__ mine) {
  constexpr int kBatch = 6;
  const double hi = s.h[i], wi = s.y[i] - s.half * hi;
  double sum = 0.0;
  for (int first = threadIdx.x % kLanes; first < s.k; first += kBatch * kLanes) {
    Step::Column column[kBatch] = {};
    double v[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int j = first + b * kLanes;
      if (j >= s.k) continue;
      v[b] = mine[j];
      column[b] = s.column(j);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int j = first + b * kLanes;
      v[b] -= hi * column[b].w + wi * column[b].h;
      if (j < s.k) mine[j] = v[b];
      sum += v[b] * s.u(j, column[b]);
    }
  }
  return sum;
}

struct StepShared {
  double squares[kMostWarps], products[kMostWarps];
};

// kLanes threads a row. `before`: how many parts the step before had.
template <int kLanes>
__device__ void take_step(const Form& f, int k, int part, int parts, int before, StepShared& shared) {
  const int threads = static_cast<int>(blockDim.x);
  Step s{f.reflector(k + 1), f.product(k + 1), f.row(k), k, 0.0, 0.0, 0.0, 0.0, 0.0};
  for (int p = threadIdx.x % 32; p < before; p += 32) s.half += f.partial(k + 1)[p];
  s.half = warp_sum(s.half) / 2;
  s.hk = s.h[k];
  s.wk = s.y[k] - s.half * s.hk;

  double square = 0.0;
  for (int j = threadIdx.x; j < k - 1; j += threads) square += s.column(j).left * s.column(j).left;
  square = block_sum(square, shared.squares);
  // A row whose square is negligible is rounding, as all are of a matrix of low rank after a few steps: u = 0 then.
  const double rounding = 2e-19 * f.trace(), last = k > 0 ? s.column(k - 1).left : 0.0;
  const bool nothing = square <= rounding * rounding;
  const double length = sqrt(square + last * last), after = nothing ? last : last > 0.0 ? -length : length;
  s.own = last - after;
  s.scale = nothing ? 0.0 : sqrt(2.0 / (square + s.own * s.own));
  if (part == 0) {
    for (int j = threadIdx.x; j < k; j += threads) f.reflector(k)[j] = s.u(j, s.column(j));
    if (threadIdx.x == 0) {
      f.diagonal()[k] = s.column(k).left;
      f.beside()[k] = after;
    }
  }

  const int rows = threads / kLanes;
  double product = 0.0;
  for (int first = part * rows; first < k; first += parts * rows) {
    const int i = first + static_cast<int>(threadIdx.x) / kLanes;
    const double sum = sum_of_lanes<kLanes>(i < k ? update_row<kLanes>(s, i, f.row(i)) : 0.0);
    if (i < k && threadIdx.x % kLanes == 0) {
      f.product(k)[i] = sum;
      product += s.u(i, s.column(i)) * sum;
    }
  }
  product = block_sum(product, shared.products);
  if (threadIdx.x == 0) f.partial(k)[part] = product;
}

// All steps, of each image by a team of `parts` blocks, which wait for each other: one launch where there would be n.
// What the next step reads of this one lies in global memory, so the barrier's is the only wait.
__global__ void __launch_bounds__(kMostThreads) tridiagonalise(
    const int* settled, double* matrices, double* forms, int64_t images, int n, int parts, unsigned* arrivals) {
  auto& shared = *reinterpret_cast<StepShared*>(dynamic_shared());
  const int part = static_cast<int>(blockIdx.x) % parts, team = static_cast<int>(blockIdx.x) / parts;
  for (int64_t image = team; image < images; image += gridDim.x / parts) {
    if (is_settled(settled, image)) continue;  // the whole team
    const Form f(matrices, forms, image, n);
    int k = n - 1, before = kMostParts;
    for (; parts > 1 && k > kAlone; --k, before = parts) {
      take_step<32>(f, k, part, parts, before, shared);
      team_barrier(arrivals + team, parts);  // the step is complete
    }
    for (; part == 0 && k >= 0; --k, before = 1) {
      take_step<8>(f, k, 0, 1, before, shared);
      __syncthreads();  // the step is complete
    }
  }
}

}  // namespace
}  // namespace lvtp::cuda
