"""The model the selectors run in: an untrained LLaVA-1.5 of true token geometry, or a real checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

from lvtp.demo import DemoError, photo
from lvtp.demo.measure import LLAVA_7B_TEXT

VISUAL_TOKENS = photo.GRID**2
PROMPT = "USER: <image>\nWhat is in this photograph? ASSISTANT:"
SEED = 0

# LLaVA-1.5's vocabulary: Vicuna's 32,000 tokens, then the image placeholder, padded to 32,064.
BOS, WORDS, IMAGE_TOKEN, VOCABULARY = 1, range(3, 32000), 32000, 32064
TEXT_BEFORE, TEXT_AFTER = 35, 12  # tokens: about Vicuna's system prompt, and a short question


@dataclass(frozen=True)
class Subject:
    """A model with its inputs, ready to generate."""

    model: LlavaForConditionalGeneration
    inputs: dict[str, Tensor]  # what `generate` takes, batch 1
    trained: bool
    name: str
    decode: Callable[[Tensor], str]  # new token ids [T] to what is printed
    flops_config: PretrainedConfig  # the language model whose FLOPs the table counts
    flops_name: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def text_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1] - VISUAL_TOKENS


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def untrained() -> LlavaForConditionalGeneration:
    """LLaVA-1.5 with seeded random weights, 111 M parameters, fp32.

    What the selectors see has its true shape (336 px, 14 px patches, 576 tokens of 1024 features, CLS attention of the
    layer LLaVA reads); depth and the decoder's width are cut until it fits a laptop.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=4,  # of 24
            num_attention_heads=16,
            image_size=photo.SIDE,
            patch_size=photo.PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=512,  # of 4096
            intermediate_size=1376,
            num_hidden_layers=8,  # of 32
            num_attention_heads=8,
            vocab_size=VOCABULARY,
        ),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlavaForConditionalGeneration(config).eval()
    # Random logits could hit an end-of-text token at once; without one every run generates the same length.
    model.generation_config = GenerationConfig(bos_token_id=BOS, pad_token_id=0)
    return model


def untrained_subject(image: Image.Image) -> Subject:
    """The untrained model with a prompt of random word ids: it has no tokenizer, and no use for one."""
    model = untrained().to(default_device())
    words = torch.randint(
        WORDS.start, WORDS.stop, (TEXT_BEFORE - 1 + TEXT_AFTER,), generator=torch.Generator().manual_seed(SEED)
    )
    before, after = words.split((TEXT_BEFORE - 1, TEXT_AFTER))
    ids = torch.cat([torch.tensor([BOS]), before, torch.full((VISUAL_TOKENS,), IMAGE_TOKEN), after])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": photo.normalise(photo.to_tensor(image)),
    }
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return Subject(
        model=model,
        inputs={name: value.to(model.device) for name, value in inputs.items()},
        trained=False,
        name=f"untrained LLaVA-1.5 ({size:.0f} M random weights, seed {SEED})",
        decode=lambda ids: f"ids {' '.join(map(str, ids.tolist()))} (random weights: no meaning)",
        flops_config=LLAVA_7B_TEXT,
        flops_name="LLaVA-1.5-7B",
    )


def checkpoint_subject(name: str, image: Image.Image) -> Subject:
    """A trained LLaVA-1.5, by Hub id or folder. Safetensors only, no remote code. Raises DemoError."""
    device = default_device()
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise DemoError(f"{name} is not a folder. --model takes a Hub id or the folder of a checkpoint.")
    try:
        model, processor = _load(name, torch.float16 if device.type == "cuda" else torch.bfloat16)
    except DemoError:
        raise
    except Exception as error:  # whatever a checkpoint on disk or on the Hub can make its loaders raise
        reason = " ".join(str(error).split())
        raise DemoError(
            f"{name} cannot be loaded: {reason} ({type(error).__name__}). The demonstration takes a LLaVA-1.5 "
            "checkpoint in transformers format with safetensors weights, as a Hub id such as llava-hf/llava-1.5-7b-hf "
            "or as a local folder; without --model it runs on random weights and needs no download."
        ) from error
    inputs = processor(images=image, text=PROMPT, return_tensors="pt").to(device, model.dtype)
    found = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if found != VISUAL_TOKENS:
        raise DemoError(
            f"{name} turns the photograph into {found} visual tokens; the demonstration draws LLaVA-1.5's "
            f"{VISUAL_TOKENS} ({photo.GRID} x {photo.GRID} patches of {photo.PATCH} pixels)."
        )
    return Subject(
        model=model.to(device).eval(),
        inputs=dict(inputs),
        trained=True,
        name=name,
        decode=lambda ids: repr(processor.decode(ids, skip_special_tokens=True).strip()),
        flops_config=model.config.text_config,
        flops_name=name,
    )


def _load(name: str, dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, AutoProcessor]:
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type != "llava":
        raise DemoError(f'{name} is a "{config.model_type}" checkpoint; the demonstration takes LLaVA-1.5 ("llava").')
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    model, report = LlavaForConditionalGeneration.from_pretrained(
        name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    # transformers fills missing weights with random ones and only warns.
    if report["missing_keys"]:
        raise DemoError(f"{name} lacks weights, for example {sorted(report['missing_keys'])[0]}.")
    return model, processor
