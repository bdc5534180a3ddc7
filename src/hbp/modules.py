"""The layers, under the name that their package had in hbp 0.1."""

from __future__ import annotations

from typing import Any

import hbp


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not hasattr(hbp, name):
        raise AttributeError(f"module 'hbp.modules' has no attribute {name!r}")
    return getattr(hbp, name)
