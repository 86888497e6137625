#include "common.h"

namespace lvtp::cpu {

// [B, N, D] -> fp32 [B, N, N].
Tensor cosine_similarity(const Tensor& features) { return gram(unit_features(features)); }

static Tensor cosine_similarity_op(Tensor features) {
  checks::cosine_similarity(features);
  return cosine_similarity(features);
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) { m.impl("cosine_similarity", TORCH_BOX(&lvtp::cpu::cosine_similarity_op)); }
