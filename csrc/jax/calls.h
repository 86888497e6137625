// What the custom calls share on every device: their arguments in order, and errors that XLA reports.
#pragma once

#include <xla/ffi/api/ffi.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <numeric>
#include <optional>
#include <utility>

namespace lvtp::jax {

namespace ffi = xla::ffi;

// Of [..., N, D] or [..., N] the product of what stands before the last `kept` dimensions: vmap puts more in front.
inline int64_t images(ffi::AnyBuffer buffer, size_t kept) {
  const auto dims = buffer.dimensions();
  return std::accumulate(dims.begin(), dims.end() - kept, int64_t{1}, std::multiplies<>());
}

// Arguments in order; `given` says which of the optional ones are there.
class Arguments {
 public:
  Arguments(ffi::RemainingArgs all, int64_t given) : all_(all), given_(given) {}
  ffi::AnyBuffer next() { return all_.get<ffi::AnyBuffer>(index_++).value(); }
  std::optional<ffi::AnyBuffer> maybe() {
    const bool here = given_ & 1;
    given_ >>= 1;
    return here ? std::optional(next()) : std::nullopt;
  }

 private:
  ffi::RemainingArgs all_;
  int64_t given_;
  size_t index_ = 0;
};

template <class F>
ffi::Error guarded(const F& f) {
  try {
    f();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  }
}

// What follows the context in each call, on either platform.
template <class Binding>
auto id_selection_arguments(Binding&& binding) {
  return std::move(binding)
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<int64_t>("k")
      .template Attr<double>("gamma")
      .template Attr<int64_t>("given");
}

template <class Binding>
auto prune_sid_arguments(Binding&& binding) {
  return std::move(binding)
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<int64_t>("n")
      .template Attr<int64_t>("reserved")
      .template Attr<std::string_view>("center")
      .template Attr<int64_t>("given");
}

}  // namespace lvtp::jax

// Looked up by name.
#define LVTP_CUSTOM_CALL(symbol, function, binding)                                            \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* symbol(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function, binding)
