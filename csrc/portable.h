// What lets one definition compile for the host, for CUDA devices and under the SIMT emulator alike.
#pragma once

#ifdef __CUDACC__
#define LVTP_HD __host__ __device__ __forceinline__
#else
#define LVTP_HD inline
#endif
