"""Queries and keys as one attention layer hands them to its kernel: after rotary embeddings, norms and window orders.

Where the projections do not show them (Qwen towers, decoders), the layer is pointed at an attention function of our
own, which looks at its arguments and calls the one that was there: the layer's output stays what it was, bit for bit.
A layer finds its function by a name in its config, so that layer alone gets a stand-in for its config, and only the
thread that looks sees another name there.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lvtp.hf.threads import shared, uncompiled
from lvtp.importance import received_attention

Seen = Callable[[Tensor, Tensor, dict], None]

# What this thread watches: layer -> the name of its attention function instead of the one in its config.
_WATCHED: ContextVar[Mapping[nn.Module, str]] = ContextVar("lvtp_watched", default=MappingProxyType({}))


class _Config:
    """The config of a watched layer, but for the name of its attention function in the threads that watch it."""

    def __init__(self, layer: nn.Module, config: Any):
        self._layer, self._config = layer, config

    @property
    def _attn_implementation(self) -> str | None:
        return _WATCHED.get().get(self._layer, self._config._attn_implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._config, memo)


@contextmanager
def _with_stand_in(layer: nn.Module) -> Iterator[None]:
    config = layer.config
    layer.config = _Config(layer, config)
    try:
        yield
    finally:
        layer.config = config


@contextmanager
def watched(layer: nn.Module, seen: Seen) -> Iterator[None]:
    """Calls `seen(query, key, keywords)` before every attention of `layer` in this thread.

    Args:
        layer: an attention layer of transformers, which looks its kernel up by `layer.config`.
        seen: gets query [B, H, N, d] and key [B, H', N, d], detached, and the kernel's keyword arguments.
    """
    with uncompiled(), shared(layer, lambda: _with_stand_in(layer)):
        name = layer.config._attn_implementation or "eager"
        eager = getattr(sys.modules[type(layer).__module__], "eager_attention_forward", None)
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)

        def look_and_attend(module, query, key, *args, **kwargs):
            seen(query.detach(), key.detach(), kwargs)
            return kernel(module, query, key, *args, **kwargs)

        # transformers tells kernels apart by their name ("flash" in it), so ours holds the old one.
        ours = f"lvtp_{id(look_and_attend)}_{name}"
        ALL_ATTENTION_FUNCTIONS[ours] = look_and_attend
        watching = _WATCHED.set({**_WATCHED.get(), layer: ours})
        try:
            yield
        finally:
            _WATCHED.reset(watching)
            del ALL_ATTENTION_FUNCTIONS[ours]


@contextmanager
def received_by_segment(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Mean attention received by every token of a packed sequence that `layer` reads segment by segment.

    Yields:
        A list that fills up in order with one fp32 [n] a segment; each sums to 1.
    """
    received: list[Tensor] = []

    def score(query: Tensor, key: Tensor, keywords: dict) -> None:
        lengths = [query.shape[2]]
        if keywords.get("cu_seq_lens_q") is not None:  # FlashAttention reads all segments at once
            lengths = keywords["cu_seq_lens_q"].diff().tolist()
        pairs = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True)
        received.extend(received_attention(q, k, keywords.get("scaling"))[0] for q, k in pairs)

    with watched(layer, score):
        yield received
