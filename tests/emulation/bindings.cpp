// The kernels' host functions (csrc/cuda/kernels.h) and the probes for Python. Arrays come as addresses; kernels.py has
// the functions that take tensors.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/eigen.h"
#include "../../csrc/cuda/kernels.h"
#include "probes.h"

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

lvtp::cuda::Dtype dtype(const std::string& name) {
  return name == "float16"    ? lvtp::cuda::Dtype::kHalf
         : name == "bfloat16" ? lvtp::cuda::Dtype::kBFloat16
                              : lvtp::cuda::Dtype::kFloat;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("cudaError_t " + std::to_string(error));
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  using namespace lvtp::cuda;
  m.def("set_seed", &simt::set_seed);
  m.def("remove_barrier", &simt::remove_barrier);
  m.def("barriers", &simt::barriers);
  m.def("from_half", [](uint16_t bits) { return __half2float({bits}); });
  m.def("to_half", [](float v) { return __float2half(v).bits; });
  m.def("from_bfloat16", [](uint16_t bits) { return __bfloat162float({bits}); });
  m.def("to_bfloat16", [](float v) { return __float2bfloat16(v).bits; });
  m.def("probe", [](const std::string& name, Address out) { simt_probe(name, at<int>(out)); });

  m.def("mean_similarity_workspace", &mean_similarity_workspace);
  m.def("greedy_suppression_workspace", &greedy_suppression_workspace);
  m.def("cluster_nms_workspace", &cluster_nms_workspace);
  m.def("eigen_matrix_size", &eigen_matrix_size);
  m.def("leading_eigenvectors_workspace", &leading_eigenvectors_workspace);
  m.def("id_selection_workspace", &id_selection_workspace);
  m.def("id_selection_in_rounds_workspace", &id_selection_in_rounds_workspace);
  m.def("psca_workspace", &psca_workspace);
  m.def("prune_sid_workspace", &prune_sid_workspace);
  m.def("dynamic_budget_workspace", &dynamic_budget_workspace);

  m.def("cosine_similarity", [](Address x, const std::string& type, int64_t b, int64_t n, int64_t d, Address out) {
    check(cosine_similarity(at<void>(x), dtype(type), b, n, d, at<float>(out), nullptr));
  });
  m.def(
      "mean_similarity", [](Address x, const std::string& type, Address mask, int64_t b, int64_t n, int64_t d,
                            Address workspace, Address out) {
        check(mean_similarity(
            at<void>(x), dtype(type), at<bool>(mask), b, n, d, at<void>(workspace), at<float>(out), nullptr));
      });
  m.def(
      "greedy_suppression", [](Address scores, Address similarity, const std::string& type, Address mask, int64_t b,
                               int64_t n, int64_t k, double gamma, Address workspace, Address picks) {
        check(greedy_suppression(
            at<float>(scores), false, at<void>(similarity), dtype(type), at<bool>(mask), b, n, k, gamma,
            at<void>(workspace), at<int64_t>(picks), nullptr));
      });
  m.def(
      "cluster_nms", [](Address scores, Address labels, Address similarity, const std::string& type, Address thresholds,
                        float threshold, Address mask, int64_t b, int64_t n, Address workspace, Address kept) {
        check(cluster_nms(
            at<float>(scores), at<int64_t>(labels), at<void>(similarity), dtype(type), at<float>(thresholds), threshold,
            at<bool>(mask), b, n, at<void>(workspace), at<bool>(kept), nullptr));
      });
  const auto selects = [&m](const char* name, auto* select) {
    m.def(
        name, [select](
                  Address x, const std::string& type, Address importance, Address mask, int64_t b, int64_t n, int64_t d,
                  int64_t k, double gamma, Address workspace, Address picks) {
          check(select(
              at<void>(x), dtype(type), at<float>(importance), at<bool>(mask), b, n, d, k, gamma, at<void>(workspace),
              at<int64_t>(picks), nullptr));
        });
  };
  selects("id_selection", &id_selection);
  selects("id_selection_in_rounds", &id_selection_in_rounds);
  m.def(
      "psca", [](Address x, const std::string& type, Address mask, int64_t b, int64_t n, int64_t d, int64_t groups,
                 bool over_features, Address workspace, Address labels, Address loadings) {
        check(psca(
            at<void>(x), dtype(type), at<bool>(mask), b, n, d, groups, over_features, at<void>(workspace),
            at<int64_t>(labels), at<float>(loadings), nullptr));
      });
  m.def(
      "leading_eigenvectors",
      [](Address matrices, int64_t b, int64_t n, int64_t count, Address workspace, Address vectors) {
        check(
            leading_eigenvectors(at<double>(matrices), b, n, count, at<void>(workspace), at<double>(vectors), nullptr));
      });
  m.def(
      "prune_sid", [](Address x, const std::string& type, Address importance, Address labels, Address mask, int64_t b,
                      int64_t n, int64_t d, int64_t groups, int64_t budget, int64_t reserved, bool over_features,
                      Address workspace, Address picks) {
        check(prune_sid(
            at<void>(x), dtype(type), at<float>(importance), at<int64_t>(labels), at<bool>(mask), b, n, d, groups,
            budget, reserved, over_features, at<void>(workspace), at<int64_t>(picks), nullptr));
      });
  m.def(
      "dynamic_budget", [](Address x, const std::string& type, int64_t b, int64_t n, int64_t d, int64_t total,
                           int64_t minimum, Address workspace, Address budget) {
        check(dynamic_budget(
            at<void>(x), dtype(type), b, n, d, total, minimum, at<void>(workspace), at<int64_t>(budget), nullptr));
      });
}
