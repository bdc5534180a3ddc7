"""Layers made of a function: of one that is elementwise, or affine in each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hbp.core.layers.elementwise import ElementwiseRule
from hbp.core.layers.shape import RearrangementRule
from hbp.layers.general import AffineRule, FunctionRule, Noted

Function = Callable[[Tensor], Tensor]


class _Call(nn.Module):
    """z from a plain function."""

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any):
        super().__init__()
        self.function, self.args, self.options = function, args, options

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input, *self.args, **self.options)

    def extra_repr(self) -> str:
        if isinstance(self.function, nn.Module):
            return ""  # It is shown below.
        name = getattr(self.function, "__name__", repr(self.function))
        options = [f"{key}={value!r}" for key, value in self.options.items()]
        return ", ".join([name, *map(repr, self.args), *options])


class HBPElementwise(ElementwiseRule, _Call):
    """Any smooth function of one number, applied to every feature.

    Args:
        function: φ, [N, ...] → [N, ...], entry by entry (not softmax, say).
        first: φ', or ``None`` for automatic differentiation.
        second: φ'', or ``None`` for automatic differentiation.

    To copy or pickle the layer, give it functions that can be.

    Examples:
        >>> import torch
        >>> from hbp import HBPElementwise
        >>> layer = HBPElementwise(torch.nn.functional.softplus)

    Raises:
        TypeError: an argument is not callable.
    """

    def __init__(
        self,
        function: Function,
        first: Function | None = None,
        second: Function | None = None,
    ) -> None:
        named = {"function": function, "first": first, "second": second}
        for name, value in named.items():
            if not callable(value) and (value is not None or name == "function"):
                raise TypeError(f"{name}={value!r} must be a function of a tensor.")
        super().__init__(function)
        self.first = first
        self.second = second

    def forward(self, input: Tensor) -> Tensor:
        """z = φ(x), [N, ...] → [N, ...].

        Raises:
            RuntimeError: the function overwrites x, where its derivatives are taken.
        """
        version = input._version
        output = super().forward(input)
        if input._version != version:
            raise RuntimeError(
                f"{self} changes its input in place, but its derivatives need it. Give "
                "HBPElementwise an out-of-place function."
            )
        return output

    def first_derivative(self, x: Tensor) -> Tensor:
        """φ'(x)."""
        return self.first(x) if self.first else super().first_derivative(x)

    def second_derivative(self, x: Tensor, first: Tensor) -> Tensor | None:
        """φ''(x)."""
        return self.second(x) if self.second else super().second_derivative(x, first)


class HBPFunction(FunctionRule, _Call):
    """Any smooth function of a sample, without parameters.

    Args:
        function: [N, ...] → [N, ...], sample by sample, of a tensor and of the further
            arguments.
        args: These arguments.
        options: Those with a name.

    Examples:
        >>> import torch
        >>> from hbp import HBPFunction
        >>> normalised = HBPFunction(torch.nn.functional.normalize, dim=1)
    """


class HBPCall(Noted, AffineRule, _Call):
    """An affine function of each sample, as ``convert`` finds it in a ``forward``.

    Args:
        function: Of a tensor, and of the further arguments.
        args: These arguments.
        options: Those with a name.
    """

    def check_record(self) -> None:
        super().check_record()
        before, after = self.last_record.input_shape, self.last_record.output_shape
        if vars(self).get("_separate") == (before[1:], after[1:]):
            return
        # Of any two of three samples it has to make the same, whichever comes first; of
        # one, squeeze() would leave none.
        dtype, device = self.last_record.kind
        count = torch.arange(3 * before[1:].numel(), dtype=dtype, device=device)
        three = count.cos().view(3, *before[1:])
        made = [_Call.forward(self, x) for x in (three, three[:2], three[1:])]
        is_kept = [z.shape for z in made] == [(n, *after[1:]) for n in (3, 2, 2)]
        pairs = zip(made[1:], (made[0][:2], made[0][1:]), strict=True)
        if not (is_kept and all(torch.allclose(few, among) for few, among in pairs)):
            raise ValueError(
                f"{self} made {list(after)} of {list(before)}, but does not keep the "
                "samples apart, or counts them. Dimension 0 has to stay as it is."
            )
        vars(self)["_separate"] = before[1:], after[1:]


class HBPRearrangement(RearrangementRule, HBPCall):
    """One that leaves the features of each sample in their order."""
