// The steps of subspace iteration (subspace.cu), each by a team of blocks: every block does its part of the rows, and a
// barrier of the team follows, which is the caller's. Vectors come as blocks [n, kSize] of kSize = 16 kColumns columns.
// Sums are in double and in a fixed order, and what decides the next step is the same in every block.
#pragma once

#include "device.cuh"
#include "ptx.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kStepThreads = 256, kStepWarps = kStepThreads / 32;
constexpr int kStrip = 8;  // rows that a block multiplies at a time

// A block's part of one image.
struct Part {
  const double* matrix;  // symmetric [n, n]
  int n, part, parts;
};

// Dynamic, as static shared memory is when blocks wait for each other (simt.h).
template <int kColumns>
struct Shared {
  static constexpr int kSize = 16 * kColumns;
  union {
    double sums[kStepWarps][kStrip][kSize];  // of multiply
    double tiles[kStepWarps][256];           // of cross
    struct {
      double factor[kSize][kSize], rows[kStrip][kSize];
    } own;  // of orthonormalise
  };
  double row[2][kSize], column[2][kSize];  // of the pivot, for this step and the next
  double scale[kSize], unit[kSize];        // unit: 1 over the root of the pivot
  double growth[kSize];                    // the diagonal of R
};

// out = alpha G in + beta in + gamma out, rows of this block. The warps share the sum over k; a lane has half a strip's
// rows and every 16th column. G is symmetric: its row k is read for column k.
template <int kColumns>
__device__ void multiply(
    const Part& t, const double* in, double alpha, double beta, double gamma, double* out, Shared<kColumns>& shared) {
  constexpr int kSize = 16 * kColumns, kRows = kStrip / 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane % 16, half = lane / 16 * kRows;
  for (int first = t.part * kStrip; first < t.n; first += t.parts * kStrip) {
    double sum[kRows][kColumns] = {};
#pragma unroll(12 / kColumns)
    for (int k = warp; k < t.n; k += kStepWarps) {
      const double* const g = t.matrix + static_cast<int64_t>(k) * t.n + first + half;
      const double* const v = in + static_cast<int64_t>(k) * kSize + column;
#pragma unroll
      for (int p = 0; p < kRows; ++p) {
        const double element = first + half + p < t.n ? g[p] : 0.0;
#pragma unroll
        for (int q = 0; q < kColumns; ++q) sum[p][q] += element * v[16 * q];
      }
    }
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
#pragma unroll
      for (int q = 0; q < kColumns; ++q) shared.sums[warp][half + p][16 * q + column] = sum[p][q];
    }
    __syncthreads();  // every warp has entered its sums
    for (int e = threadIdx.x; e < kStrip * kSize && first + e / kSize < t.n; e += kStepThreads) {
      double total = 0.0;
      for (int w = 0; w < kStepWarps; ++w) total += shared.sums[w][e / kSize][e % kSize];
      const int64_t at = static_cast<int64_t>(first) * kSize + e;
      out[at] = alpha * total + beta * in[at] + (gamma != 0.0 ? gamma * out[at] : 0.0);
    }
    __syncthreads();  // the sums have been read and may be overwritten
  }
}

// a^T b, symmetric, in kSlices pieces whose sum it is, each [kSize, kSize] and right in its tiles of 16 x 16 on and
// below the diagonal. A tile of a piece is one block's; its warps share the rows.
template <int kColumns>
struct Cross {
  static constexpr int kSize = 16 * kColumns, kTiles = kColumns * (kColumns + 1) / 2, kSlices = 12 / kColumns;
  static constexpr int kElements = kSlices * kSize * kSize;

  static __device__ void enter(const Part& t, const double* a, const double* b, double* out, Shared<kColumns>& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4 * 2, c = lane % 4 * 4;
    for (int unit = t.part; unit < kTiles * kSlices; unit += t.parts) {
      const int slice = unit % kSlices;
      int down = 0, across = unit / kSlices;
      for (; across > down; ++down) across -= down + 1;
      const auto bound = [&](int s) { return static_cast<int>(static_cast<int64_t>(t.n) * s / kSlices); };
      double sum[2][4] = {};
#pragma unroll 4
      for (int k = bound(slice) + warp; k < bound(slice + 1); k += kStepWarps) {
        const double* const x = a + static_cast<int64_t>(k) * kSize + 16 * down + r;
        const double* const y = b + static_cast<int64_t>(k) * kSize + 16 * across + c;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
#pragma unroll
          for (int q = 0; q < 4; ++q) sum[p][q] += x[p] * y[q];
        }
      }
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int q = 0; q < 4; ++q) shared.tiles[warp][(r + p) * 16 + c + q] = sum[p][q];
      }
      __syncthreads();  // every warp has entered its sums
      const int e = threadIdx.x;
      double total = 0.0;
      for (int w = 0; w < kStepWarps; ++w) total += shared.tiles[w][e];
      out[slice * kSize * kSize + (16 * down + e / 16) * kSize + 16 * across + e % 16] = total;
      __syncthreads();  // the sums have been read and may be overwritten
    }
  }

  static __device__ double element(const double* pieces, int i, int j) {
    const int at = i / 16 < j / 16 ? j * kSize + i : i * kSize + j;
    double sum = 0.0;
    for (int s = 0; s < kSlices; ++s) sum += pieces[s * kSize * kSize + at];
    return sum;
  }
};

// R^-1 for x <- x R^-1 with orthonormal columns, from x^T x, into shared.own.factor, and R's diagonal into
// shared.growth: Cholesky's factor of x^T x, its rows and columns scaled to a diagonal of ones, by elimination, which
// is carried out on a unit matrix, too. A warp has every kStepWarps-th row, in registers. Returns the smallest pivot,
// or 0 where the columns depend on each other.
template <int kColumns>
__device__ double invert_factor(const double* pieces, Shared<kColumns>& shared) {
  constexpr int kSize = 16 * kColumns, kDown = kSize / kStepWarps, kAcross = (kSize + 31) / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto& product = shared.own.factor;  // until the factor takes its place
  for (int e = threadIdx.x; e < kSize * kSize; e += kStepThreads) {
    product[e / kSize][e % kSize] = Cross<kColumns>::element(pieces, e / kSize, e % kSize);
  }
  __syncthreads();  // x^T x is there
  for (int i = threadIdx.x; i < kSize; i += kStepThreads) {
    const double square = product[i][i];
    shared.scale[i] = square > 0.0 ? 1.0 / sqrt(square) : 0.0;
  }
  __syncthreads();  // all scales are known
  double v[kDown][kAcross];
#pragma unroll
  for (int p = 0; p < kDown; ++p) {
#pragma unroll
    for (int q = 0; q < kAcross; ++q) {
      const int i = warp + kStepWarps * p, j = lane + 32 * q;
      v[p][q] = j < kSize ? product[i][j] * shared.scale[i] * shared.scale[j] : 0.0;
    }
  }
  double least = 1.0;
#pragma unroll 1
  for (int k = 0; k < kSize; ++k) {
    double *const row = shared.row[k % 2], *const column = shared.column[k % 2];
#pragma unroll
    for (int p = 0; p < kDown; ++p) {
#pragma unroll
      for (int q = 0; q < kAcross; ++q) {
        const int i = warp + kStepWarps * p, j = lane + 32 * q;
        if (i == k && j < kSize) row[j] = v[p][q];
        if (j == k) column[i] = v[p][q];
      }
    }
    __syncthreads();  // the pivot's row and column are there; those of the step before last have been read
    const double pivot = column[k];
    if (!(pivot > 1e-14)) return 0.0;  // the whole team
    least = fmin(least, pivot);
    if (threadIdx.x == 0) shared.unit[k] = 1.0 / sqrt(pivot);
    const double inverse = 1.0 / pivot;
#pragma unroll
    for (int p = 0; p < kDown; ++p) {
      const int i = warp + kStepWarps * p;
      const double f = i > k ? column[i] * inverse : 0.0;
#pragma unroll
      for (int q = 0; q < kAcross; ++q) {
        const int j = lane + 32 * q;
        if (j == k && i > k) {
          v[p][q] = -f;
        } else if (j < kSize) {
          v[p][q] -= f * row[j];
        }
      }
    }
  }
  __syncthreads();  // all pivots are known, and what shared `own` with other steps has been read
#pragma unroll
  for (int p = 0; p < kDown; ++p) {
#pragma unroll
    for (int q = 0; q < kAcross; ++q) {
      const int i = warp + kStepWarps * p, j = lane + 32 * q;
      if (j >= kSize) continue;
      shared.own.factor[j][i] = j > i ? 0.0 : (j < i ? v[p][q] : 1.0) * shared.scale[j] * shared.unit[i];
    }
  }
  __syncthreads();  // the factor is complete
  if (threadIdx.x < kSize) shared.growth[threadIdx.x] = 1.0 / shared.own.factor[threadIdx.x][threadIdx.x];
  return least;
}

// x <- x R^-1, rows of this block.
template <int kColumns>
__device__ void apply_factor(const Part& t, double* x, Shared<kColumns>& shared) {
  constexpr int kSize = 16 * kColumns;
  for (int first = t.part * kStrip; first < t.n; first += t.parts * kStrip) {
    double* const rows = x + static_cast<int64_t>(first) * kSize;
    const int count = (t.n - first < kStrip ? t.n - first : kStrip) * kSize;
    for (int e = threadIdx.x; e < count; e += kStepThreads) shared.own.rows[e / kSize][e % kSize] = rows[e];
    __syncthreads();  // the rows are there
    for (int e = threadIdx.x; e < count; e += kStepThreads) {
      const double* const row = shared.own.rows[e / kSize];
      double sum = 0.0;
      for (int c = 0; c <= e % kSize; ++c) sum += row[c] * shared.own.factor[c][e % kSize];
      rows[e] = sum;
    }
    __syncthreads();  // the rows have been read and may be overwritten
  }
}

}  // namespace
}  // namespace lvtp::cuda
