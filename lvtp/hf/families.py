"""The families that are served. A new one is a file beside `llava.py` and an entry here."""

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Family
from lvtp.hf.internvl import InternVL
from lvtp.hf.llava import Llava
from lvtp.hf.llava_next import LlavaNext
from lvtp.hf.llava_onevision import LlavaOnevision
from lvtp.hf.options import Options
from lvtp.hf.prompt import check_decoder
from lvtp.hf.qwen2_5_vl import Qwen25VL
from lvtp.hf.qwen2_vl import Qwen2VL
from lvtp.hf.qwen3_vl import Qwen3VL, Qwen3VLMoe

_FAMILIES: tuple[Family, ...] = (
    Llava(),
    LlavaNext(),
    LlavaOnevision(),
    InternVL(),
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Qwen3VLMoe(),
)


def supported() -> tuple[str, ...]:
    """The transformers model classes that `prune`, `patch` and `prepare` take."""
    return tuple(family.model_class for family in _FAMILIES)


def unwrapped(model: Any) -> Any:
    """The model inside what `torch.compile` returned, a `PeftModel`, a pipeline; any other as it is."""
    while (inside := _inside(model)) is not model:
        model = inside
    return model


def tuner_around(model: Any) -> nn.Module | None:
    """What a `PeftModel`, alone or in another wrapper, has around the model: its layer of adapters, if it has one."""
    while not hasattr(type(model), "get_base_model"):
        if (inside := _inside(model)) is model:
            return None
        model = inside
    return None if model.base_model is model.get_base_model() else model.base_model


def _inside(model: Any) -> Any:
    if hasattr(type(model), "get_base_model"):
        return model.get_base_model()
    if isinstance(model, nn.Module):
        return model._modules.get("_orig_mod", model)
    # By name: importing transformers.pipelines takes seconds.
    pipeline = any(base.__name__ == "Pipeline" for base in type(model).__mro__)
    return model.model if pipeline else model


def family_of(model: PreTrainedModel, options: Options) -> Family:
    """The family that serves `model`, after it has checked that it can do what `options` ask."""
    names = {base.__name__ for base in type(model).__mro__}
    for family in _FAMILIES:
        if family.model_class in names:
            _check_options(family, options)
            if options.score == "prompt":
                check_decoder(model)
            family.check(model, options)
            return family
    raise TypeError(f"model must be one of {', '.join(supported())}, got {type(model).__name__}")


def _check_options(family: Family, options: Options) -> None:
    if options.scope not in family.scopes:
        scopes = ", ".join(map(repr, family.scopes))
        raise ValueError(f"scope must be one of {scopes} for {family.model_class}, got {options.scope!r}")
    if options.newline is not None and options.newline not in family.newlines:
        takes = (
            f"one of {', '.join(map(repr, family.newlines))}"
            if family.newlines
            else "left out (it has no newline tokens)"
        )
        raise ValueError(f"newline must be {takes} for {family.model_class}, got {options.newline!r}")
