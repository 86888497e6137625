"""`pytest bench --benchmark-only`: each operator beside the reference, on the CPU and, where there is one, on the GPU.

The figures are those of the machine that runs it; `--benchmark-json` keeps them with its name.
"""

import pytest
import torch

import lvtp
from bench.shapes import SHAPES, Shape

DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))


def arguments(name: str, shape: Shape, device: str) -> tuple:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(40, shape.features, generator=g)
    member = torch.randint(0, 40, (shape.images, shape.tokens), generator=g)
    noise = torch.randn(shape.images, shape.tokens, shape.features, generator=g)
    features = (centres[member] + 0.5 * noise).to(device)
    importance = torch.rand(shape.images, shape.tokens, generator=g).to(device)
    return {
        "cosine_similarity": (features,),
        "mean_similarity": (features,),
        "id_selection": (features, importance, shape.keep),
        "psca": (features, shape.keep // 4),
        "prune_sid": (features, importance, shape.keep),
    }[name]


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        (device, backend)
        for device in DEVICES
        for backend in ("native", "triton", "reference")
        if device == "cuda" or backend != "triton"
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.model} {s.images}x{s.tokens}x{s.features} k={s.keep}")
@pytest.mark.parametrize("name", ["cosine_similarity", "mean_similarity", "id_selection", "psca", "prune_sid"])
def test_operator(benchmark, name, shape, device, backend):
    if backend == "native" and not lvtp.ops._has_kernel(name, device):
        pytest.skip(f"no compiled kernel of {name} for {device}")
    args = arguments(name, shape, device)
    benchmark.group = f"{name}, {shape.model}, {device}"
    benchmark.extra_info.update(
        shape._asdict(), device=device, torch=torch.__version__, threads=torch.get_num_threads()
    )

    def run():
        getattr(lvtp, name)(*args)
        if device == "cuda":
            torch.cuda.synchronize()

    with lvtp.use_backend(backend):
        benchmark.pedantic(run, rounds=7, iterations=1, warmup_rounds=2)
