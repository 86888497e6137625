// Stands in for the header of this name: the type, and its conversions, rounding to nearest even.
#pragma once
#include "../simt.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                                     : ldexpf(static_cast<float>(fraction + 1024), exponent - 25);
  return h.bits >> 15 ? -size : size;
}

inline __half __float2half(float v) {
  const auto sign = static_cast<uint16_t>(__float_as_uint(v) >> 16 & 0x8000);
  const float size = fabsf(v);
  if (!(size < INFINITY)) return {static_cast<uint16_t>(sign | (v != v ? 0x7e00 : 0x7c00))};
  int exponent;
  frexpf(size, &exponent);                                // size < 2^exponent
  const int unit = exponent > -13 ? exponent - 11 : -24;  // the weight of the last bit
  auto fraction = static_cast<int>(rintf(ldexpf(size, -unit)));
  const int bits = unit == -24 ? fraction : fraction + ((unit + 24) << 10);  // a carry raises the exponent, as it must
  return {static_cast<uint16_t>(sign | (bits < 0x7c00 ? bits : 0x7c00))};
}
