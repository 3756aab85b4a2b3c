import collections

import pytest
from faults.nursery import Nursery
from training.conftest import environment  # noqa: F401
from training.tiny_run import make_files

_counts: dict[str, collections.Counter] = {}


@pytest.fixture(scope="session")
def nursery(environment):  # noqa: F811
    return Nursery(environment)


@pytest.fixture
def count():
    """count(fault, injected=n) before what must be survived, count(fault, survived=n) after it."""

    def add(fault: str, **numbers: int) -> None:
        _counts.setdefault(fault, collections.Counter()).update(numbers)

    return add


@pytest.fixture(scope="session")
def sums(tmp_path_factory, tokenizer_dir):
    """16 examples: 4 steps of 4 in an epoch."""
    return make_files(tmp_path_factory.mktemp("sums"), tokenizer_dir, examples=16)


def pytest_terminal_summary(terminalreporter):
    if not _counts:
        return
    terminalreporter.section("faults")
    for fault, numbers in {**_counts, "all": sum(_counts.values(), collections.Counter())}.items():
        terminalreporter.write_line(
            f"{fault}: {numbers['injected']} injected, {numbers['survived']} survived"
        )
