"""What arguments have to be, and in which precision curvature is computed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

KINDS = [k for k in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(k)]


@contextmanager
def full_precision() -> Iterator[None]:
    """Autocast is off on every device, within a block or a function it decorates.

    A forward pass under ``torch.autocast`` leaves activations and gradients in half
    precision. They are widened where curvature reads them, and within the package's own
    work autocast is off: conjugate gradients need more digits than these types have.
    """
    with ExitStack() as stack:
        for kind in KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether it is bfloat16, float16 or narrower still."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


def is_number(value: object) -> TypeGuard[float]:
    """Whether torch takes ``value`` for a real number: Python's or NumPy's.

    A fraction is none for torch, nor is an integer that no float can hold.
    """
    if not (isinstance(value, int | float) or hasattr(value, "dtype")):
        return False
    too_large = isinstance(value, int) and abs(value) > sys.float_info.max
    return isinstance(value, Real) and not too_large


def is_count(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a positive integer; ``True`` is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def require_floats(name: str, value: object, data: bool = True) -> None:
    """Raise unless ``value`` is a floating-point tensor, dense and with data.

    Args:
        name: What to call it.
        value: Any object.
        data: Whether data are needed.

    Raises:
        TypeError: it is no tensor.
        ValueError: its dtype, layout or device is another.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor.")
    if not value.is_floating_point():
        raise ValueError(
            f"{name} is {value.dtype}; convert it to a floating-point dtype: .float()."
        )
    if data and (value.layout != torch.strided or value.is_meta):
        raise ValueError(
            f"{name} is {value.layout} on {value.device}; it must be dense and have "
            "data. Use .to_dense(), or a device other than meta."
        )
