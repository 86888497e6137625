"""Every Triton kernel compiles for every chip we name, on a machine without a GPU: nothing spills, shared memory fits.

The launchers themselves choose what is compiled: they run on meta tensors, and their launches are recorded, not made.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from lvtp import triton_kernels  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes that these versions save around the call of a division, outside of every loop, on sm_80. 3.9 saves none.
SPILLED = {"3.6": 12, "3.7": 24}.get(triton.__version__[:3], 0)
SHARED = 48 * 1024  # what every chip gives without being asked for more
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(name):
    """Arguments of operator `name` that make its launcher choose every kind of configuration."""
    one, llava, flexible, video = (2, 1, 3), (2, 577, 1024), (1, 1500, 1152), (1, 16384, 1280)
    for b, n, d in (one, llava, flexible, video):
        s, sim = empty(b, n), empty(b, n, n)
        mask, labels = empty(b, n, dtype=torch.bool), empty(b, n, dtype=torch.int64)
        x = empty(b, n, d)
        half = x.half() if n < 2000 else x.bfloat16()
        k = min(n, 64)
        yield from {
            "cosine_similarity": [(x,), (half,)],
            "mean_similarity": [(x,), (half, mask)],
            "greedy_suppression": [(s, sim, k, 20.0, mask), (s.double(), sim.half(), n)],
            "cluster_nms": [(s, labels, sim, 0.5, mask), (s.half(), labels, sim, s[:, 0])],
            "id_selection": [(half, s, k, 20.0, mask)],
            "prune_sid": [(x, None, k, 0, "token", None, mask), (half, s, n, 0, "feature", labels)],
            "psca": [(x, k), (half, max(1, k // 4), "token")],
            "dynamic_budget": [(x, b * n)],
        }[name]


def source(kernel, args, kwargs):
    """What triton.compile takes, for one launch: types, constants, and what Triton sees in values by itself."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        k: v for k, v in kwargs.items() if k in kernel.arg_names
    }
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        divisible = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if divisible:
            attributes[position,] = [["tt.divisibility", 16]]
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    key = (kernel.fn.__name__, str(signature), str(constants), str(attributes), str(options))
    return key, ASTSource(kernel, signature, constants, attributes), options


@pytest.fixture(scope="module")
def launches():
    """All different launches of all operators: key -> (source, options)."""
    recorded = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        key, compiled_from, options = source(kernel, args, kwargs)
        recorded[key] = (compiled_from, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        for name in triton_kernels.OPERATORS:
            for args in calls(name):
                triton_kernels.launcher(name)(*args)
    return recorded


def usage(compiled, target, folder):
    """Registers, and bytes spilled to memory, as the chip's own tools report them."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        number = {key: int(value) for key, value in re.findall(r"\.(\w+_count|\w+_fixed_size):\s+(\d+)", text)}
        return number["vgpr_count"], number["private_segment_fixed_size"] + number["vgpr_spill_count"]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    said = subprocess.run(
        [NVIDIA / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    registers, stack, local = map(int, found)
    return registers, spilled_bytes(compiled.asm["ptx"], folder) if stack + local > 0 else 0


def spilled_bytes(ptx, folder):
    """A frame on the stack may also be that of a call, such as a division's slow path: only the assembler knows."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    chip = re.search(r"\.target (sm_\w+)", ptx)[1]
    newer = NVIDIA / "ptxas-blackwell"
    tool = newer if newer.exists() and chip.startswith("sm_1") else NVIDIA / "ptxas"
    command = [tool, "-v", "--fmad=false", f"--gpu-name={chip}", source, "-o", folder / "again.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", said.stdout + said.stderr))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("chip", TARGETS)
def test_compiles_without_spilling(chip, launches, tmp_path):
    assert {key[0] for key in launches} >= {
        "greedy_suppression_kernel",
        "similarity_tiles_kernel",
        "cluster_nms_kernel",
    }
    most, spilled = {}, []
    for key, (compiled_from, options) in launches.items():
        compiled = triton.compile(compiled_from, target=TARGETS[chip], options=options)
        registers, spills = usage(compiled, TARGETS[chip], tmp_path)
        if spills > SPILLED:
            spilled.append(f"{key}: {spills} bytes, {registers} registers")
        assert compiled.metadata.shared <= SHARED, f"{key}: {compiled.metadata.shared} bytes of shared memory"
        before = most.get(key[0], (0, 0))
        most[key[0]] = (max(before[0], registers), max(before[1], compiled.metadata.shared))
    assert not spilled, "\n".join(spilled)
    for kernel, (registers, shared) in sorted(most.items()):
        print(f"{chip} {kernel}: {registers} registers, {shared} bytes shared")  # pytest -rP shows it
