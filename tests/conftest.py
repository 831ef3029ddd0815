"""What every test stands on: one thread, no network, a seed, and no GPU test without a GPU."""

from __future__ import annotations

import gc
import os

# read when torch and transformers are imported, so set before any test file is
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides when it is imported whether kernels run on the processor
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch

SEED = 20250101

# graphs are full of cycles: looking for garbage after every 700 objects costs more than it frees
gc.set_threshold(50_000, 20, 50)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files with what is computed now")


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten instead of compared."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of a test's own."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors gain nothing from threads, and sums keep one order."""
    torch.set_num_threads(1)
