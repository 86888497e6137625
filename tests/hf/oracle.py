"""Pruned calls assembled by hand, token by token, with no help from lvtp.hf.

Importance comes from the attention maps of an eager copy of the tower, and the prompt goes in as `inputs_embeds`. What
differs from family to family is a list of `Image`.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import lvtp


@dataclass
class Image:
    """An image or video of the unpruned prompt, and what is left of it."""

    size: int  # placeholders
    kept: list[int]  # those that stay, ascending
    vectors: list[Tensor]  # [D] each: what stands there


@dataclass
class Oracle:
    embeds: Tensor  # [B, S', D], padded on the left
    mask: Tensor  # [B, S']
    positions: Tensor  # [B, S'], or with more axes before
    kept: list[list[int]]  # row b: columns of the original prompt
    next_position: list[int]  # row b: the position of the token after the prompt

    def logits(self, model):
        call = {"inputs_embeds": self.embeds, "attention_mask": self.mask, "position_ids": self.positions}
        return model(**call, use_cache=False).logits

    def loss(self, model, labels):
        """Cross entropy of each token and the one before it; `labels` [B, S']."""
        return torch.nn.functional.cross_entropy(self.logits(model)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def going_on(self):
        """[B, 1], or with more axes before: positions of the token after the prompt."""
        return torch.tensor(self.next_position)[:, None]

    def read(self, model, tokens):
        """The oracle of the prompt and then `tokens` [B, n]."""
        return replace(
            self,
            embeds=torch.cat([self.embeds, model.get_input_embeddings()(tokens)], dim=1),
            mask=torch.cat([self.mask, torch.ones_like(tokens)], dim=1),
            positions=torch.cat([self.positions, self.going_on() + torch.arange(tokens.shape[1])], dim=-1),
            next_position=[position + tokens.shape[1] for position in self.next_position],
        )

    def greedy(self, model, new):
        """[B, new], one uncached forward a token."""
        oracle, tokens = self, []
        for _ in range(new):
            tokens.append(oracle.logits(model)[:, -1].argmax(-1, keepdim=True))
            oracle = oracle.read(model, tokens[-1])
        return torch.cat(tokens, dim=1)

    def generate(self, model, **kwargs):
        """[R, new]: transformers' own generate."""
        call = {"inputs_embeds": self.embeds.detach(), "attention_mask": self.mask, "position_ids": self.positions}
        return model.generate(**call, **kwargs)

    def repeat(self, times):
        """The oracle of each prompt that many times."""
        return replace(
            self,
            embeds=self.embeds.repeat_interleave(times, dim=0),
            mask=self.mask.repeat_interleave(times, dim=0),
            positions=self.positions.repeat_interleave(times, dim=-2),
            next_position=[position for position in self.next_position for _ in range(times)],
        )


def eager_attention(model, pixels, layer):
    """[n, heads, tokens, tokens]"""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    return tower(pixels, output_attentions=True).attentions[layer]


def choose(features, importance, k, method="id_selection"):
    """The kept tokens of one unit, ascending, from [N, Dv] and [N]."""
    features, importance = features.detach()[None], importance.detach()[None]
    if k >= features.shape[1]:
        return list(range(features.shape[1]))
    if method == "prune_sid":
        return lvtp.prune_sid(features, importance, k)[0].tolist()
    return sorted(lvtp.id_selection(features, importance, k)[0].tolist())


def assemble(model, inputs, images, positions="compact"):
    """`images`: those of each placeholder token, in prompt order: {token: [Image, ...]}."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    queues = {token: list(of_kind) for token, of_kind in images.items()}
    slots = dict.fromkeys(queues, 0)
    rows, places, kept, nexts = [], [], [], []
    for row in range(len(ids)):
        place = 0
        embeds, numbers, columns = [], [], []
        for column, token in enumerate(ids[row].tolist()):
            if not mask[row, column]:
                continue
            vector = None
            if token in queues:
                image, slot = queues[token][0], slots[token]
                if slot in image.kept:
                    vector = image.vectors[image.kept.index(slot)]
                slots[token] = (slot + 1) % image.size
                if slots[token] == 0:
                    queues[token].pop(0)
            else:
                vector = model.get_input_embeddings().weight[token]
            if vector is not None:
                embeds.append(vector)
                numbers.append(place)
                columns.append(column)
            place += 1
        rows.append(torch.stack(embeds))
        places.append(torch.tensor(numbers) if positions == "original" else torch.arange(len(numbers)))
        kept.append(columns)
        nexts.append(place if positions == "original" else len(numbers))
    assert not any(queues.values())
    width = max(map(len, rows))

    def left(items):
        return torch.stack([torch.cat([i.new_zeros((width - len(i), *i.shape[1:])), i]) for i in items])

    mask = left([torch.ones(len(r), dtype=torch.long) for r in rows])
    return Oracle(left(rows), mask, left(places), kept, nexts)


def relative_error(got, wanted, where=None):
    if where is not None:
        got, wanted = got[where.bool()], wanted[where.bool()]
    return ((got - wanted).abs().max() / wanted.abs().max()).item()
