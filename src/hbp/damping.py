"""Damping that adapts to how well the quadratic model foretells the loss."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from hbp.core.guards import is_number
from hbp.core.newton import CGNewton

RESOLUTION: Final = 1e-6
"""A float32 loss resolves no smaller relative change: below it, a ratio is noise."""


class LevenbergMarquardt:
    """Adapts α to the reduction ratio, one ratio for all parameters.

    Call ``step`` after ``optimizer.step()``, with the loss of the *same batch* before
    and after. The ratio is

        ρ = (actual decrease) / (decrease of the model without damping).

    H is what the ratio judges, so the model is gᵀs + ½sᵀHs with s = lr·d, as Moré 1978
    has it. Damping is left out on purpose: (1-α)H + αI *lowers* a curvature above 1.
    Judged by the damped model, α would rise there, and so make the model worse.

    With λ = α/(1-α), the matrix is (1-α)(H + λI). λ is divided by ``factor`` where
    ρ > 3/4 and multiplied by it where ρ < 1/4, in every parameter group. A decrease
    that the loss cannot resolve changes nothing. A step after which the loss is higher
    is taken back: the parameters are what they were, for which each step begins with a
    copy of them. α lives in ``param_groups``, hence in ``optimizer.state_dict()``.

    Where the optimizer finds the length of its steps itself, the model is not the sum
    over the blocks but the exact Gauss-Newton model along the step, whose decrease is
    ``optimizer.last_line.promised_decrease``. A step that is short enough keeps that
    promise whatever α is, so ρ is near 1 and α falls to ``min_alpha``: there is nothing
    to gain. It is for optimizers with an lr.

    Growing damping leads to gradient descent with step length lr, not to a step of
    zero. So where an lr is given, gradient descent has to be stable with it.

    Args:
        optimizer: Its groups' α must lie within the bounds.
        factor: Above 1; 3/2 is that of Martens 2010.
        min_alpha: Lower bound, above 0.
        max_alpha: Upper bound, below 1: a step with α = 1 tells nothing of H, so that
            α could never come down again.

    Raises:
        TypeError: ``optimizer`` is no ``CGNewton``.
        ValueError: an option, or the α of a group, is out of its range.
    """

    def __init__(
        self,
        optimizer: CGNewton,
        factor: float = 1.5,
        min_alpha: float = 1e-6,
        max_alpha: float = 0.99,
    ) -> None:
        if not isinstance(optimizer, CGNewton):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; it must be a CGNewton."
            )
        if not (is_number(factor) and 1 < factor < math.inf):
            raise ValueError(f"factor={factor!r} must be above 1. Use 1.5.")
        bounds = is_number(min_alpha) and is_number(max_alpha)
        if not (bounds and 0 < min_alpha <= max_alpha < 1):
            raise ValueError(
                f"min_alpha={min_alpha!r} and max_alpha={max_alpha!r} must satisfy "
                "0 < min_alpha ≤ max_alpha < 1. Use 1e-6 and 0.99."
            )
        for index, group in enumerate(optimizer.param_groups):
            if not min_alpha <= group["alpha"] <= max_alpha:
                raise ValueError(
                    f"alpha={group['alpha']!r} of group {index} is not within "
                    f"[{min_alpha!r}, {max_alpha!r}]. Start within, or widen the "
                    "bounds with min_alpha and max_alpha."
                )
        optimizer.register_step_pre_hook(_keep)
        self.optimizer = optimizer
        self.factor = factor
        self.min_alpha = min_alpha
        self.max_alpha = max_alpha

    def step(self, loss_before: float | Tensor, loss_after: float | Tensor) -> float:
        """Adapt α to the last step.

        Args:
            loss_before: The loss from which the last step started, finite.
            loss_after: The loss of the same batch after it. NaN and infinity count as
                a model that failed.

        Returns:
            ρ, or NaN where the model foretells a change too small to judge.

        Raises:
            RuntimeError: the optimizer has not stepped yet.
            TypeError: a loss is no number.
            ValueError: loss_before is not finite, or a step was taken at α = 1, or was
                too large to judge.
        """
        before = _loss("loss_before", loss_before)
        after = _loss("loss_after", loss_after)
        predicted = self._predicted()
        if not math.isfinite(before):
            raise ValueError(
                f"loss_before={before} must be finite. Pass the loss at which "
                "backward() was called."
            )
        if abs(predicted) <= RESOLUTION * abs(before):
            return math.nan
        ratio = (before - after) / predicted if math.isfinite(after) else -math.inf
        rose = not after <= before
        if rose:
            self._take_back()
        if ratio > 3 / 4 and not rose:
            self._scale(1 / self.factor)
        elif rose or ratio < 1 / 4:
            self._scale(self.factor)
        return ratio

    def _predicted(self) -> float:
        line = getattr(self.optimizer, "last_line", None)
        steps = self.optimizer.last_step.values()
        if not steps or "before_step" not in vars(self.optimizer):
            raise RuntimeError(
                "There is no step to judge. Call optimizer.step() first, and after "
                "LevenbergMarquardt(optimizer), which has to know where it starts."
            )
        predicted = sum(info.undamped_decrease for info in steps)
        if line is not None:
            predicted = line.promised_decrease
        if math.isfinite(predicted):
            return predicted
        raise ValueError(
            f"The last step foretells a decrease of {predicted}. If it was taken at "
            "alpha=1, it tells nothing of H: keep alpha at or below max_alpha="
            f"{self.max_alpha!r}. Otherwise scale the loss: its numbers are too large."
        )

    @torch.no_grad()
    def _take_back(self) -> None:
        for parameter, value in vars(self.optimizer)["before_step"]:
            parameter.copy_(value)

    def _scale(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            damping = factor * group["alpha"] / (1 - group["alpha"])
            alpha = damping / (1 + damping)
            group["alpha"] = min(max(alpha, self.min_alpha), self.max_alpha)


def _keep(optimizer: Any, args: object, kwargs: object) -> None:
    """Before a step: what it starts from."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in parameters if p.requires_grad]
    vars(optimizer)["before_step"] = [(p, p.detach().clone()) for p in trained]


def _loss(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        if value.numel() == 1 and not (value.is_complex() or value.is_meta):
            return float(value.detach())
    elif is_number(value):
        return float(value)
    raise TypeError(
        f"{name} is a {type(value).__name__} that is no number. Pass the loss, as a "
        "scalar tensor or a float."
    )
