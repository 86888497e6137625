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

// A tile of kRows by kColumns tokens: how many stages are in shared memory at a time, rows first, and how many blocks
// on a multiprocessor.
template <int kRows, int kColumns>
struct Plan {
  static constexpr int kColumnsAt = kRows * kRowBytes, kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kStages = kStageBytes > (16 << 10) ? 3 : 4, kBlocks = kStages == 3 ? 2 : 3;
  static constexpr int kShared = kStages * kStageBytes;
};

__device__ inline int place(int row, int piece) { return row * kRowBytes + (piece ^ row % 8) * kPiece; }

// The bytes of features in row-major order that can be copied at once: 16, 4, or 2, for which there is no asynchronous
// copy.
template <class T>
int copy_width(const T* x, int64_t d) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(x) | static_cast<uint64_t>(d) * sizeof(T);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

// Where the tokens of a tile begin, `distance` bytes apart, or those of an index. next(at, r, steps): token r, which is
// `steps` after the one at `at`.
struct Strided {
  const char* first;
  int64_t distance;
  __device__ const char* operator()(int r) const { return first + r * distance; }
  __device__ const char* next(const char* before, int, int steps, int64_t) const { return before + steps * distance; }
};
struct Gathered {
  const char* base;
  int64_t distance;
  const int* index;
  __device__ const char* operator()(int r) const { return base + index[r] * distance; }
  __device__ const char* next(const char*, int r, int, int64_t at) const { return (*this)(r) + at; }
};

// One stage of kTokens tokens, of which `count` are there: the bytes from `at` on of each, zeros beyond its end and the
// last token. Those that are not there begin somewhere, too, aligned like the others.
template <int kTokens, class Rows>
__device__ void load_rows(const Rows& rows, int count, int64_t row_bytes, int64_t at, int width, char* shared) {
  constexpr int kPieces = kRowBytes / kPiece, kStep = kTileThreads / kPieces, kTurns = kTokens / kStep;
  constexpr int kAtOnce = kTurns > 6 ? 4 : kTurns;  // as registers allow
  const int piece = threadIdx.x % kPieces, own = threadIdx.x / kPieces;
  at += piece * kPiece;
  shared += place(own, piece);
  const char* x = rows(own) + at;
  if (width == kPiece) {
#pragma unroll kAtOnce
    for (int turn = 0; turn < kTurns; ++turn) {  // kStep is a multiple of 8: a piece keeps its place in the row
      const int r = own + turn * kStep;
      if (turn > 0) x = rows.next(x, r, kStep, at);
      cp_async<16>(shared + turn * kStep * kRowBytes, x, r < count && at < row_bytes);
    }
    return;
  }
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
    const int r = own + turn * kStep;
    if (turn > 0) x = rows.next(x, r, kStep, at);
#pragma unroll 1
    for (int b = 0; b < kPiece; b += width) {
      const bool there = r < count && at + b < row_bytes;
      char* const to = shared + turn * kStep * kRowBytes + b;
      if (width == 4) {
        cp_async<4>(to, x + b, there);
      } else {
        *reinterpret_cast<uint16_t*>(to) = there ? *reinterpret_cast<const uint16_t*>(x + b) : uint16_t{0};
      }
    }
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
template <class T, int kTileRows, int kTileColumns>
struct Quarter {
  static constexpr int kRows = kTileRows / 32, kColumns = kTileColumns / 16;  // fragments' worth: 16 rows by 8 columns
  static constexpr int kSlicesAtOnce =
      sizeof(T) == sizeof(float) && kRows * kColumns > 8 ? 1 : 2;  // as registers allow
  const int lane = threadIdx.x % 32, down = threadIdx.x / 64, right = threadIdx.x / 32 % 2;
  float dot[kRows][kColumns][4] = {};
  float row_squares[kRows][2] = {}, column_squares[kColumns] = {};

  __device__ void add(const char* rows, const char* columns) {
    const LanePlace row = place_in_a(lane), column = place_in_b(lane);
    rows += down * (kTileRows / 2) * kRowBytes;
    columns += right * (kTileColumns / 2) * kRowBytes;
    float sum[kRows][kColumns][4] = {};
#pragma unroll kSlicesAtOnce
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
  __device__ void enter_squares(float (&out)[2][kTileRows + kTileColumns]) const {
    const auto enter = [&](float part, int half, int at) {
      part += __shfl_xor_sync(kFullWarp, part, 1);
      part += __shfl_xor_sync(kFullWarp, part, 2);
      if (lane % 4 == 0) out[half][at + lane / 4] = part;
    };
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      enter(row_squares[m][0], right, down * (kTileRows / 2) + m * 16);
      enter(row_squares[m][1], right, down * (kTileRows / 2) + m * 16 + 8);
    }
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
      enter(column_squares[q], down, kTileRows + right * (kTileColumns / 2) + q * 8);
    }
  }

  __device__ void enter_dots(float (*out)[kTileColumns + 1]) const {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = down * (kTileRows / 2) + m * 16 + e / 2 * 8 + lane / 4;
          out[r][right * (kTileColumns / 2) + q * 8 + lane % 4 * 2 + e % 2] = dot[m][q][e];
        }
      }
    }
  }
};

// A tile, stage by stage: load(at, to) asks for the copies of one while those before it are multiplied. `second`: where
// in a stage the columns are.
template <class T, int kRows, int kColumns, class Load>
__device__ Quarter<T, kRows, kColumns> multiply_tile(int64_t row_bytes, char* shared, int second, const Load& load) {
  using P = Plan<kRows, kColumns>;
  const int stages = static_cast<int>((row_bytes + kRowBytes - 1) / kRowBytes);
  const auto begin = [&](int stage) {
    if (stage < stages) {
      load(static_cast<int64_t>(stage) * kRowBytes, shared + stage % P::kStages * P::kStageBytes);
    }
    cp_async_commit();  // an empty group keeps the count
  };
#pragma unroll 1
  for (int stage = 0; stage < P::kStages - 1; ++stage) begin(stage);
  Quarter<T, kRows, kColumns> quarter;
  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<P::kStages - 2>();
    __syncthreads();  // everybody's part of this stage has arrived, and nobody reads the one before it any more
    begin(stage + P::kStages - 1);
    const char* const arrived = shared + stage % P::kStages * P::kStageBytes;
    quarter.add(arrived, arrived + second);
  }
  return quarter;
}

// Squares of lengths between which no dot product leaves fp32's range. Others are rare, and take their time.
constexpr float kShort = 0x1p-60f, kLong = 0x1p60f;

// What a tile's dot products become cosines with. unit[r]: what token r's features are to be multiplied by, rows first,
// then columns; 0 for one that is all zero or not finite; negative where dot products with it may have left fp32's
// range.
template <int kRows, int kColumns>
struct Lengths {
  static constexpr int kTokens = kRows + kColumns;
  float square[2][kTokens], unit[kTokens];

  // token(r): where its features are, null for one that is not there.
  template <class T, class Token>
  __device__ void find_units(const Token& token, int64_t d) {
    bool unusual = false;
    for (int r = threadIdx.x; r < kTokens; r += kTileThreads) {
      const float sum = square[0][r] + square[1][r];
      const bool usual = sum >= kShort && sum <= kLong;
      unit[r] = token(r) == nullptr ? 0.0f : usual ? 1.0f / sqrtf(sum) : -1.0f;
      unusual = unusual || unit[r] < 0.0f;
    }
    if (__syncthreads_or(unusual) == 0) return;
    for (int r = threadIdx.x / 32; r < kTokens; r += kTileThreads / 32) {
      if (unit[r] >= 0.0f) continue;
      const float scale = unit_scale_of<T>(token(r), d, threadIdx.x % 32);  // its shuffles: every lane has looked
      if (threadIdx.x % 32 == 0) unit[r] = -scale;
    }
    __syncthreads();  // all units are known
  }

  // Of row r and column c.
  template <class Token>
  __device__ float cosine(float dot, int r, int c, const Token& token, int64_t d) const {
    const float row = unit[r], column = unit[kRows + c];
    if (row == 0.0f || column == 0.0f) return 0.0f;  // a NaN times 0 would stay NaN
    if (row > 0.0f && column > 0.0f) return dot * (row * column);
    const auto *const x = token(r), *const y = token(kRows + c);
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t at = 0; at < d; ++at) sum += value(x[at]) * fabsf(row) * (value(y[at]) * fabsf(column));
    return sum;
  }
};

// The end of a tile: its dot products and the lengths, after which the stages are no longer there.
template <class T, int kRows, int kColumns, class Token>
__device__ void finish(
    const Quarter<T, kRows, kColumns>& quarter, const Token& token, int64_t d, Lengths<kRows, kColumns>& lengths,
    float (*dot)[kColumns + 1]) {
  static_assert(sizeof(float[kRows][kColumns + 1]) <= Plan<kRows, kColumns>::kShared);
  quarter.enter_squares(lengths.square);
  __syncthreads();  // all squares are entered, and the stages are no longer read
  quarter.enter_dots(dot);
  lengths.template find_units<T>(token, d);
}

}  // namespace
}  // namespace lvtp::cuda
