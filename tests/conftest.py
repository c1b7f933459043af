"""Settings for all tests."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Where no GPU runs Triton's kernels its interpreter does. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shared machine may stall any single example, and a red test must be red for everybody.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def denormals() -> Iterator[None]:
    """A run in the tests' own process flushes denormal numbers from then on; hypothesis draws them in other modules."""
    yield
    torch.set_flush_denormal(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is none, however they were selected."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
