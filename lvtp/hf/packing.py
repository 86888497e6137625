"""Samples packed into one row of tokens, as collators without padding make them.

They are unpacked into a padded batch, shortened like any other, and packed again, so that a sample is pruned as if it
were alone.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import PreTrainedModel

from lvtp.hf.arguments import given
from lvtp.hf.sequence import laid_out, numbered

# What tells attention kernels where samples start, as transformers' DataCollatorWithFlattening returns it.
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def sample_lengths(call: dict[str, Any]) -> list[int] | None:
    """How many tokens each sample of a packed row has; None if the call is not packed.

    Samples are told by `cu_seq_lens_q` [samples + 1] or `seq_idx` [1, S], or by `position_ids` that start again, where
    transformers reads those so: without a mask and a cache. Of position ids with the axes time, height and width, all
    three start again.

    Raises ValueError for bounds that do not fit the row, and for what cannot go with packed samples.
    """
    ids = call["input_ids"]  # [B, S]
    starts = torch.zeros_like(ids[0], dtype=torch.bool)  # [S]
    if (bounds := call.get("cu_seq_lens_q")) is not None:
        told_by, edges = "cu_seq_lens_q", torch.as_tensor(bounds).tolist()
        if edges[:1] != [0] or edges[-1] != ids.numel() or sorted(set(edges)) != edges:
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {ids.numel()} tokens of input_ids, got {edges}")
        keys = call.get("cu_seq_lens_k")
        if keys is not None and torch.as_tensor(keys).tolist() != edges:
            raise ValueError("cu_seq_lens_k must equal cu_seq_lens_q")
        if len(ids) == 1:
            starts[edges[:-1]] = True
    elif (samples := call.get("seq_idx")) is not None:
        told_by = "seq_idx"
        if samples.shape != ids.shape:
            raise ValueError(f"seq_idx must have the shape of input_ids {list(ids.shape)}, got {list(samples.shape)}")
        starts[1:] = (samples[0].diff() != 0).to(ids.device)
    else:
        told_by, positions = "position_ids", call.get("position_ids")
        cached = given(call, "cache") is not None or call.get("use_cache") is True
        if positions is None or cached or call.get("attention_mask") is not None or len(ids) != 1:
            return None
        if positions.shape[-2:] != ids.shape or positions.dim() > 3:
            return None
        if positions.dim() == 3 and len(positions) == 3:
            starts = (positions[:, 0] == positions[:, 0, :1]).all(dim=0)
        else:
            numbers = positions.view(-1, ids.shape[1])[0]
            starts[1:] = (numbers.diff() <= 0).to(ids.device)
        if int(starts[1:].sum()) == 0:
            return None
    if len(ids) != 1:
        raise ValueError(f"{told_by} must be left out unless all samples are packed in one row, got {len(ids)} rows")
    mask = call.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError(f"attention_mask must be left out, or hide nothing, with samples packed by {told_by}")
    starts[0] = True
    edges = [*starts.nonzero()[:, 0].tolist(), ids.shape[1]]
    return [end - start for start, end in pairwise(edges)]


def unpacked(call: dict[str, Any], lengths: list[int], pad_token_id: int) -> dict[str, Any]:
    """The call with a row for each sample, [samples, longest], padded on the right."""
    ids, sizes = call["input_ids"], torch.tensor(lengths)
    places = (torch.arange(max(lengths)) < sizes[:, None]).to(ids.device)
    call = {name: value for name, value in call.items() if name not in _BOUNDS}
    if (positions := call.get("position_ids")) is not None and positions.dim() == 3 and len(positions) == 4:
        call["position_ids"] = positions[1:]  # the first one numbered the tokens of each sample through
    call["attention_mask"] = torch.ones_like(ids)
    return laid_out(call, torch.ones_like(ids, dtype=torch.bool), places, pad_token_id)


def packed(model: PreTrainedModel, call: dict[str, Any], whole: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """The shortened `call` of samples [samples, L], with `position_ids`, in one row, in which none reads another.

    `whole` is the call before it was unpacked.
    """
    real = call["attention_mask"].bool()
    lengths = real.sum(dim=1)
    numbers = numbered(real)
    if call.get("labels") is not None:  # the first token of a sample is not to be predicted from the one before
        call = {**call, "labels": call["labels"].masked_fill((numbers == 0).to(call["labels"].device), -100)}
    call = laid_out(call, real, real.new_ones(1, int(lengths.sum())), pad_token_id)
    ends = torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).int()
    longest = int(lengths.max())
    call |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    if whole.get("seq_idx") is not None:
        samples = torch.arange(len(lengths), device=real.device).repeat_interleave(lengths)
        call["seq_idx"] = samples[None].to(whole["seq_idx"].dtype)
    call["use_cache"] = False  # with one, transformers does not look at the position ids
    if call["position_ids"].dim() == 3:
        del call["attention_mask"]  # so that the first of the axes tells where samples start
    elif len(lengths) > 1:
        call["attention_mask"] = _apart(model, numbers[real][None])
    return call


def _apart(model: PreTrainedModel, numbers: Tensor) -> Any:
    """The mask of samples that start where `numbers` [1, S] do, as the model's attention takes it.

    Original positions have gaps, at which transformers would cut a sample in two.
    """
    like = numbers[..., None].to(model.get_input_embeddings().weight.dtype)
    return create_masks_for_generate(model.config, like, None, None, numbers)
