"""CGNewton: a Newton-style optimizer that solves one linear system per parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from .cg import Product, cg_rows, check_cg_options, check_trust_radius
from .guards import full_precision, is_number
from .module import drop_curvature
from .operators import MatrixFree, System, check_alpha, singular, solve_system
from .operators import SymmetricOperator as Operator
from .settings import CHECK_EVERY, NEGLIGIBLE, NULL_SLACK, TOGETHER


@dataclass(frozen=True)
class StepInfo:
    """What the last step did to one parameter.

    Attributes:
        iterations: CG steps taken, 0 with ``solver="direct"``. Where the system falls
            into parts, the most that one of them took.
        residual_norm: ‖[(1-α)H + αI] d + g‖.
        converged: whether the solver reached its tolerance, in every part; a direct
            solve always does.
        negative_curvature: whether CG ended at a direction of curvature ≤ 0, in any
            part. The iterate up to there was applied; after 0 iterations that is no
            step. The other parts go on. With a trust radius, the step goes on to the
            boundary.
        step_norm: ‖d‖, before the learning rate.
        predicted_decrease: how far the damped quadratic model [falls][eq-decrease] for
            the step lr·d, in units of the loss. It can exceed the loss itself: the
            averaged block H ⊗ x̄x̄ᵀ is flat in every input direction but x̄.
        undamped_decrease: the same for the model without damping, whose curvature is
            H alone. NaN at α = 1, where the solver never sees H.
        on_boundary: whether the step ended on the boundary of the trust region, in any
            part.
    """

    iterations: int
    residual_norm: float
    converged: bool
    negative_curvature: bool
    step_norm: float
    predicted_decrease: float
    undamped_decrease: float
    on_boundary: bool


class CGNewton(torch.optim.Optimizer):
    """Newton steps, one curvature block per parameter.

    For each parameter θ with gradient g and curvature H = ``p.hessian``,

        [(1-α)H + αI] d = -g,        θ ← θ + lr·d

    ([a step][eq-newton] of Dangel, Harmeling & Hennig 2020). With ``solver="cg"`` the
    system is solved inexactly by conjugate gradients from 0. The iterates are those of
    CG on the full block; where the block's structure allows it they are computed in
    compressed coordinates (for H ⊗ x̄x̄ᵀ, out_features + 1 numbers). H ⊗ E[xxᵀ] falls
    into independent parts. CG solves each by itself and stops at the same relative
    residual, hence the whole does. With ``solver="direct"`` it is solved by
    factorisation.

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
        cg_maxiter: At most this many products, in each part; ``None`` for ten times
            the number of unknowns of the largest system that is solved with it.
        solver: ``"cg"`` or ``"direct"``.
        trust_radius: Bound on ‖d‖ for each parameter, before the learning rate; CG
            stops on the boundary (Steihaug 1983), so that negative curvature gives a
            step as well. ``None`` for no bound. It needs ``solver="cg"``.

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
        trust_radius: float | None = None,
        **further: Any,
    ) -> None:
        cg = {"cg_atol": cg_atol, "cg_tol": cg_tol, "cg_maxiter": cg_maxiter}
        defaults = {"lr": lr, "alpha": alpha, **cg, "solver": solver}
        self.last_step: dict[Tensor, StepInfo] = {}
        super().__init__(params, {**defaults, "trust_radius": trust_radius, **further})

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
        drop_curvature(p for group in self.param_groups for p in group["params"])

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
            ArithmeticError: loss, gradient or curvature has NaN or infinity, the
                system is singular, or a parameter would be too large for its dtype.
                No parameter has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            _check_loss(loss)
        with full_precision():
            steps = [s for i, g in enumerate(self.param_groups) for s in _steps(i, g)]
            trained = (p for group in self.param_groups for p in group["params"])
            if not steps and any(p.requires_grad for p in trained):
                raise RuntimeError(
                    "step() found no gradient. Call loss.backward() and then "
                    "model.backward_hessian(output_hessian) before step()."
                )
            self._take(steps)
        return loss

    def _take(self, steps: Sequence[_Step]) -> None:
        """Update the parameters, once it is known that nothing is in the way."""
        self.last_step = {step.equation.parameter: step.checked() for step in steps}
        for step in steps:
            _, parameter, system = step.equation
            if parameter.is_contiguous():
                system.add_to(parameter.view(-1), step.y, -step.lr)
            else:
                parameter.add_(step.change())
        # A second step needs another pass, and nothing of the batch stays alive.
        drop_curvature(p for p in self.last_step if "hessian_of" in vars(p))


class _Equation(NamedTuple):
    """[(1-α)H + αI] d = g of one parameter, in coordinates; the step is -lr·d."""

    name: str
    parameter: Parameter
    system: System


class _Step(NamedTuple):
    """θ ← θ - lr·d, once it is known that d, in coordinates y, is a solution."""

    equation: _Equation
    y: Tensor
    lr: float
    info: Callable[[float], StepInfo]

    def change(self) -> Tensor:
        """-lr·d, of the shape of θ."""
        change = self.equation.parameter.new_zeros(self.equation.parameter.numel())
        self.equation.system.add_to(change, self.y, -self.lr)
        return change.view(self.equation.parameter.shape)

    def checked(self) -> StepInfo:
        """What the step does, or ArithmeticError.

        It is raised if d is no solution, or if the parameter would leave the range of
        its dtype.

        What is below half a unit in the last place of the largest number makes no
        finite number infinite. Only a longer step is tried.
        """
        (name, parameter, _), info = self.equation, self.info(self.lr)
        limits = torch.finfo(parameter.dtype)
        if max(self.lr, 1.0) * info.step_norm <= limits.max * limits.eps / 4:
            return info
        if self.lr > limits.max or not (parameter + self.change()).isfinite().all():
            raise ArithmeticError(
                f"No step was taken; {name} would be too large for {limits.dtype} "
                f"after a step of norm {info.step_norm:.3g} at lr={self.lr!r}. "
                "Use a smaller lr or a larger alpha, or check the scale of the loss."
            )
        return info


def _steps(index: int, group: dict[str, Any]) -> list[_Step]:
    """The steps of one parameter group; nothing is changed.

    Raises:
        ArithmeticError: a gradient or a curvature is not finite, or a matrix singular.
    """
    _check_options(group)
    by_cg = group["solver"] == "cg"
    together: dict[tuple[object, ...], list[_Equation]] = {}
    for equation in _equations(index, group):
        _, p, system = equation
        # Its product costs more than what it could share.
        large = isinstance(system.operator, MatrixFree) or system.rhs.numel() > TOGETHER
        kind = p.dtype, p.device, id(p) if by_cg and large else None
        together.setdefault(kind, []).append(equation)
    steps = []
    for (_, _, alone), equations in together.items():
        options = {**group, "check_every": CHECK_EVERY if alone is None else 1}
        solved = (_by_cg if by_cg else _directly)(equations, options)
        for equation, (y, margin, facts) in zip(equations, solved, strict=True):
            info = cache(partial(_info, equation, group["alpha"], margin, facts))
            steps.append(_Step(equation, y, float(group["lr"]), info))
    return steps


def _equations(index: int, group: dict[str, Any]) -> list[_Equation]:
    found = []
    for i, p in enumerate(group["params"]):
        if p.requires_grad and p.grad is not None:
            name = f"parameter {i} of group {index}, shape {list(p.shape)}"
            found.append((name, p, _curvature(p, name)))
    return [
        _Equation(name, p, curvature.system(p.grad.flatten()))
        for name, p, curvature in found
    ]


def _curvature(p: Parameter, name: str) -> Operator:
    """What ``p.hvp`` or ``p.hessian`` says, for a gradient that is dense."""
    if p.grad is not None and p.grad.is_sparse:
        raise RuntimeError(f"The gradient of {name} is sparse; it must be dense.")
    if (product := getattr(p, "hvp", None)) is not None:
        return MatrixFree(product, p.numel(), p.dtype, p.device)
    if (hessian := getattr(p, "hessian", None)) is None:
        raise RuntimeError(
            f"There is a gradient but no curvature for {name}. Call "
            "model.backward_hessian(output_hessian) between loss.backward() and "
            "step(), or set p.hvp."
        )
    if not isinstance(hessian, Operator):
        raise RuntimeError(
            f"p.hessian of {name} is a {type(hessian).__name__}; it must be an "
            "operator. Wrap a matrix as hbp.operators.DenseOperator(matrix)."
        )
    found = hessian.shape[0], hessian.dtype, hessian.device
    if found != (p.numel(), p.dtype, p.device):
        raise RuntimeError(
            f"{hessian!r} does not fit {name}, {p.dtype} on {p.device}. Call "
            "model.backward_hessian(...) again after changing the model."
        )
    return hessian


def _info(
    equation: _Equation, alpha: float, margin: float, facts: _Facts, lr: float
) -> StepInfo:
    """What happened, once the facts say that d is a solution.

    At θ - lr·d the model has changed by -lr·gᵀd + ½lr²·dᵀCd, C = (1-α)H + αI. A
    solution has Cd = g; so has every CG iterate from 0 as far as dᵀ can see, for its
    residual is orthogonal to d. Hence dᵀCd = gᵀd, and eq-decrease. Only on the boundary
    of a trust region there is an overlap: dᵀCd = gᵀd - dᵀ(g - Cd).

    Raises:
        ArithmeticError: d is no solution.
    """
    iterations, residuals, converged, bent, left, overlaps, norms, descents = facts
    residual, norm = math.hypot(*residuals), math.hypot(*norms)
    overlap, descent = sum(overlaps), sum(descents)
    if not (math.isfinite(residual + norm) and margin > 1):
        raise ArithmeticError(f"No step was taken; {_blame(equation, margin, alpha)}")
    undamped, half = math.nan, lr * lr / 2
    if alpha < 1:  # ** raises where it overflows
        undamped = (descent - overlap - alpha * norm * norm) / (1 - alpha)
    decreases = (lr - half) * descent + half * overlap, lr * descent - half * undamped
    flags, at_edge = (bool(min(converged)), bool(max(bent))), bool(max(left))
    return StepInfo(int(max(iterations)), residual, *flags, norm, *decreases, at_edge)


def _blame(equation: _Equation, margin: float, alpha: float) -> str:
    """Why there is no solution."""
    gradient, name = equation.parameter.grad, equation.name
    if gradient is not None and not bool(gradient.isfinite().all()):
        return f"the gradient of {name} has NaN or infinity."
    if not margin > 1:
        return f"{name}: {singular(alpha)}"
    return (
        f"the direction for {name} has NaN or infinity. If its curvature is finite but "
        f"singular, alpha={alpha} may be too small, or a trust_radius helps. Of a "
        "gradient above 1e19, float32 has no square: scale the loss, or use .double()."
    )


# --- Two solvers. Each returns d in coordinates, a margin above 1 if the matrix is
# --- regular, and the numbers that _info takes apart, of each row of the system.

_Facts = Sequence[Sequence[float]]
_Solved = Sequence[tuple[Tensor, float, _Facts]]


def _by_cg(equations: Sequence[_Equation], options: dict[str, Any]) -> _Solved:
    systems = [equation.system for equation in equations]
    sizes = [len(system.rhs) for system in systems]
    b, trust = _padded([system.rhs for system in systems]), options["trust_radius"]
    factors, shares = torch.cat([_shares(p) for p in b.split(sizes)]).split(1, dim=1)
    found = cg_rows(
        _damped(systems, options["alpha"]),
        b,
        options["cg_tol"] * factors,
        shares * options["cg_atol"],
        options["cg_maxiter"] or 10 * b.shape[1],
        None if trust is None else shares * trust,
        options["check_every"],
        0 if options["alpha"] else NULL_SLACK * torch.finfo(b.dtype).eps,
    )
    numbers, end, solved = found.facts.T.tolist(), 0, []
    for system, x in zip(systems, found.x.split(sizes), strict=True):
        if x.shape[1] > system.rhs.shape[1]:
            x = torch.cat([x[:, : system.rhs.shape[1] - 1], x[:, -1:]], dim=1)
        start, end = end, end + len(x)
        solved.append((x, math.inf, [column[start:end] for column in numbers]))
    return solved


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Rows of equal width; the coordinate in the null space stays the last."""
    if len(parts) == 1:
        return parts[0]
    width, rows = max(part.shape[1] for part in parts), []
    for part in parts:
        zeros = part.new_zeros(len(part), width - part.shape[1])
        rows.append(torch.cat([part[:, :-1], zeros, part[:, -1:]], dim=1))
    return torch.cat(rows)


def _shares(b: Tensor) -> Tensor:
    """What each row may take of two tolerances, a relative and an absolute one, [k, 2].

    Of an absolute one a row takes its share, ‖b_j‖/‖b‖. The relative one is by 15/16
    relative to the row, by 1/16 shared out evenly, so that a row of mere round-off is
    done at once; the squares add up to those of the whole.
    """
    if len(b) == 1:
        return b.new_ones(1, 2)
    # In units of the largest entry, so that no square under- or overflows.
    norms = torch.linalg.vector_norm(b / b.abs().max(), dim=1, keepdim=True)
    shares = (norms / torch.linalg.vector_norm(norms)).nan_to_num(0.0)
    even = 16 * len(b) * shares.clamp(min=NEGLIGIBLE).square()
    return torch.cat([(15 / 16 + 1 / even).sqrt(), shares], dim=1)


def _damped(
    systems: Sequence[System], alpha: float
) -> Callable[[Sequence[int], Tensor], Product]:
    """p ↦ [(1-α) λ H + αI] p, row by row. Rows with the same H share its product."""
    operators = [s.operator for s in systems for _ in range(len(s.scales))]
    numbers = list(map(id, operators))
    scales = torch.cat([s.scales for s in systems])[:, None] * (1 - alpha)

    def product_of(live: Sequence[int], places: Tensor) -> Product:
        # A weight and its bias stand side by side: one product serves both.
        runs = [list(same) for _, same in groupby(live, numbers.__getitem__)]
        counts, shared = [len(run) for run in runs], [operators[run[0]] for run in runs]
        factors = scales[places].split(counts)

        def product(p: Tensor) -> Tensor:
            Ap, rows = p * alpha, zip(shared, p.split(counts), strict=True)
            pairs = [(H, part[:, : H.shape[0]]) for H, part in rows]
            products = zip(Ap.split(counts), shared[0].products(pairs), strict=True)
            for (part, Hp), factor in zip(products, factors, strict=True):
                part[:, : Hp.shape[1]].addcmul_(Hp, factor)
            return Ap

        return product

    return product_of


def _directly(equations: Sequence[_Equation], options: dict[str, Any]) -> _Solved:
    alpha, solutions, columns = options["alpha"], [], []
    for _, _, system in equations:
        y, margin = solve_system(system, 1 - alpha, alpha)
        bent = system.operator.product(y[:, :-1]) * system.scales[:, None]
        residual = alpha * y - system.rhs
        residual[:, :-1].add_(bent, alpha=1 - alpha)
        # Squares over- or underflow in float32 where a vector does not.
        norms = [torch.linalg.vector_norm(v.double()) for v in (residual, y)]
        solutions.append(y)
        columns += [*norms, (y.double() * system.rhs).sum(), margin.double()]
    numbers = torch.stack(columns).view(-1, 4).tolist()  # The host waits here.
    return [
        (y, margin, [[n] for n in (0, r, True, False, False, 0.0, norm, descent)])
        for y, (r, norm, descent, margin) in zip(solutions, numbers, strict=True)
    ]


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor | float | int):
        raise TypeError(
            f"The closure returned {type(loss).__name__}; it must return the loss."
        )
    if not math.isfinite(float(loss)):
        raise ArithmeticError(f"No step; the closure returned a loss of {float(loss)}.")


def _check_options(options: dict[str, Any]) -> None:
    lr, solver, trust = options["lr"], options["solver"], options["trust_radius"]
    is_scalar = (isinstance(lr, Tensor) and lr.numel() == 1) or is_number(lr)
    if isinstance(lr, bool) or not (is_scalar and 0 <= float(lr) < math.inf):
        raise ValueError(f"lr={lr!r} must be a finite number that is not negative.")
    check_alpha(options["alpha"])
    check_cg_options(
        options["cg_tol"], options["cg_atol"], options["cg_maxiter"], "cg_"
    )
    # An array has no truth value; a comparison must not answer with its own error.
    if not (isinstance(solver, str) and solver in ("cg", "direct")):
        raise ValueError(
            f"solver={solver!r} is unknown. Choose 'cg' (inexact, conjugate gradients) "
            "or 'direct' (factorisation)."
        )
    if trust is not None:
        check_trust_radius(trust)
        if solver == "direct":
            raise ValueError(
                f"trust_radius={trust!r} bounds the iterates of conjugate gradients. "
                "Use solver='cg', or trust_radius=None."
            )
