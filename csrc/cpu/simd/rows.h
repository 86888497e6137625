// What is done to single rows of features: widening, the sigmoid, centring, sums.
#pragma once

#include "vector.h"

namespace lvtp::cpu::LVTP_ISA {

inline void from_half(const uint16_t* x, int64_t size, float* out) {
  int64_t c = 0;
#ifdef __F16C__
  for (; c + 8 <= size; c += 8) {
    const Vector<float, 32> wide = __builtin_ia32_vcvtph2ps256(load<Vector<short, 16>>(x + c));
    store(out + c, wide);
  }
#endif
  for (; c < size; ++c) {
    const uint32_t sign = static_cast<uint32_t>(x[c] & 0x8000) << 16, rest = x[c] & 0x7fff;
    const uint32_t shifted = rest << 13;
    float value;
    if (rest >= 0x7c00) {  // Inf and NaN
      const uint32_t bits = shifted | 0x7f800000;
      __builtin_memcpy(&value, &bits, 4);
    } else {  // rebias the exponent by a multiplication, which is right for denormal numbers too
      __builtin_memcpy(&value, &shifted, 4);
      value *= 0x1p112f;
    }
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    bits |= sign;
    __builtin_memcpy(out + c, &bits, 4);
  }
}

inline void from_bfloat16(const uint16_t* x, int64_t size, float* out) {
  for (int64_t c = 0; c < size; ++c) {
    const uint32_t bits = static_cast<uint32_t>(x[c]) << 16;
    __builtin_memcpy(out + c, &bits, 4);
  }
}

inline float accumulate_unit(const float* x, int64_t size, float scale, double* sum) {
  Vector<float> square = {};
  int64_t c = 0;
  for (; c + kWidth<float> <= size; c += kWidth<float>) {
    const auto unit = load<Vector<float>>(x + c) * scale;
    square += unit * unit;
    using Doubles = Vector<double, 2 * LVTP_BYTES>;
    store(sum + c, load<Doubles>(sum + c) + __builtin_convertvector(unit, Doubles));
  }
  float rest = 0.0f;
  for (; c < size; ++c) {
    const float unit = x[c] * scale;
    rest += unit * unit;
    sum[c] += unit;
  }
  return total<float>(square) + rest;
}

inline bool sigmoid(float* row, int64_t size, int64_t count, double* sum) {
  using V = Vector<float>;
  using Ints = Vector<int32_t>;
  Ints wrong = {};
  for (int64_t c = 0; c < size; c += kWidth<float>) {
    const V v = load<V>(row + c);
    wrong |= v - v != 0.0f;
    // exp(-|v|) = 2^n exp(r), |r| <= ln(2) / 2, by Cephes' polynomial; below exp(-87) it counts as that.
    const V a = v < 0.0f ? v : -v, x = a > -87.0f ? a : V{} - 87.0f;
    constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
    const V shifted = x * 1.44269504f + kRound, n = shifted - kRound;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const V mantissa = p * (r * r) + r + 1.0f;
    const Ints power = (reinterpret_cast<const Ints&>(shifted) << 23) + (127 << 23);
    const V t = mantissa * reinterpret_cast<const V&>(power), s = 1.0f / (1.0f + t);
    store(row + c, v < 0.0f ? t * s : s);
  }
  Vector<double, 64> lanes = {};
  int64_t c = 0;
  for (; c + 8 <= count; c += 8)
    lanes += __builtin_convertvector((load<Vector<float, 32>>(row + c)), Vector<double, 64>);
  double all = 0.0;
  for (; c < count; ++c) all += row[c];
  for (int lane = 0; lane < 8; ++lane) all += lanes[lane];
  *sum = all;
  for (int64_t lane = 0; lane < kWidth<float>; ++lane) {
    if (wrong[lane]) return false;
  }
  return true;
}

// row -= mean_of(c), element by element. -> the largest magnitude that leaves: of floats that are not negative, the
// largest has the largest bits, and maxima of integers become vectors.
template <class MeanOf>
inline float centre_by(float* row, int64_t size, const MeanOf& mean_of) {
  uint32_t largest = 0;
  for (int64_t c = 0; c < size; ++c) {
    row[c] -= mean_of(c);
    uint32_t bits;
    __builtin_memcpy(&bits, row + c, sizeof(bits));
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, sizeof(magnitude));
  return magnitude;
}

inline float centre(float* row, int64_t size, float mean) {
  return centre_by(row, size, [=](int64_t) { return mean; });
}

inline float centre_each(float* row, int64_t size, const float* mean) {
  return centre_by(row, size, [=](int64_t c) { return mean[c]; });
}

inline void accumulate(const float* row, int64_t size, double* sum) {
  for (int64_t c = 0; c < size; ++c) sum[c] += row[c];
}

}  // namespace lvtp::cpu::LVTP_ISA
