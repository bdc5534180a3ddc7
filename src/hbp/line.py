"""How long a step is: the curvature of the loss along it.

Each block of a Newton step is solved as if all other parameters stood still, and then
all of them move at once; and an averaged block H ⊗ x̄x̄ᵀ is flat in every input
direction but x̄. Both faults are in the *length* of the step, and one exact number mends
them: the curvature of the loss along the step d of all parameters together,

    dᵀGd = Σ_n u_nᵀ H_n u_n,        u = J d.

u is what a forward pass of d through the layers' own rules leaves at the outputs
(Pearlmutter 1994), and H_n u_n is one second derivative of the loss, in one direction.
So the step ends at the minimum of the Gauss-Newton model on its line (Martens & Grosse
2015, section 6.4). All of this is one batch's opinion, so the step goes no further than
``lr`` says, and promises at most a fifth of what the loss has above its lower bound;
see eq-length.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from hbp.core import newton
from hbp.core.containers import HBPResidual, HBPSequential
from hbp.core.guards import is_number
from hbp.core.module import HBPModule, drop_curvature
from hbp.distributed import average
from hbp.forwards import Converted
from hbp.layers.paths import HBPParallel
from hbp.losses import hessian_and_gradient, nodes_of, places_of

DAMPING: Final = 0.01
"""α where none is given."""

LONGEST: Final = 0.1
"""lr where none is given. The minimum along a step is that of one batch, and of its
noise; steps of a tenth of the way lead to about the mean of the last ten minima."""

PROMISE: Final = 0.2
"""A step promises at most this share of what the loss has above its bound, or the share
lr if that is more. A step that promises more fits the noise of its batch: with 0.316
the accuracy of "deep, ReLU" in benchmarks/accuracy.py falls in the third epoch."""

NO_DIGITS: Final = torch.finfo(torch.float32).eps
"""A slope that a loss at its bound does not show: softmax cross-entropy is the
difference of numbers of order 1, and is exactly 0 where they agree to all digits."""

Moves = Mapping[Tensor, Tensor]
"""By how much each parameter moves."""


def backward(
    model: HBPModule,
    outputs: Tensor,
    loss: Tensor,
    curvature: str = "abs",
    exact: bool = False,
    lower_bound: float | None = 0.0,
    process_group: object = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Send the gradient and the curvature of a loss backward, in one call.

        optimizer = hbp.CGNewton(model.parameters())
        outputs = model(images)
        loss = loss_func(outputs, labels)
        optimizer.zero_grad()
        hbp.backward(model, outputs, loss)
        optimizer.step()

    It does what these three do, in the right order,

        output_hessian = batch_summed_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(output_hessian, modify_2nd_order_terms="abs")

    and tells the optimizer what the loss is, and how it bends along any step.

    Args:
        model: That computed the outputs.
        outputs: z, [N, ...].
        loss: A scalar that is a sum or mean over samples. Further terms in the
            parameters, such as a penalty, send their gradient, but no curvature, and
            keep the graph until the next forward pass; for the square of the norm
            there is ``weight_decay``.
        curvature: The treatment of second-order terms: ``"abs"``, ``"clip"``, ``"ggn"``
            or ``"hessian"``; see ``HBPModule.backward_hessian``.
        exact: Whether blocks are [exact][eq-exact], without averages over the batch.
        lower_bound: What the loss cannot fall below. 0 is right for every usual loss;
            with soft targets or label smoothing a larger one is, and bounds steps more
            tightly. ``None`` for a loss without a bound.
        process_group: As of ``backward_hessian``. Gradients are the business of
            ``DistributedDataParallel`` or of ``hbp.distributed.average``.
        scaler: What scales the gradients, instead of ``scaler.scale(loss)``. If they
            overflow there is no curvature, and ``scaler.step(optimizer)`` will take
            no step.

    Raises:
        TypeError: ``model`` is no HBP module, or ``scaler`` no scaler.
        ValueError: another argument is out of its range, or the outputs are not those
            of the last forward pass of ``model``.
        RuntimeError, ArithmeticError: as ``batch_summed_hessian`` and
            ``backward_hessian``.
    """
    _check_arguments(model, curvature, lower_bound, scaler)
    drop_curvature(model.parameters())  # Should this pass fail, no other one counts.
    hessian, gradient = hessian_and_gradient(loss, outputs, exact)
    line = Line(model, outputs, loss, gradient, lower_bound, process_group)
    gradient = gradient.detach()
    if scaler:  # While there are digits: half precision may have none for it.
        gradient = scaler.scale(gradient)
    gradient = gradient.to(outputs.dtype)
    if _has_further_leaves(loss, outputs):
        (scaler.scale(loss) if scaler else loss).backward(retain_graph=True)
    else:  # The graph of the loss alone stays, for the curvature along the step.
        outputs.backward(gradient)
    if scaler and _have_overflowed(model, process_group):
        return
    _require_own(model, outputs, gradient)
    treatment = "none" if curvature == "hessian" else curvature
    model.backward_hessian(
        hessian,
        modify_2nd_order_terms=treatment,
        process_group=process_group,
        loss_scale=scaler.get_scale() if scaler else 1.0,
    )
    # A parameter that held the line would keep the graph alive, and the graph it.
    vars(model)["line"] = line
    for parameter in model.parameters():
        if parameter.requires_grad:
            vars(parameter)["line"] = weakref.ref(line)


def _check_arguments(
    model: object, curvature: object, lower_bound: object, scaler: object
) -> None:
    """Raise before a gradient is sent."""
    if not isinstance(model, HBPModule):
        raise TypeError(
            f"model is a {type(model).__name__}, which sends no curvature backward. "
            "Use HBP layers, or hbp.convert(model); of a wrapper pass the HBP model "
            "in it."
        )
    if curvature not in ("abs", "clip", "ggn", "zero", "hessian", "none"):
        raise ValueError(
            f"curvature={curvature!r} is unknown. Choose 'abs', 'clip', 'ggn' or "
            "'hessian'."
        )
    real = is_number(lower_bound) and math.isfinite(lower_bound)
    if lower_bound is not None and not real:
        raise ValueError(
            f"lower_bound={lower_bound!r} must be a finite number, or None for a loss "
            "without a bound."
        )
    if not isinstance(scaler, torch.amp.GradScaler | None):
        raise TypeError(
            f"scaler is a {type(scaler).__name__}; pass a torch.amp.GradScaler."
        )


def _have_overflowed(model: HBPModule, process_group: Any) -> bool:
    """Whether a gradient of this process, or of another one, is not finite."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    bad = not all(bool(gradient.isfinite().all()) for gradient in found)
    if process_group is None or not found:
        return bad
    average([share := found[0].new_tensor(float(bad))], process_group)
    return bool(share > 0)


def _require_own(model: HBPModule, outputs: Tensor, sent: Tensor) -> None:
    """Raise ValueError unless the last layer got the very gradient of the outputs."""
    record = vars(_last_layer(model)).get("last_record")
    if record is None or record.output_gradient is None:
        return
    delta, own = record.output_gradient.flatten(), sent.flatten()
    norm = torch.linalg.vector_norm
    if len(delta) != len(own) or norm(delta - own.to(delta)) > 1e-2 * norm(delta):
        raise ValueError(
            f"outputs of shape {list(outputs.shape)} are not those of the last forward "
            "pass of model. Pass model(inputs) itself, and compute what follows, "
            "a softmax, a temperature, a mask or another order, in the loss."
        )


def _last_layer(module: nn.Module) -> nn.Module:
    """The one whose outputs are those of the model, or of a path into their sum."""
    if isinstance(module, Converted):
        module = vars(module)["_chain"]
    is_nest = isinstance(module, HBPSequential | HBPResidual)
    found = map(_last_layer, reversed([*module.children()] if is_nest else []))
    # An empty chain, which is the identity, has no record.
    return next((layer for layer in found if "last_record" in vars(layer)), module)


class Line:
    """A loss along any step from here.

    Args:
        model: That computed the outputs, and has not changed since.
        outputs: z, [N, ...].
        loss: Their loss.
        gradient: ∂loss/∂z, [N, ...], with a graph of its own, at ``places_of`` z.
        lower_bound: As of ``backward``.
        process_group: As of ``backward``.
    """

    def __init__(
        self,
        model: HBPModule,
        outputs: Tensor,
        loss: Tensor,
        gradient: Tensor,
        lower_bound: float | None,
        process_group: Any,
    ) -> None:
        self._model = weakref.ref(model)
        self.outputs, self.loss = outputs, loss.detach().reshape(())
        self.bound = -math.inf if lower_bound is None else lower_bound
        self.process_group = process_group
        layers = [m for m in model.modules() if "last_record" in vars(m)]
        self._records: dict[Any, Any] = {m: m.last_record for m in layers}
        self._places, self._gradient = places_of(loss, outputs), gradient

    def measure(self, moves: Moves) -> Tensor:
        """dᵀGd and the loss, [2], in float64; the means over processes."""
        for layer, record in self._records.items():
            if vars(layer).get("last_record") is not record:
                raise RuntimeError(
                    "Between hbp.backward and step() another forward pass went through "
                    f"{layer}, so that nothing is known along the step any more. "
                    "Evaluate under torch.no_grad()."
                )
            layer.check_record()
        numbers = torch.stack([self.curvature(moves), self.loss]).double()
        if self.process_group is not None:
            average([numbers], self.process_group)
        return numbers

    def curvature(self, moves: Moves) -> Tensor:
        """dᵀGd, eq-length, a scalar tensor."""
        u = tangent(self._model(), None, moves)
        if u is None or not self._gradient.requires_grad:
            return self.loss.new_zeros(())
        u = u.view(self.outputs.shape)
        # Within the range of half precision, if the gradient is in it.
        largest = torch.linalg.vector_norm(u, math.inf)
        unit = largest.clamp(min=torch.finfo(u.dtype).tiny)
        with torch.enable_grad():
            found = torch.autograd.grad(
                self._gradient,
                self._places,
                (u / unit).to(self._gradient.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        return sum(
            ((u / unit * Hu).sum() * unit * unit for Hu in found if Hu is not None),
            self.loss.new_zeros(()),
        )


@singledispatch
def tangent(layer: Any, u: Tensor | None, moves: Moves) -> Tensor | None:
    """How z moves, to first order, as x moves by u and parameters by their moves.

    Args:
        layer: After a forward pass with gradients enabled.
        u: [1, N · in_features]; None where x stays.
        moves: By how much parameters move; those that it does not name stay.

    Returns:
        [1, N · out_features], exact for every sample; None where z stays.
    """
    own = set(layer.parameters(recurse=False))
    if any(p in moves for p in layer.parameters() if p not in own):
        raise TypeError(
            f"{type(layer).__name__} contains layers, but no rule says how a step goes "
            "through it. Register one by hbp.line.tangent.register, or use "
            "HBPSequential and HBPResidual."
        )
    terms = [] if u is None else [layer.jacobian().jvp(u)]
    if any(p in moves for p in own):
        for p, J in layer.parameter_jacobians():
            terms += [J.jvp(moves[p].reshape(1, -1))] if p in moves else []
    return sum(terms[1:], terms[0]) if terms else None


@tangent.register
def _(layer: HBPSequential, u: Tensor | None, moves: Moves) -> Tensor | None:
    for child in layer.children():
        u = tangent(child, u, moves)
    return u


@tangent.register
def _(layer: HBPResidual, u: Tensor | None, moves: Moves) -> Tensor | None:
    through = tangent(layer.branch, u, moves)
    past = tangent(layer.shortcut, u, moves)
    return through if past is None else past if through is None else through + past


@tangent.register
def _(layer: HBPParallel, u: Tensor | None, moves: Moves) -> Tensor | None:
    found = [tangent(path, u, moves) for path in layer.children()]
    known = [moved for moved in found if moved is not None]
    if not known:
        return None
    count = layer.last_record.input_shape[0]
    parts = [
        known[0].new_zeros(count, shape.numel())
        if moved is None
        else moved.view(count, -1)
        for moved, shape in zip(found, layer.recorded_shapes, strict=True)
    ]
    return torch.cat(parts, 1).view(1, -1)


@tangent.register
def _(layer: Converted, u: Tensor | None, moves: Moves) -> Tensor | None:
    return tangent(vars(layer)["_chain"], u, moves)


def _has_further_leaves(loss: Tensor, outputs: Tensor) -> bool:
    """Whether the loss depends on leaves, as a penalty does, other than by outputs."""
    nodes = nodes_of(loss, outputs)
    return any(getattr(node, "variable", outputs) is not outputs for node in nodes)


@dataclass(frozen=True)
class LineInfo:
    """What was known of the loss along the last step, of all parameters together.

    Attributes:
        length: s ≤ lr, by which the Newton steps of all blocks were multiplied; those
            of a group with a smaller lr than the largest by as much less.
        slope: -gᵀd, how fast the loss falls at first; d is the step for s = 1.
        curvature: dᵀGd.
        promised_decrease: how far the exact Gauss-Newton model falls for the step s·d,
            in units of the loss.
        loss: The loss from which the step started.
    """

    length: float
    slope: float
    curvature: float
    promised_decrease: float
    loss: float


class CGNewton(newton.CGNewton):
    """Newton steps, one curvature block per parameter, of a length that holds.

        optimizer = hbp.CGNewton(model.parameters())

    For each parameter θ with gradient g and curvature H = ``p.hessian``,

        [(1-α)H + αI] d = -g,        θ ← θ + s · d

    ([a step][eq-newton] of Dangel, Harmeling & Hennig 2020). The solver, and what makes
    it fast, is that of ``hbp.core.newton.CGNewton``.

    *Without a learning rate* s is one number for all parameters: the step ends where
    the Gauss-Newton model along it has its [minimum][eq-length], promises at most a
    fifth of what the loss has above its lower bound, and is no longer than ``lr``, 0.1
    at first, which schedulers may lower. ``hbp.backward(model, outputs, loss)`` has to
    come before each step. Clipped gradients make the step shorter.

    *With a learning rate* and no ``adaptive_lr`` s = lr, as in the original. Then a
    step that promises more than the loss has is a warning, once, where ``hbp.backward``
    told what the loss is.

    A step is all or nothing: every system is solved before any parameter moves. It uses
    the curvature up: ``p.hessian`` and what the layers kept of the batch are gone then.
    Curvature of your own is used as long as it stands in ``p.hvp``, a function from a
    vector [n] to the product [n], or in ``p.hessian``. Frozen parameters and parameters
    without a gradient are left alone.

    Args:
        params: Parameters, or dicts of parameter groups. Each option below but
            ``adaptive_lr`` can be set per group.
        lr: Learning rate, not negative; ``None`` for lengths from the curvature, at
            most 0.1. For another bound give ``adaptive_lr=True``, too; with all data
            in one batch, whose minimum is the one to go to, that may be 1. From a
            fifth to 1 it also is the share of the loss that a step may promise.
        alpha: Damping α in [0, 1].
        cg_atol: Absolute tolerance on the residual, not negative.
        cg_tol: Tolerance on the residual relative to ‖g‖, positive; ``None`` for 0.1
            without a learning rate and 1e-5 with one.
        cg_maxiter: At most this many products, in each part; ``None`` for ten times
            the number of unknowns.
        solver: ``"cg"`` or ``"direct"``.
        trust_radius: Bound on ‖d‖ of each parameter, before s, by Steihaug's
            method; ``None`` for no bound. Only with ``solver="cg"``.
        weight_decay: θ ← (1 - lr·weight_decay) θ before each step (decoupled, as in
            ``torch.optim.AdamW``, whose lr is far below 1).
        adaptive_lr: Whether s comes from the curvature; ``None`` for: without ``lr``.

    Attributes:
        last_step: What the last step did, parameter by parameter.
        last_line: What was known of the loss along it; None without ``hbp.backward``.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[dict[str, Any]],
        lr: float | None = None,
        alpha: float = DAMPING,
        cg_atol: float = 1e-8,
        cg_tol: float | None = None,
        cg_maxiter: int | None = None,
        solver: Literal["cg", "direct"] = "cg",
        trust_radius: float | None = None,
        weight_decay: float = 0.0,
        adaptive_lr: bool | None = None,
    ) -> None:
        free = lr is None if adaptive_lr is None else adaptive_lr
        self.last_line: LineInfo | None = None
        self._warned = False
        super().__init__(
            params,
            LONGEST if lr is None else lr,
            alpha,
            cg_atol,
            (0.1 if free else 1e-5) if cg_tol is None else cg_tol,
            cg_maxiter,
            solver,
            trust_radius,
            weight_decay=weight_decay,
            adaptive_lr=free,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore an optimizer that was pickled, or a state; without the last step.

        Raises:
            ValueError: it is the state of another kind of optimizer.
        """
        for group in state["param_groups"]:
            group.setdefault("weight_decay", 0.0)
            group.setdefault("adaptive_lr", False)
            missing = [name for name in ("alpha", "solver") if name not in group]
            if missing:
                raise ValueError(
                    f"This state has no {', '.join(missing)}: it is that of another "
                    "optimizer than CGNewton. Load one that CGNewton.state_dict() gave."
                )
        super().__setstate__(state)
        self.last_line, self._warned = None, False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as ``torch.optim`` does.

        Raises:
            ValueError: an option of the group is out of its range, or ``adaptive_lr``
                is not that of the other groups.
        """
        options = {**self.defaults, **param_group}
        decay, free = options["weight_decay"], options["adaptive_lr"]
        if not (is_number(decay) and 0 <= decay < math.inf):
            raise ValueError(f"weight_decay={decay!r} must be finite, not negative.")
        if decay and is_number(options["lr"]) and math.isfinite(options["lr"]):
            _remaining(options)
        if not all(group["adaptive_lr"] is free for group in self.param_groups):
            raise ValueError(
                f"adaptive_lr={free!r} of a group must be that of all: one length is "
                "found for the step of all parameters together."
            )
        super().add_param_group(param_group)

    def _take(self, steps: Sequence[newton._Step]) -> None:
        for step in steps:
            step.info(step.lr)  # It raises unless there is a solution.
        groups = self.param_groups if steps else []
        decaying = [group for group in groups if group["weight_decay"]]
        shares = [_remaining(group) for group in decaying]
        self.last_line = None
        if steps and self.param_groups[0]["adaptive_lr"]:
            longest = max(step.lr for step in steps)
            # The groups' factors belong to the direction, all but the largest.
            steps = [_formed(s)._replace(lr=s.lr / (longest or 1.0)) for s in steps]
            self.last_line = _along(steps, longest)
            steps = [s._replace(lr=s.lr * self.last_line.length) for s in steps]
        elif steps and vars(steps[0].equation.parameter).get("line"):
            self._warned = self._warned or _warn_of_a_promise(steps)
        moved = {step.equation.parameter for step in steps}
        for step in steps if decaying else ():
            step.checked()  # Nothing shrinks unless all can move.
        for group, share in zip(decaying, shares, strict=True):
            for p in moved.intersection(group["params"]):
                p.mul_(share)
        super()._take(steps)


def _remaining(group: Mapping[str, Any]) -> float:
    """How much of its weights the decay of one step leaves.

    Raises:
        ValueError: nothing, or less.
    """
    share = 1 - float(group["lr"]) * group["weight_decay"]
    if not share > 0:
        raise ValueError(
            f"weight_decay={group['weight_decay']!r} at lr={group['lr']!r} would "
            "shrink weights to less than nothing. AdamW's default is 1e-2."
        )
    return share


def _formed(step: newton._Step) -> newton._Step:
    """The same step, in the coordinates of its parameter: it is needed twice."""
    d = step._replace(lr=1.0).change().view(-1)

    def add_to(target: Tensor, y: Tensor, scale: float) -> None:
        target.add_(y, alpha=-scale)

    system = step.equation.system._replace(add_to=add_to)
    return step._replace(equation=step.equation._replace(system=system), y=d)


def _along(steps: Sequence[newton._Step], longest: float) -> LineInfo:
    """What is known of the loss along a step, of at most this length.

    Raises:
        RuntimeError: nobody told the loss.
        ArithmeticError: it is not finite.
    """
    lines = _lines(steps)
    if not lines:
        raise RuntimeError(
            "CGNewton finds its length from the loss along the step, of which it knows "
            "nothing, or no longer. Call hbp.backward(model, outputs, loss) before "
            "step(), for one optimizer; or give CGNewton an lr, and no adaptive_lr."
        )
    moves: dict[Tensor, Tensor] = {}
    for step in steps:
        d = step.y if step.lr == 1 else step.y * step.lr
        moves[step.equation.parameter] = d
    gradients = [(p.grad, d) for p, d in moves.items() if p.grad is not None]
    slopes = [-torch.dot(g.flatten(), d) for g, d in gradients]
    measured = torch.stack([line.measure(moves) for line in lines]).sum(0)
    numbers = [torch.stack(slopes).double().sum()[None], measured]
    slope, curvature, loss = torch.cat(numbers).tolist()  # The host waits here.
    if not math.isfinite(slope + curvature + loss):
        raise ArithmeticError(
            f"No step was taken; along it the loss {loss} has slope {-slope} and "
            f"curvature {curvature}. Check the loss, or scale it down."
        )
    room = loss - sum(line.bound for line in lines)
    promised = max(PROMISE, min(longest, 1.0)) * room
    s = min(_length(slope, curvature, promised), longest)
    promise = s * slope - s * s / 2 * curvature
    return LineInfo(s, slope, curvature, promise, loss)


def _lines(steps: Sequence[newton._Step]) -> set[Line]:
    """The lines that all parameters of a step are on; none if one of them has none."""
    known = [vars(step.equation.parameter).get("line") for step in steps]
    lines = [line() for line in known if line and line()]
    return set(lines) if len(lines) == len(steps) else set()


def _warn_of_a_promise(steps: Sequence[newton._Step]) -> bool:
    """Warn where the step promises more than the loss has; whether it did."""
    lines = _lines(steps)
    promise = sum(step.info(step.lr).predicted_decrease for step in steps)
    room = sum(float(line.loss) - line.bound for line in lines)
    too_much = bool(lines) and promise > room > 0
    if too_much:
        warnings.warn(
            f"The step promises to lower the loss by {promise:.3g}, but the loss has "
            f"only {room:.3g} above its lower bound: the model means nothing so far "
            "away. Leave lr away, so that CGNewton finds the length, or lower it.",
            stacklevel=6,
        )
    return too_much


def _length(slope: float, curvature: float, most: float) -> float:
    """How far to go: to the minimum, or until the model has fallen by ``most``."""
    # A loss of 0 has no digits for so little, and its curvature is round-off.
    if slope <= 0 or (most == 0 and slope < NO_DIGITS):
        return 0.0
    minimum = slope / curvature if curvature > 0 else math.inf
    if most <= 0 or most == math.inf:
        return minimum
    # The smaller root of s·slope - ½s²·curvature = most, without cancellation.
    root = math.sqrt(max(slope * slope - 2 * curvature * most, 0.0))
    return min(minimum, 2 * most / (slope + root))
