// Two ways, by shape. Up to kGramTokens tokens: the similarity matrix, then one block's loop over its rows. Beyond,
// where the matrix outgrows the caches and then the memory: rounds (rounds.cu).
#include "kernels.h"
#include "launch.h"

namespace lvtp::cuda {

constexpr int64_t kGramTokens = 4096;

int64_t id_selection_workspace(int64_t images, int64_t n) {
  constexpr int64_t kFloat = sizeof(float);
  return n <= kGramTokens ? images * n * n * kFloat : id_selection_in_rounds_workspace(images, n);
}

cudaError_t id_selection(
    const void* features, Dtype dtype, const float* importance, const bool* mask, int64_t images, int64_t n, int64_t d,
    int64_t k, double gamma, void* workspace, int64_t* picks, cudaStream_t stream) {
  if (n > kGramTokens) {
    return id_selection_in_rounds(features, dtype, importance, mask, images, n, d, k, gamma, workspace, picks, stream);
  }
  auto* similarity = static_cast<float*>(workspace);
  LVTP_TRY(cosine_similarity(features, dtype, images, n, d, similarity, stream));
  return greedy_suppression(
      importance, true, similarity, Dtype::kFloat, mask, images, n, k, gamma, nullptr, picks, stream);
}

}  // namespace lvtp::cuda
