// Every operator's schema, once. Kernels register themselves: csrc/cpu/<op>.cpp, csrc/cuda/<op>.cpp,
// and from Python (lvtp/ops.py) the fake kernels and the reference for devices that have no kernel of their own.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lvtp, m) {
  m.def("cosine_similarity(Tensor features) -> Tensor");
  m.def("mean_similarity(Tensor features, Tensor? mask=None) -> Tensor");
  m.def(
      "greedy_suppression(Tensor scores, Tensor similarity, SymInt k, float gamma=20.0, Tensor? mask=None) "
      "-> Tensor");
  m.def(
      "cluster_nms(Tensor scores, Tensor labels, Tensor similarity, float threshold, Tensor? mask=None) "
      "-> Tensor");
  m.def(
      "cluster_nms.per_image(Tensor scores, Tensor labels, Tensor similarity, Tensor threshold, "
      "Tensor? mask=None) -> Tensor");
  m.def("psca(Tensor features, SymInt groups, str center=\"feature\") -> (Tensor labels, Tensor loadings)");
  m.def(
      "id_selection(Tensor features, Tensor importance, SymInt k, float gamma=20.0, Tensor? mask=None) "
      "-> Tensor");
  m.def(
      "prune_sid(Tensor features, Tensor? importance, SymInt n, SymInt reserved=0, str center=\"feature\", "
      "Tensor? labels=None, Tensor? mask=None) -> Tensor");
  m.def("dynamic_budget(Tensor features, SymInt total, SymInt minimum=1) -> Tensor");
}
