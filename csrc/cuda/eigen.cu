#include "eigen.h"

#include <algorithm>

#include "tridiagonal.cuh"

namespace lvtp::cuda {
namespace {

// T of trace 1. Equal eigenvalues have no vectors of their own; noise far below the accuracy of the matrix tells them
// apart, so that they get different ones, and the same in every run. It also couples all rows. A thread a row.
__global__ void __launch_bounds__(kMostThreads)
    separate(const int* settled, double* matrices, double* forms, int64_t rows, int n) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kMostThreads + threadIdx.x;
  if (at >= rows || is_settled(settled, at / n)) return;
  const Form f(matrices, forms, at / n, n);
  const int i = static_cast<int>(at % n);
  const double scale = f.trace() > 0.0 ? 1.0 / f.trace() : 0.0, beside = f.beside()[i] * scale;
  f.diagonal()[i] = f.diagonal()[i] * scale + (scrambled(i) * 0x1p-32 - 0.5) * 1e-11;
  f.beside()[i] = i > 0 ? copysign(fmax(fabs(beside), 1e-18), beside) : 0.0;
}

// How many eigenvalues of T lie below x: the signs that change in Sturm's sequence, which is scaled by powers of two
// wherever it would leave the range of numbers. It takes two operations a row, one after the other, where the ratios of
// its elements would take a division.
__device__ int below(const double* __restrict__ diagonal, const double* __restrict__ beside, int n, double x) {
  constexpr double kFar = 0x1p300;
  double before = 0.0, p = 1.0;
  int count = 0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    const double past = beside[i] * beside[i] * before;
    before = p;
    p = (diagonal[i] - x) * p - past;
    if (p == 0.0) p = -1e-30 * before;
    count += (p < 0.0) != (before < 0.0);
    if (i % 4 == 3) {
      const double size = fmax(fabs(p), fabs(before)), scale = size > kFar ? 1 / kFar : size < 1 / kFar ? kFar : 1.0;
      p *= scale;
      before *= scale;
    }
  }
  return count;
}

constexpr int kPoints = 256, kRounds = 7;  // 257^7 > 2^56

// The eigenvalue number blockIdx.x % count, counted from the largest: a block tries kPoints values at once.
__global__ void __launch_bounds__(kPoints) find_eigenvalues(
    const int* settled, double* matrices, double* forms, int n, int count, double* __restrict__ values) {
  if (is_settled(settled, blockIdx.x / count)) return;
  const Form f(matrices, forms, blockIdx.x / count, n);
  const int rank = n - 1 - static_cast<int>(blockIdx.x % count);  // counted from the smallest
  double lower = -0.01, width = 1.02;
  for (int round = 0; round < kRounds; ++round) {
    width /= kPoints + 1;
    const bool reached = below(f.diagonal(), f.beside(), n, lower + width * (threadIdx.x + 1)) <= rank;
    lower += width * __syncthreads_count(reached);
  }
  if (threadIdx.x == 0) values[blockIdx.x] = lower + width / 2;
}

// z of length 1, for which (T - value) z is zero but for one row, the one where what is left over is smallest (the
// twist). `pivots` [2, n]: those of L D L^T, from the top, and of U D U^T, from the bottom. A warp a vector.
__global__ void __launch_bounds__(32) find_vectors(
    const int* settled, double* matrices, double* forms, int n, int count, const double* __restrict__ values,
    double* pivots, double* vectors) {
  if (is_settled(settled, blockIdx.x / count)) return;
  const Form f(matrices, forms, blockIdx.x / count, n);
  const double *diagonal = f.diagonal(), *beside = f.beside(), value = values[blockIdx.x];
  double* const down = pivots + static_cast<int64_t>(blockIdx.x) * 2 * n;
  double* const up = down + n;
  double* const z = vectors + static_cast<int64_t>(blockIdx.x) * n;
  const int lane = threadIdx.x;
  const bool from_top = lane == 0;
  double* const mine = from_top ? down : up;
  if (lane < 2) {
    double q = 1.0, coupling = 0.0;
    for (int s = 0; s < n; ++s) {
      const int i = from_top ? s : n - 1 - s;
      if (from_top) coupling = beside[i];
      q = diagonal[i] - value - coupling * coupling / q;
      if (fabs(q) < 1e-290) q = -1e-290;
      mine[i] = q;
      if (!from_top) coupling = beside[i];
    }
  }
  __syncwarp();  // all pivots are known
  double least = INFINITY;
  int twist = 0;
  for (int i = lane; i < n; i += 32) {
    const double left_over = fabs(down[i] + up[i] - (diagonal[i] - value));
    if (left_over < least) {
      least = left_over;
      twist = i;
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, least, offset);
    const int place = __shfl_xor_sync(kFullWarp, twist, offset);
    if (other < least || (other == least && place < twist)) {
      least = other;
      twist = place;
    }
  }
  for (int i = lane; i < n; i += 32) z[i] = i < twist ? -beside[i + 1] / down[i] : i > twist ? -beside[i] / up[i] : 1.0;
  __syncwarp();  // z holds the ratios of neighbours
  if (lane < 2) {
    double x = 1.0;
    for (int i = from_top ? twist - 1 : twist + 1; i >= 0 && i < n; i += from_top ? -1 : 1) z[i] = x *= z[i];
  }
  __syncwarp();  // z is complete, up to its length
  double square = 0.0;
  for (int i = lane; i < n; i += 32) square += z[i] * z[i];
  const double scale = f.trace() > 0.0 ? 1.0 / sqrt(warp_sum(square)) : 0.0;
  for (int i = lane; i < n; i += 32) z[i] *= scale;
}

constexpr int kTogether = 4, kThreads = 128, kBatch = 4;

// Q z for each vector: the reflectors in turn, kTogether at a time, whose products with each other say what one takes
// from the next. A block a vector, of which each thread has elements of its own.
__global__ void __launch_bounds__(kThreads)
    reflect(const int* settled, double* matrices, double* forms, int n, int count, double* __restrict__ vectors) {
  if (is_settled(settled, blockIdx.x / count)) return;
  const Form f(matrices, forms, blockIdx.x / count, n);
  double* const z = vectors + static_cast<int64_t>(blockIdx.x) * n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __shared__ double warps[2][kThreads / 32][kTogether][kTogether];
  for (int k = 1, turn = 0; k < n; k += kTogether, turn ^= 1) {
    const auto element = [&](int a, int j) { return j < k + a && k + a < n ? f.reflector(k + a)[j] : 0.0; };
    double dots[kTogether][kTogether] = {};  // [a][a]: u_a . z, [a][b < a]: u_a . u_b
    const int end = k + kTogether - 1 < n ? k + kTogether - 1 : n;
    for (int first = threadIdx.x; first < end; first += kBatch * kThreads) {
      double u[kBatch][kTogether + 1];  // and z
#pragma unroll
      for (int e = 0; e < kBatch; ++e) {
        const int j = first + e * kThreads;
#pragma unroll
        for (int a = 0; a < kTogether; ++a) u[e][a] = element(a, j);
        u[e][kTogether] = j < end ? z[j] : 0.0;
      }
#pragma unroll
      for (int e = 0; e < kBatch; ++e) {
#pragma unroll
        for (int a = 0; a < kTogether; ++a) {
          dots[a][a] += u[e][a] * u[e][kTogether];
#pragma unroll
          for (int b = 0; b < a; ++b) dots[a][b] += u[e][a] * u[e][b];
        }
      }
    }
    double part[kTogether];
#pragma unroll
    for (int a = 0; a < kTogether; ++a) {
#pragma unroll
      for (int b = 0; b <= a; ++b) {
        dots[a][b] = warp_sum(dots[a][b]);
        if (lane == 0) warps[turn][warp][a][b] = dots[a][b];
      }
    }
    __syncthreads();  // every warp has entered its sums; those of the turn before last have been read
#pragma unroll
    for (int a = 0; a < kTogether; ++a) {
      part[a] = 0.0;
      for (int w = 0; w < kThreads / 32; ++w) part[a] += warps[turn][w][a][a];
#pragma unroll
      for (int b = 0; b < a; ++b) {
        for (int w = 0; w < kThreads / 32; ++w) part[a] -= warps[turn][w][a][b] * part[b];
      }
    }
    for (int j = threadIdx.x; j < end; j += kThreads) {
#pragma unroll
      for (int a = 0; a < kTogether; ++a) z[j] -= element(a, j) * part[a];
    }
  }
}

}  // namespace

// The blocks that share an image's steps: about one row a warp, as many as are there at a time.
static cudaError_t launch_tridiagonalise(
    const int* settled, double* matrices, double* forms, int64_t images, int n, unsigned* arrivals,
    cudaStream_t stream) {
  constexpr size_t kShared = sizeof(StepShared);
  if (n <= kAlone) {
    const unsigned grid = blocks(images);
    return launch(
        tridiagonalise, grid, kMostThreads, kShared, stream, settled, matrices, forms, images, n, 1, arrivals);
  }
  int64_t room = 0;
  LVTP_TRY(blocks_at_a_time(tridiagonalise, kMostThreads, kShared, room));
  const Teams teams = teams_of(room, images, std::min<int64_t>(ceil_div(n, kMostWarps), kMostParts));
  LVTP_TRY(cudaMemsetAsync(arrivals, 0, teams.count * sizeof(unsigned), stream));
  return launch_together(
      tridiagonalise, teams.blocks(), kMostThreads, kShared, stream, settled, matrices, forms, images, n, teams.parts,
      arrivals);
}

int64_t direct_eigenvectors_workspace(int64_t images, int64_t n, int64_t count) {
  return images * (Form::size(n) + count + count * 2 * n + 1) * static_cast<int64_t>(sizeof(double));
}

cudaError_t direct_eigenvectors(
    const int* settled, double* matrices, int64_t images, int64_t n, int64_t count, void* workspace, double* vectors,
    cudaStream_t stream) {
  const auto rows = static_cast<int>(n), wanted = static_cast<int>(count);
  auto* forms = static_cast<double*>(workspace);
  double* values = forms + images * Form::size(n);
  double* pivots = values + images * count;
  auto* arrivals = reinterpret_cast<unsigned*>(pivots + images * count * 2 * n);
  LVTP_TRY(launch(begin, blocks(images), kMostThreads, 0, stream, settled, matrices, forms, rows));
  LVTP_TRY(launch_tridiagonalise(settled, matrices, forms, images, rows, arrivals, stream));
  const unsigned by_row = blocks(ceil_div(images * n, kMostThreads)), by_vector = blocks(images * count);
  LVTP_TRY(launch(separate, by_row, kMostThreads, 0, stream, settled, matrices, forms, images * n, rows));
  LVTP_TRY(launch(find_eigenvalues, by_vector, kPoints, 0, stream, settled, matrices, forms, rows, wanted, values));
  LVTP_TRY(
      launch(find_vectors, by_vector, 32, 0, stream, settled, matrices, forms, rows, wanted, values, pivots, vectors));
  return launch(reflect, by_vector, kThreads, 0, stream, settled, matrices, forms, rows, wanted, vectors);
}

}  // namespace lvtp::cuda
