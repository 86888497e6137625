"""Pruned models for lmms-eval, which finds them as `--model lvtp` once both packages are installed.

    lmms-eval --model lvtp --model_args pretrained=llava-hf/llava-1.5-7b-hf,keep=64 --tasks pope,gqa --batch_size 16

One batch is one call of `generate`.
"""

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria

import lvtp


def manifest():
    """What lmms-eval's entry point asks for: under which name to load which class."""
    from lmms_eval.models.registry_v2 import ModelManifest  # that package loads this module

    return ModelManifest("lvtp", chat_class_path=f"{__name__}.PrunedModel")


class PrunedModel(lmms):
    """A checkpoint of a family in `lvtp.hf.supported()`, its visual tokens pruned in every call.

    Messages go through the processor's own chat template; videos are sampled by the processor's own rule.
    """

    is_simple = False  # it takes messages

    def __init__(
        self,
        pretrained: str,
        method: str = "id_selection",
        keep: float = 64,
        *,
        batch_size: int = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        system_prompt: str = "",
        **pruning,
    ):
        """The arguments are what `--model_args` can hold.

        Args:
            pretrained: a checkpoint on the hub, or a folder.
            method, keep: see `lvtp.hf.prune`; keep=1.0 is the unpruned model.
            device: where to put the model, "auto" for all devices; None is the device of this process.
            dtype, attn_implementation: see `from_pretrained` of transformers.
            system_prompt: text, or a file that holds it.
            pruning: everything else that `lvtp.hf.prune` takes.
        """
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            dtype=dtype,
            device_map=device or str(self.accelerator.device),
            attn_implementation=attn_implementation,
        ).eval()
        self.device = self.model.device
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.processor.tokenizer.padding_side = "left"
        self.batch_size = int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self._pruning = lvtp.hf.patch(self.model, method, keep, **pruning)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. One ends before the first of the task's `until` in it, and where the
        model ends it. A blank line ends none: lmms-eval puts that in the `until` of every task that names none, and its
        own Qwen2.5-VL leaves it out, too."""
        # A batch shares its generation settings, and the longest questions come first.
        collator = utils.Collator(
            [request.args for request in requests], lambda args: -len(args[0]), lambda args: args[2], grouping=True
        )
        answers = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answers") as bar:
            for batch in collator.get_batched(n=self.batch_size):
                _, to_messages, settings, documents, tasks, splits = zip(*batch, strict=True)
                rows = zip(to_messages, tasks, splits, documents, strict=True)
                messages = [make(self.task_dict[task][split][document]) for make, task, split, document in rows]
                answers += self._answer(messages, settings[0])
                bar.update(len(batch))
        return collator.get_original(answers)

    def _answer(self, conversations: list[list[dict]], settings: dict) -> list[GenerationResult]:
        inputs = self.processor.apply_chat_template(
            [self._apply_system_prompt(messages, self.system_prompt) for messages in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, self.model.dtype)
        temperature = settings.get("temperature") or 0
        sample = temperature > 0 and settings.get("do_sample", True)
        tokenizer = self.processor.tokenizer
        answered = _Answered(tokenizer, _until(settings))
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=settings.get("max_new_tokens", 1024),
            num_beams=settings.get("num_beams", 1),
            do_sample=sample,
            temperature=temperature if sample else None,
            top_p=settings.get("top_p") if sample else None,
            top_k=settings.get("top_k") if sample else None,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=[answered],
        )[:, answered.start :]
        texts = map(answered.cut, self.processor.batch_decode(tokens, skip_special_tokens=True))
        pruned = self._pruning.last  # None: no images
        read = (inputs["attention_mask"] if pruned is None else pruned.kept).sum(dim=1).tolist()
        written = (tokens != tokenizer.pad_token_id).sum(dim=1).tolist()
        counts = map(TokenCounts, read, written)
        return [GenerationResult(text, count) for text, count in zip(texts, counts, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lvtp answers by generating; lmms-eval has no likelihood tasks for chat models")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "lvtp answers one question at a time; lmms-eval's tasks of several rounds are not supported"
        )


def _until(settings: dict) -> list[str]:
    until = settings.get("until") or []
    return [term for term in ([until] if isinstance(until, str) else until) if term not in ("", "\n\n")]


class _Answered(StoppingCriteria):
    """Stops a row once one of the strings stands in its answer. It also notes where answers start."""

    def __init__(self, tokenizer, until: list[str]):
        self._tokenizer, self._until = tokenizer, until
        # A token that is shown has at least a byte; and some room for those that are not.
        self._latest = 2 * max((len(term.encode()) for term in until), default=0) + 16
        self.start = 0

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self.start = self.start or input_ids.shape[1] - 1  # at the first call there is one new token
        tokens = input_ids[:, max(self.start, input_ids.shape[1] - self._latest) :]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True) if self._until else [""] * len(tokens)
        ends = [any(term in text for term in self._until) for text in texts]
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)

    def cut(self, text: str) -> str:
        """The text up to the first of the strings."""
        for term in self._until:
            text = text.split(term)[0]
        return text
