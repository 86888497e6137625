"""What the table reports: medians of interleaved runs, FLOPs counted by torch, and the machine they come from."""

import platform
import statistics
import time
from collections.abc import Callable, Hashable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.auto import AutoModelForCausalLM

import lvtp

K = TypeVar("K", bound=Hashable)  # the name of a variant

WARM_UP, AT_LEAST = 2, 3  # rounds
PATIENCE = 20  # seconds after which a busy or slow machine is let off further rounds

# LLaVA-1.5-7B's language model (Vicuna-7B v1.5, its vocabulary padded for the image token): llava-hf/llava-1.5-7b-hf.
LLAVA_7B_TEXT = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
)


def median_times(variants: dict[K, Callable[[], object]], rounds: int, device: torch.device) -> dict[K, float]:
    """Median seconds of each variant. Rounds run every variant once, so that drift of the clock hits all alike."""
    times: dict[K, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    for r in range(WARM_UP + rounds):
        if r >= WARM_UP + AT_LEAST and time.perf_counter() - begin > PATIENCE:
            break
        for name, call in variants.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if r >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def serving_backend(call: Callable[[], Tensor]) -> str:
    """The first of lvtp's backends that can run `call`, which must not be pinned to one itself."""
    for backend in ("native", "triton") if torch.cuda.is_available() else ("native",):
        try:
            with lvtp.use_backend(backend):
                call()
        except RuntimeError:  # an explicit backend that cannot serve a call says so; the next one may
            continue
        return backend
    return "reference"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prefill_flops(config: PretrainedConfig, tokens: int) -> int:
    """FLOPs of one prefill of `tokens` tokens (batch 1, logits of the last one), counted on the meta device.

    A product of [m, k] and [k, n] counts 2 m k n, attention as the full square; nothing is computed or allocated.
    """
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        embeddings = torch.empty(1, tokens, config.hidden_size, dtype=model.dtype)
        # A ready-made 4-D mask: building one reads values, which a meta tensor does not have.
        mask = torch.empty(1, 1, tokens, tokens, dtype=model.dtype)
        with FlopCounterMode(display=False) as counter:
            model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return counter.get_total_flops()


def flops_removed(config: PretrainedConfig, text: int, visual: int, budgets: list[int]) -> dict[int, float]:
    """Share of the visual tokens' prefill FLOPs that goes when only k of them stay, for each k.

    With F(n) the FLOPs of a prefill of n tokens: (F(text + visual) - F(text + k)) / (F(text + visual) - F(text)).
    The vision tower runs either way and is in neither difference.
    """
    full, bare = prefill_flops(config, text + visual), prefill_flops(config, text)
    return {k: (full - prefill_flops(config, text + k)) / (full - bare) for k in budgets}


def machine(device: torch.device) -> str:
    """Processor, threads, torch and date, in one line."""
    parts = [_cpu_name(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join([*parts, datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")])


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
