from importlib.metadata import version

import pytest
from packaging.version import Version

import lvtp

try:
    lvtp.hf  # noqa: B018  # importing it looks at transformers
except ImportError as error:
    MEMBERS, WITHOUT = [], str(error)
else:
    from .members import MEMBERS

    WITHOUT = ""

CASES = [
    pytest.param((member, variant), id="-".join([member.name, *variant.values()]))
    for member in MEMBERS
    for variant in member.variants
]


class NotCollected(pytest.Module):
    def collect(self):
        pytest.skip(WITHOUT)


def pytest_pycollect_makemodule(module_path, parent):
    """Where lvtp.hf does not import, its test files are skipped with the reason instead of ending the whole run."""
    return NotCollected.from_parent(parent, path=module_path) if WITHOUT else None


@pytest.fixture(scope="session")
def model():
    """LLaVA-1.5, for tests of what has nothing to do with the family."""
    return MEMBERS[0].model


@pytest.fixture(params=MEMBERS, ids=lambda member: member.name)
def member(request):
    """Every family."""
    return request.param


@pytest.fixture(params=CASES)
def case(request):
    """Every family with every scope and newline policy it has."""
    return request.param


@pytest.fixture(params=["single", "padded", "two_and_one", "text_only_row", "ragged"])
def rows(request):
    """A batch that every family has."""
    return request.param


@pytest.fixture(params=["cache", "past_key_values"])
def cache_name(request):
    """Every name that the installed transformers takes a key-value cache under."""
    installed = Version(version("transformers"))
    if request.param == "cache" and installed < Version("5.24"):
        pytest.skip("transformers does not take it yet")
    if request.param == "past_key_values" and installed >= Version("5.40"):
        pytest.skip("transformers no longer takes it")
    return request.param
