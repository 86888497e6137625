import pytest

from .tiny_llava import BATCHES, build


@pytest.fixture(scope="session")
def model():
    return build()


@pytest.fixture(params=BATCHES)
def rows(request):
    return BATCHES[request.param]
