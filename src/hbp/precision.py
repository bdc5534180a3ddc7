"""Half precision stops here: curvature is float32 or float64, whatever forward used.

A forward pass under ``torch.autocast`` leaves activations and gradients in bfloat16 or
float16. They are widened where curvature reads them, and within the package's own
work autocast is off: conjugate gradients need more digits than these types have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import torch

_AUTOCAST_KINDS: Final = tuple(
    kind
    for kind in ("cpu", "cuda", "mps", "xpu")
    if torch.amp.is_autocast_available(kind)
)


@contextmanager
def full_precision() -> Iterator[None]:
    """Autocast is off on every device, within a block or a function it decorates."""
    with ExitStack() as stack:
        for kind in _AUTOCAST_KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32 for the floating-point types that are narrower; any other as it is."""
    return torch.float32 if is_narrow(dtype) else dtype


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether it is bfloat16, float16 or narrower still."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
