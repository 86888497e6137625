"""What ptxas made of the CUDA kernels, read from the built library: no GPU is needed, and nothing is compiled again.

No kernel spills or uses local memory on any architecture, and registers and static shared memory are those of the
record beside this file. `python tests/test_cuda_resources.py` writes the record anew; look at its diff before you
commit it.
"""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import lvtp

RECORD = Path(__file__).with_name("cuda_resources.txt")
LIBRARY = lvtp.ops._LIBRARIES / "liblvtp_cuda.so"
ROOT = Path(__file__).parents[1]
USAGE = re.compile(r"^ Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE)
FILE = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_")
KERNEL = re.compile(r"\(anonymous namespace\)::(\w+(?:<.*?>)?)\(")


def cuobjdump():
    """CUDA's own tool, or the copy that Triton brings."""
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)


def usage():
    """(kernel, architecture) -> (registers, shared bytes, bytes of stack and local memory)."""
    dump = subprocess.run([cuobjdump(), "--dump-resource-usage", LIBRARY], capture_output=True, text=True, check=True)
    found = {}
    for section in re.split(r"^Fatbin elf code:$", dump.stdout, flags=re.MULTILINE)[1:]:
        arch = re.search(r"^arch = sm_(\w+)$", section, re.MULTILINE)[1]
        for symbol, registers, stack, shared, local in USAGE.findall(section):
            found[short_name(symbol), arch] = int(registers), int(shared), int(stack) + int(local)
    return found


@functools.cache
def short_name(symbol):
    """File and kernel, as in cluster_nms/suppress_in_groups<float>."""
    plain = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    kernel = re.sub(r"lvtp::cuda::|[(]int[)]| ", "", KERNEL.search(plain)[1])
    return f"{FILE.search(symbol)[1]}/{kernel}"


def table(found):
    archs = sorted({arch for _, arch in found}, key=lambda arch: int(arch.rstrip("af")))
    kernels = sorted({kernel for kernel, _ in found})
    width = max(map(len, kernels))
    lines = [f"# registers / bytes of static shared memory of each kernel, nvcc {built()['nvcc']}"]
    lines.append(f"{'':{width}}" + "".join(f"{'sm_' + arch:>11}" for arch in archs))
    for kernel in kernels:
        cells = ("{}/{}".format(*found[kernel, arch][:2]) if (kernel, arch) in found else "-" for arch in archs)
        lines.append(f"{kernel:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines) + "\n"


def built():
    return json.loads((LIBRARY.parent / "build.json").read_text())


needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc")
needs_tool = pytest.mark.skipif(not cuobjdump() or not shutil.which("c++filt"), reason="no cuobjdump or no c++filt")


@needs_library
@needs_tool
def test_no_kernel_spills_or_uses_local_memory():
    found = usage()
    assert len({kernel for kernel, _ in found}) > 10
    assert {key: bytes_used for key, (_, _, bytes_used) in found.items() if bytes_used > 0} == {}


@needs_library
@needs_tool
def test_every_kernel_is_built_for_every_architecture_of_the_build():
    wanted = {arch.removesuffix("-real") for arch in built()["cuda_architectures"]}
    found = usage()
    assert {arch for _, arch in found} == wanted
    assert len(found) == len({kernel for kernel, _ in found}) * len(wanted)


@needs_library
@needs_tool
def test_registers_and_shared_memory_are_those_on_record():
    recorded = RECORD.read_text()
    if built()["nvcc"] not in recorded.splitlines()[0]:
        pytest.skip(f"the record is of another nvcc: {recorded.splitlines()[0]}")
    now = table(usage())
    if recorded.splitlines()[1].split() != now.splitlines()[1].split():
        pytest.skip("the record is of other architectures")
    assert now == recorded, "if that was meant: python tests/test_cuda_resources.py"


def test_the_promised_architectures_are_the_default_of_the_build():
    default = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
    assert [arch.removesuffix("-real") for arch in default] == ["80", "86", "89", "90a", "100", "120"]


if __name__ == "__main__":
    RECORD.write_text(table(usage()))
    print(RECORD.read_text(), end="")
