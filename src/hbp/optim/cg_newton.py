"""CGNewton: a Newton-style optimizer that solves one linear system per parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from hbp.operators import (
    MatrixFree,
    Reduction,
    SymmetricOperator,
    attach_hessian,
    check_alpha,
)
from hbp.optim.cg import cg, check_cg_options


@dataclass(frozen=True)
class StepInfo:
    """What the last step did to one parameter.

    Attributes:
        iterations: CG steps taken, 0 with ``solver="direct"``.
        residual_norm: ‖[(1-α)H + αI] d + g‖.
        converged: whether the solver reached its tolerance; a direct solve always does.
        negative_curvature: whether CG ended at a direction of curvature ≤ 0. The
            iterate up to there was applied; after 0 iterations that is no step.
        step_norm: ‖d‖, before the learning rate.
        predicted_decrease: how far the damped quadratic model falls for the step
            lr·d, in units of the loss. It can exceed the loss itself: the averaged
            block H ⊗ x̄x̄ᵀ is flat in every input direction but x̄.
    """

    iterations: int
    residual_norm: float
    converged: bool
    negative_curvature: bool
    step_norm: float
    predicted_decrease: float


class CGNewton(torch.optim.Optimizer):
    """Newton steps, one curvature block per parameter.

    For each parameter θ with gradient g and curvature H = ``p.hessian``,

        [(1-α)H + αI] d = -g,        θ ← θ + lr·d

    (Dangel, Harmeling & Hennig 2020). With ``solver="cg"`` the system is
    solved inexactly by conjugate gradients from 0. The iterates are those of CG on
    the full block; where the block's structure allows it they are computed in
    compressed coordinates (for H ⊗ x̄x̄ᵀ, out_features + 1 numbers). With
    ``solver="direct"`` it is solved by factorisation.

    Before a step, run ``loss.backward()`` and ``model.backward_hessian(...)``. To use
    curvature of your own, set ``p.hvp``, a function from a vector [n] to the product
    [n]; it takes precedence over ``p.hessian`` and stays until you remove it.

    A step is all or nothing: every system is solved before any parameter moves.
    Frozen parameters and parameters without a gradient are left alone.

    Args:
        params: Parameters, or dicts of parameter groups. Each option below can be
            set per group.
        lr: Learning rate, not negative.
        alpha: Damping α in [0, 1].
        cg_atol: Absolute tolerance on the residual, not negative.
        cg_tol: Tolerance on the residual relative to ‖g‖, positive.
        cg_maxiter: At most this many products; ``None`` for ten times the number of
            unknowns.
        solver: ``"cg"`` or ``"direct"``.

    Attributes:
        last_step: ``StepInfo`` of the last step, by parameter. It is not part of
            ``state_dict()``; the optimizer has no state of its own.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float,
        alpha: float,
        cg_atol: float = 1e-8,
        cg_tol: float = 1e-5,
        cg_maxiter: int | None = None,
        solver: Literal["cg", "direct"] = "cg",
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "cg_atol": cg_atol,
            "cg_tol": cg_tol,
            "cg_maxiter": cg_maxiter,
            "solver": solver,
        }
        self.last_step: dict[Tensor, StepInfo] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore an optimizer that was pickled, without its last step."""
        super().__setstate__(state)
        self.last_step = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as ``torch.optim`` does.

        Raises:
            ValueError: an option of the group is out of its range.
        """
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and, with them, ``p.hessian``."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                attach_hessian(parameter, None)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model: clears the gradients, computes the loss,
                runs ``loss.backward()`` and ``model.backward_hessian(...)`` and
                returns the loss.

        Returns:
            The closure's loss, or ``None`` without a closure.

        Raises:
            RuntimeError: there is no gradient at all, or a parameter has a gradient
                but no curvature.
            ArithmeticError: loss, gradient or curvature has NaN or infinity, or the
                system is singular. No parameter has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            _check_loss(loss)
        systems = self._systems()
        solutions = [system.solve() for system in systems]
        for system, (y, _) in zip(systems, solutions, strict=True):
            system.apply(y)
        self.last_step = {
            system.parameter: info
            for system, (_, info) in zip(systems, solutions, strict=True)
        }
        return loss

    def _systems(self) -> list[_System]:
        systems = []
        trainable = False
        for group_index, group in enumerate(self.param_groups):
            _check_options(group)
            for index, parameter in enumerate(group["params"]):
                trainable |= parameter.requires_grad
                if parameter.requires_grad and parameter.grad is not None:
                    name = (
                        f"parameter {index} of group {group_index}, "
                        f"shape {list(parameter.shape)}"
                    )
                    systems.append(_System(name, parameter, group))
        if trainable and not systems:
            raise RuntimeError(
                "step() found no gradient. Call loss.backward() and then "
                "model.backward_hessian(output_hessian) before step()."
            )
        return systems


class _System:
    """[(1-α)H + αI] d = g for one parameter, in the coordinates that H allows.

    Its solution is the d of the step with the sign turned: θ ← θ - lr·d.
    """

    def __init__(
        self, name: str, parameter: Parameter, options: dict[str, Any]
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.options = options
        self.reduction = self._curvature().reduce(self._gradient())

    def _gradient(self) -> Tensor:
        gradient = self.parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError(
                f"The gradient of {self.name} is sparse; CGNewton needs a dense one."
            )
        return gradient.flatten()

    def _curvature(self) -> SymmetricOperator:
        p = self.parameter
        product = getattr(p, "hvp", None)
        if product is not None:
            return MatrixFree(product, p.numel(), p.dtype, p.device)
        hessian = getattr(p, "hessian", None)
        if hessian is None:
            raise RuntimeError(
                f"There is a gradient but no curvature for {self.name}. Call "
                "model.backward_hessian(output_hessian) between loss.backward() and "
                "step(), or set p.hvp."
            )
        if not isinstance(hessian, SymmetricOperator):
            raise RuntimeError(
                f"p.hessian of {self.name} is a {type(hessian).__name__}; it must be "
                "an operator. Wrap a matrix as hbp.operators.DenseOperator(matrix)."
            )
        fits = hessian.shape[0] == p.numel() and hessian.dtype == p.dtype
        if not (fits and hessian.device == p.device):
            raise RuntimeError(
                f"{hessian!r} does not fit {self.name}, {p.dtype} on {p.device}. Call "
                "model.backward_hessian(...) again after changing the model."
            )
        return hessian

    def solve(self) -> tuple[Tensor, StepInfo]:
        """The coordinates of d, and what happened."""
        if not bool(self.reduction.rhs.isfinite().all()):
            raise ArithmeticError(
                f"No step was taken; the gradient of {self.name} has NaN or infinity."
            )
        solve = _by_cg if self.options["solver"] == "cg" else _directly
        try:
            y, info = solve(self.reduction, self.options)
        except ArithmeticError as error:
            raise ArithmeticError(f"No step was taken; {self.name}: {error}") from error
        if not math.isfinite(info.step_norm):
            raise ArithmeticError(
                f"No step was taken; the direction for {self.name} has NaN or "
                "infinity. Is its curvature finite?"
            )
        return y, info

    def apply(self, y: Tensor) -> None:
        """θ ← θ - lr·d for the d with coordinates y."""
        p, lr = self.parameter, self.options["lr"]
        if p.is_contiguous():
            self.reduction.add_to(p.view(-1), y, scale=-lr)
        else:
            step = torch.zeros_like(p, memory_format=torch.contiguous_format)
            self.reduction.add_to(step.view(-1), y, scale=-lr)
            p.add_(step)


class _Damped:
    """(1-α)A + αI, for conjugate gradients."""

    def __init__(self, operator: SymmetricOperator, alpha: float) -> None:
        self.operator = operator
        self.alpha = alpha

    def __matmul__(self, vector: Tensor) -> Tensor:
        product = self.operator @ vector
        return torch.lerp(product, vector, self.alpha)


def _by_cg(reduction: Reduction, options: dict[str, Any]) -> tuple[Tensor, StepInfo]:
    result = cg(
        _Damped(reduction.operator, options["alpha"]),
        reduction.rhs,
        tol=options["cg_tol"],
        atol=options["cg_atol"],
        maxiter=options["cg_maxiter"],
    )
    info = StepInfo(
        result.iterations,
        result.residual_norm,
        result.converged,
        result.negative_curvature,
        *_model(reduction, result.x, options["lr"]),
    )
    return result.x, info


def _directly(reduction: Reduction, options: dict[str, Any]) -> tuple[Tensor, StepInfo]:
    alpha = options["alpha"]
    y = reduction.operator.solve(reduction.rhs, alpha)
    residual = _Damped(reduction.operator, alpha) @ y - reduction.rhs
    norm = float(torch.linalg.vector_norm(residual))
    info = StepInfo(0, norm, True, False, *_model(reduction, y, options["lr"]))
    return y, info


def _model(reduction: Reduction, y: Tensor, lr: float) -> tuple[float, float]:
    """‖d‖ and the decrease of the quadratic model.

    At θ - lr·d it has changed by -lr·gᵀd + ½lr²·dᵀCd, C = (1-α)H + αI. A solution has
    Cd = g; so has every CG iterate from 0 as far as dᵀ can see, for its residual is
    orthogonal to d. Hence dᵀCd = gᵀd.
    """
    descent = float(y @ reduction.rhs)
    return float(torch.linalg.vector_norm(y)), (lr - lr**2 / 2) * descent


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor | float | int):
        raise TypeError(
            f"The closure returned {type(loss).__name__}; it must return the loss."
        )
    if not math.isfinite(float(loss)):
        raise ArithmeticError(
            f"No step was taken; the closure returned a loss of {float(loss)}."
        )


def _check_options(options: dict[str, Any]) -> None:
    lr = options["lr"]
    if not (isinstance(lr, Real) and 0 <= float(lr) < math.inf):
        raise ValueError(f"lr={lr!r} must be a finite number that is not negative.")
    check_alpha(options["alpha"])
    check_cg_options(
        options["cg_tol"], options["cg_atol"], options["cg_maxiter"], prefix="cg_"
    )
    if options["solver"] not in ("cg", "direct"):
        raise ValueError(
            f"solver={options['solver']!r} is unknown. Choose 'cg' (inexact, conjugate "
            "gradients) or 'direct' (factorisation)."
        )
