// The similarity matrix, square tiles of it (tile.cuh). Those above the diagonal are computed once and written twice;
// the lengths of the tokens are divided out at the end.
#include "tile.cuh"

namespace lvtp::cuda {
namespace {

// The dot products as cosines, to where they belong and to the mirror image; both in whole lines. Tiles on the diagonal
// hold their mirror image themselves; of its two versions, which may differ by rounding, one is taken for both.
template <int kTile, class Token>
__device__ void write_tile(
    const float (*dot)[kTile + 1], const Lengths<kTile, kTile>& lengths, const Token& token, int64_t i0, int64_t j0,
    int64_t n, int64_t d, float* out) {
  const auto cosine = [&](int r, int c) { return lengths.cosine(dot[r][c], r, c, token, d); };
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
__global__ void __launch_bounds__(kTileThreads, Plan<kTile, kTile>::kBlocks) similarity_tiles(
    const T* __restrict__ x, int64_t n, int64_t d, int64_t tiles_per_image, int width, float* __restrict__ out) {
  using P = Plan<kTile, kTile>;
  const int64_t image = blockIdx.x / tiles_per_image;
  auto tile = static_cast<int>(blockIdx.x % tiles_per_image), row = 0;
  for (const auto across = static_cast<int>((n + kTile - 1) / kTile); tile >= across - row; ++row) tile -= across - row;
  const int64_t i0 = int64_t{row} * kTile, j0 = int64_t{row + tile} * kTile;
  x += image * n * d;

  char* const shared = dynamic_shared();
  const int64_t row_bytes = d * static_cast<int64_t>(sizeof(T));
  const Strided rows{reinterpret_cast<const char*>(x + i0 * d), row_bytes};
  const Strided columns{reinterpret_cast<const char*>(x + j0 * d), row_bytes};
  const int row_count = i0 + kTile < n ? kTile : static_cast<int>(n - i0);
  const int column_count = j0 + kTile < n ? kTile : static_cast<int>(n - j0);
  const int second = i0 == j0 ? 0 : P::kColumnsAt;  // where the columns are; on the diagonal they are the rows
  const auto quarter = multiply_tile<T, kTile, kTile>(row_bytes, shared, second, [&](int64_t at, char* to) {
    load_rows<kTile>(rows, row_count, row_bytes, at, width, to);
    if (second != 0) load_rows<kTile>(columns, column_count, row_bytes, at, width, to + second);
  });

  __shared__ Lengths<kTile, kTile> lengths;
  auto* const dot = reinterpret_cast<float (*)[kTile + 1]>(shared);
  const auto token = [&](int r) {
    const int64_t at = r < kTile ? i0 + r : j0 + r - kTile;
    return at < n ? x + at * d : nullptr;
  };
  finish(quarter, token, d, lengths, dot);
  write_tile<kTile>(dot, lengths, token, i0, j0, n, d, out + image * n * n);
}

template <int kTile, class T>
cudaError_t launch_tiles(const T* x, int64_t images, int64_t n, int64_t d, float* out, cudaStream_t stream) {
  const int64_t across = ceil_div(n, kTile), per_image = across * (across + 1) / 2;
  return launch(
      similarity_tiles<T, kTile>, blocks(images * per_image), kTileThreads, Plan<kTile, kTile>::kShared, stream, x, n,
      d, per_image, copy_width(x, d), out);
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
