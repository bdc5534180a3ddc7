"""Further convolutions, transposed or of one or three dimensions: one rule for all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hbp.core.layers.convolution import Convolution, ConvolutionRule


class TransposedRule(ConvolutionRule):
    """z = W ∗ x + b, a transposed convolution; ``output_size`` may differ by call."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """z = W ∗ x + b, [N, C, ...] → [N, out, ...], of ``output_size`` if given.

        Raises:
            ValueError: no output padding of that layer gives this size.
        """
        output = super(ConvolutionRule, self).forward(input, output_size)
        return self.record(input, output, keep=input)

    def convolution(self: Any) -> Convolution:
        """That of the layer, with the output padding of the latest forward pass."""
        found = super().convolution()
        stride, padding, dilation = found.options[:3]
        before, after = self.last_record.input_shape, self.last_record.output_shape
        each = stride, padding, dilation, self.kernel_size, before[2:], after[2:]
        extra = tuple(
            z - ((x - 1) * s - 2 * p + d * (k - 1) + 1)
            for s, p, d, k, x, z in zip(*each, strict=True)
        )
        return found._replace(options=(*found.options[:4], extra, found.options[5]))


class HBPConvTranspose1d(TransposedRule, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` that sends curvature backward."""

    input_dimensions = 3


class HBPConvTranspose2d(TransposedRule, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` that sends curvature backward."""

    input_dimensions = 4


class HBPConvTranspose3d(TransposedRule, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` that sends curvature backward."""

    input_dimensions = 5


class HBPConv1d(ConvolutionRule, nn.Conv1d):
    """``torch.nn.Conv1d`` that sends curvature backward."""

    input_dimensions = 3


class HBPConv3d(ConvolutionRule, nn.Conv3d):
    """``torch.nn.Conv3d`` that sends curvature backward."""

    input_dimensions = 5
