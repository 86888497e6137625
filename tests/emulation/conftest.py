import sys

import pytest

from . import build, kernels

SEEDS = range(4)  # two of each way to choose the next thread, and of each poison


def pytest_collection_modifyitems(items):
    if sys.platform != "linux" or build.compiler() is None:
        for item in items:
            if "emulation" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="the emulator wants Linux and a C++ compiler"))


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def seed(request):
    kernels.module().set_seed(request.param)
    return request.param
