// Gram matrices of rows that lie in panels, and panels themselves.
#pragma once

#include "vector.h"

namespace lvtp::cpu::LVTP_ISA {

using Row = Vector<float, kTile * sizeof(float)>;

#define LVTP_LANES(f) \
  f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)

// Exchanges the off-diagonal Step x Step blocks of every 2 Step x 2 Step block.
template <int Step>
inline void exchange(Row (&r)[kTile]) {
#define LVTP_LOW(l) (l & Step ? kTile + l - Step : l)
#define LVTP_HIGH(l) (l & Step ? kTile + l : l + Step)
  for (int i = 0; i < kTile; ++i) {
    if (i & Step) continue;
    const Row a = r[i], b = r[i + Step];
    r[i] = __builtin_shufflevector(a, b, LVTP_LANES(LVTP_LOW));
    r[i + Step] = __builtin_shufflevector(a, b, LVTP_LANES(LVTP_HIGH));
  }
#undef LVTP_LOW
#undef LVTP_HIGH
}

inline void transpose(const float* block, int64_t stride, int64_t depth, float* panel) {
  int64_t c = 0;
#if LVTP_BYTES == 64
  for (; c + kTile <= depth; c += kTile) {
    Row r[kTile];
    for (int i = 0; i < kTile; ++i) r[i] = load<Row>(block + i * stride + c);
    exchange<8>(r);
    exchange<4>(r);
    exchange<2>(r);
    exchange<1>(r);
    for (int i = 0; i < kTile; ++i) store(panel + (c + i) * kTile, r[i]);
  }
#endif
  for (; c < depth; ++c) {
    for (int i = 0; i < kTile; ++i) panel[c * kTile + i] = block[i * stride + c];
  }
}

// tile += the rows of `a` times those of `b` over `depth` columns. The sums of some rows at a time stay in registers,
// and start from zero: sums of sums lose less to rounding than one long one.
inline void add_to_tile(const float* a, const float* b, int64_t depth, float* tile) {
  using V = Vector<float>;
  constexpr int64_t kRows = LVTP_BYTES == 64 ? 16 : LVTP_BYTES == 32 ? 4 : 2, kParts = kTile / kWidth<float>;
  for (int64_t r0 = 0; r0 < kTile; r0 += kRows) {
    V sum[kRows][kParts] = {};
    for (int64_t c = 0; c < depth; ++c) {
      V column[kParts];
      for (int64_t p = 0; p < kParts; ++p) column[p] = load<V>(b + c * kTile + p * kWidth<float>);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t p = 0; p < kParts; ++p) sum[r][p] += a[c * kTile + r0 + r] * column[p];
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t p = 0; p < kParts; ++p) {
        float* place = tile + (r0 + r) * kTile + p * kWidth<float>;
        store(place, load<V>(place) + sum[r][p]);
      }
    }
  }
}

inline void gram_strip(const float* panels, int64_t depth, int64_t s, float* tiles) {
  constexpr int64_t kDepth = 256;  // columns at a time: two panels of them fit in the first-level cache
  const int64_t size = depth * kTile;
  for (int64_t i = 0; i < (s + 1) * kTile * kTile; ++i) tiles[i] = 0.0f;
  for (int64_t c = 0; c < depth; c += kDepth) {
    const int64_t columns = depth - c < kDepth ? depth - c : kDepth;
    for (int64_t t = 0; t <= s; ++t) {
      add_to_tile(panels + s * size + c * kTile, panels + t * size + c * kTile, columns, tiles + t * kTile * kTile);
    }
  }
}

inline void cross(const float* a, const float* b, int64_t depth, float* product) {
  for (int64_t i = 0; i < kTile * kTile; ++i) product[i] = 0.0f;
  add_to_tile(a, b, depth, product);
}

inline void cross_row(const float* a, const float* b, int64_t depth, float* product) {
  Row sum[4] = {};
  int64_t c = 0;
  for (; c + 4 <= depth; c += 4) {
    for (int64_t p = 0; p < 4; ++p) sum[p] += a[c + p] * load<Row>(b + (c + p) * kTile);
  }
  for (; c < depth; ++c) sum[0] += a[c] * load<Row>(b + c * kTile);
  store(product, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

inline void add_product(const float* a, const float* tile, int64_t rows, float* out) {
  using V = Vector<float>;
  for (int64_t p = 0; p < kTile; p += kWidth<float>) {
    V row[kTile];
    for (int64_t r = 0; r < kTile; ++r) row[r] = load<V>(tile + r * kTile + p);
    for (int64_t i = 0; i < rows; ++i) {
      V even = load<V>(out + i * kTile + p), odd = {};
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTile; r += 2) {
        even += a[i * kTile + r] * row[r];
        odd += a[i * kTile + r + 1] * row[r + 1];
      }
      store(out + i * kTile + p, even + odd);
    }
  }
}

}  // namespace lvtp::cpu::LVTP_ISA
