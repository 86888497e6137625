#include "eigen.h"

#include "device.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kMostWarps = 16, kMostThreads = 32 * kMostWarps;
constexpr int kMostParts = 128;  // blocks that share a step
constexpr int kAlone = 192;      // rows from which on one block takes all steps: nothing is launched between them
constexpr int kRowsAPart = 8;    // a warp each

// The blocks that share step k of Householder's form.
LVTP_HD int parts_of(int k) {
  const int parts = (k + kRowsAPart - 1) / kRowsAPart;
  return k <= kAlone ? 1 : parts < kMostParts ? parts : kMostParts;
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
__global__ void __launch_bounds__(kMostThreads) begin(double* matrices, double* forms, int n) {
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

// Householder's form T = Q^T C Q, from the last row up: step k leaves of row k but the diagonal and one element beside
// it. With u its reflector, y = C u and w = y - u (u . y) / 2, a step is C -= u w^T + w u^T; that is put off until the
// next one, h's, multiplies the matrix, so that it is read and written once a step. A warp a row.
__device__ void step(const Form& f, int k, int part, double (&squares)[kMostWarps], double (&products)[kMostWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, parts = parts_of(k);
  const double* __restrict__ h = f.reflector(k + 1), * __restrict__ y = f.product(k + 1), * __restrict__ row = f.row(k);
  double half = 0.0;
  for (int p = lane; p < parts_of(k + 1); p += 32) half += f.partial(k + 1)[p];
  half = warp_sum(half) / 2;
  const auto w = [&](int j) { return y[j] - half * h[j]; };
  const double hk = h[k], wk = w(k);
  const auto current = [&](int j) { return row[j] - hk * w(j) - wk * h[j]; };

  double square = 0.0;
  for (int j = threadIdx.x; j < k - 1; j += static_cast<int>(blockDim.x)) square += current(j) * current(j);
  square = block_sum(square, squares);
  // A row whose square is negligible is rounding, as all are of a matrix of low rank after a few steps: u = 0 then.
  const double rounding = 2e-19 * f.trace(), last = k > 0 ? current(k - 1) : 0.0;
  const bool nothing = square <= rounding * rounding;
  const double length = sqrt(square + last * last), after = nothing ? last : last > 0.0 ? -length : length;
  const double own = last - after, scale = nothing ? 0.0 : sqrt(2.0 / (square + own * own));
  const auto u = [&](int j) { return scale * (j == k - 1 ? own : current(j)); };
  if (part == 0) {
    for (int j = threadIdx.x; j < k; j += static_cast<int>(blockDim.x)) f.reflector(k)[j] = u(j);
    if (threadIdx.x == 0) {
      f.diagonal()[k] = current(k);
      f.beside()[k] = after;
    }
  }

  double product = 0.0;
  for (int i = part * warps + warp; i < k; i += parts * warps) {
    double* __restrict__ mine = f.row(i);
    const double hi = h[i], wi = w(i);
    double sum = 0.0;
#pragma unroll 4
    for (int j = lane; j < k; j += 32) {
      const double v = mine[j] - hi * w(j) - wi * h[j];
      mine[j] = v;
      sum += v * u(j);
    }
    sum = warp_sum(sum);
    if (lane == 0) f.product(k)[i] = sum;
    product += lane == 0 ? u(i) * sum : 0.0;
  }
  product = block_sum(product, products);
  if (threadIdx.x == 0) f.partial(k)[part] = product;
}

// Steps first, first - 1, ..., last, by parts_of(first) blocks an image: several of them take one step.
__global__ void __launch_bounds__(kMostThreads)
    tridiagonalise(double* matrices, double* forms, int n, int first, int last) {
  const int parts = parts_of(first);
  const Form f(matrices, forms, blockIdx.x / parts, n);
  __shared__ double squares[kMostWarps], products[kMostWarps];
  for (int k = first; k >= last; --k) {
    step(f, k, static_cast<int>(blockIdx.x % parts), squares, products);
    __syncthreads();  // the step is complete
  }
}

// T of trace 1. Equal eigenvalues have no vectors of their own; noise far below the accuracy of the matrix tells them
// apart, so that they get different ones, and the same in every run. It also couples all rows. A thread a row.
__global__ void __launch_bounds__(kMostThreads) separate(double* matrices, double* forms, int64_t rows, int n) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kMostThreads + threadIdx.x;
  if (at >= rows) return;
  const Form f(matrices, forms, at / n, n);
  const int i = static_cast<int>(at % n);
  auto bits = static_cast<uint32_t>(i) + 1u;
  for (int round = 0; round < 3; ++round) bits = (bits ^ bits >> 16) * 0x45d9f3bu;
  const double scale = f.trace() > 0.0 ? 1.0 / f.trace() : 0.0, beside = f.beside()[i] * scale;
  f.diagonal()[i] = f.diagonal()[i] * scale + (bits * 0x1p-32 - 0.5) * 1e-11;
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
__global__ void __launch_bounds__(kPoints)
    find_eigenvalues(double* matrices, double* forms, int n, int count, double* __restrict__ values) {
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
    double* matrices, double* forms, int n, int count, const double* __restrict__ values, double* pivots,
    double* __restrict__ vectors) {
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

constexpr int kTogether = 4, kThreads = 128;

// Q z for each vector: the reflectors in turn, kTogether at a time, whose products with each other say what one takes
// from the next. A block a vector, of which each thread has elements of its own.
__global__ void __launch_bounds__(kThreads)
    reflect(double* matrices, double* forms, int n, int count, double* __restrict__ vectors) {
  const Form f(matrices, forms, blockIdx.x / count, n);
  double* const z = vectors + static_cast<int64_t>(blockIdx.x) * n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __shared__ double warps[2][kThreads / 32][kTogether][kTogether];
  for (int k = 1, turn = 0; k < n; k += kTogether, turn ^= 1) {
    const auto element = [&](int a, int j) { return j < k + a && k + a < n ? f.reflector(k + a)[j] : 0.0; };
    double dots[kTogether][kTogether] = {};  // [a][a]: u_a . z, [a][b < a]: u_a . u_b
    for (int j = threadIdx.x; j < n && j < k + kTogether - 1; j += kThreads) {
      double u[kTogether];
#pragma unroll
      for (int a = 0; a < kTogether; ++a) {
        u[a] = element(a, j);
        dots[a][a] += u[a] * z[j];
#pragma unroll
        for (int b = 0; b < a; ++b) dots[a][b] += u[a] * u[b];
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
    for (int j = threadIdx.x; j < n && j < k + kTogether - 1; j += kThreads) {
#pragma unroll
      for (int a = 0; a < kTogether; ++a) z[j] -= element(a, j) * part[a];
    }
  }
}

}  // namespace

int64_t leading_eigenvectors_workspace(int64_t images, int64_t n, int64_t count) {
  return images * (Form::size(n) + count + count * 2 * n) * static_cast<int64_t>(sizeof(double));
}

cudaError_t leading_eigenvectors(
    double* matrices, int64_t images, int64_t n, int64_t count, void* workspace, double* vectors, cudaStream_t stream) {
  const auto rows = static_cast<int>(n), wanted = static_cast<int>(count);
  auto* forms = static_cast<double*>(workspace);
  double* values = forms + images * Form::size(n);
  double* pivots = values + images * count;
  LVTP_TRY(launch(begin, blocks(images), kMostThreads, 0, stream, matrices, forms, rows));
  int k = rows - 1;
  for (; k > kAlone; --k) {
    const unsigned grid = blocks(images * parts_of(k));
    LVTP_TRY(launch(tridiagonalise, grid, kRowsAPart * 32, 0, stream, matrices, forms, rows, k, k));
  }
  LVTP_TRY(launch(tridiagonalise, blocks(images), kMostThreads, 0, stream, matrices, forms, rows, k, 0));
  const unsigned by_row = blocks(ceil_div(images * n, kMostThreads)), by_vector = blocks(images * count);
  LVTP_TRY(launch(separate, by_row, kMostThreads, 0, stream, matrices, forms, images * n, rows));
  LVTP_TRY(launch(find_eigenvalues, by_vector, kPoints, 0, stream, matrices, forms, rows, wanted, values));
  LVTP_TRY(launch(find_vectors, by_vector, 32, 0, stream, matrices, forms, rows, wanted, values, pivots, vectors));
  return launch(reflect, by_vector, kThreads, 0, stream, matrices, forms, rows, wanted, vectors);
}

}  // namespace lvtp::cuda
