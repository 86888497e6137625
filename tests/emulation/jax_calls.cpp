// The custom calls for CUDA devices (csrc/jax/cuda.cpp) for JAX's CPU: its call frames as they come, but the stream is
// null and scratch memory the host's, filled with bytes that no kernel may take for its own.
#include <xla/ffi/api/ffi.h>

#include <cstdlib>
#include <cstring>

extern "C" {
XLA_FFI_Error* lvtp_id_selection_cuda(XLA_FFI_CallFrame*);
XLA_FFI_Error* lvtp_prune_sid_cuda(XLA_FFI_CallFrame*);
}

namespace {

XLA_FFI_Error* no_stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = nullptr;
  return nullptr;
}

XLA_FFI_Error* allocate(XLA_FFI_DeviceMemory_Allocate_Args* args) {
  if (args->alignment > 16) abort();  // XLA refuses more
  args->data = static_cast<char*>(aligned_alloc(256, (args->size + 511) / 256 * 256)) + 16;
  memset(args->data, 0xA5, args->size);
  return nullptr;
}

XLA_FFI_Error* release(XLA_FFI_DeviceMemory_Free_Args* args) {
  free(static_cast<char*>(args->data) - 16);
  return nullptr;
}

XLA_FFI_Error* on_host(XLA_FFI_Error* (*call)(XLA_FFI_CallFrame*), XLA_FFI_CallFrame* frame) {
  const XLA_FFI_Api* const jaxs = frame->api;
  XLA_FFI_Api api = *jaxs;
  api.XLA_FFI_Stream_Get = no_stream;
  api.XLA_FFI_DeviceMemory_Allocate = allocate;
  api.XLA_FFI_DeviceMemory_Free = release;
  frame->api = &api;
  XLA_FFI_Error* const error = call(frame);
  frame->api = jaxs;
  return error;
}

}  // namespace

extern "C" XLA_FFI_Error* id_selection_on_host(XLA_FFI_CallFrame* frame) {
  return on_host(lvtp_id_selection_cuda, frame);
}
extern "C" XLA_FFI_Error* prune_sid_on_host(XLA_FFI_CallFrame* frame) { return on_host(lvtp_prune_sid_cuda, frame); }
