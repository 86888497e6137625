"""The kernels of csrc/cuda on CPU tensors, run by the emulator: the functions of `lvtp`, with a seed before each call.

What the launchers of csrc/cuda/<op>.cpp do is done here: tensors made contiguous, outputs and workspace allocated.
Outputs are filled with a value that would be noticed, the workspace with zeros, so that a kernel with a barrier removed
reads a wrong index there and not one outside of its tensors; the margins of the workspace show what is written beside.
"""

import functools

import torch

from .build import load

MARGIN = 64


@functools.cache
def module():
    return load()


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _type(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _contiguous(tensor, dtype=None):
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


class _Workspace:
    content = 0  # of each byte

    def __init__(self, size: int):
        self.bytes = torch.full((size + 2 * MARGIN,), 0xA5, dtype=torch.uint8)
        self.bytes[MARGIN : MARGIN + size] = self.content
        self.size = size

    def __enter__(self):
        return self.bytes.data_ptr() + MARGIN  # torch aligns to 64 bytes, and no kernel asks for more than 8

    def __exit__(self, *_):
        for margin in (self.bytes[:MARGIN], self.bytes[MARGIN + self.size :]):
            assert (margin == 0xA5).all(), "written beside the workspace"


def cosine_similarity(features):
    b, n, d = features.shape
    x, out = _contiguous(features), torch.full((b, n, n), -7.0)
    module().cosine_similarity(_address(x), _type(x), b, n, d, _address(out))
    return out


def mean_similarity(features, mask=None):
    b, n, d = features.shape
    x, m, out = _contiguous(features), _contiguous(mask), torch.full((b,), -7.0)
    with _Workspace(module().mean_similarity_workspace(b, n, d)) as workspace:
        module().mean_similarity(_address(x), _type(x), _address(m), b, n, d, workspace, _address(out))
    return out


def greedy_suppression(scores, similarity, k, gamma=20.0, mask=None):
    b, n = scores.shape
    s, sim, m = _contiguous(scores, torch.float32), _contiguous(similarity), _contiguous(mask)
    picks = torch.full((b, k), -7)
    with _Workspace(module().greedy_suppression_workspace(b, n)) as workspace:
        module().greedy_suppression(
            _address(s), _address(sim), _type(sim), _address(m), b, n, k, gamma, workspace, _address(picks)
        )
    return picks


def cluster_nms(scores, labels, similarity, threshold, mask=None):
    b, n = scores.shape
    s, sim, m = _contiguous(scores, torch.float32), _contiguous(similarity), _contiguous(mask)
    group, kept = _contiguous(labels), torch.full((b, n), 7, dtype=torch.uint8)
    each = _contiguous(threshold, torch.float32) if isinstance(threshold, torch.Tensor) else None
    same = 0.0 if each is not None else threshold
    with _Workspace(module().cluster_nms_workspace(b, n)) as workspace:
        module().cluster_nms(
            _address(s), _address(group), _address(sim), _type(sim), _address(each), same, _address(m), b, n, workspace,
            _address(kept),
        )  # fmt: skip
    assert (kept <= 1).all()
    return kept.bool()


def id_selection(features, importance, k, gamma=20.0, mask=None, way="id_selection"):
    b, n, d = features.shape
    x, s, m = _contiguous(features), _contiguous(importance, torch.float32), _contiguous(mask)
    picks = torch.full((b, k), -7)
    with _Workspace(getattr(module(), f"{way}_workspace")(b, n)) as workspace:
        getattr(module(), way)(
            _address(x), _type(x), _address(s), _address(m), b, n, d, k, gamma, workspace, _address(picks)
        )
    return picks


def id_selection_in_rounds(*args, **kwargs):
    """What `id_selection` does with many tokens, for any number."""
    return id_selection(*args, **kwargs, way="id_selection_in_rounds")


def psca(features, groups, center="feature", mask=None):
    b, n, d = features.shape
    x, m = _contiguous(features), _contiguous(mask)
    labels, loadings = torch.full((b, n), -7), torch.full((b, n), -7.0)
    with _Workspace(module().psca_workspace(b, n, d, groups)) as workspace:
        module().psca(
            _address(x), _type(x), _address(m), b, n, d, groups, center == "feature", workspace, _address(labels),
            _address(loadings),
        )  # fmt: skip
    return labels, loadings


def leading_eigenvectors(matrices, count):
    """Vectors [B, count, N] of matrices [B, N, N] in float64, and for which images the direct way was taken, which is
    the one that overwrites its matrix."""
    b, n, _ = matrices.shape
    space = torch.full((b, module().eigen_matrix_size(n)), -7.0, dtype=torch.float64)
    space[:, : n * n] = matrices.flatten(1)
    vectors = torch.full((b, count, n), -7.0, dtype=torch.float64)
    with _Workspace(module().leading_eigenvectors_workspace(b, n, count)) as workspace:
        module().leading_eigenvectors(_address(space), b, n, count, workspace, _address(vectors))
    return vectors, (space[:, : n * n] != matrices.flatten(1)).any(1)


def prune_sid(features, importance, n, reserved=0, center="feature", labels=None, mask=None):
    b, tokens, d = features.shape
    x, m, group = _contiguous(features), _contiguous(mask), _contiguous(labels)
    scores = _contiguous(importance, torch.float32)
    groups = max(1, min(n // 4, tokens))
    picks = torch.full((b, min(n - reserved, tokens)), -7)
    with _Workspace(module().prune_sid_workspace(b, tokens, d, groups, labels is None)) as workspace:
        module().prune_sid(
            _address(x), _type(x), _address(scores), _address(group), _address(m), b, tokens, d, groups, n, reserved,
            center == "feature", workspace, _address(picks),
        )  # fmt: skip
    return picks


def dynamic_budget(features, total, minimum=1):
    b, n, d = features.shape
    x, budget = _contiguous(features), torch.full((b,), -7)
    with _Workspace(module().dynamic_budget_workspace(b, n, d)) as workspace:
        module().dynamic_budget(_address(x), _type(x), b, n, d, total, minimum, workspace, _address(budget))
    return budget
