// Gram matrices: x x^T of the rows of x, of which only the lower half is computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "../memory.h"
#include "simd.h"
#include "team.h"

namespace lvtp::cpu {

inline int64_t strips(int64_t rows) { return (rows + kTile - 1) / kTile; }

// Memory for vector code: not initialized, and a vector never straddles two cache lines, which costs half the
// bandwidth. By plain new: what it frees it hands out again, where aligned memory of this size would come from the
// system each time.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) {
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T)) + kAlign;
    memory_.reset(new (std::nothrow) char[bytes]);
    if (!memory_) throw OutOfMemory(bytes);
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    first_ = reinterpret_cast<T*>((address + kAlign - 1) / kAlign * kAlign);
  }
  T* get() const { return first_; }
  T& operator[](int64_t i) const { return first_[i]; }

 private:
  static constexpr int64_t kAlign = 64;
  std::unique_ptr<char[]> memory_;
  T* first_;
};
template <class T>
Array<T> zeros(int64_t size) {
  Array<T> out(size);
  std::fill_n(out.get(), size, T(0));
  return out;
}

// The rows of a matrix [rows, depth] in strips of kTile: strip s is [depth][kTile], rows beyond the last are zero.
struct Panels {
  int64_t rows, depth;
  Array<float> values;

  Panels(int64_t rows, int64_t depth) : rows(rows), depth(depth), values(strips(rows) * depth * kTile) {}
  float* strip(int64_t s) const { return values.get() + s * depth * kTile; }
};

// A symmetric matrix as its tiles on and below the diagonal, tile row by tile row, so that a walk through it is one
// stream of memory. Diagonal tiles are whole; rows and columns that only fill the last tile are zero.
template <class T>
struct Tiles {
  int64_t rows, size;
  Array<T> values;

  explicit Tiles(int64_t rows) : rows(rows), size(offset(strips(rows))), values(size) {}
  static int64_t offset(int64_t tile_row) { return tile_row * (tile_row + 1) / 2 * kTile * kTile; }
  T* strip(int64_t tile_row) const { return values.get() + offset(tile_row); }
};

inline Tiles<float> gram(Team& team, const Panels& panels) {
  Tiles<float> out(panels.rows);
  const int64_t tile_rows = strips(panels.rows);
  team.run(tile_rows, [&](int64_t piece) {
    const int64_t s = tile_rows - 1 - piece;  // the longest first
    simd().gram_strip(panels.values.get(), panels.depth, s, out.strip(s));
  });
  return out;
}

}  // namespace lvtp::cpu
