// What the launchers share: tensors made ready for the kernels, the current stream, workspace, errors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace lvtp::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: return Dtype::kFloat;
  }
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Contiguous, in `dtype`; the tensor itself where it already is.
inline Tensor ready(const Tensor& t, ScalarType dtype) {
  const Tensor same = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}
inline Tensor ready(const Tensor& t) { return ready(t, t.scalar_type()); }
inline OptionalTensor ready(const OptionalTensor& t) { return t ? OptionalTensor(ready(*t)) : t; }

// A type the kernels read as it is; float64, which they do not, becomes fp32.
inline Tensor ready_floats(const Tensor& t) {
  return ready(t, t.scalar_type() == ScalarType::Double ? ScalarType::Float : t.scalar_type());
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
inline const bool* data_or_null(const OptionalTensor& t) { return t ? data<bool>(*t) : nullptr; }
template <class T>
T* data_out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace lvtp::cuda
