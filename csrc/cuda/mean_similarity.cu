#include "device.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kColumns = 32, kSlices = 16, kThreads = kColumns * kSlices;  // features and token slices of a block

// What 32 features contribute: total[0] = their part of ||sum_i x^_i||^2, total[1] = of sum_i ||x^_i||^2. In double, as
// sums over tens of thousands of tokens lose what the difference of the two is made of.
template <class T>
__global__ void __launch_bounds__(kThreads) feature_sums(
    const T* __restrict__ x, const float* __restrict__ scale, const bool* __restrict__ mask, int64_t n, int64_t d,
    int64_t tiles, double* __restrict__ total) {
  const int64_t image = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int column = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int64_t c = tile * kColumns + column;
  double sum = 0.0, own = 0.0;
  for (int64_t i = slice; i < n && c < d; i += kSlices) {
    const int64_t token = image * n + i;
    if (scale[token] == 0.0f || (mask != nullptr && !mask[token])) continue;  // a NaN times 0 would stay NaN
    const double v = value(x[token * d + c]) * scale[token];
    sum += v;
    own += v * v;
  }

  __shared__ double sums[kSlices][kColumns], owns[kSlices][kColumns];
  sums[slice][column] = sum;
  owns[slice][column] = own;
  __syncthreads();  // every slice has entered its sums
  if (slice > 0) return;
  for (int s = 1; s < kSlices; ++s) {
    sum += sums[s][column];
    own += owns[s][column];
  }
  const double together = warp_sum(sum * sum), alone = warp_sum(own);
  if (column == 0) {
    total[blockIdx.x * 2] = together;
    total[blockIdx.x * 2 + 1] = alone;
  }
}

// rho = (||sum_i x^_i||^2 - sum_i ||x^_i||^2) / (N (N - 1)) over the real tokens; 0 where there is no pair. A warp an
// image, which adds the tiles up in a fixed order: the result repeats itself to the last bit.
__global__ void finish(
    const double* __restrict__ total, const bool* __restrict__ mask, int64_t n, int64_t tiles,
    float* __restrict__ out) {
  const int64_t image = blockIdx.x;
  double difference = 0.0;
  for (int64_t t = threadIdx.x; t < tiles; t += 32) {
    difference += total[(image * tiles + t) * 2] - total[(image * tiles + t) * 2 + 1];
  }
  int real = 0;
  for (int64_t i = threadIdx.x; i < n; i += 32) real += mask == nullptr || mask[image * n + i];
  difference = warp_sum(difference);
  real = warp_sum(real);
  const double pairs = static_cast<double>(real) * (real - 1);
  if (threadIdx.x == 0) out[image] = real < 2 ? 0.0f : static_cast<float>(difference / pairs);
}

}  // namespace

int64_t mean_similarity_workspace(int64_t images, int64_t n, int64_t d) {
  const int64_t totals = images * ceil_div(d, kColumns) * 2;
  return totals * static_cast<int64_t>(sizeof(double)) + images * n * static_cast<int64_t>(sizeof(float));
}

cudaError_t mean_similarity(
    const void* features, Dtype dtype, const bool* mask, int64_t images, int64_t n, int64_t d, void* workspace,
    float* out, cudaStream_t stream) {
  const int64_t tiles = ceil_div(d, kColumns);
  auto* total = static_cast<double*>(workspace);
  auto* scale = reinterpret_cast<float*>(total + images * tiles * 2);
  LVTP_TRY(with_dtype(features, dtype, [&](const auto* x) {
    LVTP_TRY(launch_unit_scale(x, images * n, d, scale, stream));
    return launch(
        feature_sums<std::decay_t<decltype(*x)>>, blocks(images * tiles), kThreads, 0, stream, x, scale, mask, n, d,
        tiles, total);
  }));
  return launch(finish, blocks(images), 32, 0, stream, total, mask, n, tiles, out);
}

}  // namespace lvtp::cuda
