// Argument checks, once: the C++ twin of lvtp/checks.py, same order, same words (tests/test_bad_input.py holds
// them together). They read metadata only, so none of them can wait for a GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace lvtp::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Takes, class Got>
void require(bool ok, const char* op, const char* argument, const Takes& takes, const Got& got) {
  if (ok) return;
  std::ostringstream message;
  message << op << ": " << argument << " must be " << takes << ", got " << got;
  throw std::runtime_error(message.str());
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << "]";
  return out.str();
}

// As Python prints it: "float32", "int64".
inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another device";
}

inline bool is_floating(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16: return true;
    default: return false;
  }
}

inline void features(const char* op, const Tensor& x) {
  const auto shape = shape_text(x.sizes());
  require(x.dim() == 3, op, "features", "a [B, N, D] tensor", "shape " + shape);
  const auto dtype = x.scalar_type();
  require(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op, "features",
      "float32, float16 or bfloat16", dtype_text(dtype));
  require(x.size(1) >= 1, op, "features", "a tensor of at least one token (N >= 1)", shape);
  require(x.size(2) >= 1, op, "features", "a tensor of at least one feature (D >= 1)", shape);
}

// [B, N] of any floating dtype, when it is the argument that defines B and N.
inline void scores(const char* op, const char* name, const Tensor& t) {
  const auto shape = shape_text(t.sizes());
  require(t.dim() == 2, op, name, "a [B, N] tensor", "shape " + shape);
  require(is_floating(t), op, name, "a floating-point tensor", dtype_text(t.scalar_type()));
  require(t.size(1) >= 1, op, name, "a tensor of at least one token (N >= 1)", shape);
}

enum class Kind { kFloat, kInt64, kBool };

// A tensor whose shape and device follow another's.
inline void companion(
    const char* op, const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape,
    Kind kind) {
  const std::vector<int64_t> wanted(shape);
  const auto sizes = t.sizes();
  bool same = sizes.size() == wanted.size();
  for (size_t i = 0; same && i < wanted.size(); ++i) same = sizes[i] == wanted[i];
  require(same, op, name, "of shape " + shape_text(wanted), shape_text(sizes));
  const auto dtype = dtype_text(t.scalar_type());
  if (kind == Kind::kFloat) require(is_floating(t), op, name, "a floating-point tensor", dtype);
  if (kind == Kind::kInt64) require(dtype == "int64", op, name, "int64", dtype);
  if (kind == Kind::kBool) require(dtype == "bool", op, name, "bool", dtype);
  require(t.device() == like.device(), op, name, "on " + device_text(like), device_text(t));
}

// mask [B, N] bool (false = padding) beside a [B, N, ...] tensor.
inline void mask(const char* op, const OptionalTensor& t, const Tensor& like) {
  if (t) companion(op, "mask", *t, like, {like.size(0), like.size(1)}, Kind::kBool);
}

inline void at_least(const char* op, const char* name, int64_t value, int64_t low) {
  require(value >= low, op, name, "at least " + std::to_string(low), value);
}

inline void in_range(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
  require(
      value >= low && value <= high, op, name, "in [" + std::to_string(low) + ", " + std::to_string(high) + "]", value);
}

inline void gamma(const char* op, double value) {
  require(std::isfinite(value) && value >= 0, op, "gamma", "finite and at least 0", value);
}

inline void center(const char* op, const std::string& value) {
  require(value == "feature" || value == "token", op, "center", "\"feature\" or \"token\"", "\"" + value + "\"");
}

// One function an operator, called by its kernels on every device.

inline void cosine_similarity(const Tensor& x) { features("cosine_similarity", x); }

inline void mean_similarity(const Tensor& x, const OptionalTensor& m) {
  features("mean_similarity", x);
  mask("mean_similarity", m, x);
}

inline void greedy_suppression(
    const Tensor& s, const Tensor& similarity, int64_t k, double g, const OptionalTensor& m) {
  const char* op = "greedy_suppression";
  scores(op, "scores", s);
  companion(op, "similarity", similarity, s, {s.size(0), s.size(1), s.size(1)}, Kind::kFloat);
  in_range(op, "k", k, 1, s.size(1));
  gamma(op, g);
  mask(op, m, s);
}

inline void cluster_nms(
    const Tensor& s, const Tensor& labels, const Tensor& similarity, const OptionalTensor& threshold,
    const OptionalTensor& m) {
  const char* op = "cluster_nms";
  scores(op, "scores", s);
  companion(op, "labels", labels, s, {s.size(0), s.size(1)}, Kind::kInt64);
  companion(op, "similarity", similarity, s, {s.size(0), s.size(1), s.size(1)}, Kind::kFloat);
  if (threshold) companion(op, "threshold", *threshold, s, {s.size(0)}, Kind::kFloat);
  mask(op, m, s);
}

inline void psca(const Tensor& x, int64_t groups, const std::string& c) {
  features("psca", x);
  in_range("psca", "groups", groups, 1, x.size(1));
  center("psca", c);
}

inline void id_selection(const Tensor& x, const Tensor& importance, int64_t k, double g, const OptionalTensor& m) {
  const char* op = "id_selection";
  features(op, x);
  companion(op, "importance", importance, x, {x.size(0), x.size(1)}, Kind::kFloat);
  in_range(op, "k", k, 1, x.size(1));
  gamma(op, g);
  mask(op, m, x);
}

inline void prune_sid(
    const Tensor& x, const OptionalTensor& importance, int64_t n, int64_t reserved, const std::string& c,
    const OptionalTensor& labels, const OptionalTensor& m) {
  const char* op = "prune_sid";
  features(op, x);
  if (importance) companion(op, "importance", *importance, x, {x.size(0), x.size(1)}, Kind::kFloat);
  at_least(op, "n", n, 1);
  in_range(op, "reserved", reserved, 0, n - 1);
  center(op, c);
  if (labels) {
    companion(op, "labels", *labels, x, {x.size(0), x.size(1)}, Kind::kInt64);
    require(importance.has_value(), op, "importance", "given when labels are", "None");
  }
  mask(op, m, x);
}

inline void dynamic_budget(const Tensor& x, int64_t total, int64_t minimum) {
  const char* op = "dynamic_budget";
  features(op, x);
  in_range(op, "minimum", minimum, 0, x.size(1));
  in_range(op, "total", total, x.size(0) * minimum, x.size(0) * x.size(1));
}

}  // namespace lvtp::checks
