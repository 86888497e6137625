// A tile of dot products on tensor cores, by one block: features stream through shared memory as they are, a stage at a
// time, and the squares of the tokens' lengths are gathered on the way. fp32 features are split in two tf32 numbers
// each, of whose four products three count: what is left out is as small as fp32's own rounding.
//
// A tensor core rounds its sums towards zero, so no sum stays in it for long: each stage begins with zeros, and its
// result is added to the total by ordinary additions.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "ptx.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kTileThreads = 128;  // four warps, two by two, each a quarter of the tile
constexpr int kRowBytes = 128;     // of a token in one stage
constexpr int kPiece = 16;         // bytes; pieces of a row are permuted, so that 8 rows' lie in different banks
constexpr int kSlices = kRowBytes / (2 * kPiece);  // a fragment's depth is two pieces

// How many stages are in shared memory at a time, and blocks of which size on a multiprocessor.
template <int kTile>
struct Plan {
  static constexpr int kStages = kTile > 64 ? 3 : 4, kBlocks = 2;
  static constexpr int kTileBytes = kTile * kRowBytes, kStageBytes = 2 * kTileBytes;
  static constexpr int kShared = kStages * kStageBytes;
};

__device__ inline int place(int row, int piece) { return row * kRowBytes + (piece ^ row % 8) * kPiece; }

// One stage of kTile tokens, of which `count` are there: the bytes from `at` on of each, zeros beyond its end and the
// last token. `width`, the bytes that can be copied at once: 16, 4, or 2, for which there is no asynchronous copy.
template <int kTile>
__device__ void load_rows(const char* x, int count, int64_t row_bytes, int64_t at, int width, char* shared) {
  constexpr int kPieces = kRowBytes / kPiece, kStep = kTileThreads / kPieces, kTurns = kTile / kStep;
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
      // 8 rows on, a piece lies where it does here.
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

}  // namespace
}  // namespace lvtp::cuda
