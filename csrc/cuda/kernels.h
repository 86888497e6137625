// The boundary between launchers (csrc/cuda/<op>.cpp, which know torch) and kernels (<op>.cu, which do not).
// Every tensor is contiguous; `images` is at least 1, and no function waits for the device. `mask` may be null: every
// token is real then. A <name>_workspace tells how many bytes of scratch its function wants, aligned to 256.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lvtp::cuda {

enum class Dtype { kFloat, kHalf, kBFloat16 };

// features [images, n, d] -> out fp32 [images, n, n].
cudaError_t cosine_similarity(
    const void* features, Dtype dtype, int64_t images, int64_t n, int64_t d, float* out, cudaStream_t stream);

// features [images, n, d], mask [images, n] -> out fp32 [images].
int64_t mean_similarity_workspace(int64_t images, int64_t n, int64_t d);
cudaError_t mean_similarity(
    const void* features, Dtype dtype, const bool* mask, int64_t images, int64_t n, int64_t d, void* workspace,
    float* out, cudaStream_t stream);

// scores [images, n], similarity [images, n, n] of `dtype`, mask [images, n] -> picks [images, k]. Scores that are
// `raw` are importance, which is scaled first.
int64_t greedy_suppression_workspace(int64_t images, int64_t n);
cudaError_t greedy_suppression(
    const float* scores, bool raw, const void* similarity, Dtype dtype, const bool* mask, int64_t images, int64_t n,
    int64_t k, double gamma, void* workspace, int64_t* picks, cudaStream_t stream);

// scores, labels, mask [images, n], similarity [images, n, n] of `dtype` -> kept [images, n]. The threshold is
// thresholds[image], or `threshold` where that pointer is null.
int64_t cluster_nms_workspace(int64_t images, int64_t n);
cudaError_t cluster_nms(
    const float* scores, const int64_t* labels, const void* similarity, Dtype dtype, const float* thresholds,
    float threshold, const bool* mask, int64_t images, int64_t n, void* workspace, bool* kept, cudaStream_t stream);

// features [images, n, d], mask [images, n] -> labels, loadings [images, n].
int64_t psca_workspace(int64_t images, int64_t n, int64_t d, int64_t groups);
cudaError_t psca(
    const void* features, Dtype dtype, const bool* mask, int64_t images, int64_t n, int64_t d, int64_t groups,
    bool over_features, void* workspace, int64_t* labels, float* loadings, cudaStream_t stream);

// features [images, n, d], importance, mask [images, n] -> picks [images, k].
int64_t id_selection_workspace(int64_t images, int64_t n);
cudaError_t id_selection(
    const void* features, Dtype dtype, const float* importance, const bool* mask, int64_t images, int64_t n, int64_t d,
    int64_t k, double gamma, void* workspace, int64_t* picks, cudaStream_t stream);
// The same, for many tokens: without the similarity matrix.
int64_t id_selection_in_rounds_workspace(int64_t images, int64_t n);
cudaError_t id_selection_in_rounds(
    const void* features, Dtype dtype, const float* importance, const bool* mask, int64_t images, int64_t n, int64_t d,
    int64_t k, double gamma, void* workspace, int64_t* picks, cudaStream_t stream);

// features [images, n, d], importance (null: the loadings), labels (null: those of psca), mask [images, n]
// -> picks [images, min(budget - reserved, n)].
int64_t prune_sid_workspace(int64_t images, int64_t n, int64_t d, int64_t groups, bool with_psca);
cudaError_t prune_sid(
    const void* features, Dtype dtype, const float* importance, const int64_t* labels, const bool* mask, int64_t images,
    int64_t n, int64_t d, int64_t groups, int64_t budget, int64_t reserved, bool over_features, void* workspace,
    int64_t* picks, cudaStream_t stream);

// features [images, n, d] -> budget [images], adding up to total.
int64_t dynamic_budget_workspace(int64_t images, int64_t n, int64_t d);
cudaError_t dynamic_budget(
    const void* features, Dtype dtype, int64_t images, int64_t n, int64_t d, int64_t total, int64_t minimum,
    void* workspace, int64_t* budget, cudaStream_t stream);

}  // namespace lvtp::cuda
