#include <algorithm>

#include "device.cuh"
#include "eigen.h"

namespace lvtp::cuda {
namespace {

constexpr int kThreads = 256;

// Below -87 it is no normal fp32 number any more; a feature counts as that much.
__device__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-fmaxf(v, -87.0f))); }

// A = sigmoid(x), a row a token, less its mean where `over_features`. Padding and tokens that are not finite become
// zero rows. usable[i]: 0 for those, and for a centred row that is zero, else 1. A warp a token.
template <class T>
__global__ void __launch_bounds__(kThreads) sigmoid_rows(
    const T* __restrict__ x, const bool* __restrict__ mask, int64_t tokens, int64_t d, bool over_features,
    float* __restrict__ a, float* __restrict__ usable) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (token >= tokens) return;  // the whole warp
  const int lane = threadIdx.x % 32;
  x += token * d;
  a += token * d;
  double sum = 0.0;
  bool finite = mask == nullptr || mask[token];
  for (int64_t c = lane; c < d; c += 32) {
    const float v = value(x[c]);
    finite = finite && isfinite(v);
    sum += sigmoid(v);
  }
  finite = __all_sync(kFullWarp, finite);
  const float mean = over_features ? static_cast<float>(warp_sum(sum) / static_cast<double>(d)) : 0.0f;
  bool any = false;
  for (int64_t c = lane; c < d; c += 32) {
    a[c] = finite ? sigmoid(value(x[c])) - mean : 0.0f;
    any = any || a[c] != 0.0f;
  }
  any = __any_sync(kFullWarp, any);
  if (lane == 0) usable[token] = (over_features ? any : finite) ? 1.0f : 0.0f;
}

// Subtracts each feature's mean over the usable tokens. A warp a feature.
__global__ void __launch_bounds__(kThreads)
    centre_features(int64_t features, int64_t n, int64_t d, const float* __restrict__ usable, float* __restrict__ a) {
  const int64_t feature = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (feature >= features) return;  // the whole warp
  const int64_t image = feature / d, c = feature % d;
  const int lane = threadIdx.x % 32;
  a += image * n * d + c;
  usable += image * n;
  double sum = 0.0, count = 0.0;
  for (int64_t i = lane; i < n; i += 32) {
    sum += a[i * d];
    count += usable[i];
  }
  sum = warp_sum(sum);
  count = warp_sum(count);
  const float mean = count > 0.0 ? static_cast<float>(sum / count) : 0.0f;
  for (int64_t i = lane; i < n; i += 32) a[i * d] = usable[i] > 0.0f ? a[i * d] - mean : 0.0f;
}

// usable[i] again, now that the rows are centred. A warp a token.
__global__ void __launch_bounds__(kThreads)
    find_usable(const float* __restrict__ a, int64_t tokens, int64_t d, float* __restrict__ usable) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (token >= tokens) return;  // the whole warp
  bool any = false;
  for (int64_t c = threadIdx.x % 32; c < d; c += 32) any = any || a[token * d + c] != 0.0f;
  any = __any_sync(kFullWarp, any);
  if (threadIdx.x % 32 == 0) usable[token] = any ? 1.0f : 0.0f;
}

// A matrix as a kernel reads it: `rows` of `depth` elements.
template <class T>
struct Rows {
  const T* data;
  int rows, depth;
  int64_t row_stride, depth_stride, image_stride;
};

constexpr int kTile = 32;

// x's tile at (r0, c0), zero beyond its rows and depth. Neighbouring threads read neighbours in memory.
template <class T>
__device__ void load_tile(const Rows<T>& x, int64_t image, int r0, int c0, double (&tile)[kTile][kTile + 1]) {
  const bool along = x.depth_stride == 1;
  const T* data = x.data + image * x.image_stride;
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
    const int r = along ? e / kTile : e % kTile, c = along ? e % kTile : e / kTile;
    const bool inside = r0 + r < x.rows && c0 + c < x.depth;
    tile[r][c] = inside ? data[(r0 + r) * x.row_stride + (c0 + c) * x.depth_stride] : 0.0;
  }
}

// out = x y^T in double, [x.rows, y.rows] an image, of which only half is computed where x and y are the same. A block
// a tile, a thread 2 x 2 of it.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) multiply(
    Rows<T> x, Rows<float> y, bool same, int tiles_across, int tiles, int64_t out_stride, double* __restrict__ out) {
  const int64_t image = blockIdx.x / tiles;
  const int tile = static_cast<int>(blockIdx.x % tiles);
  const int r0 = tile / tiles_across * kTile, s0 = tile % tiles_across * kTile;
  if (same && s0 > r0) return;
  out += image * out_stride;
  __shared__ double xs[kTile][kTile + 1], ys[kTile][kTile + 1];
  const int r = threadIdx.x / 16, s = threadIdx.x % 16;
  double sum[2][2] = {};
  for (int c0 = 0; c0 < x.depth; c0 += kTile) {
    load_tile(x, image, r0, c0, xs);
    load_tile(y, image, s0, c0, ys);
    __syncthreads();  // the tiles are complete
#pragma unroll 4
    for (int c = 0; c < kTile; ++c) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int q = 0; q < 2; ++q) sum[p][q] += xs[r + 16 * p][c] * ys[s + 16 * q][c];
      }
    }
    __syncthreads();  // the tiles have been read and may be overwritten
  }
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int i = r0 + r + 16 * p, j = s0 + s + 16 * q;
      if (i >= x.rows || j >= y.rows) continue;
      out[static_cast<int64_t>(i) * y.rows + j] = sum[p][q];
      if (same) out[static_cast<int64_t>(j) * y.rows + i] = sum[p][q];
    }
  }
}

template <class T>
cudaError_t launch_multiply(
    const Rows<T>& x, const Rows<float>& y, bool same, int64_t images, int64_t out_stride, double* out,
    cudaStream_t stream) {
  const int across = (y.rows + kTile - 1) / kTile, tiles = (x.rows + kTile - 1) / kTile * across;
  return launch(multiply<T>, blocks(images * tiles), kThreads, 0, stream, x, y, same, across, tiles, out_stride, out);
}

// The squares of the lengths of vectors [rows, n]. A warp a vector.
__global__ void __launch_bounds__(32)
    find_squares(int64_t n, const double* __restrict__ vectors, double* __restrict__ squares) {
  vectors += blockIdx.x * n;
  double square = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += 32) square += vectors[i] * vectors[i];
  square = warp_sum(square);
  if (threadIdx.x == 0) squares[blockIdx.x] = square;
}

// To length 1, or zero where the square over that of the image's first vector says that nothing of it is in fp32
// features: beyond their rank it is what rounding leaves, and would take tokens from the first. A block a vector.
__global__ void __launch_bounds__(kThreads)
    normalise(int64_t n, int groups, const double* __restrict__ squares, double* __restrict__ vectors) {
  constexpr double kRank = 1e-14;
  const double square = squares[blockIdx.x], first = squares[blockIdx.x / groups * groups];
  const double scale = square > kRank * first ? 1.0 / sqrt(square) : 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) vectors[blockIdx.x * n + i] *= scale;
}

// The component on which each token loads most. A thread a token.
__global__ void __launch_bounds__(kThreads) assign(
    const double* __restrict__ components, const float* __restrict__ usable, int64_t tokens, int64_t n, int groups,
    int64_t* __restrict__ labels, float* __restrict__ loadings) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= tokens) return;
  components += token / n * groups * n + token % n;
  int best = 0;
  float most = 0.0f;
  for (int g = 0; g < groups && usable[token] > 0.0f; ++g) {
    const auto part = static_cast<float>(fabs(components[g * n]));
    if (part > most) {  // strict: ties to the lowest group
      best = g;
      most = part;
    }
  }
  labels[token] = best;
  loadings[token] = most;
}

// Where tokens outnumber features, the small matrix is A^T A, and V = A U up to length. Groups beyond the rank have no
// vector there, and so no token; as many groups as tokens are a whole basis, of which every token has its part.
bool over_the_features(int64_t n, int64_t d, int64_t groups) { return n > d && groups < n; }
int64_t with_vectors(int64_t n, int64_t d, int64_t groups) {
  return over_the_features(n, d, groups) ? std::min(groups, d) : groups;
}

struct Pieces {
  double *matrices, *vectors, *projected, *squares;
  float *a, *usable;
  void* scratch;
  int64_t bytes;
};

Pieces divide(void* workspace, int64_t images, int64_t n, int64_t d, int64_t groups) {
  const bool transposed = over_the_features(n, d, groups);
  groups = with_vectors(n, d, groups);
  const int64_t rows = transposed ? d : n;
  Workspace w{static_cast<char*>(workspace)};
  Pieces p{};
  p.matrices = w.take<double>(images * eigen_matrix_size(rows));
  p.vectors = w.take<double>(images * groups * rows);
  p.projected = transposed ? w.take<double>(images * groups * n) : p.vectors;
  p.squares = w.take<double>(images * groups);
  p.a = w.take<float>(images * n * d);
  p.usable = w.take<float>(images * n);
  p.scratch = w.take<char>(leading_eigenvectors_workspace(images, rows, groups));
  p.bytes = w.used;
  return p;
}

}  // namespace

int64_t psca_workspace(int64_t images, int64_t n, int64_t d, int64_t groups) {
  return divide(nullptr, images, n, d, groups).bytes;
}

cudaError_t psca(
    const void* features, Dtype dtype, const bool* mask, int64_t images, int64_t n, int64_t d, int64_t groups,
    bool over_features, void* workspace, int64_t* labels, float* loadings, cudaStream_t stream) {
  const Pieces p = divide(workspace, images, n, d, groups);
  const bool transposed = over_the_features(n, d, groups);
  groups = with_vectors(n, d, groups);
  const int64_t tokens = images * n;
  const unsigned warp_each = blocks(ceil_div(tokens, kThreads / 32));
  LVTP_TRY(with_dtype(features, dtype, [&](const auto* x) {
    return launch(
        sigmoid_rows<std::decay_t<decltype(*x)>>, warp_each, kThreads, 0, stream, x, mask, tokens, d, over_features,
        p.a, p.usable);
  }));
  if (!over_features) {
    const unsigned grid = blocks(ceil_div(images * d, kThreads / 32));
    LVTP_TRY(launch(centre_features, grid, kThreads, 0, stream, images * d, n, d, p.usable, p.a));
    LVTP_TRY(launch(find_usable, warp_each, kThreads, 0, stream, p.a, tokens, d, p.usable));
  }

  const auto size = static_cast<int>(n), depth = static_cast<int>(d), wanted = static_cast<int>(groups);
  const Rows<float> a{p.a, size, depth, d, 1, n * d}, features_of_a{p.a, depth, size, 1, d, n * d};
  const Rows<float>& x = transposed ? features_of_a : a;
  LVTP_TRY(launch_multiply(x, x, true, images, eigen_matrix_size(x.rows), p.matrices, stream));
  LVTP_TRY(leading_eigenvectors(p.matrices, images, x.rows, groups, p.scratch, p.vectors, stream));
  if (transposed) {
    const Rows<double> u{p.vectors, wanted, depth, d, 1, groups * d};
    LVTP_TRY(launch_multiply(u, a, false, images, groups * n, p.projected, stream));
    const unsigned by_vector = blocks(images * groups);
    LVTP_TRY(launch(find_squares, by_vector, 32, 0, stream, n, p.projected, p.squares));
    LVTP_TRY(launch(normalise, by_vector, kThreads, 0, stream, n, wanted, p.squares, p.projected));
  }
  return launch(
      assign, blocks(ceil_div(tokens, kThreads)), kThreads, 0, stream, p.projected, p.usable, tokens, n, wanted, labels,
      loadings);
}

}  // namespace lvtp::cuda
