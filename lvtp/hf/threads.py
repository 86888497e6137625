"""What several threads need at the same time and there is one of: opened by the first of them, closed by the last."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_LOCK = threading.Lock()
_OPEN: dict[Hashable, tuple[AbstractContextManager, int]] = {}  # the context, and how many hold it open


@contextmanager
def shared(key: Hashable, make: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """The context `make()`, which all threads that ask for `key` at the same time have in common."""
    with _LOCK:
        context, holders = _OPEN.get(key, (None, 0))
        if context is None:
            context = make()
            context.__enter__()
        _OPEN[key] = context, holders + 1
    try:
        yield
    finally:
        with _LOCK:
            context, holders = _OPEN.pop(key)
            if holders > 1:
                _OPEN[key] = context, holders - 1
            else:
                context.__exit__(None, None, None)


def uncompiled() -> AbstractContextManager[None]:
    """Code that was compiled before a hook came does not call the hook; in this context nothing runs compiled.

    `torch.compiler` has one stance for the whole process.
    """
    return shared("stance", lambda: torch.compiler.set_stance("force_eager"))
