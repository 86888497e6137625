"""Which GPUs are here, and whether the CUDA library was built for them, without initialising CUDA.

Asked while lvtp is imported: a CUDA context made then would break processes that fork later. NVML makes none.
"""

import ctypes
import re


def capabilities() -> list[tuple[int, int]]:
    """Compute capability of every NVIDIA GPU of the machine; empty where NVML is not to be had."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return []
        count, device = ctypes.c_uint(), ctypes.c_void_p()
        major, minor = ctypes.c_int(), ctypes.c_int()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        found = []
        for index in range(count.value):
            nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
            if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0:
                found.append((major.value, minor.value))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return []
    return found


def runs_on(architectures: list[str], chip: tuple[int, int]) -> bool:
    """Whether a library of these CMake architectures ("80-real", "90a", "120", ...) holds code that `chip` can run.

    Machine code runs from its minor version up within one major version, PTX (no "-real") on everything newer; what
    ends in "a" on that chip alone, in "f" within its major version.
    """
    for architecture in architectures:
        parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
        if parts is None:  # "native", "all", ...
            return True
        built = (int(parts[1]), int(parts[2]))
        same_major = built[0] == chip[0] and built[1] <= chip[1]
        newer = parts[4] != "-real" and built <= chip
        if built == chip or (parts[3] != "a" and (same_major or (newer and parts[3] == ""))):
            return True
    return False


def served_by(architectures: list[str]) -> bool:
    """Whether a library of these architectures runs on one of the GPUs that are here, or none is to be seen."""
    found = capabilities()
    return not found or any(runs_on(architectures, chip) for chip in found)
