"""CGNewton: a Newton-style optimizer that solves one linear system per parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from hbp.blocks import JointBlock, JointPart
from hbp.checks import is_number
from hbp.operators import (
    MatrixFree,
    SymmetricOperator,
    attach_hessian,
    check_alpha,
    singular_message,
    solve_reductions,
)
from hbp.optim.cg import check_cg_options, check_trust_radius
from hbp.optim.lockstep import CHECK_EVERY, Damped, cg_lockstep
from hbp.precision import full_precision

LOCKSTEP_UNKNOWNS: Final = 2**12
"""Systems of more unknowns are solved one by one: they gain nothing from company.

In company, short vectors are padded to the longest. With 2**16, those of a network with
averaged products took more memory than the bound allows, and no less time.
"""


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
            the number of unknowns.
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
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "cg_atol": cg_atol,
            "cg_tol": cg_tol,
            "cg_maxiter": cg_maxiter,
            "solver": solver,
            "trust_radius": trust_radius,
        }
        self.last_step: dict[Tensor, StepInfo] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore an optimizer that was pickled, without its last step."""
        super().__setstate__(state)
        for group in self.param_groups:  # older states have no such option
            group.setdefault("trust_radius", None)
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
            systems = self._systems()
            solutions = _solve(systems)
            for system in systems:
                system.require_room(*solutions[system])
            for system in systems:
                system.apply(solutions[system][0])
        self.last_step = {p: solutions[s][1] for s in systems for p in s.parameters}
        return loss

    def _systems(self) -> list[_System]:
        systems = []
        trainable = False
        for group_index, group in enumerate(self.param_groups):
            _check_options(group)
            trainable |= any(p.requires_grad for p in group["params"])
            for indices in _together(group["params"]):
                parameters = [group["params"][index] for index in indices]
                names = [
                    f"parameter {index} of group {group_index}, shape {list(p.shape)}"
                    for index, p in zip(indices, parameters, strict=True)
                ]
                systems.append(_System(" and ".join(names), parameters, group))
        if trainable and not systems:
            raise RuntimeError(
                "step() found no gradient. Call loss.backward() and then "
                "model.backward_hessian(output_hessian) before step()."
            )
        return systems


def _together(parameters: Sequence[Parameter]) -> list[list[int]]:
    """Which parameters with a gradient make a system: one, or a weight and its bias.

    Raises:
        RuntimeError: one of two parameters with a joint block has no gradient, or is
            in another group.
    """
    alone: list[list[int]] = []
    joint: dict[JointBlock, dict[int, int]] = {}
    for index, p in enumerate(parameters):
        if not p.requires_grad or p.grad is None:
            continue
        hessian = getattr(p, "hessian", None)
        if isinstance(hessian, JointPart) and getattr(p, "hvp", None) is None:
            joint.setdefault(hessian.joint, {})[hessian.index] = index
        else:
            alone.append([index])
    for members in joint.values():
        if len(members) == 1:
            (index,) = members.values()
            raise RuntimeError(
                f"Parameter {index} of a group, shape {list(parameters[index].shape)}, "
                "shares a joint block with another that has no gradient or p.hvp, or "
                "is in another group. Put weight and bias in one group, or call "
                "set_hbp_blocks(joint_bias=False)."
            )
    pairs = [[members[0], members[1]] for members in joint.values()]
    return sorted(alone + pairs)


class Facts(NamedTuple):
    """What a solver says of one system; the first five as in ``StepInfo``.

    Attributes:
        descent: gᵀd.
        on_boundary: As in ``StepInfo``.
        overlap: dᵀ(g - Cd), C = (1-α)H + αI.
        margin: Above 1 if the matrix is regular.
    """

    iterations: float
    residual_norm: float
    converged: float
    negative_curvature: float
    step_norm: float
    descent: float
    on_boundary: float
    overlap: float
    margin: float


class _System:
    """[(1-α)H + αI] d = g for one parameter, in the coordinates that H allows.

    A weight and a bias that share a joint block are one system. H may fall into
    independent blocks; each has a reduction of its own.

    The solution is the d of the step with the sign turned: θ ← θ - lr·d.

    Attributes:
        parameters: One, or weight and bias.
    """

    def __init__(
        self, name: str, parameters: Sequence[Parameter], options: dict[str, Any]
    ) -> None:
        self.name = name
        self.parameters = parameters
        self.options = options
        curvatures = [self._curvature(p) for p in parameters]
        gradients = [self._gradient(p) for p in parameters]
        self._joint = None
        operator, gradient = curvatures[0], gradients[0]
        if isinstance(operator, JointPart):
            self._joint = operator.joint
            operator = self._joint.operator
            columns = (gradient.unsqueeze(1) for gradient in gradients)
            gradient = self._joint.gather(*columns).squeeze(1)
        self.reductions = operator.reductions(gradient)

    def _gradient(self, parameter: Parameter) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError(
                f"The gradient of {self.name} is sparse; CGNewton needs a dense one."
            )
        return gradient.flatten()

    def _curvature(self, p: Parameter) -> SymmetricOperator:
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

    @property
    def rhs(self) -> Tensor:
        """g in coordinates, [k]."""
        return torch.cat([reduction.rhs for reduction in self.reductions])

    def parts(self) -> list[Damped]:
        """The system for conjugate gradients, as independent ones."""
        o = self.options
        parts = [part for reduction in self.reductions for part in reduction.parts()]
        stop = o["cg_tol"], o["cg_atol"], o["cg_maxiter"]
        shares = _shares([rhs for _, rhs in parts])
        return [
            Damped(operator, o["alpha"], rhs, *stop, share, o["trust_radius"])
            for (operator, rhs), share in zip(parts, shares, strict=True)
        ]

    def info(self, facts: Facts) -> StepInfo:
        """What happened, once the facts say that d is a solution.

        At θ - lr·d the model has changed by -lr·gᵀd + ½lr²·dᵀCd, C = (1-α)H + αI. A
        solution has Cd = g; so has every CG iterate from 0 as far as dᵀ can see, for
        its residual is orthogonal to d. Hence dᵀCd = gᵀd, and eq-decrease. Only on the
        boundary of a trust region there is an overlap: dᵀCd = gᵀd - dᵀ(g - Cd).

        Raises:
            ArithmeticError: d is no solution.
        """
        finite = math.isfinite(facts.residual_norm + facts.step_norm)
        if not (finite and facts.margin > 1):
            raise ArithmeticError(f"No step was taken; {self._blame(facts.margin)}")
        lr, alpha = self.options["lr"], self.options["alpha"]
        curvature = facts.descent - facts.overlap
        undamped = math.nan
        if alpha < 1:
            square = facts.step_norm * facts.step_norm  # ** raises where it overflows
            undamped = (curvature - alpha * square) / (1 - alpha)
        return StepInfo(
            int(facts.iterations),
            facts.residual_norm,
            bool(facts.converged),
            bool(facts.negative_curvature),
            facts.step_norm,
            (lr - lr * lr / 2) * facts.descent + lr * lr / 2 * facts.overlap,
            lr * facts.descent - lr * lr / 2 * undamped,
            bool(facts.on_boundary),
        )

    def _blame(self, margin: float) -> str:
        """Why there is no solution."""
        if not bool(self.rhs.isfinite().all()):
            return f"the gradient of {self.name} has NaN or infinity."
        if not margin > 1:
            return f"{self.name}: {singular_message(self.options['alpha'])}"
        return (
            f"the direction for {self.name} has NaN or infinity. Is its curvature "
            f"finite? If it is singular, alpha={self.options['alpha']} may be too "
            "small; a trust_radius bounds the direction. Of a gradient above 1e19, "
            "float32 has no square: scale the loss, or use .double()."
        )

    def join(self, solutions: Sequence[Tensor]) -> list[Tensor]:
        """The coordinates of d by reduction, from those by part."""
        remaining = iter(solutions)
        counts = [len(reduction.parts()) for reduction in self.reductions]
        pairs = zip(self.reductions, counts, strict=True)
        return [r.join(list(islice(remaining, count))) for r, count in pairs]

    def apply(self, coordinates: Sequence[Tensor]) -> None:
        """θ ← θ - lr·d for the d with these coordinates, by reduction."""
        first = self.parameters[0]
        if self._joint is None and first.is_contiguous():
            self._add_to(first.view(-1), coordinates)
            return
        for p, change in zip(self.parameters, self._changes(coordinates), strict=True):
            p.add_(change)

    def require_room(self, coordinates: Sequence[Tensor], info: StepInfo) -> None:
        """Raise ArithmeticError if a parameter would leave the range of its dtype.

        What is below half a unit in the last place of the largest number makes no
        finite number infinite. Only a longer step is tried.
        """
        limits = torch.finfo(self.parameters[0].dtype)
        lr = self.options["lr"]
        if max(lr, 1.0) * info.step_norm <= limits.max * limits.eps / 4:
            return
        if lr <= limits.max:
            pairs = zip(self.parameters, self._changes(coordinates), strict=True)
            if all(bool((p + change).isfinite().all()) for p, change in pairs):
                return
        raise ArithmeticError(
            f"No step was taken; {self.name} would be too large for {limits.dtype} "
            f"after a step of norm {info.step_norm:.3g} at lr={lr!r}. Use a smaller lr "
            "or a larger alpha, or check the scale of the loss."
        )

    def _changes(self, coordinates: Sequence[Tensor]) -> list[Tensor]:
        """-lr·d for the d with these coordinates, by parameter."""
        first = self.parameters[0]
        size = sum(p.numel() for p in self.parameters)
        step = first.new_zeros(size)
        self._add_to(step, coordinates)
        steps = [step.unsqueeze(1)]
        if self._joint is not None:
            steps = list(self._joint.scatter(step.unsqueeze(1)))
        pairs = zip(self.parameters, steps, strict=True)
        return [own.reshape(p.shape) for p, own in pairs]

    def _add_to(self, target: Tensor, coordinates: Sequence[Tensor]) -> None:
        sizes = [reduction.size for reduction in self.reductions]
        rows = zip(self.reductions, target.split(sizes), coordinates, strict=True)
        for reduction, part, y in rows:
            reduction.add_to(part, y, scale=-self.options["lr"])


def _solve(systems: Sequence[_System]) -> dict[_System, tuple[list[Tensor], StepInfo]]:
    """The coordinates of d, and what happened, for every system.

    Raises:
        ArithmeticError: a gradient or a curvature is not finite, or a matrix singular.
    """
    iterative = [s for s in systems if s.options["solver"] == "cg"]
    direct = [s for s in systems if s.options["solver"] == "direct"]
    solved = {**_by_cg(iterative), **_directly(direct)}
    return {s: (solved[s][0], s.info(solved[s][1])) for s in systems}


def _by_cg(systems: Sequence[_System]) -> dict[_System, tuple[list[Tensor], Facts]]:
    """The coordinates of d by conjugate gradients, part by part."""
    parts = {system: system.parts() for system in systems}
    solutions = iter(_solve_parts([part for own in parts.values() for part in own]))
    solved = {}
    for system, own in parts.items():
        directions, facts = zip(*islice(solutions, len(own)), strict=True)
        solved[system] = system.join(directions), _combine(facts)
    return solved


def _solve_parts(parts: Sequence[Damped]) -> list[tuple[Tensor, Facts]]:
    """Small systems together, large ones and functions of the user alone."""
    groups: dict[object, list[int]] = {}
    for i, part in enumerate(parts):
        kind: object = part.b.dtype, part.b.device
        groups.setdefault(i if _is_large(part) else kind, []).append(i)
    solutions = {}
    for indices in groups.values():
        group = [parts[i] for i in indices]
        # A product of a large system costs more than the host's look at the residual.
        check_every = 1 if _is_large(group[0]) else CHECK_EVERY
        x, *facts = cg_lockstep(group, check_every)
        margins = torch.full_like(facts[-1], math.inf)
        rows = _read([*facts, margins])
        for i, part, row, fact in zip(indices, group, x, rows, strict=True):
            solutions[i] = row[: len(part.b)], fact
    return [solutions[i] for i in range(len(parts))]


def _is_large(part: Damped) -> bool:
    """Whether a product costs more than what the systems could share."""
    return isinstance(part.operator, MatrixFree) or len(part.b) > LOCKSTEP_UNKNOWNS


def _shares(parts: Sequence[Tensor]) -> list[Tensor | None]:
    """The norm of each part of a vector, relative to that of the whole."""
    if len(parts) == 1:
        return [None]
    # In units of the largest entry, so that no square under- or overflows.
    unit = torch.stack([part.abs().max() for part in parts]).max()
    norms = torch.stack([torch.linalg.vector_norm(part / unit) for part in parts])
    shares = norms / torch.linalg.vector_norm(norms)
    # Where the whole is zero, so is its residual; where it is not finite, CG says so.
    return list(shares.nan_to_num(0.0))


def _combine(parts: Sequence[Facts]) -> Facts:
    """The facts on a system from those on its parts."""
    return Facts(
        iterations=max(part.iterations for part in parts),
        residual_norm=math.hypot(*(part.residual_norm for part in parts)),
        converged=min(part.converged for part in parts),
        negative_curvature=max(part.negative_curvature for part in parts),
        step_norm=math.hypot(*(part.step_norm for part in parts)),
        descent=sum(part.descent for part in parts),
        on_boundary=max(part.on_boundary for part in parts),
        overlap=sum(part.overlap for part in parts),
        margin=min(part.margin for part in parts),
    )


def _directly(
    systems: Sequence[_System],
) -> dict[_System, tuple[list[Tensor], Facts]]:
    """The coordinates of d by factorisation."""
    groups: dict[object, list[_System]] = {}
    for system in systems:
        kind = system.rhs.dtype, system.rhs.device
        groups.setdefault(kind, []).append(system)
    solved = {}
    for group in groups.values():
        directions, facts = _factorise(group)
        found = iter(zip(directions, _read(facts), strict=True))
        for system in group:
            own = islice(found, len(system.reductions))
            ds, fs = zip(*own, strict=True)
            solved[system] = list(ds), _combine(fs)
    return solved


def _factorise(group: Sequence[_System]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The coordinates of d by reduction, and ``Facts`` on the device."""
    directions, norms, sizes, descents, margins = [], [], [], [], []
    for system in group:
        alpha = system.options["alpha"]
        solved = solve_reductions(system.reductions, alpha)
        for reduction, (d, margin) in zip(system.reductions, solved, strict=True):
            operator, rhs = reduction.operator, reduction.rhs
            residual = alpha * d - rhs
            k = operator.shape[0]
            operator.add_product(residual[:k, None], d[:k, None], 1 - alpha)
            directions.append(d)
            norms.append(_norm(residual))
            sizes.append(_norm(d))
            descents.append(d.double() @ rhs.double())
            margins.append(margin)
    zero = torch.zeros_like(torch.stack(margins))
    stacked = map(torch.stack, (sizes, descents))
    unbounded = [zero, zero]
    facts = [zero, torch.stack(norms), zero + 1, zero, *stacked, *unbounded]
    return directions, [*facts, torch.stack(margins)]


def _norm(vector: Tensor) -> Tensor:
    """Its squares over- or underflow in float32 where the vector does not."""
    return torch.linalg.vector_norm(vector, dtype=torch.float64)


def _read(facts: Sequence[Tensor]) -> list[Facts]:
    """Facts by system, from the device: here the host waits for the solutions."""
    rows = torch.stack([fact.double() for fact in facts], dim=1).tolist()
    return [Facts(*row) for row in rows]


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
    if not (is_number(lr) and 0 <= float(lr) < math.inf):
        raise ValueError(f"lr={lr!r} must be a finite number that is not negative.")
    check_alpha(options["alpha"])
    check_cg_options(
        options["cg_tol"], options["cg_atol"], options["cg_maxiter"], prefix="cg_"
    )
    # An array has no truth value; a comparison must not answer with its own error.
    if not isinstance(options["solver"], str) or (
        options["solver"] not in ("cg", "direct")
    ):
        raise ValueError(
            f"solver={options['solver']!r} is unknown. Choose 'cg' (inexact, conjugate "
            "gradients) or 'direct' (factorisation)."
        )
    check_trust_radius(options["trust_radius"])
    if options["trust_radius"] is not None and options["solver"] == "direct":
        raise ValueError(
            f"trust_radius={options['trust_radius']!r} bounds the iterates of "
            "conjugate gradients. Use solver='cg', or trust_radius=None."
        )
