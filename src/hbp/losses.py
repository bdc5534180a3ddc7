"""Output Hessians: with all their digits under autocast, and by formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hbp.core import losses as core
from hbp.core.guards import full_precision, is_narrow
from hbp.core.losses import Places, check_outputs, require_finite
from hbp.core.operators import require_room


@wraps(core.batch_summed_hessian)
def batch_summed_hessian(loss: Tensor, outputs: Tensor) -> Tensor:  # noqa: D103  # wraps.
    return watching(outputs, *hessian_and_gradient(loss, outputs, each=False))


@wraps(core.per_sample_hessian)
def per_sample_hessian(loss: Tensor, outputs: Tensor) -> Tensor:  # noqa: D103  # wraps.
    return watching(outputs, *hessian_and_gradient(loss, outputs, each=True))


def hessian_and_gradient(
    loss: Tensor, outputs: Tensor, each: bool
) -> tuple[Tensor, Tensor]:
    """As the core's, at ``places_of`` the outputs."""
    if isinstance(loss, Tensor) and loss.requires_grad:
        # An honest gradient depends on what is sent to the loss, which this factor is.
        with torch.enable_grad():
            loss = loss * torch.ones_like(loss, requires_grad=True)
    with _torch_explained():
        places = places_of(loss, outputs)
        found = core.hessian_and_gradient(loss, outputs, places, each)
    _require_honest(found[1], outputs)
    return found


def _require_honest(gradient: Tensor, outputs: Tensor) -> None:
    """Raise where a function of somebody's own hides how its derivative came about."""
    nodes = nodes_of(gradient, outputs)
    if gradient.requires_grad and not any(n.name().endswith("::Error") for n in nodes):
        return
    raise RuntimeError(
        "loss has no Hessian, for it can be differentiated only once: the backward() "
        "of a torch.autograd.Function is marked @once_differentiable, or leaves torch. "
        "Write it in torch's functions, or give backward_hessian() a matrix of your "
        "own."
    )


def watching(outputs: Tensor, hessian: Tensor, gradient: Tensor) -> Tensor:
    """The same matrix, which learns what is sent backward with it.

    The Hessian of a loss and the gradient of 7 times that loss would make a step 7
    times too long. So a hook on the outputs notes by what ``backward()`` multiplies the
    gradient, in an attribute ``sent_scale``, NaN while that is unknown or where another
    gradient is sent; ``backward_hessian`` compares it with its ``loss_scale``.

    Args:
        outputs: z, [N, ...].
        hessian: [C, C] or [N, C, C].
        gradient: ∂loss/∂z, [N, ...].
    """
    # A leaf would keep the hook for ever, and two numbers are always parallel.
    if outputs.is_leaf or outputs.numel() == 1:
        return hessian
    own, scale = gradient.detach().flatten(), hessian.new_full((), math.nan)

    def note(sent: Tensor | None) -> None:
        # With gradients enabled it is that of another output Hessian.
        if sent is not None and not torch.is_grad_enabled():
            with full_precision():
                scale.copy_(_factor_between(own, sent.flatten().to(own)))

    outputs.register_hook(note)
    hessian = hessian.clone()  # Its version tells whether anybody has changed it.
    vars(hessian)["sent_scale"] = scale
    return hessian


def _factor_between(e: Tensor, g: Tensor) -> Tensor:
    """The f with g = f e, or NaN if there is none; no square over- or underflows."""
    units = e.abs().max(), g.abs().max()
    e, g = e / units[0], g / units[1]
    along, parallel = g @ e, (g @ g) * (e @ e) * (1 - 1e-4)
    factor = along / (e @ e) * (units[1] / units[0])
    is_known = (along * along > parallel) & factor.isfinite()
    return torch.where(is_known, factor, math.nan)


@contextmanager
def _torch_explained() -> Iterator[None]:
    """Say what to do where torch refuses to differentiate, or to do it twice."""
    try:
        yield
    except RuntimeError as error:
        if "second time" in str(error):
            raise RuntimeError(
                "The graph of loss is gone. Call batch_summed_hessian(loss, outputs) "
                "before loss.backward(), or hbp.backward(model, outputs, loss) instead."
            ) from error
        if "derivative for aten::" not in str(error):
            raise
        name = str(error).split("::")[1].split("_backward")[0].strip("_")
        raise RuntimeError(
            f"loss has no Hessian, for torch cannot differentiate {name} twice. Write "
            "the loss in functions that it can, or give backward_hessian() a matrix of "
            "your own: zeros, if the loss is linear piece by piece."
        ) from error


def places_of(loss: Tensor, outputs: Tensor) -> Places:
    """Where to differentiate a loss, in place of the outputs, to keep all digits."""
    half = isinstance(outputs, Tensor) and is_narrow(outputs.dtype)
    return (casts(loss, outputs) if half else None) or [outputs]


def casts(loss: Tensor, outputs: Tensor) -> Places | None:
    """Where the loss has widened the outputs, or None.

    A loss under autocast begins by casting half-precision outputs to float32. A
    derivative there keeps the digits that it would lose on its way through the cast.
    """
    if not (isinstance(loss, Tensor) and outputs.requires_grad):
        return None
    own = get_gradient_edge(outputs)
    casts: list[GradientEdge] = []
    for node in nodes_of(loss, outputs):
        if (own.node, own.output_nr) in node.next_functions:
            if node.name() != "ToCopyBackward0":
                return None
            casts.append(GradientEdge(node, 0))
    return casts or None


def nodes_of(end: Tensor, start: Tensor) -> Iterator[Node]:
    """The graph that computed ``end``, as far back as what computed ``start``."""
    seen, waiting = {start.grad_fn}, [end.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


@full_precision()
def output_hessian(
    loss_func: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> Tensor:
    """The Hessian of ``loss_func(outputs, targets)``, by a formula where one is known.

    The same matrix as ``batch_summed_hessian(loss_func(outputs, targets), outputs)``,
    only faster for ``CrossEntropyLoss``, ``MSELoss`` and ``BCEWithLogitsLoss`` (with
    any of their options and ``reduction="mean"`` or ``"sum"``); see the formulas for
    [cross-entropy][eq-softmax] and [squared error][eq-mse]. Any other loss goes to
    ``batch_summed_hessian``.

    Args:
        loss_func: The loss.
        outputs: z, [N, ...].
        targets: What ``loss_func`` takes as its second argument.

    Returns:
        H̄, [C, C], as from ``batch_summed_hessian``. It is that of the widened outputs
        where these are in half precision.

    Raises:
        ValueError: the batch is empty, or the loss is no scalar.
        MemoryError: the matrix would need more than ``hbp.set_dense_limit`` allows.
        ArithmeticError: the Hessian has NaN or infinity.
    """
    check_outputs(outputs)
    if not callable(loss_func):
        raise TypeError(
            f"loss_func is a {type(loss_func).__name__}; it must be a function of "
            "outputs and targets."
        )
    formula = _FORMULAS.get(type(loss_func))
    z = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
    # Some losses take one dtype only; to widen is exact.
    wide = targets.to(z) if _is_narrow(targets) else targets
    fits = not _is_narrow(getattr(loss_func, "weight", None))
    taken = (z, wide) if fits else (outputs.detach(), targets)
    if formula is _cross_entropy and z.dim() < 2:
        raise ValueError(
            f"outputs has shape {list(z.shape)}, which CrossEntropyLoss takes as one "
            "sample. Give it a batch, [N, C]: outputs.unsqueeze(0)."
        )
    # torch's MSELoss broadcasts, and then the formula is another.
    shape = getattr(targets, "shape", None)
    broadcast = formula is _mean_squared_error and shape != z.shape
    scalar = getattr(loss_func, "reduction", None) in ("mean", "sum")
    if formula is None or broadcast or z.dim() < 2 or not scalar:
        with torch.enable_grad():
            loss = loss_func(z.requires_grad_(), wide)
            return watching(outputs, *hessian_and_gradient(loss, z, each=False))
    require_room((z[0].numel(),) * 2, z.dtype, "Pass an operator, as MatrixFree(...)")
    with torch.no_grad():
        loss_func(*taken)  # It knows best which targets it takes.
        hessian = require_finite(formula(loss_func, z, wide))
    leaf, same = taken[0].requires_grad_(), taken[1]
    if same.is_floating_point():  # torch 2.4 sends no gradient through a mixture.
        same = same.to(leaf)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss_func(leaf, same), leaf)
    return watching(outputs, hessian, gradient)


def _is_narrow(value: object) -> bool:
    return isinstance(value, Tensor) and is_narrow(value.dtype)


def _cross_entropy(loss: nn.CrossEntropyLoss, z: Tensor, targets: Tensor) -> Tensor:
    """Σ_n a_n (diag(p_n) - p_n p_nᵀ), per position s of z, [N, C, S]; eq-softmax."""
    logits = z.flatten(2) if z.dim() > 2 else z.unsqueeze(2)
    classes, positions = logits.shape[1:]
    p = logits.softmax(1)
    weighted = _cross_entropy_weights(loss, logits, targets).unsqueeze(1) * p
    products = weighted.permute(2, 1, 0) @ p.permute(2, 0, 1)  # [S, C, C]
    blocks = weighted.sum(0).T.diag_embed() - products
    # Positions do not mix: [S, C, C] → [C, S, C, S], zero where they differ.
    dense = blocks.permute(1, 2, 0).diag_embed().transpose(1, 2)
    return dense.reshape(classes * positions, classes * positions)


def _cross_entropy_weights(
    loss: nn.CrossEntropyLoss, logits: Tensor, targets: Tensor
) -> Tensor:
    """a, [N, S]: the weight of Σ_c t_c log p_c at each sample and position."""
    count, classes, positions = logits.shape
    ones = logits.new_ones(classes)
    class_weight = ones if loss.weight is None else loss.weight.to(logits)
    smoothing = loss.label_smoothing
    if targets.is_floating_point():
        probability = targets.to(logits).reshape(logits.shape) * (1 - smoothing)
        probability = probability + smoothing / classes
        weights = torch.einsum("c,ncs->ns", class_weight, probability)
        total = logits.new_full((), count * positions)  # Not a copy, as new_tensor.
    else:
        labels = targets.long().reshape(count, positions)  # uint8 would be a mask.
        counted = labels != loss.ignore_index
        of_label = class_weight[labels.where(counted, 0)] * counted
        spread = smoothing / classes * class_weight.sum() * counted
        weights = (1 - smoothing) * of_label + spread
        total = of_label.sum()
    return weights if loss.reduction == "sum" else weights / total


def _mean_squared_error(loss: nn.MSELoss, z: Tensor, targets: Tensor) -> Tensor:
    """2N · I for a sum; 2/C · I for torch's mean, which is over all N · C entries."""
    # The second one is eq-mse, the first N · C times it.
    features = z[0].numel()
    scale = 2 * len(z) if loss.reduction == "sum" else 2 / features
    return scale * torch.eye(features, dtype=z.dtype, device=z.device)


def _binary_cross_entropy(
    loss: nn.BCEWithLogitsLoss, z: Tensor, targets: Tensor
) -> Tensor:
    """diag(Σ_n w (1 + (v - 1) t) σ(1 - σ)) for weight w and positive weight v."""
    probability = z.sigmoid()
    curvature = probability * (1 - probability)
    if loss.pos_weight is not None:
        curvature = curvature * (1 + (loss.pos_weight.to(z) - 1) * targets.to(z))
    if loss.weight is not None:
        curvature = curvature * loss.weight.to(z)
    diagonal = curvature.flatten(1).sum(0)
    return torch.diag(diagonal if loss.reduction == "sum" else diagonal / z.numel())


_FORMULAS: dict[type, Callable[..., Tensor]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _mean_squared_error,
    nn.BCEWithLogitsLoss: _binary_cross_entropy,
}
