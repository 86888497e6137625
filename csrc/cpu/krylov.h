// The leading eigenvectors of A A^T by block Lanczos iteration: a few products with A, where they are enough.
#pragma once

#include <cstdint>
#include <optional>

#include "eigen.h"

namespace lvtp::cpu {

// The eigenvectors of A A^T with the largest eigenvalues, for A in panels, or nothing where they do not converge within
// `most` dimensions: the direct way is cheaper then. Deterministic for any number of threads.
std::optional<Eigenvectors<float>> leading_eigenvectors_of_gram(
    Team& team, const Panels& a, int64_t count, int64_t most);

}  // namespace lvtp::cpu
