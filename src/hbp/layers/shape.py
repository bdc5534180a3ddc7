"""Layers that leave the features as they are, and only shape them."""

from __future__ import annotations

from torch import Tensor, nn

from hbp.core.layers.shape import RearrangementRule


class _Reshape(nn.Module):
    """Reshaping, with a sample for each sample."""

    def __init__(self, *shape: int | None) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, input: Tensor) -> Tensor:
        sizes = [len(input) if size is None else size for size in self.shape]
        output = input.reshape(sizes)
        if output.shape[:1] != input.shape[:1]:
            raise ValueError(
                f"{self} made {list(output.shape)} of {list(input.shape)}: the number "
                "of samples must stay. Write x.flatten(1), or "
                "x.reshape(x.size(0), ...)."
            )
        return output

    def extra_repr(self) -> str:
        return ", ".join("N" if size is None else str(size) for size in self.shape)


class HBPReshape(RearrangementRule, _Reshape):
    """``Tensor.reshape`` that sends curvature backward.

    Args:
        shape: The new shape; ``None`` stands for the number of samples, and is first,
            or -1 is.
    """


class HBPUnflatten(RearrangementRule, nn.Unflatten):
    """``torch.nn.Unflatten`` that sends curvature backward.

    The batch dimension must stay as it is.
    """


class HBPIdentity(RearrangementRule, nn.Identity):
    """``torch.nn.Identity`` that sends curvature backward."""
