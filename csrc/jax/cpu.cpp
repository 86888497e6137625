// The selectors as XLA's custom calls on the CPU: buffers seen as tensors, without a copy, and torch's dispatcher
// called on them. lvtp/jax.py has checked the arguments when it traced them, and loads this library after torch and
// liblvtp.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../cpu/common.h"
#include "calls.h"

namespace lvtp::jax {

using torch::stable::detail::from;

static ScalarType dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F16: return ScalarType::Half;
    case ffi::DataType::BF16: return ScalarType::BFloat16;
    case ffi::DataType::F32: return ScalarType::Float;
    case ffi::DataType::F64: return ScalarType::Double;
    case ffi::DataType::S32: return ScalarType::Int;
    case ffi::DataType::S64: return ScalarType::Long;
    case ffi::DataType::PRED: return ScalarType::Bool;
    default: throw std::runtime_error("lvtp takes no array of this dtype");
  }
}

// [..., N, D] -> [B, N, D], or [..., N] -> [B, N].
static Tensor tensor(ffi::AnyBuffer buffer, size_t rank) {
  const auto dims = buffer.dimensions();
  std::vector<int64_t> shape(dims.end() - (rank - 1), dims.end()), strides(rank, 1);
  shape.insert(shape.begin(), images(buffer, rank - 1));
  for (size_t i = rank - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
  return torch::stable::from_blob(
      buffer.untyped_data(), shape, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      dtype_of(buffer.element_type()));
}

static OptionalTensor tensor(const std::optional<ffi::AnyBuffer>& buffer) {
  return buffer ? OptionalTensor(tensor(*buffer, 2)) : std::nullopt;
}

template <class Stack>
static void answer(const char* op, Stack stack, ffi::AnyBuffer out) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  const auto picks = ready(torch::stable::detail::to<Tensor>(stack[0]));
  const auto* from = data<int64_t>(picks);
  std::copy(from, from + picks.numel(), static_cast<int32_t*>(out.untyped_data()));
}

static ffi::Error id_selection(
    ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out, int64_t k, double gamma, int64_t given) {
  return guarded([&] {
    Arguments in(args, given);
    const auto features = tensor(in.next(), 3), importance = tensor(in.next(), 2);
    std::array<StableIValue, 5> stack{from(features), from(importance), from(k), from(gamma), from(tensor(in.maybe()))};
    answer("lvtp::id_selection", stack, *out);
  });
}

static ffi::Error prune_sid(
    ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out, int64_t n, int64_t reserved, std::string_view center,
    int64_t given) {
  return guarded([&] {
    Arguments in(args, given);
    const auto features = tensor(in.next(), 3);
    const auto importance = tensor(in.maybe());
    auto labels = tensor(in.maybe());
    const auto mask = tensor(in.maybe());
    if (labels) {  // their values here, too: the words of an error do not come through the stable ABI
      labels = ready(*labels, ScalarType::Long);
      cpu::check_labels("prune_sid", *labels, mask, std::max<int64_t>(1, std::min(n / 4, features.size(1))));
    }
    std::array<StableIValue, 7> stack{
        from(features), from(importance), from(n), from(reserved), from(std::string(center)), from(labels), from(mask)};
    answer("lvtp::prune_sid", stack, *out);
  });
}

}  // namespace lvtp::jax

LVTP_CUSTOM_CALL(lvtp_id_selection, lvtp::jax::id_selection, lvtp::jax::id_selection_arguments(xla::ffi::Ffi::Bind()));

LVTP_CUSTOM_CALL(lvtp_prune_sid, lvtp::jax::prune_sid, lvtp::jax::prune_sid_arguments(xla::ffi::Ffi::Bind()));
