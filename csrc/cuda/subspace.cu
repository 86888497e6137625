// Subspace iteration with Chebyshev polynomials (Zhou, Saad, Tiago & Chelikowsky, J. Comput. Phys. 219, 2006): a block
// of vectors, somewhat more than are wanted, is multiplied by a polynomial of the matrix that is small on its lower
// eigenvalues and grows fast above, and made orthonormal, until what is left of the others is small. The eigenvectors
// of the matrix as that subspace sees it, a small one, then give those of the matrix. A residual says how good they
// are.
#include <algorithm>

#include "eigen.h"
#include "subspace.cuh"

namespace lvtp::cuda {
namespace {

constexpr double kReach = 1e10;  // how far a polynomial may pull the vectors apart: double can still separate them
constexpr double kGoal = 1e-3;   // the angle to the subspace sought; that to an eigenvector is about its square
constexpr int kMostProducts = 40, kMostDegree = 12;

// Sixteenths of the columns of a subspace: for up to a third of them; for up to two thirds; for none, where the matrix
// is small or the vectors are many.
constexpr int kFew = 3, kMany = 6;
int columns_for(int64_t n, int64_t count) {
  constexpr int64_t kWorthIterating = 256;
  if (n < kWorthIterating || count > 64) return 0;
  return count <= 16 ? kFew : kMany;
}

// What one image keeps between the steps.
template <int kColumns>
struct Space {
  static constexpr int kSize = 16 * kColumns;
  LVTP_HD static int64_t size(int64_t n) { return 2 * n * kSize + Cross<kColumns>::kElements; }
  double *x, *y, *pieces;
  __device__ Space(double* workspace, int64_t image, int64_t n)
      : x(workspace + image * size(n)), y(x + n * kSize), pieces(y + n * kSize) {}
  __device__ void swap() {
    double* const other = x;
    x = y;
    y = other;
  }
};

template <int kColumns>
__device__ bool orthonormalise(const Part& t, Space<kColumns>& s, unsigned* arrivals, Shared<kColumns>& shared) {
  double least = 0.0;
#pragma unroll 1
  for (int turn = 0; turn < 2 && least < 1e-6; ++turn) {  // again where rounding has left them far from orthonormal
    Cross<kColumns>::enter(t, s.x, s.x, s.pieces, shared);
    team_barrier(arrivals, t.parts);  // the products are complete
    const double before = turn > 0 ? shared.growth[threadIdx.x % Space<kColumns>::kSize] : 1.0;
    least = invert_factor<kColumns>(s.pieces, shared);
    if (least == 0.0) return false;
    apply_factor(t, s.x, shared);
    if (threadIdx.x < Space<kColumns>::kSize) shared.growth[threadIdx.x] *= before;
    team_barrier(arrivals, t.parts);  // all rows are orthonormal
  }
  return true;
}

// The eigenvalue at which the polynomial of this degree, small below `low`, has the value `growth`, nearly.
__device__ double eigenvalue_of(double growth, int degree, double low) {
  const double angle = growth > 1.0 ? acosh(growth) / degree : acos(growth) / degree;
  const double square = angle * angle;  // cos by three terms, as that of the library wants local memory
  return low * ((growth > 1.0 ? cosh(angle) : 1.0 - square / 2.0 + square * square / 24.0) + 1.0) / 2.0;
}

// x <- T(G) x, T Chebyshev's polynomial on [0, low].
template <int kColumns>
__device__ void filter(
    const Part& t, Space<kColumns>& s, double low, int degree, unsigned* arrivals, Shared<kColumns>& shared) {
  multiply(t, s.x, 2.0 / low, -1.0, 0.0, s.y, shared);
  team_barrier(arrivals, t.parts);  // the product is complete
#pragma unroll 1
  for (int i = 1; i < degree; ++i) {
    s.swap();
    multiply(t, s.x, 4.0 / low, -2.0, -1.0, s.y, shared);
    team_barrier(arrivals, t.parts);  // the product is complete
  }
  s.swap();
}

// s.x: orthonormal columns that span the leading `count` eigenvectors, nearly; or false where they could not be told
// apart from the others. `count` is at most two thirds of the columns.
template <int kColumns>
__device__ bool iterate(const Part& t, Space<kColumns>& s, int count, unsigned* arrivals, Shared<kColumns>& shared) {
  constexpr int kSize = 16 * kColumns, kLast = 4;
  for (int first = t.part * kStrip; first < t.n; first += t.parts * kStrip) {
    const int end = (t.n - first < kStrip ? t.n - first : kStrip) * kSize;
    for (int e = threadIdx.x; e < end; e += kStepThreads)
      s.x[first * kSize + e] = scrambled(first * kSize + e) * 0x1p-31 - 1.0;
  }
  team_barrier(arrivals, t.parts);  // the noise is complete
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    multiply(t, s.x, 1.0, 0.0, 0.0, s.y, shared);
    team_barrier(arrivals, t.parts);  // the product is complete
    s.swap();
    if (!orthonormalise(t, s, arrivals, shared)) return false;
  }
  const auto smallest = [&](int from, int to) {
    double v = shared.growth[from];
#pragma unroll 4
    for (int c = from + 1; c < to; ++c) v = fmin(v, shared.growth[c]);
    return v;
  };
  const auto largest = [&](int from) {
    double v = shared.growth[from];
#pragma unroll 4
    for (int c = from + 1; c < kSize; ++c) v = fmax(v, shared.growth[c]);
    return v;
  };
  double low = smallest(kSize - kLast, kSize), top = largest(0), left = 1.0;
  for (int products = 2; left > kGoal && products < kMostProducts;) {
    if (!(low > 1e-12 * top)) return false;
    const double reach = acosh(fmax(2.0 * top / low - 1.0, 1.0001));
    const int degree = static_cast<int>(fmin(fmax(log(2.0 * kReach) / reach, 1.0), double{kMostDegree}));
    filter(t, s, low, degree, arrivals, shared);
    if (!orthonormalise(t, s, arrivals, shared)) return false;
    left *= fmin(1.0, largest(kSize - 2 * kLast) / smallest(0, count));
    top = eigenvalue_of(largest(0), degree, low);
    low = eigenvalue_of(smallest(0, kSize), degree, low);
    products += degree;
  }
  return true;
}

// A team an image: the matrix as the subspace sees it, and in `place` where Space keeps the subspace: first (1) or
// second (2), or 0 where there is none.
template <int kColumns>
__global__ void __launch_bounds__(kStepThreads) find_subspace(
    const double* matrices, int64_t images, int n, int count, int parts, unsigned* arrivals, double* workspace,
    double* small, int* place) {
  constexpr int kSize = 16 * kColumns;
  auto& shared = *reinterpret_cast<Shared<kColumns>*>(dynamic_shared());
  const auto part = static_cast<int>(blockIdx.x % parts), team = static_cast<int>(blockIdx.x / parts);
  arrivals += team;
  for (int64_t image = team; image < images; image += gridDim.x / parts) {
    const Part t{matrices + image * eigen_matrix_size(n), n, part, parts};
    Space<kColumns> s(workspace, image, n);
    const double* const first = s.x;
    const bool found = iterate(t, s, count, arrivals, shared);
    if (found) {
      multiply(t, s.x, 1.0, 0.0, 0.0, s.y, shared);
      team_barrier(arrivals, parts);  // the product is complete
      Cross<kColumns>::enter(t, s.x, s.y, s.pieces, shared);
      team_barrier(arrivals, parts);  // the pieces are complete
    }
    for (int e = part * kStepThreads + static_cast<int>(threadIdx.x); e < kSize * kSize; e += parts * kStepThreads) {
      const double v = found ? Cross<kColumns>::element(s.pieces, e / kSize, e % kSize) : 0.0;
      small[image * eigen_matrix_size(kSize) + e] = v;
    }
    if (part == 0 && threadIdx.x == 0) place[image] = !found ? 0 : s.x == first ? 1 : 2;
  }
}

// Vectors of the small matrix to those of the large one, v = X s, their Rayleigh quotients and the lengths of their
// residuals G v - quotient v, which are known to about 1e-8 of the quotient. `of_small` and the results have one vector
// more than `vectors`. A block a vector, of which 16 lanes share an element.
template <int kColumns>
__global__ void __launch_bounds__(kStepThreads) expand(
    double* workspace, const int* __restrict__ place, const double* __restrict__ of_small, int n, int count,
    double* __restrict__ quotients, double* __restrict__ residuals, double* __restrict__ vectors) {
  constexpr int kSize = 16 * kColumns;
  const int64_t image = blockIdx.x / (count + 1), number = blockIdx.x % (count + 1);
  if (place[image] == 0) return;
  Space<kColumns> s(workspace, image, n);
  if (place[image] == 2) s.swap();
  const int lane = threadIdx.x % 16;
  double factor[kColumns], squares = 0.0, product = 0.0, product_squares = 0.0;
#pragma unroll
  for (int q = 0; q < kColumns; ++q) factor[q] = of_small[blockIdx.x * int64_t{kSize} + lane + 16 * q];
  for (int first = 0; first < n; first += kStepThreads / 16) {
    const int i = first + static_cast<int>(threadIdx.x) / 16;
    double v = 0.0, image_of_v = 0.0;
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
      const int64_t at = static_cast<int64_t>(i) * kSize + lane + 16 * q;
      v += i < n ? s.x[at] * factor[q] : 0.0;
      image_of_v += i < n ? s.y[at] * factor[q] : 0.0;
    }
    for (int offset = 8; offset > 0; offset /= 2) {
      v += __shfl_xor_sync(kFullWarp, v, offset);
      image_of_v += __shfl_xor_sync(kFullWarp, image_of_v, offset);
    }
    if (lane != 0 || i >= n) continue;
    if (number < count) vectors[(image * count + number) * n + i] = v;
    squares += v * v;
    product += v * image_of_v;
    product_squares += image_of_v * image_of_v;
  }
  __shared__ double warps[3][kStepWarps];
  squares = block_sum(squares, warps[0]);
  product = block_sum(product, warps[1]);
  product_squares = block_sum(product_squares, warps[2]);
  if (threadIdx.x != 0) return;
  const double quotient = product / squares;
  quotients[blockIdx.x] = quotient;
  residuals[blockIdx.x] = sqrt(fmax(product_squares / squares - quotient * quotient, 0.0)) + 3e-8 * fabs(quotient);
}

// Whether each vector is within an angle of about 0.01 of an eigenvector: its residual over the distance to the next
// quotient bounds the angle. A thread an image.
__global__ void judge(
    const int* __restrict__ place, int64_t images, int count, const double* __restrict__ quotients,
    const double* __restrict__ residuals, int* __restrict__ settled) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (image >= images) return;
  quotients += image * (count + 1);
  residuals += image * (count + 1);
  bool good = place[image] != 0;
  double above = INFINITY;
  for (int g = 0; g < count && good; ++g) {
    const double below = quotients[g] - quotients[g + 1];
    good = residuals[g] <= 0.01 * fmin(above, below);
    above = below;
  }
  settled[image] = good ? 1 : 0;
}

struct Pieces {
  double *spaces, *small, *of_small, *quotients, *residuals;
  int *place, *settled;
  unsigned* arrivals;
  void* scratch;  // of the direct way
  int64_t bytes;
};

// Without columns: the direct way only.
Pieces divide(void* workspace, int64_t images, int64_t n, int64_t count, int columns) {
  Workspace w{static_cast<char*>(workspace)};
  Pieces p{};
  int64_t scratch = direct_eigenvectors_workspace(images, n, count);
  if (columns > 0) {
    const int64_t size = 16 * columns, more = count + 1;
    p.spaces = w.take<double>(images * (columns == kFew ? Space<kFew>::size(n) : Space<kMany>::size(n)));
    p.small = w.take<double>(images * eigen_matrix_size(size));
    p.of_small = w.take<double>(images * more * size);
    p.quotients = w.take<double>(images * more);
    p.residuals = w.take<double>(images * more);
    p.place = w.take<int>(images);
    p.settled = w.take<int>(images);
    p.arrivals = w.take<unsigned>(images);
    scratch = std::max(scratch, direct_eigenvectors_workspace(images, size, more));
  }
  p.scratch = w.take<char>(scratch);
  p.bytes = w.used;
  return p;
}

template <int kColumns>
cudaError_t by_subspace(
    const double* matrices, int64_t images, int n, int count, const Pieces& p, double* vectors, cudaStream_t stream) {
  constexpr int kSize = 16 * kColumns;
  constexpr size_t kShared = sizeof(Shared<kColumns>);
  int64_t room = 0;
  LVTP_TRY(blocks_at_a_time(find_subspace<kColumns>, kStepThreads, kShared, room));
  const Teams teams = teams_of(room, images, ceil_div(n, kStrip));
  LVTP_TRY(cudaMemsetAsync(p.arrivals, 0, teams.count * sizeof(unsigned), stream));
  LVTP_TRY(launch_together(
      find_subspace<kColumns>, teams.blocks(), kStepThreads, kShared, stream, matrices, images, n, count, teams.parts,
      p.arrivals, p.spaces, p.small, p.place));
  LVTP_TRY(direct_eigenvectors(nullptr, p.small, images, kSize, count + 1, p.scratch, p.of_small, stream));
  LVTP_TRY(launch(
      expand<kColumns>, blocks(images * (count + 1)), kStepThreads, 0, stream, p.spaces, p.place, p.of_small, n, count,
      p.quotients, p.residuals, vectors));
  constexpr unsigned kSmall = 128;
  return launch(
      judge, blocks(ceil_div(images, kSmall)), kSmall, 0, stream, p.place, images, count, p.quotients, p.residuals,
      p.settled);
}

}  // namespace

int64_t leading_eigenvectors_workspace(int64_t images, int64_t n, int64_t count) {
  return divide(nullptr, images, n, count, columns_for(n, count)).bytes;
}

cudaError_t leading_eigenvectors(
    double* matrices, int64_t images, int64_t n, int64_t count, void* workspace, double* vectors, cudaStream_t stream) {
  const auto rows = static_cast<int>(n), wanted = static_cast<int>(count);
  const int columns = columns_for(n, count);
  const Pieces p = divide(workspace, images, n, count, columns);
  if (columns == kFew) LVTP_TRY(by_subspace<kFew>(matrices, images, rows, wanted, p, vectors, stream));
  if (columns == kMany) LVTP_TRY(by_subspace<kMany>(matrices, images, rows, wanted, p, vectors, stream));
  return direct_eigenvectors(p.settled, matrices, images, n, count, p.scratch, vectors, stream);
}

}  // namespace lvtp::cuda
