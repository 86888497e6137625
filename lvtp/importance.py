"""Importance of visual tokens from one attention layer, without asking the model for its attention maps.

Asking a vision tower for `output_attentions` forces eager attention in every layer. The selectors need one number a
token from one layer, so the queries and keys of that layer are recorded where its projections produce them, and the
softmax is taken again for the wanted rows only. The layer itself keeps running on SDPA or FlashAttention, bit for bit.

Everything is computed in float32: an average rounded to bfloat16 leaves about 160 distinct values over 576 tokens.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lvtp.reference import without_autocast

# Rows of attention held at once, and of the heads as many as fit: of 16k tokens, 256 MB. On a CPU they should stay in
# its cache, and rows come before heads, for products of few rows are slow: 16 heads of 2304 tokens take 230 ms with
# 2 MB, 250 ms with 8 MB, 380 ms with 8 MB of all heads at once (one core of a shared Xeon, November 2026).
QUERY_BLOCK = 512
MAX_LOGITS = 2**26
MAX_LOGITS_CPU = 2**19


def cls_attention(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Attention that the first token (CLS) pays to every token, averaged over the heads.

    Args:
        query, key: [B, H, N, d], any floating dtype, as the attention layer uses them.
        scale: what the logits are multiplied with; d ** -0.5 if None.

    Returns:
        fp32 [B, N]; each row sums to 1. Column 0 is the CLS token's attention to itself.
    """
    return _attention_rows(query[:, :, :1], key, scale).mean(dim=(1, 2))


def received_attention(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Attention that every token receives, averaged over all queries and heads.

    Args:
        query, key: [B, H, N, d], any floating dtype, as the attention layer uses them.
        scale: what the logits are multiplied with; d ** -0.5 if None.

    Returns:
        fp32 [B, N]; each row sums to 1.
    """
    batch, heads, tokens, _ = query.shape
    total = query.new_zeros(batch, key.shape[2], dtype=torch.float32)
    limit = MAX_LOGITS_CPU if query.device.type == "cpu" else MAX_LOGITS
    row = max(1, batch * key.shape[2])  # of the logits of one head
    rows = max(1, min(QUERY_BLOCK, tokens, limit // row))
    at_once = max(1, limit // (rows * row))  # heads
    for of_heads, keys in zip(query.split(at_once, dim=1), key.split(at_once, dim=1), strict=True):
        keys = keys.float()
        for block in of_heads.split(rows, dim=2):
            total += _attention_rows(block, keys, scale).sum(dim=(1, 2))
    return total / (heads * tokens)


def prompt_attention(query: Tensor, key: Tensor, visible: Tensor, scale: float | None = None) -> Tensor:
    """Attention that one token of a prompt pays to every token, averaged over the heads.

    Args:
        query: [B, H, d] of that token, any floating dtype, as the attention layer uses it.
        key: [B, H', N, d]; H' divides H, query head h reads key head h // (H / H').
        visible: bool [B, N], the tokens that it attends to.
        scale: what the logits are multiplied with; d ** -0.5 if None.

    Returns:
        fp32 [B, N]; each row sums to 1 over its visible tokens.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, H', H / H', d]
    return _attention_rows(grouped, key, scale, visible[:, None, None]).mean(dim=(1, 2))


def _attention_rows(query: Tensor, key: Tensor, scale: float | None, visible: Tensor | None = None) -> Tensor:
    """softmax(scale * query key^T) in float32: [B, H, Q, d] x [B, H, N, d] -> [B, H, Q, N]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(query):
        logits = (query.float() * scale) @ key.float().transpose(-1, -2)
        if visible is not None:
            logits = logits.masked_fill(~visible, float("-inf"))
        return logits.softmax(dim=-1)


# To be held while a hook comes or goes: torch numbers hooks without a lock, and two threads could get the same number.
HOOKING = threading.Lock()


@contextmanager
def observed(module: nn.Module, seen: Callable[[tuple, Any], None]) -> Iterator[None]:
    """Calls `seen(args, output)` after every forward of `module` in this thread; what others call is theirs."""
    thread = threading.get_ident()

    def hook(_, args: tuple, output: Any) -> None:
        if threading.get_ident() == thread:
            seen(args, output)

    with HOOKING:
        handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        with HOOKING:
            handle.remove()


class AttentionTap:
    """Records the queries and keys of one attention layer in this thread while the context is open; changes nothing.

    For layers that use `q_proj` and `k_proj` as they come (CLIP, SigLIP) or normed (InternVL); no rotary embedding.

    Args:
        attention: the layer, with submodules `q_proj` and `k_proj` of output [B, N, heads * d]; where it has `q_norm`
            and `k_norm`, those of that size that come after them.
        heads: number of attention heads.
    """

    def __init__(self, attention: nn.Module, heads: int):
        self._projections = {
            "query": getattr(attention, "q_norm", attention.q_proj),
            "key": getattr(attention, "k_norm", attention.k_proj),
        }
        self._heads = heads
        self._recorded: dict[str, Tensor] = {}
        self._observing = ExitStack()

    def __enter__(self) -> "AttentionTap":
        for name, projection in self._projections.items():
            self._observing.enter_context(observed(projection, self._recorder(name)))
        return self

    def __exit__(self, *exception) -> None:
        self._observing.close()

    def _recorder(self, name: str):
        def record(args: tuple, output: Tensor) -> None:
            self._recorded[name] = output.detach().unflatten(-1, (self._heads, -1)).transpose(1, 2)

        return record

    @property
    def query(self) -> Tensor:
        """[B, H, N, d]"""
        return self._get("query")

    @property
    def key(self) -> Tensor:
        """[B, H, N, d]"""
        return self._get("key")

    def _get(self, name: str) -> Tensor:
        if name not in self._recorded:
            raise RuntimeError(
                f"AttentionTap: the tapped layer has not run its {name[0]}_proj module inside the context "
                "(a fused or replaced attention layer does not call it)"
            )
        return self._recorded[name]
