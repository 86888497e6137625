"""How the tokens of an image or video lie in the prompt, and which of its placeholders stay."""

from dataclasses import dataclass

import torch
from torch import Tensor


def check_room(count: int, room: int) -> None:
    """Raises unless `count` tokens of crops fit into the placeholders of their image."""
    if count > room:
        raise ValueError(
            f"keep must leave at most the {room} tokens that an image has in the prompt after unpadding, got {count} "
            "over all its crops; scope='image' counts after unpadding"
        )


@dataclass(frozen=True)
class Layout:
    """An image or video whose M placeholders are not just the tokens of one unit.

    Placeholders that are no newlines are the tokens of its units, one unit after another; unless there are `crops`.
    """

    units: int  # how many units it is cut into
    newline: Tensor  # bool [M]: separators after each row, which no selector sees
    row: Tensor  # int64 [M]: which row a placeholder stands in
    # [sum N, D]: the tokens of the units before they are packed into a grid. Padding is among them and newlines are
    # not, so they have no placeholders of their own: those that are kept take the first ones.
    crops: Tensor | None = None

    def kept(self, chosen: Tensor, newline: str) -> Tensor:
        """The placeholders that stay, bool [M], when of its units' tokens those `chosen` bool [sum N] do.

        If all of them do, so do all newlines: the image is what it was.
        """
        chosen = chosen.to(self.newline.device)
        if bool(chosen.all()):
            return torch.ones_like(self.newline)
        if self.crops is not None:
            count, room = int(chosen.sum()), len(self.newline)
            check_room(count, room)
            return torch.arange(room) < count
        kept = torch.zeros_like(self.newline)
        kept[~self.newline] = chosen
        if newline == "all":
            return kept | self.newline
        if newline == "rows":
            return kept | (self.newline & torch.isin(self.row, self.row[kept]))
        return kept

    def tokens(self, projected: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
        """What the language model reads in the place of the `kept` placeholders: [K, D], of `projected` [M, D]."""
        if self.crops is None or bool(chosen.all()):
            return projected[kept.to(projected.device)]
        return self.crops[chosen.to(self.crops.device)]
