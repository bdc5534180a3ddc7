"""One call for every random number generator."""

from __future__ import annotations

import random

import torch


def set_seeds(seed: int = 0) -> None:
    """Seed Python, NumPy (if installed) and torch, on the CPU and every GPU.

    Args:
        seed: From 0 to 2³² - 1, the range that NumPy takes.

    Raises:
        ValueError: ``seed`` is outside that range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2**32 - 1.")
    random.seed(seed)
    torch.manual_seed(seed)  # On every CUDA device too.
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed)
