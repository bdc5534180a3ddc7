"""What arguments have to be, before anything is done with them."""

from __future__ import annotations

import sys
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor


def is_number(value: object) -> TypeGuard[float]:
    """Whether torch takes ``value`` for a real number: Python's or NumPy's.

    A fraction is none for torch, nor is an integer that no float can hold.
    """
    if not (isinstance(value, int | float) or hasattr(value, "dtype")):
        return False
    too_large = isinstance(value, int) and abs(value) > sys.float_info.max
    return isinstance(value, Real) and not too_large


def require_floats(name: str, value: object) -> None:
    """Raise unless ``value`` is a dense floating-point tensor that has data.

    Raises:
        TypeError: it is no tensor.
        ValueError: its dtype, layout or device is another.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor.")
    if not value.is_floating_point():
        raise ValueError(
            f"{name} is {value.dtype}; it must have a floating-point dtype. Convert it "
            "with .float()."
        )
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{name} is {value.layout} on {value.device}; it must be dense and have "
            "data. Use .to_dense(), or a device other than meta."
        )
