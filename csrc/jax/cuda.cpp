// The selectors as XLA's custom calls on CUDA devices: the kernels' own host functions on XLA's stream, with its
// scratch memory. No torch here. lvtp/jax.py checks the arguments when it traces them, passes importance in fp32, and
// passes and takes an int64 as two int32s, because JAX's arrays hold no int64 by default; what is checked again is what
// a kernel would read or write memory by.

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string_view>

#include "../cuda/kernels.h"
#include "calls.h"

namespace lvtp::jax {

template <class Takes, class Got>
static void require(bool ok, const char* argument, const Takes& takes, const Got& got) {
  if (ok) return;
  std::ostringstream message;
  message << "lvtp: " << argument << " must be " << takes << ", got " << got;
  throw std::runtime_error(message.str());
}

static const void* data(ffi::AnyBuffer buffer, ffi::DataType type, int64_t count, const char* argument) {
  require(buffer.element_type() == type, argument, type, buffer.element_type());
  const auto found = static_cast<int64_t>(buffer.element_count());
  require(found == count, argument, std::to_string(count) + " elements", found);
  return buffer.untyped_data();
}

static const bool* mask_or_null(const std::optional<ffi::AnyBuffer>& mask, int64_t count) {
  return mask ? static_cast<const bool*>(data(*mask, ffi::DataType::PRED, count, "mask")) : nullptr;
}

// Features [..., n, d], and their importance, which PruneSID can do without.
struct Features {
  const void* values;
  cuda::Dtype dtype;
  int64_t images, n, d;

  explicit Features(ffi::AnyBuffer buffer) : values(buffer.untyped_data()) {
    require(buffer.dimensions().size() >= 3, "features", "of three dimensions", buffer.dimensions().size());
    images = jax::images(buffer, 2);
    n = buffer.dimensions().end()[-2];
    d = buffer.dimensions().end()[-1];
    require(n >= 1 && d >= 1, "features", "of at least one token and one feature", n * d);
    switch (buffer.element_type()) {
      case ffi::DataType::F32: dtype = cuda::Dtype::kFloat; break;
      case ffi::DataType::F16: dtype = cuda::Dtype::kHalf; break;
      case ffi::DataType::BF16: dtype = cuda::Dtype::kBFloat16; break;
      default: require(false, "features", "F32, F16 or BF16", buffer.element_type());
    }
  }
  const float* importance(ffi::AnyBuffer buffer) const {
    return static_cast<const float*>(data(buffer, ffi::DataType::F32, images * n, "importance"));
  }
};

// `wanted` int64s an image.
static int64_t* picks(ffi::Result<ffi::AnyBuffer> out, const Features& x, int64_t wanted) {
  const void* const memory = data(*out, ffi::DataType::S32, 2 * x.images * wanted, "the answer");
  return static_cast<int64_t*>(const_cast<void*>(memory));
}

static void* allocate(ffi::ScratchAllocator& scratch, int64_t bytes) {
  constexpr uintptr_t kWanted = 256, kMost = 16;  // XLA refuses to promise more than kMost
  const auto memory = scratch.Allocate(static_cast<size_t>(bytes) + kWanted - kMost, kMost);
  if (!memory) throw std::runtime_error("lvtp: no " + std::to_string(bytes) + " bytes of scratch memory on the device");
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(*memory) + kWanted - 1) / kWanted * kWanted);
}

static void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("lvtp: CUDA says: ") + cudaGetErrorString(error));
}

static ffi::Error id_selection(
    cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out,
    int64_t k, double gamma, int64_t given) {
  return guarded([&] {
    Arguments in(args, given);
    const Features x(in.next());
    const float* const importance = x.importance(in.next());
    const bool* const mask = mask_or_null(in.maybe(), x.images * x.n);
    require(1 <= k && k <= x.n, "k", "in [1, " + std::to_string(x.n) + "]", k);
    int64_t* const to = picks(out, x, k);
    if (x.images == 0) return;
    void* const workspace = allocate(scratch, cuda::id_selection_workspace(x.images, x.n));
    check(cuda::id_selection(x.values, x.dtype, importance, mask, x.images, x.n, x.d, k, gamma, workspace, to, stream));
  });
}

static ffi::Error prune_sid(
    cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::RemainingArgs args, ffi::Result<ffi::AnyBuffer> out,
    int64_t n, int64_t reserved, std::string_view center, int64_t given) {
  return guarded([&] {
    Arguments in(args, given);
    const Features x(in.next());
    const auto importance = in.maybe(), labels = in.maybe();
    const bool* const mask = mask_or_null(in.maybe(), x.images * x.n);
    const float* const scores = importance ? x.importance(*importance) : nullptr;
    const void* const group = labels ? data(*labels, ffi::DataType::S32, 2 * x.images * x.n, "labels") : nullptr;
    require(scores || !group, "importance", "given when labels are", "none");
    require(n >= 1, "n", "at least 1", n);
    require(0 <= reserved && reserved < n, "reserved", "in [0, " + std::to_string(n - 1) + "]", reserved);
    int64_t* const to = picks(out, x, std::min(n - reserved, x.n));
    if (x.images == 0) return;
    const int64_t groups = std::max<int64_t>(1, std::min(n / 4, x.n));
    void* const workspace = allocate(scratch, cuda::prune_sid_workspace(x.images, x.n, x.d, groups, !group));
    check(
        cuda::prune_sid(
            x.values, x.dtype, scores, static_cast<const int64_t*>(group), mask, x.images, x.n, x.d, groups, n,
            reserved, center == "feature", workspace, to, stream));
  });
}

}  // namespace lvtp::jax

LVTP_CUSTOM_CALL(
    lvtp_id_selection_cuda, lvtp::jax::id_selection,
    lvtp::jax::id_selection_arguments(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().Ctx<xla::ffi::ScratchAllocator>()));

LVTP_CUSTOM_CALL(
    lvtp_prune_sid_cuda, lvtp::jax::prune_sid,
    lvtp::jax::prune_sid_arguments(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().Ctx<xla::ffi::ScratchAllocator>()));
