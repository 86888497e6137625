// What CPU kernels and CUDA launchers share: tensors made ready to be walked with plain pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "memory.h"

// The boxed kernel of an operator, for `impl`.
#define LVTP_KERNEL(op, kernel)                                              \
  [](StableIValue* stack, uint64_t arguments, uint64_t results) {            \
    lvtp::naming(op, [&] { TORCH_BOX(kernel)(stack, arguments, results); }); \
  }

namespace lvtp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// make() gives so many elements on the device of `like`. Where torch has no memory for them, its error does not come
// through the stable ABI.
template <class Make>
Tensor allocated(const Tensor& like, int64_t elements, ScalarType dtype, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    const int64_t size = dtype == ScalarType::Byte || dtype == ScalarType::Bool       ? 1
                         : dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? 2
                         : dtype == ScalarType::Float                                 ? 4
                                                                                      : 8;
    throw OutOfMemory(
        elements * size, like.is_cpu() ? "out of memory" : "out of GPU memory, or a kernel before failed");
  }
}

// Not initialized, on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  return allocated(like, elements, dtype, [&] { return torch::stable::new_empty(like, shape, dtype); });
}

// Owning and contiguous, in `dtype`; the tensor itself where it already is.
inline Tensor ready(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype && t.is_contiguous()) return t;
  return allocated(t, t.numel(), dtype, [&] {
    const Tensor same = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
    return same.is_contiguous() ? same : torch::stable::contiguous(same);
  });
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
