// Step 8 of PruneSID (arXiv 2603.09480; ALGORITHMS: "Information-aware budget"): an image's share of a total.
#pragma once

#include <cmath>

#include "portable.h"

namespace lvtp {

// Shares in proportion to phi = 1 - rho, each between `minimum` and `most`: exp2(log_lambda) phi, clamped. Their sum
// rises with log_lambda, the largest of which that keeps it within the total is bisected from [kLow, kHigh] down to
// rounding.
struct Shares {
  double minimum, most;
  static constexpr double kLow = -64.0, kHigh = 192.0;
  static constexpr int kSteps = 64;

  // An image that repeats itself entirely takes part with so little that no other share changes: such images share
  // equally where nobody has any phi, and take what is left where all others are full.
  LVTP_HD static double phi(float rho) { return fmax(1.0 - static_cast<double>(rho), 0x1p-100); }
  LVTP_HD double of(double phi, double log_lambda) const { return fmin(fmax(exp2(log_lambda) * phi, minimum), most); }
  // What rounding a share down leaves; an image that is full wants no more.
  LVTP_HD double remainder(double share) const { return floor(share) < most ? share - floor(share) : -1.0; }
};

}  // namespace lvtp
