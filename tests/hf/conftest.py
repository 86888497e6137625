import pytest

from .members import MEMBERS


@pytest.fixture(scope="session")
def model():
    """LLaVA-1.5, for tests of what has nothing to do with the family."""
    return MEMBERS[0].model


@pytest.fixture(params=["single", "padded", "two_and_one", "text_only_row", "ragged"])
def rows(request):
    """A batch that every member has."""
    return request.param


def pytest_generate_tests(metafunc):
    """`member`: every family; `case`: every family with every scope and newline policy it has."""
    if "case" in metafunc.fixturenames:
        cases = [(member, variant) for member in MEMBERS for variant in member.variants]
        names = ["-".join([member.name, *variant.values()]) for member, variant in cases]
        metafunc.parametrize("case", cases, ids=names)
    if "member" in metafunc.fixturenames:
        metafunc.parametrize("member", MEMBERS, ids=[member.name for member in MEMBERS])
