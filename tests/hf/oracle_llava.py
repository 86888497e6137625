"""Pruned LLaVA-1.5 calls assembled by hand, token by token, with no help from lvtp.hf.

Importance comes from the attention maps of an eager copy of the tower, and the prompt goes in as `inputs_embeds`.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import lvtp


@dataclass
class Oracle:
    embeds: Tensor  # [B, S', D], padded on the left
    mask: Tensor  # [B, S']
    positions: Tensor  # [B, S']
    kept: list[list[int]]  # row b: columns of the original prompt

    def logits(self, model):
        return model(inputs_embeds=self.embeds, attention_mask=self.mask, position_ids=self.positions).logits

    def greedy(self, model, new):
        """[B, new], one uncached forward a token."""
        embeds, mask, positions, tokens = self.embeds, self.mask, self.positions, []
        for _ in range(new):
            logits = model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits  # fmt: skip
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
            embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[-1])], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        return torch.cat(tokens, dim=1)


def eager_attention(model, pixels, layer):
    """[n, heads, tokens, tokens]"""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    return tower(pixels, output_attentions=True).attentions[layer]


def select(model, pixels, k, method="id_selection"):
    """What the tower shows, what the selector keeps: projected [n, N, D] and ascending indices [n, k]."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    importance = eager_attention(model, pixels, -2).mean(1)[:, 0, 1:]
    if method == "id_selection":
        indices = lvtp.id_selection(hidden.detach(), importance.detach(), k).sort(dim=1).values
    else:
        indices = lvtp.prune_sid(hidden.detach(), importance.detach(), k)
    return model.model.multi_modal_projector(hidden), indices


def assemble(model, inputs, k, positions="compact", method="id_selection"):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    projected, chosen = select(model, inputs["pixel_values"], k, method)
    n = projected.shape[1]
    image = -1
    rows, places, kept = [], [], []
    for row in range(len(ids)):
        seen, place = 0, 0
        embeds, numbers, columns = [], [], []
        for column, token in enumerate(ids[row].tolist()):
            if not mask[row, column]:
                continue
            if token == model.config.image_token_id:
                image += seen % n == 0
                inside = seen % n
                seen += 1
                if inside in chosen[image].tolist():
                    embeds.append(projected[image, inside])
                    numbers.append(place)
                    columns.append(column)
            else:
                embeds.append(model.get_input_embeddings().weight[token])
                numbers.append(place)
                columns.append(column)
            place += 1
        rows.append(torch.stack(embeds))
        places.append(torch.tensor(numbers) if positions == "original" else torch.arange(len(numbers)))
        kept.append(columns)
    width = max(map(len, rows))

    def left(items, fill=0):
        return torch.stack([torch.cat([i.new_full((width - len(i), *i.shape[1:]), fill), i]) for i in items])

    return Oracle(left(rows), left([torch.ones(len(r), dtype=torch.long) for r in rows]), left(places), kept)


def relative_error(got, wanted, where=None):
    if where is not None:
        got, wanted = got[where.bool()], wanted[where.bool()]
    return ((got - wanted).abs().max() / wanted.abs().max()).item()
