"""What the tiny random models of the families share, and the inputs of a call."""

import torch
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMAGE_TOKEN, VIDEO_TOKEN = 120, 121
VOCABULARY = 128
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def text_config():
    return LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=4096, pad_token_id=0, eos_token_id=None, bos_token_id=1,
        initializer_range=0.3,
    )  # fmt: skip


def finish(model, attention="sdpa"):
    """The model ready for tests; the default init is so small that images would hardly matter."""
    model = model.eval()
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, weight in model.model.multi_modal_projector.named_parameters():
            if "norm" not in name:
                weight.normal_(std=0.5 if "weight" in name else 0.1)
        for name, weight in model.model.vision_tower.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:  # attention that is not nearly uniform
                weight.mul_(8)
        model.lm_head.weight[[IMAGE_TOKEN, VIDEO_TOKEN]] = 0  # never generated: without a cache they would count
    return model


def footprint(model):
    """Everything that pruning could leave: attributes, hooks and configs of every module, and attention functions."""
    modules = {
        name: (
            sorted(vars(module)),
            [str(value) for key, value in sorted(vars(module).items()) if "hooks" in key],
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    }
    return modules, sorted(ALL_ATTENTION_FUNCTIONS)


def visual(ids):
    """Which tokens are placeholders."""
    return (ids == IMAGE_TOKEN) | (ids == VIDEO_TOKEN)


def padded(ids, side):
    """`input_ids` and `attention_mask` [B, S] of prompts of several lengths."""
    width = max(map(len, ids))
    input_ids = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, content in enumerate(ids):
        columns = slice(width - len(content), width) if side == "left" else slice(0, len(content))
        input_ids[row, columns] = content
        mask[row, columns] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def prompts(rows, length, side="left", seed=0):
    """`input_ids` and `attention_mask`. A row holds ints (that many random text tokens) and images.

    Args:
        length: from an image to its placeholder token and how many there are of it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for row in rows:
        parts = []
        for part in row:
            if isinstance(part, int):
                parts.append(torch.randint(2, IMAGE_TOKEN, (part,), generator=generator))
            else:
                token, count = length(part)
                parts.append(torch.full((count,), token))
        ids.append(torch.cat(parts))
    return padded(ids, side), generator


def with_completions(inputs, lengths):
    """The prompts, padded on the left; after each, a completion of that many random tokens, padded on the right."""
    generator = torch.Generator().manual_seed(5)
    new = torch.randint(2, 100, (len(lengths), max(lengths)), generator=generator)
    new = torch.nn.functional.pad(new, (0, 1))  # a column that none fills
    mask = (torch.arange(new.shape[1]) < torch.tensor(lengths)[:, None]).long()
    added = {"input_ids": new * mask, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(mask)}
    return {
        name: torch.cat([value, added[name].to(value.dtype)], dim=1) if name in added else value
        for name, value in inputs.items()
    }
