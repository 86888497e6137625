// The inner loops that pay for wide vectors, compiled once for each instruction set (csrc/cpu/simd/) and called through
// a table. Sizes are in elements; a pointer needs no alignment beyond its type's.
#pragma once

#include <cstdint>

namespace lvtp::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

// What this processor has and torch's own switch, ATEN_CPU_CAPABILITY, allows. Found once.
Isa isa();

constexpr int64_t kTile = 16;  // a tile is kTile x kTile numbers

// Loops that exist in float and in double.
template <class T>
struct EigenLoops {
  // Columns that lie side by side in a block of vectors, [rows][kLanes].
  static constexpr int64_t kLanes = 64 / sizeof(T);

  // Updates to a matrix that wait until all of them are made at once: c -= h w^T + w h^T, for h, w [kWaiting][stride].
  static constexpr int64_t kWaiting = 2;

  // y += c u for the tiles of one tile row of a symmetric matrix and their mirror images.
  void (*multiply)(T* tiles, int64_t tile_row, const T* u, T* y);
  // The same once all kWaiting updates are made.
  void (*update_and_multiply)(T* tiles, int64_t tile_row, const T* h, const T* w, int64_t stride, const T* u, T* y);
  // Row k, in `tiles`, as the first `waiting` updates would leave it -> row[0, k].
  void (*current_row)(const T* tiles, int64_t k, const T* h, const T* w, int64_t stride, int64_t waiting, T* row);
  // What the first `waiting` updates change in c u: y -= h (w.u) + w (h.u); size is a multiple of kTile.
  void (*correct)(const T* h, const T* w, int64_t stride, int64_t waiting, const T* u, int64_t size, T* y);
  // a.b; size is a multiple of kTile.
  T (*dot)(const T* a, const T* b, int64_t size);
  // w = (y0 + y1 + y2 + y3) - h (h.y) / 2, where the four lie `stride` apart; size is a multiple of kTile.
  void (*second_vector)(const T* y, int64_t stride, const T* h, int64_t size, T* w);
  // x *= scale; size is a multiple of kTile.
  void (*scale)(T* x, int64_t size, T scale);
  // z <- (I - h h^T) z for z [rows][kLanes].
  void (*reflect)(const T* h, int64_t rows, T* z);
};

struct Simd {
  // Half precision to float; the values' bits come in.
  void (*from_half)(const uint16_t* x, int64_t size, float* out);
  void (*from_bfloat16)(const uint16_t* x, int64_t size, float* out);
  // unit = x * scale, added to sum in double. Returns |unit|^2.
  float (*accumulate_unit)(const float* x, int64_t size, float scale, double* sum);
  // block [kTile][stride], of which `depth` columns -> panel [depth][kTile].
  void (*transpose)(const float* block, int64_t stride, int64_t depth, float* panel);
  // Tiles (s, 0), ..., (s, s) of the Gram matrix of rows in panels [depth][kTile] -> tiles [s + 1][kTile][kTile].
  void (*gram_strip)(const float* panels, int64_t depth, int64_t s, float* tiles);
  // product [kTile][kTile] = a^T b for a, b [depth][kTile].
  void (*cross)(const float* a, const float* b, int64_t depth, float* product);
  // product [kTile] = a^T b for a [depth], b [depth][kTile].
  void (*cross_row)(const float* a, const float* b, int64_t depth, float* product);
  // out += a tile for a, out [rows][kTile].
  void (*add_product)(const float* a, const float* tile, int64_t rows, float* out);
  // sigmoid of row[0, size) in place, size a multiple of kTile, and the sum of the first `count` in double.
  // -> were those finite?
  bool (*sigmoid)(float* row, int64_t size, int64_t count, double* sum);
  // row -= mean over [0, size). -> the largest magnitude that leaves.
  float (*centre)(float* row, int64_t size, float mean);
  // row -= mean, element by element. -> the largest magnitude that leaves.
  float (*centre_each)(float* row, int64_t size, const float* mean);
  // sum += row.
  void (*accumulate)(const float* row, int64_t size, double* sum);
  // The eigenpairs of rank first, ..., first + 7 (0 is the largest eigenvalue) of the tridiagonal matrix whose
  // off-diagonal is beside[1, n), beside[0] = 0. All eigenvalues lie in [low, high]. -> z [n][8], columns of length 1,
  // and values [8]. scratch: [2][n][8].
  void (*eight_eigenpairs)(
      const double* diagonal, const double* beside, int64_t n, double low, double high, int64_t first, double* scratch,
      double* z, double* values);
  EigenLoops<float> in_float;
  EigenLoops<double> in_double;

  template <class T>
  const EigenLoops<T>& eigen() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return in_float;
    } else {
      return in_double;
    }
  }
};

// Those for this processor.
const Simd& simd();

}  // namespace lvtp::cpu
