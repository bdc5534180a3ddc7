"""Output Hessians: where Hessian backpropagation starts.

The curvature of a loss w.r.t. the model's outputs z, summed over the samples,

    H̄ = Σ_n ∂²loss/∂z_n∂z_nᵀ,        [C, C] for C output features.

The 1/N of a mean loss is already in the loss, so for a mean loss this is the
average of the samples' Hessians.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .guards import full_precision, is_narrow, require_floats
from .operators import require_room
from .settings import rows_at_once

Places = Sequence[Tensor] | Sequence[GradientEdge]
At = Places | None


def batch_summed_hessian(loss: Tensor, outputs: Tensor, at: At = None) -> Tensor:
    """The Hessian of any loss w.r.t. the outputs, [summed over the batch][eq-batch].

    Double backpropagation, as many rows of H̄ at once as memory likes. Call it before
    ``loss.backward()``, which frees the graph.

    Args:
        loss: A scalar that is a sum or mean over samples of a twice differentiable
            function of each sample's output. (Terms that couple samples would be
            added to H̄ without notice.)
        outputs: z, [N, ...], from which ``loss`` was computed.
        at: Where to differentiate, if not at the outputs themselves.

    Returns:
        H̄, [C, C], C features per sample (all dimensions but the first, flattened;
        C = 1 for outputs of shape [N]), on the device of ``outputs`` and of their
        dtype, or in float32 if that is narrower.

    Raises:
        ValueError: ``loss`` is no scalar, does not depend on ``outputs``, or the
            batch is empty.
        RuntimeError: the graph of ``loss`` is gone, or torch has no second derivative.
        MemoryError: the matrix would need more than ``hbp.set_dense_limit`` allows.
        ArithmeticError: the loss or the Hessian has NaN or infinity.
    """
    return hessian_and_gradient(loss, outputs, at, each=False)[0]


def per_sample_hessian(loss: Tensor, outputs: Tensor, at: At = None) -> Tensor:
    """The Hessian of any loss w.r.t. each sample's output.

    What ``model.backward_hessian`` takes for [exact products][eq-exact]. Arguments and
    errors as for ``batch_summed_hessian``, which is the sum over the samples.

    Returns:
        ∂²loss/∂z_n∂z_nᵀ, [N, C, C]. Of a mean loss each carries the 1/N.
    """
    return hessian_and_gradient(loss, outputs, at, each=True)[0]


@torch.enable_grad()
@full_precision()
def hessian_and_gradient(
    loss: Tensor, outputs: Tensor, at: At, each: bool
) -> tuple[Tensor, Tensor]:
    """Every sample's Hessian, or their sum, and ∂loss/∂z with a graph of its own."""
    _check_loss(loss, outputs)
    count, features = len(outputs), outputs[0].numel()
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    shape, places = (count if each else 1, features, features), at or [outputs]
    require_room(shape, dtype, "Pass an operator, as MatrixFree(...)")
    hessian = outputs.new_zeros(shape, dtype=dtype)
    gradient = derivative(loss, places)
    if gradient is None:
        raise ValueError(
            "loss does not depend on outputs. Pass the very tensor that loss_func got."
        )
    if not gradient.requires_grad:  # A loss that is linear in the outputs.
        return hessian if each else hessian[0], gradient
    # Row c is ∂(Σ_m ∂loss/∂z_mc)/∂z_n: samples do not mix, so the inner sum only
    # collects what belongs to sample n. On its way a row has some 8 images: with them
    # counted, 256 samples of 784 outputs take 41 MiB instead of 193, and less time.
    total, end = gradient.reshape(count, -1).sum(0), 0
    seeds = torch.eye(features, dtype=total.dtype, device=total.device)
    for some in seeds.split(rows_at_once(8 * outputs.numel())):
        rows = derivative(total, places, some)
        if rows is None:  # Linear in the outputs, though not in something else.
            break
        start, end = end, end + len(some)
        part = rows.detach().to(dtype).reshape(-1, count, features)
        hessian[:, start:end] = part.transpose(0, 1) if each else part.sum(1)
    if is_narrow(gradient.dtype):  # Its roundings are not symmetric.
        hessian = (hessian + hessian.mT) / 2
    return require_finite(hessian if each else hessian[0]), gradient


def derivative(of: Tensor, places: Places, *seeds: Tensor) -> Tensor | None:
    """∂of/∂z with a graph of its own, the sum over ``places``; one for each seed."""
    # Layers take a gradient for that of loss.backward() unless create_graph is set.
    grad = partial(torch.autograd.grad, of, places, *seeds, create_graph=True)
    # Anomaly detection reads every number, and a batch of seeds has none to read.
    with torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), not seeds):
        found = grad(allow_unused=True, is_grads_batched=bool(seeds))
    gradients = [gradient for gradient in found if gradient is not None]
    return reduce(torch.add, gradients) if gradients else None


def check_outputs(outputs: Tensor) -> None:
    """Raise unless it is a batch of at least one sample."""
    require_floats("outputs", outputs)
    if outputs.dim() == 0 or len(outputs) == 0:
        shape = f"outputs has shape {list(outputs.shape)}"
        raise ValueError(
            f"{shape}; a batch [N, ...] with at least one sample is needed."
        )


def _check_loss(loss: Tensor, outputs: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss must be a scalar tensor, got {shape}. Use reduction='mean' or "
            "'sum', or call loss.sum()."
        )
    require_floats("loss", loss)
    check_outputs(outputs)
    if not bool(loss.isfinite()):
        raise ArithmeticError(f"loss is {loss.item()}. Check inputs and learning rate.")
    if not loss.requires_grad or not outputs.requires_grad:
        raise ValueError(
            "loss and outputs need a graph: compute outputs = model(inputs) and loss = "
            "loss_func(outputs, labels) with gradients enabled, outputs not detached."
        )


def require_finite(hessian: Tensor) -> Tensor:
    """The Hessian, or ArithmeticError."""
    if not bool(hessian.isfinite().all()):
        raise ArithmeticError(
            "The output Hessian contains NaN or infinity. Check outputs and targets."
        )
    return hessian
