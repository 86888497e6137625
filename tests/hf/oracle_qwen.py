"""Pruned Qwen-VL calls assembled by hand, token by token, with no help from lvtp.hf.

Importance comes from the attention maps of an eager copy of the tower, positions from counting, and the prompt goes
straight to the language model as embeddings, with the deepstack features of the kept tokens where there are any.
"""

import copy
import sys
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from . import oracle
from .tiny import IMAGE_TOKEN, VIDEO_TOKEN, visual
from .tiny_qwen import MERGE, PATCH

SCORED_LAYER = {"qwen2_vl": 3, "qwen2_5_vl": 2, "qwen3_vl": 3, "qwen3_vl_moe": 3}
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
KINDS = {IMAGE_TOKEN: "image", VIDEO_TOKEN: "video"}


@dataclass
class Oracle(oracle.Oracle):
    """Positions are [4, B, S']: numbered through, then time, height and width."""

    ids: Tensor  # [B, S']
    deepstack: list[Tensor] = field(default_factory=list)  # a layer: [visual tokens, D]
    encoded: dict[str, ModelOutput] = field(default_factory=dict)

    def logits(self, model):
        extra = {}
        if self.deepstack:
            shown = torch.zeros_like(self.mask, dtype=torch.bool)
            shown[:, : self.ids.shape[1]] = visual(self.ids)
            extra = {"visual_pos_masks": shown, "deepstack_visual_embeds": self.deepstack}
        hidden = model.model.language_model(
            inputs_embeds=self.embeds, attention_mask=self.mask, position_ids=self.positions, use_cache=False, **extra
        ).last_hidden_state
        return model.lm_head(hidden)

    def going_on(self):
        axes = super().going_on()
        return torch.stack([self.mask.sum(1, keepdim=True), axes, axes, axes])

    def generate(self, model, **kwargs):
        call = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        outputs = model.generate(**call, mm_encoder_outputs=copy.copy(self.encoded), **kwargs)
        return outputs[:, self.ids.shape[1] :]

    def repeat(self, times):
        shown = visual(self.ids).sum(1).tolist()
        deepstack = [torch.cat([row.repeat(times, 1) for row in layer.split(shown)]) for layer in self.deepstack]
        return replace(super().repeat(times), ids=self.ids.repeat_interleave(times, dim=0), deepstack=deepstack)


def eager_maps(model, pixels, grid, layer=None):
    """[heads, n, n] of every segment that the layer reads."""
    tower = copy.deepcopy(model.model.visual)
    tower.set_attn_implementation("eager")
    layer = SCORED_LAYER[model.config.model_type] if layer is None else layer
    module, maps = sys.modules[type(tower).__module__], []
    eager = module.eager_attention_forward

    def record(layer_module, *args, **kwargs):
        output, weights = eager(layer_module, *args, **kwargs)
        if layer_module is tower.blocks[layer].attn:
            maps.append(weights[0])
        return output, weights

    module.eager_attention_forward = record
    try:
        tower(pixels, grid_thw=grid)
    finally:
        module.eager_attention_forward = eager
    return maps


def importance(model, pixels, grid):
    """[sum N] of merged tokens in raster order: received attention, averaged over heads, queries and merged patches."""
    received = torch.cat([weights.mean((0, 1)) for weights in eager_maps(model, pixels, grid)])
    blocks = received.view(-1, MERGE**2).mean(1)
    if model.config.model_type != "qwen2_5_vl":
        return blocks
    raster = torch.empty_like(blocks)
    raster[window_order(grid, model.config.vision_config.window_size // MERGE // PATCH)] = blocks
    return raster


def window_order(grid, side):
    """The raster index of each merged token in the order of the tower: window by window."""
    order, start = [], 0
    for t, h, w in grid.tolist():
        h, w = h // MERGE, w // MERGE
        for frame in range(t):
            for top in range(0, h, side):
                for left in range(0, w, side):
                    rows, columns = range(top, min(top + side, h)), range(left, min(left + side, w))
                    order += [start + frame * h * w + row * w + column for row in rows for column in columns]
        start += t * h * w
    return order


def select(model, kind, inputs, ks, method, scope):
    """Merged tokens [N, D], their deepstack features by layer, and the kept indices, one list a unit of the scope."""
    pixels, grid = inputs[PIXELS[kind]], inputs[f"{kind}_grid_thw"]
    output = getattr(model.model, f"get_{kind}_features")(pixels, grid)
    tokens = torch.cat(list(output.pooler_output))
    deepstack = [torch.cat(list(layer)) for layer in output.get("deepstack_features") or []]
    if scope == "frame":
        sizes = [h * w // MERGE**2 for t, h, w in grid.tolist() for _ in range(t)]
    else:
        sizes = [t * h * w // MERGE**2 for t, h, w in grid.tolist()]
    scores, chosen, start = importance(model, pixels, grid), [], 0
    for size in sizes:
        picks = oracle.choose(tokens[start : start + size], scores[start : start + size], ks.pop(0), method)
        chosen.append([start + pick for pick in picks])
        start += size
    return tokens, deepstack, chosen


def count(model, ids, grids, seconds):
    """(time, height, width) of every token of one unpadded prompt; takes the grids it passes from `grids`."""
    places, place = [], 0
    while len(places) < len(ids):
        kind = KINDS.get(ids[len(places)])
        if kind is None:
            places.append((place,) * 3)
            place += 1
            continue
        t, h, w = grids[kind].pop(0)
        h, w = h // MERGE, w // MERGE
        interval = 1
        if model.config.model_type == "qwen2_5_vl" and kind == "video":
            interval = model.config.vision_config.tokens_per_second * seconds.pop(0)
        for frame in range(t):
            time = place + int(frame * interval)
            places += [(time, place + y, place + x) for y in range(h) for x in range(w)]
        place += max(h, w)
    return places


def assemble(model, inputs, k, positions="original", method="id_selection", scope="image"):
    """`k`: of every unit, or a list with that of each: images first."""
    ids, mask, ks = inputs["input_ids"], inputs["attention_mask"], list(k) if isinstance(k, list) else [k] * 99
    shown = {kind: select(model, kind, inputs, ks, method, scope) for kind in PIXELS if PIXELS[kind] in inputs}
    wanted = {kind: {pick for unit in chosen for pick in unit} for kind, (_, _, chosen) in shown.items()}
    grids = {kind: inputs[f"{kind}_grid_thw"].tolist() for kind in shown}
    if "qwen3" in model.config.model_type and "video" in grids:  # every frame follows its own timestamp
        grids["video"] = [[1, h, w] for t, h, w in grids["video"] for _ in range(t)]
    seconds = inputs["second_per_grid_ts"].tolist() if "second_per_grid_ts" in inputs else [1] * 9
    seen = dict.fromkeys(shown, 0)
    table = model.get_input_embeddings().weight
    embeds, tokens, places, kept, nexts, deep = [], [], [], [], [], []
    for row in range(len(ids)):
        columns = mask[row].nonzero().flatten().tolist()
        numbers = count(model, ids[row, columns].tolist(), grids, seconds)
        keep, vectors = [], []
        for inside, column in enumerate(columns):
            kind = KINDS.get(ids[row, column].item())
            if kind is not None:
                pick, seen[kind] = seen[kind], seen[kind] + 1
                if pick not in wanted[kind]:
                    continue
                features, deepstack, _ = shown[kind]
                vectors.append(features[pick])
                deep.append([layer[pick] for layer in deepstack])
            else:
                vectors.append(table[ids[row, column]])
            keep.append(inside)
        through = list(range(len(keep)))
        axes = [numbers[inside] for inside in keep] if positions == "original" else [(i,) * 3 for i in through]
        embeds.append(torch.stack(vectors))
        tokens.append(ids[row, [columns[inside] for inside in keep]])
        places.append(torch.tensor([(i, *axis) for i, axis in zip(through, axes, strict=True)]))
        kept.append([columns[inside] for inside in keep])
        nexts.append(max(map(max, numbers)) + 1 if positions == "original" else len(keep))
    width = max(map(len, embeds))

    def left(items):
        return torch.stack([torch.cat([i.new_zeros(width - len(i), *i.shape[1:]), i]) for i in items])

    encoded = {}
    for kind, (features, deepstack, chosen) in shown.items():
        pooled = [features[unit].detach() for unit in chosen]
        encoded[kind] = BaseModelOutputWithPooling(pooler_output=pooled)
        if deepstack:
            layers = [[layer[unit].detach() for unit in chosen] for layer in deepstack]
            encoded[kind] = BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=layers)
    layers = [torch.stack(layer) for layer in zip(*deep, strict=True)]
    mask = left([torch.ones_like(row) for row in tokens])
    return Oracle(left(embeds), mask, left(places).permute(2, 0, 1), kept, nexts, left(tokens), layers, encoded)
