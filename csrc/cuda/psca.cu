// Principal components without a library call that would wait for the device: subspace iteration on the tokens' Gram
// matrix from a fixed start, Gram-Schmidt after each step, and one-sided Jacobi on the last one, whose columns become
// the components. Vectors are stored one after the other ([vectors, n]), so that warps read them in order.
//
// 32 vectors more than groups and 32 steps: at N = 576, G = 4 to 48, at least 0.99 of the tokens of a photograph and of
// clustered features are grouped as by float64 eigenvectors (tests/emulation, LVTP_EMULATION_ALL=1). It promises
// nothing for more groups, or where the components lie close together, so no launcher calls it, nor prune_sid.cu, yet:
// CUDA tensors take Triton's psca, in double.
#include "device.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kOversampling = 32, kSteps = 32;
constexpr int kSweeps = 12;           // at most; 3 to 6 are needed
constexpr float kOrthogonal = 1e-6f;  // a cosine that fp32 sums cannot tell from 0
constexpr float kRounding = 1e-12f;   // of the first vector's square: lengths below a millionth of it are rounding
constexpr int kWide = 1024;           // threads of the kernels in which one block does it all, at most
constexpr int kThreads = 256;

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
    sum += 1.0f / (1.0f + expf(-v));
  }
  finite = __all_sync(kFullWarp, finite);
  const float mean = over_features ? static_cast<float>(warp_sum(sum) / static_cast<double>(d)) : 0.0f;
  bool any = false;
  for (int64_t c = lane; c < d; c += 32) {
    a[c] = finite ? 1.0f / (1.0f + expf(-value(x[c]))) - mean : 0.0f;
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

// The start: numbers in [-1, 1) that depend on nothing but their place.
__global__ void __launch_bounds__(kThreads) scatter(int64_t count, int64_t per_image, float* __restrict__ v) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  auto bits = static_cast<uint32_t>(at % per_image) + 1u;
  for (int round = 0; round < 3; ++round) {
    bits = (bits ^ bits >> 16) * 0x45d9f3bu;
  }
  v[at] = static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f;
}

constexpr int kTileVectors = 32, kTileTokens = 64, kTileDepth = 32;

// out = v gram, [vectors, n] = [vectors, n] [n, n]. A block a tile of kTileVectors x kTileTokens, a thread 2 x 4 of it.
__global__ void __launch_bounds__(kThreads) multiply(
    const float* __restrict__ v, const float* __restrict__ gram, int n, int vectors, int tiles_across, int tiles,
    float* __restrict__ out) {
  const int64_t image = blockIdx.x / tiles;
  const int tile = static_cast<int>(blockIdx.x % tiles);
  const int c0 = tile / tiles_across * kTileVectors, i0 = tile % tiles_across * kTileTokens;
  v += image * vectors * n;
  gram += image * n * n;
  out += image * vectors * n;
  __shared__ float a[kTileVectors][kTileDepth + 1], b[kTileDepth][kTileTokens];
  const int tc = threadIdx.x / 16 * 2, ti = threadIdx.x % 16 * 4;
  float sum[2][4] = {};
  for (int j0 = 0; j0 < n; j0 += kTileDepth) {
    for (int e = threadIdx.x; e < kTileVectors * kTileDepth; e += kThreads) {
      const int c = e / kTileDepth, j = e % kTileDepth;
      a[c][j] = c0 + c < vectors && j0 + j < n ? v[static_cast<int64_t>(c0 + c) * n + j0 + j] : 0.0f;
    }
    for (int e = threadIdx.x; e < kTileDepth * kTileTokens; e += kThreads) {
      const int j = e / kTileTokens, i = e % kTileTokens;
      b[j][i] = i0 + i < n && j0 + j < n ? gram[static_cast<int64_t>(j0 + j) * n + i0 + i] : 0.0f;
    }
    __syncthreads();  // the tiles are complete
    for (int j = 0; j < kTileDepth; ++j) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[p][q] += a[tc + p][j] * b[j][ti + q];
      }
    }
    __syncthreads();  // the tiles have been read and may be overwritten
  }
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (c0 + tc + p < vectors && i0 + ti + q < n)
        out[static_cast<int64_t>(c0 + tc + p) * n + i0 + ti + q] = sum[p][q];
    }
  }
}

__device__ int warps() { return static_cast<int>(blockDim.x / 32); }

__device__ float warp_dot(const float* a, const float* b, int n, int lane) {
  float sum = 0.0f;
  for (int i = lane; i < n; i += 32) sum += a[i] * b[i];
  return warp_sum(sum);
}

// Modified Gram-Schmidt, one block an image: y's rows become orthonormal, or zero where nothing but rounding is left of
// them, which has a direction that no Gram matrix gave it.
__global__ void __launch_bounds__(kWide, 1) orthonormalise(int n, int vectors, float* y) {
  y += static_cast<int64_t>(blockIdx.x) * vectors * n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float rounding = 0.0f;
  for (int j = 0; j < vectors; ++j) {
    float* pivot = y + static_cast<int64_t>(j) * n;
    const float square = warp_dot(pivot, pivot, n, lane);  // by every warp: cheaper than telling them
    if (j == 0) rounding = kRounding * square;
    for (int c = j + 1 + warp; c < vectors && square > rounding; c += warps()) {
      float* other = y + static_cast<int64_t>(c) * n;
      const float part = warp_dot(pivot, other, n, lane) / square;
      for (int i = lane; i < n; i += 32) other[i] -= part * pivot[i];
    }
    __syncthreads();  // the next pivot is final
  }
  for (int c = warp; c < vectors; c += warps()) {
    float* mine = y + static_cast<int64_t>(c) * n;
    const float square = warp_dot(mine, mine, n, lane), inverse = square > rounding ? 1.0f / sqrtf(square) : 0.0f;
    for (int i = lane; i < n; i += 32) mine[i] *= inverse;
  }
}

// Makes a and b orthogonal by a rotation of the plane they span; false where they are already.
__device__ bool rotate(float* a, float* b, int n, int lane) {
  const float aa = warp_dot(a, a, n, lane), bb = warp_dot(b, b, n, lane), ab = warp_dot(a, b, n, lane);
  if (!(fabsf(ab) > kOrthogonal * sqrtf(aa) * sqrtf(bb))) return false;
  const float zeta = (bb - aa) / (2.0f * ab);
  const float tangent = copysignf(1.0f / (fabsf(zeta) + hypotf(1.0f, zeta)), zeta);
  const float cosine = 1.0f / sqrtf(1.0f + tangent * tangent), sine = cosine * tangent;
  for (int i = lane; i < n; i += 32) {
    const float p = a[i], q = b[i];
    a[i] = cosine * p - sine * q;
    b[i] = sine * p + cosine * q;
  }
  return true;
}

// One-sided Jacobi, one block an image: y = v gram with orthonormal rows v; rotated until y's rows are orthogonal,
// these are components times their eigenvalues. Each round of the tournament pairs every row once. `order` lists the
// rows from the largest eigenvalue down (ties: lowest row), `inverse` holds 1 / length.
__global__ void __launch_bounds__(kWide, 1) rotate_all(int n, int vectors, float* y, float* inverse, int* order) {
  y += static_cast<int64_t>(blockIdx.x) * vectors * n;
  inverse += blockIdx.x * vectors;
  order += blockIdx.x * vectors;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int ring = (vectors + 1) / 2 * 2 - 1;  // the last of an even number of players keeps its seat, the ring turns
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < ring; ++round) {
      for (int pair = warp; pair <= ring / 2; pair += warps()) {
        const int first = pair == 0 ? ring : (round + pair) % ring, second = (round + ring - pair) % ring;
        if (first >= vectors || second >= vectors) continue;  // an odd number: one row rests
        const int low = first < second ? first : second, high = first < second ? second : first;
        rotated |= rotate(y + static_cast<int64_t>(low) * n, y + static_cast<int64_t>(high) * n, n, lane);
      }
      __syncthreads();  // every pair of the round is done
    }
    if (__syncthreads_or(rotated) == 0) break;
  }
  for (int c = warp; c < vectors; c += warps()) {
    const float* row = y + static_cast<int64_t>(c) * n;
    const float square = warp_dot(row, row, n, lane);
    if (lane == 0) inverse[c] = square > 0.0f ? 1.0f / sqrtf(square) : INFINITY;
  }
  __syncthreads();  // all lengths are known
  for (int c = threadIdx.x; c < vectors; c += static_cast<int>(blockDim.x)) {
    int rank = 0;
    for (int other = 0; other < vectors; ++other) {
      rank += inverse[other] < inverse[c] || (inverse[other] == inverse[c] && other < c);
    }
    order[rank] = c;
  }
}

// The component on which each token loads most. A thread a token.
__global__ void __launch_bounds__(kThreads) assign(
    const float* __restrict__ y, const float* __restrict__ inverse, const int* __restrict__ order,
    const float* __restrict__ usable, int64_t tokens, int n, int vectors, int groups, int64_t* __restrict__ labels,
    float* __restrict__ loadings) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= tokens) return;
  const int64_t image = token / n, i = token % n;
  int best = 0;
  float loading = 0.0f;
  for (int g = 0; g < groups && usable[token] > 0.0f; ++g) {
    const int64_t row = image * vectors + order[image * vectors + g];
    const float part = inverse[row] < INFINITY ? fabsf(y[row * n + i]) * inverse[row] : 0.0f;
    if (part > loading) {  // strict: ties to the lowest group
      best = g;
      loading = part;
    }
  }
  labels[token] = best;
  loadings[token] = loading;
}

int64_t vectors_for(int64_t n, int64_t groups) { return groups + kOversampling < n ? groups + kOversampling : n; }

}  // namespace

// Of an image: A [n, d], gram [n, n], two sets of vectors, usable [n], inverse and order [vectors].
int64_t psca_workspace(int64_t images, int64_t n, int64_t d, int64_t groups) {
  const int64_t vectors = vectors_for(n, groups);
  return images * (n * d + n * n + 2 * vectors * n + n + 2 * vectors) * static_cast<int64_t>(sizeof(float));
}

cudaError_t psca(
    const void* features, Dtype dtype, const bool* mask, int64_t images, int64_t n, int64_t d, int64_t groups,
    bool over_features, void* workspace, int64_t* labels, float* loadings, cudaStream_t stream) {
  const int64_t tokens = images * n;
  const auto size = static_cast<int>(n), vectors = static_cast<int>(vectors_for(n, groups));
  auto* a = static_cast<float*>(workspace);
  float* gram = a + tokens * d;
  float* v = gram + tokens * n;
  float* y = v + tokens * vectors;
  float* usable = y + tokens * vectors;
  float* inverse = usable + tokens;
  auto* order = reinterpret_cast<int*>(inverse + images * vectors);

  const unsigned warp_each = blocks(ceil_div(tokens, kThreads / 32));
  LVTP_TRY(with_dtype(features, dtype, [&](const auto* x) {
    return launch(
        sigmoid_rows<std::decay_t<decltype(*x)>>, warp_each, kThreads, 0, stream, x, mask, tokens, d, over_features, a,
        usable);
  }));
  if (!over_features) {
    const unsigned grid = blocks(ceil_div(images * d, kThreads / 32));
    LVTP_TRY(launch(centre_features, grid, kThreads, 0, stream, images * d, n, d, usable, a));
    LVTP_TRY(launch(find_usable, warp_each, kThreads, 0, stream, a, tokens, d, usable));
  }
  LVTP_TRY(scaled_gram(a, Dtype::kFloat, usable, images, n, d, gram, stream));

  const int64_t count = tokens * vectors;
  LVTP_TRY(launch(scatter, blocks(ceil_div(count, kThreads)), kThreads, 0, stream, count, n * vectors, v));
  const auto across = static_cast<int>(ceil_div(n, kTileTokens));
  const int tiles = across * static_cast<int>(ceil_div(vectors, kTileVectors));
  const unsigned wide = vectors < kWide / 32 ? vectors * 32 : kWide;  // a warp a vector
  for (int step = 0; step < kSteps; ++step) {
    LVTP_TRY(launch(orthonormalise, blocks(images), wide, 0, stream, size, vectors, v));
    LVTP_TRY(launch(multiply, blocks(images * tiles), kThreads, 0, stream, v, gram, size, vectors, across, tiles, y));
    float* const product = y;
    y = v;
    v = product;
  }
  LVTP_TRY(launch(rotate_all, blocks(images), wide, 0, stream, size, vectors, v, inverse, order));
  return launch(
      assign, blocks(ceil_div(tokens, kThreads)), kThreads, 0, stream, v, inverse, order, usable, tokens, size, vectors,
      static_cast<int>(groups), labels, loadings);
}

}  // namespace lvtp::cuda
