"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import seed
from hypothesis import HealthCheck, settings

settings.register_profile(
    "hbp",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("hbp")

# The matrices of the tests are small: threads would only wait for each other.
torch.set_num_threads(1)
# Some parameters of tests are random, and part of their names: every process has to
# collect the same.
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> Iterator[None]:
    """A fixed seed, and torch's defaults again after each test."""
    seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
