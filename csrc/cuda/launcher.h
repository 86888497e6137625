// What the launchers share: dtypes, the current stream, workspace.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../tensors.h"
#include "kernels.h"

namespace lvtp::cuda {

using torch::stable::accelerator::DeviceGuard;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: return Dtype::kFloat;
  }
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A type the kernels read as it is; float64, which they do not, becomes fp32.
inline Tensor ready_floats(const Tensor& t) {
  return ready(t, t.scalar_type() == ScalarType::Double ? ScalarType::Float : t.scalar_type());
}

inline const bool* data_or_null(const OptionalTensor& t) { return t ? data<bool>(*t) : nullptr; }

inline Tensor workspace(const Tensor& like, int64_t bytes) { return empty(like, {bytes}, ScalarType::Byte); }

}  // namespace lvtp::cuda
