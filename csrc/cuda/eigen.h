// The leading eigenvectors of Gram matrices, without a library call that would wait for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../portable.h"

namespace lvtp::cuda {

// The doubles of a matrix [n, n] that is to be decomposed, with the two rows of workspace that follow it.
LVTP_HD int64_t eigen_matrix_size(int64_t n) { return (n + 2) * n; }

// matrices [images, eigen_matrix_size(n)], positive semidefinite, overwritten -> vectors fp64 [images, count, n] of
// length 1 (to about 1e-6), largest eigenvalue first; zero where the matrix is. By subspace iteration, and directly
// where that does not converge, which the device finds out: what is launched depends on the shape alone. Deterministic.
int64_t leading_eigenvectors_workspace(int64_t images, int64_t n, int64_t count);
cudaError_t leading_eigenvectors(
    double* matrices, int64_t images, int64_t n, int64_t count, void* workspace, double* vectors, cudaStream_t stream);

// The same by Householder's tridiagonal form, its largest eigenvalues by multisection, their vectors by twisted
// factorization (Dhillon & Parlett 2004), and back: nothing in it depends on the matrix. Images that are `settled`
// ([images], or null) keep the vectors they have.
int64_t direct_eigenvectors_workspace(int64_t images, int64_t n, int64_t count);
cudaError_t direct_eigenvectors(
    const int* settled, double* matrices, int64_t images, int64_t n, int64_t count, void* workspace, double* vectors,
    cudaStream_t stream);

}  // namespace lvtp::cuda
