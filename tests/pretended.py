"""A pretended accelerator: a device ``pretended``, which refuses to mix with the CPU.

Its tensors compute on the CPU, but say that they lie elsewhere. So code that makes a
tensor on the wrong device fails here as it would on a GPU, and one that moves numbers
to the host or from it runs ``_to_copy``, ``copy_`` or ``_local_scalar_dense``, which a
``TorchDispatchMode`` sees. What it cannot tell is what a GPU's own kernels compute.

It stands on torch's hooks for a backend that is written in Python, PrivateUse1. They
cannot be taken back, and autograd starts a thread for each device at the first backward
pass of a process, so that a later device has none: import this at the head of a file.

There are no random generators on it, as on some true devices. The package needs none:
it draws random signs on the CPU and moves them, and where the host must not wait, the
vector that is as good as random is cos k², of an ``arange`` on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

try:
    from torch.utils.backend_registration import (
        _setup_privateuseone_for_python_backend as set_up,
    )
except ImportError:  # torch is older than these hooks.
    set_up = None

NAME = "pretended"
CPU = torch.device("cpu")


class Pretended(Tensor):
    """A tensor on the pretended device; its numbers are in ``raw``, on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Pretended:
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        kind = {"dtype": raw.dtype, "device": torch.device(NAME, 0)}
        found = Tensor._make_wrapper_subclass(cls, raw.size(), **layout, **kind)
        found.raw = raw
        return found

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.raw})"

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, *args, **(kwargs or {}))


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation, on the CPU, if all its tensors lie on the device.

    So do those of the result. What it changes in place, or writes to, is the same
    object before and after.
    """
    if func is torch.ops.aten._to_copy.default:
        return _to_copy(*args, **kwargs)
    if func is torch.ops.aten.copy_.default:
        _raw(args[0], []).copy_(_raw(args[1], []))
        return args[0]
    inputs: list[Tensor] = []
    raw_args, raw_kwargs = _each(_raw, (args, kwargs), inputs)
    # A number in a tensor is no array to a GPU: it goes along with a launch.
    numbers_too = torch.Tag.pointwise in func.tags and not func._schema.is_mutable
    for x in inputs:
        if not (isinstance(x, Pretended) or (numbers_too and x.dim() == 0)):
            raise RuntimeError(f"{func} got a tensor of the CPU, {list(x.shape)}.")
    same = {id(x.raw): x for x in inputs if isinstance(x, Pretended)}
    return _each(_wrapped, func(*raw_args, **raw_kwargs), same)


def _each(function: Callable[[Any, Any], Any], x: Any, context: Any) -> Any:
    """The function of everything in a nest; torch's own ``tree_map`` takes longer."""
    if isinstance(x, list | tuple):
        return type(x)([_each(function, part, context) for part in x])
    if isinstance(x, dict):
        return {name: _each(function, part, context) for name, part in x.items()}
    return function(x, context)


def _raw(x: Any, inputs: list[Tensor]) -> Any:
    """What stands for an argument on the CPU."""
    if isinstance(x, torch.device):
        return CPU
    if not isinstance(x, Tensor):
        return x
    inputs.append(x)
    return x.raw if isinstance(x, Pretended) else x


def _wrapped(x: Any, same: dict[int, Pretended]) -> Any:
    """What stands for a result on the device."""
    if not isinstance(x, Tensor):
        return x
    if id(x) in same:
        assert same[id(x)].shape == x.shape, "A wrapper cannot grow: see FACTORIES."
        return same[id(x)]
    # Zeros of autograd have no memory, which operations below it take for granted.
    return Pretended(torch.zeros_like(x) if x._is_zerotensor() else x)


def _to_copy(x: Tensor, *, device: Any = None, **options: Any) -> Tensor:
    """Whether the result lies on the CPU depends on where it should go."""
    raw = torch.ops.aten._to_copy.default(_raw(x, []), device=CPU, **options)
    there = x.device if device is None else torch.device(device)
    return raw if there.type == "cpu" else Pretended(raw)


# Torch's own make an empty tensor and let it grow, which a wrapper cannot.
FACTORIES = {
    "eye": torch.ops.aten.eye.default,
    "arange": torch.ops.aten.arange.default,
    "arange.start": torch.ops.aten.arange.start,
    "arange.start_step": torch.ops.aten.arange.start_step,
}

if set_up is not None:
    set_up(NAME)
    FALLBACK, OWN = (torch.library.Library(space, "IMPL") for space in ("_", "aten"))
    FALLBACK.fallback(run, "PrivateUse1")
    for name, func in FACTORIES.items():
        OWN.impl(name, partial(run, func), "PrivateUse1")
