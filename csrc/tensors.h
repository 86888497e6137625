// What CPU kernels and CUDA launchers share: tensors made ready to be walked with plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace lvtp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Owning and contiguous, in `dtype`; the tensor itself where it already is.
inline Tensor ready(const Tensor& t, ScalarType dtype) {
  const Tensor same = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}
inline Tensor ready(const Tensor& t) { return ready(t, t.scalar_type()); }
inline OptionalTensor ready(const OptionalTensor& t) { return t ? OptionalTensor(ready(*t)) : t; }

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* data_out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace lvtp
