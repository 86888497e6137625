"""Encoding with a CLIP-like vision tower and a `multi_modal_projector`, shared by the LLaVA-like families."""

import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.family import Family, Size
from lvtp.hf.options import Options, Score
from lvtp.hf.threads import uncompiled
from lvtp.importance import AttentionTap, cls_attention, observed, received_attention

# Towers whose queries and keys leave q_proj and k_proj, or the norms after them, as the attention uses them; the value:
# has it a CLS token, at position 0.
_HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False, "internvl_vision": True}


class TowerFamily(Family):
    """A family whose tokens go through a CLIP-like tower and a projector."""

    def check(self, model: PreTrainedModel, options: Options) -> None:
        check_tower(model, options.tower_score)

    def sizes(self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], scope: str) -> list[Size]:
        tokens = tower_tokens(model, arguments)
        return [Size(tokens, (tokens,))] * len(arguments[self.modalities[modality]])


class Seen(NamedTuple):
    """What went through the encoder: n crops (or tiles, or frames) of N tokens."""

    outputs: ModelOutput  # what the model's own method returned
    projected: Tensor  # [n, N, D]: out of the projector
    features: Tensor  # [n, N, Dv]: into the projector
    importance: Tensor  # fp32 [n, N]


def tower_tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> int:
    """How many tokens of a crop leave the tower."""
    vision = model.config.vision_config
    sizes = [[side] * 2 if isinstance(side, int) else side for side in (vision.image_size, vision.patch_size)]
    tokens = math.prod(size // patch for size, patch in zip(*sizes, strict=True))
    return tokens + _HAS_CLS.get(vision.model_type, False) - (_strategy(model, arguments) == "default")


def check_tower(model: PreTrainedModel, score: Score) -> None:
    """Raises unless importance `score` can be read from the model's vision tower."""
    if callable(score):
        return
    tower = model.config.vision_config.model_type
    if tower not in _HAS_CLS:
        raise ValueError(
            f"score={score!r} needs a vision tower of type {', '.join(_HAS_CLS)}, got {tower}; "
            "pass score as a callable for any other"
        )
    if score == "cls" and not _HAS_CLS[tower]:
        raise ValueError(f"score='cls' needs a vision tower with a CLS token, got {tower}; use score='received'")


def encode_with_tower(
    model: PreTrainedModel,
    modality: str,
    arguments: dict[str, Any],
    score: Score,
    merge: Callable[[Tensor], Tensor] | None = None,
) -> Seen:
    """Calls the model's own `get_image_features` (or `get_video_features`) once.

    Args:
        merge: importance of the tower's tokens [n, T] -> of the projector's, [n, N]; None where these are the same.
    """
    core = model.base_model
    strategy = _strategy(model, arguments)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(_loaded(core))
        through: list[tuple[Tensor, Tensor]] = []  # what goes into the projector, and what comes out
        stack.enter_context(
            observed(core.multi_modal_projector, lambda args, output: through.append((args[0], output)))
        )
        if not callable(score):
            layer = arguments.get("vision_feature_layer")
            layer = core.config.vision_feature_layer if layer is None else layer
            attention = _attention(core.vision_tower, attention_layer(core.vision_tower, layer))
            tap = stack.enter_context(AttentionTap(attention, attention.num_heads))
        outputs = getattr(core, f"get_{modality}_features")(**arguments, return_dict=True)

    (features, projected), *_ = through
    features = features.detach()
    if callable(score):
        return Seen(outputs, projected, features, called(score, features))
    score = _resolve(score, model, strategy)
    rule = cls_attention if score == "cls" else received_attention
    importance = rule(tap.query, tap.key, attention.scale)  # [n, tower tokens]
    # "default" drops the tower's first token, whatever it is, and keeps the others in order.
    importance = importance[:, 1:] if strategy == "default" else importance
    return Seen(outputs, projected, features, importance if merge is None else merge(importance))


def _strategy(model: PreTrainedModel, arguments: dict[str, Any]) -> str:
    return arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy


def _attention(tower: PreTrainedModel, layer: int) -> nn.Module:
    if tower.config.model_type == "internvl_vision":
        return tower.encoder.layer[layer].attention
    return tower.encoder.layers[layer].self_attn


def attention_layer(tower: PreTrainedModel, vision_feature_layer: int | list[int]) -> int:
    """The layer whose output `hidden_states[vision_feature_layer]` is; of several, the deepest.

    `hidden_states` holds the embeddings first, so it has one entry more than there are layers: a negative index counts
    both alike, and a positive k is the output of layer k - 1.
    """
    layers = tower.config.num_hidden_layers
    wanted = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
    layer = max(index + layers if index < 0 else index - 1 for index in wanted)
    if not 0 <= layer < layers:
        raise ValueError(
            f"vision_feature_layer must name the output of one of the tower's {layers} layers to read importance from, "
            f"got {vision_feature_layer}; pass score as a callable otherwise"
        )
    return layer


def _resolve(score: str, model: PreTrainedModel, strategy: str) -> str:
    if score != "auto":
        return score
    has_cls = _HAS_CLS[model.config.vision_config.model_type]
    return "cls" if has_cls and strategy == "default" else "received"


def called(score: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """The importance, fp32 [n, N], that a caller's own `score` gives features [n, N, Dv]."""
    importance = score(features)
    if not isinstance(importance, Tensor) or importance.shape != features.shape[:2]:
        got = list(importance.shape) if isinstance(importance, Tensor) else type(importance).__name__
        raise ValueError(
            f"score must map features {list(features.shape)} to a tensor of shape {list(features.shape[:2])}, got {got}"
        )
    return importance.detach().float()


@contextmanager
def _loaded(module: nn.Module):
    """With the parameters of `module` itself (`image_newline`) in place, which accelerate may have offloaded: it loads
    them for `forward` alone."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)
