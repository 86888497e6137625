"""Principal components without an eigensolver of torch's, because those wait for the GPU.

Filtered subspace iteration, all in fp64: torch multiplies G + 32 vectors by the Gram matrix, Chebyshev polynomials of
it damp what lies below the subspace, Cholesky keeps the vectors apart; at the end a kernel diagonalises the small
matrix that is left. The number of iterations is fixed. With 24 filtered ones every token of 576 was grouped as by
`eigh`, for 4 to 144 groups, on a photograph and on clustered features (5 clusters for 144 groups, too); 30 leave room.
Filters of a higher degree amplify the first component until its rounding covers the last: at degree 8, agreement fell
below 0.5.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lvtp.reference import centred_sigmoid
from lvtp.triton_kernels.common import block_of, operator

OVERSAMPLING = 32
PLAIN_ITERATIONS, FILTERS, DEGREE = 4, 10, 3
RANK_FLOOR = 1e-10  # of the largest eigenvalue: what rounding leaves of one that is zero
SHIFT = 1e-6  # what `_gram` adds to every eigenvalue
LEAST_DAMPED = 1e-6  # of the largest eigenvalue; below, DEGREE 3 amplifies the first component beyond fp64


@triton.jit
def _chunk(x_ptr, row, c, width, member, CHUNK: tl.constexpr):
    """Addresses of columns c, c + 1, ... of these rows of x [M, width], and which of them exist."""
    col = c + tl.arange(0, CHUNK)
    return x_ptr + row[:, None] * width + col[None, :], member[:, None] & (col < width)[None, :]


@triton.jit
def _rotation(x_ptr, p, q, m, width, member, PAIRS: tl.constexpr, CHUNK: tl.constexpr):
    """cos and sin that make rows p and q of x orthogonal in their first m columns, and how far they were from it."""
    pp, qq, pq = tl.zeros((PAIRS,), tl.float64), tl.zeros((PAIRS,), tl.float64), tl.zeros((PAIRS,), tl.float64)
    for c in range(0, m, CHUNK):
        left = ((c + tl.arange(0, CHUNK)) < m)[None, :]
        at_p, here = _chunk(x_ptr, p, c, width, member, CHUNK)
        at_q, _ = _chunk(x_ptr, q, c, width, member, CHUNK)
        xp, xq = tl.load(at_p, mask=here & left, other=0.0), tl.load(at_q, mask=here & left, other=0.0)
        pp += tl.sum(xp * xp, 1)
        qq += tl.sum(xq * xq, 1)
        pq += tl.sum(xp * xq, 1)
    cosine = tl.abs(pq) / tl.maximum(tl.sqrt(pp) * tl.sqrt(qq), 1e-300)
    turn = cosine > 1e-15
    zeta = (qq - pp) / (2 * tl.where(turn, pq, 1.0))
    tangent = tl.where(zeta < 0, -1.0, 1.0) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
    tangent = tl.where(turn, tangent, 0.0)
    cos = 1 / tl.sqrt(1 + tangent * tangent)
    return cos, cos * tangent, tl.max(cosine, 0)


@triton.jit
def orthogonal_rows_kernel(
    x_ptr,  # fp64 [B, M, 2M]: any matrix beside the identity, in place
    m,
    PAIRS: tl.constexpr, CHUNK: tl.constexpr, SWEEPS: tl.constexpr,
):  # fmt: skip
    """One-sided Jacobi: rotate pairs of rows until the left half's are orthogonal; the right half records how.

    One program an image. A sweep meets every pair once, in rounds of disjoint pairs (the circle method), which it
    rotates all at once. Convergence is quadratic: after a sweep that met no cosine above 1e-8 nothing is left to do.
    """
    width = 2 * m
    x_ptr += tl.program_id(0).to(tl.int64) * m * width
    k = tl.arange(0, PAIRS).to(tl.int64)
    last = m - 1 + m % 2  # the circle has an odd number of seats, and one in the middle
    sweep = 0
    worst = tl.full((), 1.0, tl.float64)
    while (sweep < SWEEPS) & (worst > 1e-8):
        worst = tl.full((), 0.0, tl.float64)
        for turn in range(last):
            p = tl.where(k == 0, last, (turn + k) % last)
            q = tl.where(k == 0, turn, (turn - k + last) % last)
            member = (2 * k <= last) & (p < m) & (q < m)
            cos, sin, cosine = _rotation(x_ptr, p, q, m, width, member, PAIRS, CHUNK)
            worst = tl.maximum(worst, cosine)
            tl.debug_barrier()  # everyone has read what is about to change
            for c in range(0, width, CHUNK):
                at_p, here = _chunk(x_ptr, p, c, width, member, CHUNK)
                at_q, _ = _chunk(x_ptr, q, c, width, member, CHUNK)
                xp, xq = tl.load(at_p, mask=here, other=0.0), tl.load(at_q, mask=here, other=0.0)
                tl.store(at_p, cos[:, None] * xp - sin[:, None] * xq, mask=here)
                tl.store(at_q, sin[:, None] * xp + cos[:, None] * xq, mask=here)
            tl.debug_barrier()  # the rows are in memory before they meet others
        sweep += 1


def orthogonalise_rows(x: Tensor) -> None:
    """x fp64 [B, M, 2M], contiguous, any [M, M] beside the identity, in place: see the kernel."""
    b, m, _ = x.shape
    pairs = block_of((m + 1) // 2, 2**20)
    orthogonal_rows_kernel[(b,)](x, m, PAIRS=pairs, CHUNK=max(1, 2048 // pairs), SWEEPS=30, num_warps=8)


def _gram(a: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with A A^T / trace + SHIFT, A fp64 [B, N, D]; the matrix itself only where it saves work.

    What is added changes no eigenvector. It keeps vectors apart that the matrix alone would send to zero, where A has
    fewer components than are asked for, and lies far below those that count.
    """
    n, d = a.shape[1:]
    trace = a.square().sum((1, 2))[:, None, None]
    a = a / torch.where(trace > 0, trace, 1.0).sqrt()
    if n > 2 * d:
        return lambda y: torch.baddbmm(SHIFT * y, a, a.mT @ y)
    gram = a @ a.mT
    return lambda y: torch.baddbmm(SHIFT * y, gram, y)


def _orthonormal(y: Tensor) -> Tensor:
    """The columns of y [B, N, M], each without its part in those before it: twice, by Cholesky's factor of y^T y."""
    for _ in range(2):
        y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(1e-150)
        products = y.mT @ y
        products.diagonal(dim1=1, dim2=2).add_(1e-15)
        factor, _ = torch.linalg.cholesky_ex(products)  # the other one reads back whether it worked
        y = torch.linalg.solve_triangular(factor, y.mT, upper=False).mT
    return y


def _subspace(multiply: Callable[[Tensor], Tensor], n: int, m: int, like: Tensor) -> Tensor:
    """Orthonormal fp64 [B, N, M] that span the first components, those in front nearly the components themselves."""
    i, j = (torch.arange(size, dtype=torch.float64, device=like.device) for size in (n, m))
    noise = torch.sin(12.9898 * i[:, None] + 78.233 * j + 1) * 43758.5453  # the same on every device, at every call
    y = (noise - noise.floor() - 0.5).expand(like.shape[0], n, m)
    for _ in range(1 + PLAIN_ITERATIONS):  # the first component must stand out before a filter amplifies it
        y = _orthonormal(multiply(y))
    for _ in range(FILTERS):
        product = multiply(y)
        values = (y * product).sum(1)  # nearly the eigenvalues; those from 0 to twice `half` are damped
        half = (values.amin(1) / 2).maximum(LEAST_DAMPED * values.amax(1))[:, None, None]
        before, y = y, product / half - y
        for _ in range(DEGREE - 1):
            before, y = y, 2 * (multiply(y) / half - y) - before
        y = _orthonormal(y)
    return y


def components(a: Tensor, groups: int) -> Tensor:
    """A fp64 [B, N, D] -> the eigenvectors of A A^T for its largest eigenvalues, largest first, fp64 [B, groups, N].

    Where tokens outnumber features, and groups, those beyond the rank are zero.
    """
    b, n, d = a.shape
    m = min(n, groups + OVERSAMPLING)
    multiply = _gram(a)
    y = _subspace(multiply, n, m, a)
    small = y.mT @ multiply(y)
    factor, _ = torch.linalg.cholesky_ex((small + small.mT) / 2)
    x = torch.cat([factor, torch.eye(m, dtype=a.dtype, device=a.device).expand(b, m, m)], 2)  # [B, M, 2M]
    orthogonalise_rows(x)
    eigenvalues, rotation = x[..., :m].square().sum(2), x[..., m:]
    eigenvalues, order = (t[:, :groups, None] for t in eigenvalues.sort(dim=1, descending=True, stable=True))
    vectors = rotation.gather(1, order.expand(b, groups, m)) @ y.mT
    if n <= d or groups == n:
        return vectors
    return torch.where(eigenvalues - SHIFT > RANK_FLOOR * eigenvalues[:, :1], vectors, 0.0)


def launch(features: Tensor, groups: int, center: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`psca`, already checked, where padding is left out, too."""
    a, usable = centred_sigmoid(features, center, mask)
    if a.shape[0] == 0:
        return usable.long(), usable.float()
    loadings, labels = components(a, groups).abs().max(1)
    return torch.where(usable, labels, 0), torch.where(usable, loadings, 0.0).float()


@operator
def psca(features: Tensor, groups: int, center: str = "feature") -> tuple[Tensor, Tensor]:
    """features [B, N, D] fp32, fp16 or bf16 -> labels int64 [B, N], loadings fp32 [B, N]."""
    return launch(features, groups, center, None)
