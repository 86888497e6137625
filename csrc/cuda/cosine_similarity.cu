// The similarity matrix on tensor cores, square tiles of it. Tiles above the diagonal are computed once and written
// twice. Features stream through shared memory as they are; the lengths of the tokens are gathered on the way and
// divided out at the end. fp32 features are split in two tf32 numbers each, of whose four products three count: what is
// left out is as small as fp32's own rounding.
//
// A tensor core rounds its sums towards zero, so no sum stays in it for long: each stage begins with zeros, and its
// result is added to the total by ordinary additions.
#include <type_traits>

#include "device.cuh"
#include "ptx.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kThreads = 128;   // four warps, two by two, each a quarter of the tile
constexpr int kRowBytes = 128;  // of a token in one stage
constexpr int kPiece = 16;      // bytes; pieces of a row are permuted, so that 8 rows' lie in different banks
constexpr int kSlices = kRowBytes / (2 * kPiece);  // a fragment's depth is two pieces

// How many stages are in shared memory at a time, and blocks of which size on a multiprocessor.
template <int kTile>
struct Plan {
  static constexpr int kStages = kTile > 64 ? 3 : 4, kBlocks = 2;
  static constexpr int kTileBytes = kTile * kRowBytes, kStageBytes = 2 * kTileBytes;
  static constexpr int kShared = kStages * kStageBytes;
};

// Squares of lengths between which no dot product leaves fp32's range. Others are rare, and take their time.
constexpr float kShort = 0x1p-60f, kLong = 0x1p60f;

__device__ inline int place(int row, int piece) { return row * kRowBytes + (piece ^ row % 8) * kPiece; }

// One stage of kTile tokens, of which `count` are there: the bytes from `at` on of each, zeros beyond its end and the
// last token. `width`, the bytes that can be copied at once: 16, 4, or 2, for which there is no asynchronous copy.
template <int kTile>
__device__ void load_rows(const char* x, int count, int64_t row_bytes, int64_t at, int width, char* shared) {
  constexpr int kPieces = kRowBytes / kPiece, kStep = kThreads / kPieces, kTurns = kTile / kStep;
  const int piece = threadIdx.x % kPieces, own = threadIdx.x / kPieces;
  at += piece * kPiece;
  x += own * row_bytes + at;
  shared += place(own, piece);
  if (width == kPiece) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {  // kStep is a multiple of 8: a piece keeps its place in the row
      cp_async<16>(shared + turn * kStep * kRowBytes, x, own + turn * kStep < count && at < row_bytes);
      x += kStep * row_bytes;
    }
    return;
  }
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll 1
    for (int b = 0; b < kPiece; b += width) {
      const bool there = own + turn * kStep < count && at + b < row_bytes;
      char* const to = shared + turn * kStep * kRowBytes + b;
      if (width == 4) {
        cp_async<4>(to, x + b, there);
      } else {
        *reinterpret_cast<uint16_t*>(to) = there ? *reinterpret_cast<const uint16_t*>(x + b) : uint16_t{0};
      }
    }
    x += kStep * row_bytes;
  }
}

template <class T>
__device__ void add_squares(float& sum, uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half numbers[2];
    memcpy(numbers, &word, sizeof(word));
    for (const __half v : numbers) sum += value(v) * value(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of an fp32 number
    const float low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
    sum += low * low;
    sum += high * high;
  } else {
    const float v = __uint_as_float(word);
    sum += v * v;
  }
}

// A fragment as factors: itself, or an fp32 one as the sum of two of tf32.
template <class T>
struct Factor {
  Fragment high;
  __device__ explicit Factor(const Fragment& f) : high(f) {}
};
template <>
struct Factor<float> {
  Fragment high, low;
  __device__ explicit Factor(const Fragment& f) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float v = __uint_as_float(f.word[w]);
      high.word[w] = to_tf32(v);
      low.word[w] = to_tf32(v - __uint_as_float(high.word[w]));
    }
  }
};

// The products of a's 16 rows and the kHalf-th 8 of b's.
template <int kHalf, class T>
__device__ void multiply(float (&sum)[4], const Factor<T>& a, const Factor<T>& b) {
  const auto add = [&](const Fragment& x, const Fragment& y) {
    mma<T>(sum, x.word, y.word[2 * kHalf], y.word[2 * kHalf + 1]);
  };
  if constexpr (std::is_same_v<T, float>) {
    add(a.low, b.high);
    add(a.high, b.low);
  }
  add(a.high, b.high);
}

// A warp's quarter of the tile, in registers: dot products of its rows and columns, and the squares of their lengths.
// Another warp has the same rows, and another one the same columns, so each squares but half of what it holds of them.
template <class T, int kTile>
struct Quarter {
  static constexpr int kRows = kTile / 32, kColumns = kTile / 16;  // fragments' worth: 16 rows by 8 columns
  const int lane = threadIdx.x % 32, down = threadIdx.x / 64, right = threadIdx.x / 32 % 2;
  float dot[kRows][kColumns][4] = {};
  float row_squares[kRows][2] = {}, column_squares[kColumns] = {};

  __device__ void add(const char* rows, const char* columns) {
    const LanePlace row = place_in_a(lane), column = place_in_b(lane);
    rows += down * (kTile / 2) * kRowBytes;
    columns += right * (kTile / 2) * kRowBytes;
    float sum[kRows][kColumns][4] = {};
#pragma unroll 2
    for (int slice = 0; slice < kSlices; ++slice) {
      // 16 rows on, a piece lies where it does here.
      const char* const row_half = rows + place(row.row, slice * 2 + row.half);
      const char* const column_half = columns + place(column.row, slice * 2 + column.half);
      Fragment a[kRows];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        a[m] = load_fragment(row_half + m * 16 * kRowBytes);
        add_squares<T>(row_squares[m][0], right == 0 ? a[m].word[0] : a[m].word[2]);
        add_squares<T>(row_squares[m][1], right == 0 ? a[m].word[1] : a[m].word[3]);
      }
#pragma unroll
      for (int q = 0; q < kColumns; q += 2) {
        const Fragment b = load_fragment(column_half + q * 8 * kRowBytes);
        add_squares<T>(column_squares[q], down == 0 ? b.word[0] : b.word[1]);
        add_squares<T>(column_squares[q + 1], down == 0 ? b.word[2] : b.word[3]);
        const Factor<T> factor(b);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          const Factor<T> other(a[m]);
          multiply<0>(sum[m][q], other, factor);
          multiply<1>(sum[m][q + 1], other, factor);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dot[m][q][e] += sum[m][q][e];
      }
    }
  }

  // What it gathered: of the tile's rows, then of its columns.
  __device__ void enter_squares(float (&out)[2][2 * kTile]) const {
    const auto enter = [&](float part, int half, int at) {
      part += __shfl_xor_sync(kFullWarp, part, 1);
      part += __shfl_xor_sync(kFullWarp, part, 2);
      if (lane % 4 == 0) out[half][at + lane / 4] = part;
    };
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      enter(row_squares[m][0], right, down * (kTile / 2) + m * 16);
      enter(row_squares[m][1], right, down * (kTile / 2) + m * 16 + 8);
    }
#pragma unroll
    for (int q = 0; q < kColumns; ++q) enter(column_squares[q], down, kTile + right * (kTile / 2) + q * 8);
  }

  __device__ void enter_dots(float (*out)[kTile + 1]) const {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = down * (kTile / 2) + m * 16 + e / 2 * 8 + lane / 4;
          out[r][right * (kTile / 2) + q * 8 + lane % 4 * 2 + e % 2] = dot[m][q][e];
        }
      }
    }
  }
};

// unit[r]: what token r's features are to be multiplied by, 0 for one that is all zero or not finite; `given`, or from
// the squares. Negative where dot products with it may have left fp32's range.
template <class T, int kTile>
__device__ void find_units(
    const float (&square)[2][2 * kTile], const T* x, const float* given, int64_t i0, int64_t j0, int64_t n, int64_t d,
    float (&unit)[2 * kTile]) {
  const auto token_of = [&](int r) { return r < kTile ? i0 + r : j0 + r - kTile; };
  bool unusual = false;
  for (int r = threadIdx.x; r < 2 * kTile; r += kThreads) {
    const int64_t token = token_of(r);
    const float sum = square[0][r] + square[1][r];
    const bool usual = sum >= kShort && sum <= kLong;
    unit[r] = token >= n ? 0.0f : given != nullptr ? given[token] : usual ? 1.0f / sqrtf(sum) : -1.0f;
    unusual = unusual || unit[r] < 0.0f;
  }
  if (__syncthreads_or(unusual) == 0) return;
  for (int r = threadIdx.x / 32; r < 2 * kTile; r += kThreads / 32) {
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
  for (int r = warp; r < kTile && i0 + r < n; r += kThreads / 32) {
    for (int c = lane; c < kTile && j0 + c < n; c += 32) {
      out[(i0 + r) * n + j0 + c] = diagonal && c < r ? cosine(c, r) : cosine(r, c);
    }
  }
  for (int c = warp; c < kTile && j0 + c < n && !diagonal; c += kThreads / 32) {
    for (int r = lane; r < kTile; r += 32) out[(j0 + c) * n + i0 + r] = cosine(r, c);
  }
}

// One block a tile of the upper triangle of one image.
template <class T, int kTile>
__global__ void __launch_bounds__(kThreads, Plan<kTile>::kBlocks) similarity_tiles(
    const T* __restrict__ x, const float* __restrict__ given, int64_t n, int64_t d, int64_t tiles_per_image, int width,
    float* __restrict__ out) {
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
  find_units<T, kTile>(square, x, given != nullptr ? given + image * n : nullptr, i0, j0, n, d, unit);
  write_tile<T, kTile>(dot, unit, x, i0, j0, n, d, out + image * n * n);
}

template <int kTile, class T>
cudaError_t launch_tiles(
    const T* x, const float* scale, int64_t images, int64_t n, int64_t d, float* out, cudaStream_t stream) {
  const int64_t across = ceil_div(n, kTile), per_image = across * (across + 1) / 2;
  const uint64_t bits = reinterpret_cast<uintptr_t>(x) | static_cast<uint64_t>(d) * sizeof(T);
  const int width = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
  return launch(
      similarity_tiles<T, kTile>, blocks(images * per_image), kThreads, Plan<kTile>::kShared, stream, x, scale, n, d,
      per_image, width, out);
}

// Large tiles read less; small ones keep more multiprocessors busy where there is little work. The sums are the same.
template <class T>
cudaError_t launch_similarity(
    const T* x, const float* scale, int64_t images, int64_t n, int64_t d, float* out, cudaStream_t stream) {
  constexpr int kSmall = 64, kLarge = 96, kEnough = 100;
  if constexpr (sizeof(T) < sizeof(float)) {  // of fp32, twice as many fragments must be held
    const int64_t across = ceil_div(n, kLarge);
    if (images * across * (across + 1) / 2 >= kEnough) {
      return launch_tiles<kLarge>(x, scale, images, n, d, out, stream);
    }
  }
  return launch_tiles<kSmall>(x, scale, images, n, d, out, stream);
}

}  // namespace

cudaError_t scaled_gram(
    const void* features, Dtype dtype, const float* scale, int64_t images, int64_t n, int64_t d, float* out,
    cudaStream_t stream) {
  return with_dtype(
      features, dtype, [&](const auto* x) { return launch_similarity(x, scale, images, n, d, out, stream); });
}

cudaError_t cosine_similarity(
    const void* features, Dtype dtype, int64_t images, int64_t n, int64_t d, float* out, cudaStream_t stream) {
  return scaled_gram(features, dtype, nullptr, images, n, d, out, stream);
}

}  // namespace lvtp::cuda
