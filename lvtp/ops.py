"""The operators as torch sees them: loading the compiled libraries, fake kernels, fallbacks, choice of backend.

`torch.ops.lvtp.*` is the dispatcher's view: each device gets the fastest kernel registered for it. The functions of
the package (`lvtp.id_selection`, ...) call those, unless `use_backend` asks for another implementation by name.
"""

import contextlib
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from lvtp import arguments, checks, chips, dlpack, reference, triton_kernels
from lvtp.arguments import constant_when_traced

BACKENDS = ("auto", "native", "triton", "reference")
OPS = reference.__all__

_LIBRARIES = Path(__file__).with_name("lib")
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_missing: dict[str, str] = {}  # backend -> why it is not here


def _load_libraries() -> None:
    library = _LIBRARIES / f"liblvtp{_SUFFIX}"
    remedy = "Remedy: pip install --force-reinstall --no-deps lvtp (in a source tree: pip install -e .)"
    if not library.exists():
        raise ImportError(f"lvtp's compiled library is missing: {library} does not exist. {remedy}")
    wanted = _built()["torch_required"]
    if tuple(map(int, torch.__version__.split(".")[:2])) < tuple(map(int, wanted.removeprefix(">=").split("."))):
        raise ImportError(
            f"lvtp needs torch {wanted}, found torch {torch.__version__} in {Path(torch.__file__).parent}. "
            f'Remedy: pip install --upgrade "torch{wanted}"'
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"lvtp's compiled library does not load ({error}). It wants torch {wanted}; "
            f"found torch {torch.__version__}. {remedy}"
        ) from error
    _load_cuda_library(_LIBRARIES / f"liblvtp_cuda{_SUFFIX}")


def _load_cuda_library(library: Path) -> None:
    """Not being able to is no error: CUDA tensors then run on Triton or the reference. `build_info()` says why."""
    if not library.exists():
        _missing["native_cuda"] = "built without nvcc: liblvtp_cuda was not compiled"
    elif torch.version.cuda is None:
        _missing["native_cuda"] = f"torch {torch.__version__} is built without CUDA"
    elif not chips.served_by(_built()["cuda_architectures"]):
        here = ", ".join(f"sm_{major}{minor}" for major, minor in chips.capabilities())
        built = ", ".join(_built()["cuda_architectures"])
        _missing["native_cuda"] = f"liblvtp_cuda was built for {built}, this machine has {here}"
    else:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            _missing["native_cuda"] = f"liblvtp_cuda does not load: {error}"


def _built() -> dict:
    """What the build wrote down about itself."""
    return json.loads((_LIBRARIES / "build.json").read_text())


@functools.cache
def _triton_trouble() -> str:
    """Why no Triton kernel can run here; empty if they can. Imports Triton (0.1 s), so only asked when it matters."""
    try:
        import triton
    except Exception as error:  # a broken installation raises anything
        return f"triton does not import ({error}). Remedy: pip install triton"
    try:
        for name in triton_kernels.OPERATORS:
            triton_kernels.launcher(name)
        if not triton.knobs.runtime.interpret:
            triton.runtime.driver.active  # noqa: B018  # builds its launcher: needs a GPU and a C compiler
    except Exception as error:
        return f"triton {triton.__version__} cannot run here ({error})"
    return ""


_load_libraries()
_compiled_for_cuda = frozenset(
    name for name in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"lvtp::{name}", "CUDA")
)


# ------------------------------------------------------------------------------------------------------- backends


def _known(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


_default_backend = _known(os.environ.get("LVTP_BACKEND") or "auto", "LVTP_BACKEND")
_backend: ContextVar[str] = ContextVar("lvtp_backend", default=_default_backend)


@constant_when_traced  # a compiled function keeps the backend in force when it was traced
def backend_in_force() -> str:
    return _backend.get()


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the implementation behind `lvtp`'s functions, in this thread or task, until the block ends.

    "auto" takes the fastest present for the tensors' device and may fall back; "native" (compiled C++ or CUDA),
    "triton" and "reference" (plain PyTorch) are held to: a call they cannot serve raises `RuntimeError` and says why.
    The environment variable LVTP_BACKEND sets the default. `torch.ops.lvtp.*`, which is torch's own dispatch, is not
    affected; a compiled function keeps the backend in force when it was traced, and the reference is not made to be
    traced. Raises `ValueError` for any other name.
    """
    token = _backend.set(_known(backend, "use_backend: backend"))
    try:
        yield
    finally:
        _backend.reset(token)


def call(name: str, *args, overload: str = "default"):
    """Run operator `name` on the backend in force, on tensors or on other libraries' arrays."""
    takes = _ARGUMENTS[name, overload]
    for value, argument in zip(args, takes, strict=False):
        if type(value) not in argument.types:
            ready = [argument.ready(value) for value, argument in zip(args, takes, strict=False)]
            return dlpack.in_kind(_run(name, ready, overload), args[0])
    return _run(name, args, overload)


def _run(name: str, args: Sequence, overload: str):
    backend = backend_in_force()
    if backend == "reference":
        if name == "psca" and _wants(args[0]):
            return _psca_without_derivative(reference.psca, *args)
        return getattr(reference, name)(*args)
    if backend == "triton":
        device = args[0].device.type
        if why := _triton_refuses(name, device):
            raise RuntimeError(f'backend "triton" cannot run {name} on {device}: {why}')
        return getattr(getattr(torch.ops.lvtp_triton, name), overload)(*args)
    if backend == "native":
        device = args[0].device.type
        if not _has_kernel(name, device):
            why = _missing.get(f"native_{device}", f"there is no compiled kernel for {device} tensors")
            raise RuntimeError(f'backend "native" cannot run {name} on {device}: {why}')
    return getattr(getattr(torch.ops.lvtp, name), overload)(*args)


@constant_when_traced
def _has_kernel(name: str, device: str) -> bool:
    return device == "cpu" or (device == "cuda" and name in _compiled_for_cuda)


@constant_when_traced
def _triton_refuses(name: str, device: str) -> str:
    """Why Triton cannot run this operator on this kind of device; empty if it can."""
    if name not in triton_kernels.OPERATORS:
        return "it has no such kernel"
    if trouble := _triton_trouble():
        return trouble
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return ""
    return "Triton compiles for GPUs; on the CPU its interpreter runs kernels, if TRITON_INTERPRET=1 from the start"


def build_info() -> dict:
    """What is installed and why the rest is not, as plain data.

    "version", "torch", "python", "platform"; "torch_required", "compiler", "nvcc" and "cuda_architectures" of the
    build; "backends": for native_cpu, native_cuda, triton and reference either "loaded" or the reason why not.
    """
    from lvtp import __version__

    why_not = {**_missing, **({"triton": _triton_trouble()} if _triton_trouble() else {})}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_built(),
        "backends": {
            name: why_not.get(name, "loaded") for name in ("native_cpu", "native_cuda", "triton", "reference")
        },
    }


# -------------------------------------------------------------------- what every device and every tracer falls back to

OVERLOADS = (*OPS, "cluster_nms.per_image")
_ARGUMENTS = {
    (name, overload): arguments.of(getattr(getattr(torch.ops.lvtp, name), overload))
    for name in OPS
    for overload in getattr(torch.ops.lvtp, name).overloads()
}
_fallback = torch.library.Library("lvtp", "FRAGMENT")
for _name in OVERLOADS:
    _fallback.impl(_name, getattr(reference, _name.split(".")[0]), "CompositeExplicitAutograd")

# The Triton kernels as operators of their own, so that a call of them is one node to a tracer, and `use_backend`
# reaches them where "auto" takes the compiled ones. On a 2-core x86 a call of a stub by way of `define` and `impl` took
# 3.8 us, of `custom_op` 8.2 us, of `triton_op` 10.0 us (torch 2.13).
_triton = torch.library.Library("lvtp_triton", "DEF")


def _triton_kernel(name: str) -> Callable:
    return lambda *args: triton_kernels.launcher(name)(*args)


def _without_compiled_kernel(name: str) -> Callable:
    """What CUDA tensors run on by themselves. Triton first: nothing has been measured yet that says otherwise."""

    def run(*args):
        if _triton_refuses(name, "cuda"):
            return getattr(reference, name)(*args)
        return triton_kernels.launcher(name)(*args)

    return run


for _name in OVERLOADS:
    _packet, _, _overload = _name.partition(".")
    _triton.define(
        str(getattr(getattr(torch.ops.lvtp, _packet), _overload or "default")._schema).removeprefix("lvtp::")
    )
    if _packet in triton_kernels.OPERATORS:
        for _key in ("CPU", "CUDA"):  # on the CPU in Triton's interpreter
            _triton.impl(_name, _triton_kernel(_packet), _key)
        if _packet not in _compiled_for_cuda:
            _fallback.impl(_name, _without_compiled_kernel(_packet), "CUDA")


def _register_fake(name: str) -> Callable:
    def register(fake: Callable) -> Callable:
        for namespace in ("lvtp", "lvtp_triton"):
            torch.library.register_fake(f"{namespace}::{name}", fake)
        return fake

    return register


@_register_fake("cosine_similarity")
def _(features):
    checks.cosine_similarity(features)
    b, n, _ = features.shape
    return features.new_empty((b, n, n), dtype=torch.float32)


@_register_fake("mean_similarity")
def _(features, mask=None):
    checks.mean_similarity(features, mask)
    return features.new_empty((features.shape[0],), dtype=torch.float32)


@_register_fake("greedy_suppression")
def _(scores, similarity, k, gamma=20.0, mask=None):
    checks.greedy_suppression(scores, similarity, k, gamma, mask)
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)


@_register_fake("cluster_nms")
@_register_fake("cluster_nms.per_image")
def _(scores, labels, similarity, threshold, mask=None):
    checks.cluster_nms(scores, labels, similarity, threshold, mask)
    return scores.new_empty(tuple(scores.shape), dtype=torch.bool)


@_register_fake("psca")
def _(features, groups, center="feature"):
    checks.psca(features, groups, center)
    shape = tuple(features.shape[:2])
    return features.new_empty(shape, dtype=torch.int64), features.new_empty(shape, dtype=torch.float32)


@_register_fake("id_selection")
def _(features, importance, k, gamma=20.0, mask=None):
    checks.id_selection(features, importance, k, gamma, mask)
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


@_register_fake("prune_sid")
def _(features, importance, n, reserved=0, center="feature", labels=None, mask=None):
    checks.prune_sid(features, importance, n, reserved, center, labels, mask)
    b, tokens, _ = features.shape
    return features.new_empty((b, torch.sym_min(n - reserved, tokens)), dtype=torch.int64)


@_register_fake("dynamic_budget")
def _(features, total, minimum=1):
    checks.dynamic_budget(features, total, minimum)
    return features.new_empty((features.shape[0],), dtype=torch.int64)


# ------------------------------------------------------------------------------------------------------- derivatives

# Indices carry no gradient, so the selectors need no word here: `take` the features with them, and it flows. The others
# have kernels for the dispatcher's Autograd key: `register_autograd` knows neither forward mode nor torch.func.


def _register_derivative(name: str, differentiable: Callable) -> None:
    """`differentiable(below, *args)` where a derivative with respect to the first argument is asked for.

    `below(*args)` is the operator without derivatives.
    """

    def register(namespace: str) -> None:
        operator = getattr(getattr(torch.ops, namespace), name).default

        def run(keys, *args):
            def below(*args):
                with torch._C._AutoDispatchBelowAutograd():
                    return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

            return differentiable(below, *args) if _wants(args[0]) else below(*args)

        _derivatives.append(torch.library.Library(namespace, "FRAGMENT"))
        _derivatives[-1].impl(name, run, "Autograd", with_keyset=True)

    for namespace in ("lvtp", "lvtp_triton"):
        register(namespace)


_derivatives: list[torch.library.Library] = []  # a kernel lives as long as its library object


def _wants(t: Tensor) -> bool:
    return (torch.is_grad_enabled() and t.requires_grad) or _has_tangent(t)


def _has_tangent(t: Tensor) -> bool:
    if is_functorch_wrapped_tensor(t):  # a compiled graph opens level 0, the only one, and Python does not know of it
        return torch._VF._unpack_dual(t, level=0).tangent is not None
    return forward_ad.unpack_dual(t).tangent is not None


def _psca_without_derivative(below, features, *others):
    """Backward refuses, where it comes by the loadings; forward mode has no later time to do so."""
    why = "lvtp.psca is not differentiable: groups are a choice, not a function of the features; detach its argument"
    if _has_tangent(features):
        raise RuntimeError(why)
    labels, loadings = below(features, *others)
    refusal = torch._C._functions.DelayedError(why, 1)(features)[..., 0]
    return labels, torch.where(torch.ones_like(loadings, dtype=torch.bool), loadings, refusal.float())


# The same values to within rounding, from PyTorch's own operators, which know every mode and order.
for _name in ("cosine_similarity", "mean_similarity"):
    _register_derivative(_name, functools.partial(lambda of, below, *args: of(*args), getattr(reference, _name)))
_register_derivative("psca", _psca_without_derivative)


# -------------------------------------------------------------------------------------------- the functions themselves


def cosine_similarity(features: Tensor) -> Tensor:
    """Cosine similarity of every pair of tokens, one matrix an image.

    Args:
        features: [B, N, D] float32, float16 or bfloat16.

    Returns:
        float32 [B, N, N], accumulated in float32. A token with NaN or Inf, or with only zeros, has similarity 0 to
        every token. Differentiable: where a derivative is asked for, PyTorch's own operators compute the value, too.

    Raises:
        RuntimeError: `features` of another rank or dtype, or without tokens.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    return call("cosine_similarity", features)


def mean_similarity(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cosine similarity rho over the pairs of different tokens, without their matrix.

    PruneSID (arXiv 2603.09480) calls it the image's redundancy; 1 - rho is its information score.

    Args:
        features: [B, N, D] float32, float16 or bfloat16.
        mask: bool [B, N], False = padding.

    Returns:
        float32 [B]; 0 where an image has fewer than two real tokens. Differentiable, as `cosine_similarity` is.

    Raises:
        RuntimeError: an argument of another rank, shape, dtype or device.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    return call("mean_similarity", features, mask)


def greedy_suppression(
    scores: Tensor, similarity: Tensor, k: int, gamma: float = 20.0, mask: Tensor | None = None
) -> Tensor:
    """The loop of ID-Selection (arXiv 2604.05601) on scores and a similarity of your own.

    k times: take the highest score (ties: lowest index), then lower every other one by
    exp(-gamma * max(0, 1 - sim_ij)^2) * max(S_i, 0). The first j of k picks are the picks for j.

    Args:
        scores: [B, N] of any floating dtype, used as they are; NaN is picked last.
        similarity: [B, N, N] of any floating dtype.
        k: picks an image, in [1, N].
        gamma: how quickly suppression fades with distance, finite and at least 0.
        mask: bool [B, N], False = padding.

    Returns:
        int64 [B, k] in pick order; -1 after the last pick of an image with fewer than k real tokens.

    Raises:
        RuntimeError: an argument of another rank, shape, dtype or device, or out of range.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    return call("greedy_suppression", scores, similarity, k, gamma, mask)


def cluster_nms(
    scores: Tensor, labels: Tensor, similarity: Tensor, threshold: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Non-maximum suppression inside groups (PruneSID, arXiv 2603.09480).

    In the order of falling scores (ties: lowest index) a token is kept unless an already kept token of its group has a
    similarity above the threshold. A token whose score is NaN or <= 0 is never kept.

    Args:
        scores: [B, N] of any floating dtype.
        labels: int64 [B, N], the group of each token, from 0 up.
        similarity: [B, N, N] of any floating dtype.
        threshold: a number, or one for each image: [B] of any floating dtype.
        mask: bool [B, N], False = padding.

    Returns:
        bool [B, N]: which tokens are kept.

    Raises:
        RuntimeError: an argument of another rank, shape, dtype or device; on the CPU also a label below 0.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    overload = "per_image" if getattr(threshold, "ndim", 0) else "default"
    return call("cluster_nms", scores, labels, similarity, threshold, mask, overload=overload)


def psca(features: Tensor, groups: int, center: str = "feature") -> tuple[Tensor, Tensor]:
    """Principal semantic component analysis (PruneSID, arXiv 2603.09480): the group of each token.

    A token belongs to the principal component of the tokens' Gram matrix on which it loads most. Converged
    eigenvectors, deterministic; the released code draws random ones, and two runs share about half of their picks.

    Args:
        features: [B, N, D] float32, float16 or bfloat16.
        groups: number of components, in [1, N].
        center: "feature" subtracts each token's mean over D from its sigmoid (the released code), "token" each
            feature's mean over the tokens (the paper).

    Returns:
        labels int64 [B, N] in [0, groups), and the absolute loadings on them, float32 [B, N]. Not differentiable:
        backward through the loadings is an error, and so is a call in forward mode.

    Raises:
        RuntimeError: an argument of another rank or dtype, or out of range.
        TypeError, ValueError: an argument of the wrong type, or an array that torch cannot read.
    """
    return call("psca", features, groups, center)
