"""What pruning puts on a model: forward hooks, and a `generate` of its own. Nothing is left behind after.

A forward hook alone would not do: `generate` encodes the images itself, before the first forward.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.arguments import given
from lvtp.hf.families import unwrapped
from lvtp.importance import HOOKING

_OF_IMAGES = ("pixel", "mm_encoder_outputs", "inputs_embeds")  # how arguments begin that may hold some


class Pruning(Protocol):
    """What is called: `lvtp.hf.Pruning`."""

    thread: threading.Thread

    def forward(self, model: PreTrainedModel, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments for `model.forward` instead of `call`."""

    def called(self, call: dict[str, Any], outputs: Any) -> None:
        """Looks at what the model made of the arguments that `forward` returned."""

    def generate(self, original: Callable, model: PreTrainedModel, call: dict[str, Any]) -> Any:
        """What `model.generate` does instead of `original(**call)`."""


class _Installed:
    """The forward hooks and the `generate` of one model, shared by all its prunings.

    Both find the prunings through the model they are called on, so a deep copy of a patched model is an unpatched one.
    """

    def __init__(self, model: PreTrainedModel):
        self.prunings: tuple[Pruning, ...] = ()  # in the order in which they began
        # from_pretrained puts a `generate` of the checkpoint's own on the instance, if it has one. Bound to the model,
        # it would keep it alive.
        own = model.__dict__.get("generate")
        self._bound = getattr(own, "__self__", None) is model
        self._own_generate = own.__func__ if self._bound else own
        with HOOKING:
            self._hooks = (
                model.register_forward_pre_hook(_before_forward, with_kwargs=True, prepend=True),
                model.register_forward_hook(_after_forward, with_kwargs=True),
            )
        self._generate = _generate_of(type(model), self._own_generate, self._bound)
        model.generate = MethodType(self._generate, model)

    def uninstall(self, model: PreTrainedModel) -> None:
        with HOOKING:
            for hook in self._hooks:
                hook.remove()
        # Somebody else may have wrapped ours meanwhile: then it stays, and passes every call on.
        if getattr(model.__dict__.get("generate"), "__func__", None) is self._generate:
            del model.generate
            if self._own_generate is not None:
                model.generate = MethodType(self._own_generate, model) if self._bound else self._own_generate


_INSTALLED: WeakKeyDictionary[PreTrainedModel, _Installed] = WeakKeyDictionary()
_INSTALLING = threading.Lock()


def install(model: PreTrainedModel, pruning: Pruning) -> None:
    """From now on `pruning` is one of those of `model`."""
    with _INSTALLING:
        if model not in _INSTALLED:
            _INSTALLED[model] = _Installed(model)
        _INSTALLED[model].prunings += (pruning,)


def uninstall(model: PreTrainedModel, pruning: Pruning) -> None:
    """Takes `pruning` away; with the last one, everything that was installed on `model`."""
    with _INSTALLING:
        installed = _INSTALLED.get(model)
        if installed is None or pruning not in installed.prunings:
            return
        installed.prunings = tuple(other for other in installed.prunings if other is not pruning)
        if not installed.prunings:
            installed.uninstall(model)
            del _INSTALLED[model]


def _pruning_of(model: PreTrainedModel) -> Pruning | None:
    """The pruning that counts for a call of `model` from this thread; `prune` says which."""
    # A replica of DataParallel, a shallow copy, has the `generate` of the model that it copies.
    installed = _INSTALLED.get(getattr(model.__dict__.get("generate"), "__self__", model))
    prunings = () if installed is None else installed.prunings
    threads = {pruning.thread for pruning in prunings}
    if not threads:
        return None
    here = threading.current_thread()
    thread = here if here in threads else prunings[0].thread
    return [pruning for pruning in prunings if pruning.thread is thread][-1]


def _is_step(kwargs: dict[str, Any]) -> bool:
    """Whether it is a step of `generate`, with positions, a cache and tokens alone: it goes straight through, which
    torch.compile can trace."""
    images = any(name.startswith(_OF_IMAGES) and value is not None for name, value in kwargs.items())
    return kwargs.get("position_ids") is not None and given(kwargs, "cache") is not None and not images


def _before_forward(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any] | None = None):
    # torch calls a hook without `kwargs` if another thread takes it away meanwhile.
    if kwargs is None or (not args and _is_step(kwargs)):
        return None
    pruning = _pruning_of(model)
    if pruning is None:
        return None
    return (), pruning.forward(model, _named(type(model).forward, model, args, kwargs))


def _after_forward(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], outputs: Any = None) -> None:
    if outputs is None or _is_step(kwargs):  # as above; a step leaves nothing to note
        return
    pruning = _pruning_of(model)
    if pruning is not None:
        pruning.called(kwargs, outputs)


def before_tuner(tuner: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None):
    return _before_forward(unwrapped(tuner.model), args, kwargs)


def _generate_of(model_class: type[PreTrainedModel], own: Callable | None, bound: bool) -> Callable:
    """`own`: the checkpoint's, which gets the model if it was `bound` to it."""

    # generate's signature is part of its interface: transformers and its users inspect it.
    @functools.wraps(model_class.generate)
    def generate(model: PreTrainedModel, *args, **kwargs):
        original = own if own is not None and not bound else MethodType(own or model_class.generate, model)
        pruning = _pruning_of(model)
        if pruning is None:
            return original(*args, **kwargs)
        call = _named(model_class.generate, model, args, kwargs)
        if call.get("input_ids") is None and call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        return pruning.generate(original, model, call)

    return generate


def _named(method: Callable, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(method)
    named = dict(signature.bind_partial(model, *args, **kwargs).arguments)
    receiver, *_ = signature.parameters
    named.pop(receiver)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
