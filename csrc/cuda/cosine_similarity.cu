// The similarity matrix, square tiles of it (tile.cuh). Those above the diagonal are computed once and written twice;
// the lengths of the tokens are divided out at the end.
#include "tile.cuh"

namespace lvtp::cuda {
namespace {

// Squares of lengths between which no dot product leaves fp32's range. Others are rare, and take their time.
constexpr float kShort = 0x1p-60f, kLong = 0x1p60f;

// unit[r]: what token r's features are to be multiplied by, 0 for one that is all zero or not finite.
// Negative where dot products with it may have left fp32's range.
template <class T, int kTile>
__device__ void find_units(
    const float (&square)[2][2 * kTile], const T* x, int64_t i0, int64_t j0, int64_t n, int64_t d,
    float (&unit)[2 * kTile]) {
  const auto token_of = [&](int r) { return r < kTile ? i0 + r : j0 + r - kTile; };
  bool unusual = false;
  for (int r = threadIdx.x; r < 2 * kTile; r += kTileThreads) {
    const int64_t token = token_of(r);
    const float sum = square[0][r] + square[1][r];
    const bool usual = sum >= kShort && sum <= kLong;
    unit[r] = token >= n ? 0.0f : usual ? 1.0f / sqrtf(sum) : -1.0f;
    unusual = unusual || unit[r] < 0.0f;
  }
  if (__syncthreads_or(unusual) == 0) return;
  for (int r = threadIdx.x / 32; r < 2 * kTile; r += kTileThreads / 32) {
    if (unit[r] >= 0.0f) continue;
    const float scale = unit_scale_of(x + token_of(r) * d, d, threadIdx.x % 32);  // its shuffles: every lane has looked
    if (threadIdx.x % 32 == 0) unit[r] = -scale;
  }
  __syncthreads();  // all units are known
}

// The dot products as cosines, to where they belong and to the mirror image; both in whole lines. Tiles on the diagonal
// hold their mirror image themselves; of its two versions, which may differ by rounding, one is taken for both.
template <class T, int kTile>
__device__ void write_tile(
    const float (*dot)[kTile + 1], const float (&unit)[2 * kTile], const T* x, int64_t i0, int64_t j0, int64_t n,
    int64_t d, float* out) {
  const auto cosine = [&](int r, int c) {
    const float row = unit[r], column = unit[kTile + c];
    if (row == 0.0f || column == 0.0f) return 0.0f;  // a NaN times 0 would stay NaN
    if (row > 0.0f && column > 0.0f) return dot[r][c] * (row * column);
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t at = 0; at < d; ++at) {
      sum += value(x[(i0 + r) * d + at]) * fabsf(row) * (value(x[(j0 + c) * d + at]) * fabsf(column));
    }
    return sum;
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool diagonal = i0 == j0;
  for (int r = warp; r < kTile && i0 + r < n; r += kTileThreads / 32) {
    for (int c = lane; c < kTile && j0 + c < n; c += 32) {
      out[(i0 + r) * n + j0 + c] = diagonal && c < r ? cosine(c, r) : cosine(r, c);
    }
  }
  for (int c = warp; c < kTile && j0 + c < n && !diagonal; c += kTileThreads / 32) {
    for (int r = lane; r < kTile; r += 32) out[(j0 + c) * n + i0 + r] = cosine(r, c);
  }
}

// One block a tile of the upper triangle of one image.
template <class T, int kTile>
__global__ void __launch_bounds__(kTileThreads, Plan<kTile>::kBlocks) similarity_tiles(
    const T* __restrict__ x, int64_t n, int64_t d, int64_t tiles_per_image, int width, float* __restrict__ out) {
  using P = Plan<kTile>;
  const int64_t image = blockIdx.x / tiles_per_image;
  auto tile = static_cast<int>(blockIdx.x % tiles_per_image), row = 0;
  for (const auto across = static_cast<int>((n + kTile - 1) / kTile); tile >= across - row; ++row) tile -= across - row;
  const int64_t i0 = int64_t{row} * kTile, j0 = int64_t{row + tile} * kTile;
  x += image * n * d;

  char* const shared = dynamic_shared();
  const int64_t row_bytes = d * static_cast<int64_t>(sizeof(T));
  const auto* const rows = reinterpret_cast<const char*>(x + i0 * d);
  const auto* const columns = reinterpret_cast<const char*>(x + j0 * d);
  const int row_count = i0 + kTile < n ? kTile : static_cast<int>(n - i0);
  const int column_count = j0 + kTile < n ? kTile : static_cast<int>(n - j0);
  const int second = i0 == j0 ? 0 : P::kTileBytes;  // where the columns are; on the diagonal they are the rows
  const int stages = static_cast<int>((row_bytes + kRowBytes - 1) / kRowBytes);
  const auto load = [&](int stage) {
    char* const to = shared + stage % P::kStages * P::kStageBytes;
    const int64_t at = static_cast<int64_t>(stage) * kRowBytes;
    if (stage < stages) load_rows<kTile>(rows, row_count, row_bytes, at, width, to);
    if (stage < stages && second != 0) load_rows<kTile>(columns, column_count, row_bytes, at, width, to + second);
    cp_async_commit();  // an empty group keeps the count
  };
#pragma unroll 1
  for (int stage = 0; stage < P::kStages - 1; ++stage) load(stage);
  Quarter<T, kTile> quarter;
  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<P::kStages - 2>();
    __syncthreads();  // everybody's part of this stage has arrived, and nobody reads the one before it any more
    load(stage + P::kStages - 1);
    const char* const arrived = shared + stage % P::kStages * P::kStageBytes;
    quarter.add(arrived, arrived + second);
  }

  __shared__ float square[2][2 * kTile], unit[2 * kTile];
  auto* const dot = reinterpret_cast<float (*)[kTile + 1]>(shared);
  static_assert(sizeof(float[kTile][kTile + 1]) <= P::kShared);
  quarter.enter_squares(square);
  __syncthreads();  // all squares are entered, and the stages are no longer read
  quarter.enter_dots(dot);
  find_units<T, kTile>(square, x, i0, j0, n, d, unit);
  write_tile<T, kTile>(dot, unit, x, i0, j0, n, d, out + image * n * n);
}

template <int kTile, class T>
cudaError_t launch_tiles(const T* x, int64_t images, int64_t n, int64_t d, float* out, cudaStream_t stream) {
  const int64_t across = ceil_div(n, kTile), per_image = across * (across + 1) / 2;
  const uint64_t bits = reinterpret_cast<uintptr_t>(x) | static_cast<uint64_t>(d) * sizeof(T);
  const int width = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
  return launch(
      similarity_tiles<T, kTile>, blocks(images * per_image), kTileThreads, Plan<kTile>::kShared, stream, x, n, d,
      per_image, width, out);
}

// Large tiles read less; small ones keep more multiprocessors busy where there is little work. The sums are the same.
template <class T>
cudaError_t launch_similarity(const T* x, int64_t images, int64_t n, int64_t d, float* out, cudaStream_t stream) {
  constexpr int kSmall = 64, kLarge = 96, kEnough = 100;
  if constexpr (sizeof(T) < sizeof(float)) {  // of fp32, twice as many fragments must be held
    const int64_t across = ceil_div(n, kLarge);
    if (images * across * (across + 1) / 2 >= kEnough) {
      return launch_tiles<kLarge>(x, images, n, d, out, stream);
    }
  }
  return launch_tiles<kSmall>(x, images, n, d, out, stream);
}

}  // namespace

cudaError_t cosine_similarity(
    const void* features, Dtype dtype, int64_t images, int64_t n, int64_t d, float* out, cudaStream_t stream) {
  return with_dtype(features, dtype, [&](const auto* x) { return launch_similarity(x, images, n, d, out, stream); });
}

}  // namespace lvtp::cuda
