"""What the arguments of a call are named. transformers renames some, and goes on taking the old names for a while."""

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

# Newest first; `outputs` of a model have the same names. "cache" is from 5.24, where "past_key_values" is taken until
# 5.40, and "cache_params" by `generate`.
_NAMES = {"cache": ("cache", "past_key_values", "cache_params")}


def name_in(call: Mapping[str, Any], argument: str) -> str | None:
    """The name under which `call` gives `argument`; None if it does not, or gives None."""
    return next((name for name in _NAMES.get(argument, (argument,)) if call.get(name) is not None), None)


def given(call: Mapping[str, Any], argument: str) -> Any:
    """The value of `argument` under any of its names; None if it is not given."""
    name = name_in(call, argument)
    return None if name is None else call[name]


def returned(outputs: ModelOutput, field: str) -> Any:
    """The value of `field` under the name that the installed transformers has for it; None if there is none."""
    return next((getattr(outputs, name) for name in _NAMES.get(field, (field,)) if hasattr(outputs, name)), None)


def filled_cache(call: Mapping[str, Any]) -> Cache | None:
    """The key-value cache of an earlier turn that the call continues, if any."""
    cache = given(call, "cache")
    return cache if cache is not None and cache.get_seq_length() > 0 else None
