"""The interactive figure: its numbers, its plane, and what its page says of them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import ROOT, close, load, same_drawing

from hbp import HBPLinear
from hbp.reference import hessian_blocks

PAGE = " ".join((ROOT / "docs/explorer.md").read_text("utf-8").split())
pytest.importorskip("sklearn")
tool = load(ROOT / "tools" / "draw_explorer.py")
WEAKEST, MOST = tool.ALPHAS[-1], tool.ITERATIONS[-1]


@pytest.fixture(scope="module")
def shown() -> Any:
    return tool.Slice()


def committed() -> str:
    return tool.TARGET.read_text("utf-8")


def numbers() -> dict[str, Any]:
    found = re.search(r'id="explorer-numbers">(.*?)</script>', committed(), re.S)
    assert found is not None
    return json.loads(found[1])


def loss_after(shown: Any, alpha: float, iterations: int) -> float:
    return shown.loss - shown.steps[alpha, iterations].actual


# --------------------------------------------------------------------------------------
# The committed figure.
# --------------------------------------------------------------------------------------


def test_figure_is_what_its_script_draws(shown: Any) -> None:
    drawn, stored = tool.draw(shown), committed()
    same_drawing(drawn, stored)


def test_fragment_needs_no_server_and_runs_no_inline_script() -> None:
    html = committed()
    assert re.findall(r"\son\w+=", html) == []
    assert "://" not in html
    scripts = re.findall(r"<script([^>]*)>", html)
    assert [("src=" in s) or ("application/json" in s) for s in scripts] == [True, True]


def test_drawings_have_an_alternative() -> None:
    labels = re.findall(r'<svg[^>]*role="img"[^>]*aria-label="([^"]*)"', committed())
    assert len(labels) == committed().count("<svg") == 2
    assert all(len(label) > 100 for label in labels)


# --------------------------------------------------------------------------------------
# The numbers are what they are called, without the code that made them.
# --------------------------------------------------------------------------------------


def test_gradient_and_hessian_are_those_of_the_loss(shown: Any) -> None:
    model = torch.nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(shown.start)
    loss = torch.nn.functional.cross_entropy(model(shown.inputs), shown.labels)
    loss.backward()
    blocks = hessian_blocks(
        model, torch.nn.CrossEntropyLoss(), shown.inputs, shown.labels
    )
    assert shown.loss == pytest.approx(loss.item(), rel=1e-12)
    assert model.weight.grad is not None
    close(shown.gradient, model.weight.grad.flatten())
    close(shown.hessian, blocks["weight"])


def test_rows_agree_with_steps_applied_to_the_network(shown: Any) -> None:
    """From the stored coordinates and numbers alone, as a reader would check them."""
    stored = numbers()
    assert stored["alphas"] == tool.ALPHAS
    model = torch.nn.Linear(2, 3, bias=False).double()
    for iterations, rows in enumerate(stored["steps"], start=1):
        for alpha, row in zip(tool.ALPHAS, rows, strict=True):
            d = shown.steps[alpha, iterations].d
            with torch.no_grad():
                model.weight.copy_(shown.start + d.view(3, 2))
                after = torch.nn.functional.cross_entropy(
                    model(shown.inputs), shown.labels
                )
            damped = (1 - alpha) * (shown.hessian @ d) + alpha * d
            residual = (damped + shown.gradient).norm() / shown.gradient.norm()
            predicted = -(shown.gradient @ d) - d @ shown.hessian @ d / 2
            x, y = shown.axes @ d
            values = x, y, d.norm(), predicted, shown.loss - after, residual
            # Stored with four decimals.
            assert row == pytest.approx([float(v) for v in values], abs=5.1e-5)


def test_steps_are_the_iterates_of_conjugate_gradients(shown: Any) -> None:
    """The k-th is the model's minimum on the Krylov space of k products, by lstsq."""
    for alpha in tool.ALPHAS[::8]:
        damped = (1 - alpha) * shown.hessian + alpha * torch.eye(6).double()
        krylov = [shown.gradient]
        for iterations in tool.ITERATIONS:
            basis = torch.linalg.qr(torch.stack(krylov, dim=1)).Q
            # At α = 1 the space ends after one product, and so do the steps.
            inner = torch.linalg.pinv(basis.T @ damped @ basis)
            expected = -basis @ inner @ (basis.T @ shown.gradient)
            d = shown.steps[alpha, iterations].d
            # Measured: 1e-13 of its length at most; the Krylov basis loses some digits.
            assert (d - expected).norm() < 1e-9 * expected.norm()
            krylov.append(damped @ krylov[-1])


def test_four_iterations_solve_the_system(shown: Any) -> None:
    for alpha in tool.ALPHAS:
        damped = (1 - alpha) * shown.hessian + alpha * torch.eye(6).double()
        expected = torch.linalg.solve(damped, -shown.gradient)
        # The condition is 2500 at α = 1e-4.
        assert torch.allclose(shown.steps[alpha, MOST].d, expected, rtol=0, atol=1e-9)
    assert torch.linalg.matrix_rank(shown.hessian, hermitian=True) == 4


# --------------------------------------------------------------------------------------
# The map.
# --------------------------------------------------------------------------------------


def test_plane_holds_the_two_steps_and_nearly_all_of_the_others(shown: Any) -> None:
    axes = shown.axes
    close(axes @ axes.T, torch.eye(2).double())
    for step in (shown.steps[1.0, 1].d, shown.steps[WEAKEST, MOST].d):
        close((axes @ step) @ axes, step)
    steps = torch.stack([step.d for step in shown.steps.values()])
    flat = (steps @ axes.T) @ axes
    assert (flat.norm(dim=1) / steps.norm(dim=1)).min() > 0.98
    assert "At least 98 % of the length of every step lies in it" in PAGE
    assert (shown.losses(flat) - shown.losses(steps)).abs().max() < 0.22
    assert "differs from that of the step by 0.22 at most" in PAGE


def test_contours_and_ellipses_lie_where_their_loss_is(shown: Any) -> None:
    for level in tool.LEVELS:
        losses = shown.losses(shown.contour(level) @ shown.axes)
        # The bisection ends within 3e-11 of a unit of weight.
        close(losses, torch.full_like(losses, level), rtol=1e-9)
    centre, hessian, lowest = shown.model()
    # The model on the plane, at its centre and at the start.
    start = lowest + (centre @ hessian @ centre).item() / 2
    assert start == pytest.approx(shown.loss, rel=1e-12)
    assert (centre @ shown.axes - shown.steps[WEAKEST, MOST].d).norm() < 0.1


def test_the_lowest_point_is_the_lowest(shown: Any) -> None:
    point = shown.minimum.clone().requires_grad_()
    shown.losses((point @ shown.axes)[None]).sum().backward()
    assert point.grad.norm() < 1e-8  # Measured: 3e-11.


def test_the_gradient_step_crosses_the_contours_at_right_angles(shown: Any) -> None:
    at_start = torch.zeros(2).double().requires_grad_()
    shown.losses((at_start @ shown.axes)[None]).sum().backward()
    step = shown.axes @ shown.steps[1.0, 1].d
    assert at_start.grad @ step == pytest.approx(-at_start.grad.norm() * step.norm())


# --------------------------------------------------------------------------------------
# What the page says.
# --------------------------------------------------------------------------------------


def says(words: str) -> None:
    assert words in PAGE


def test_page_on_alpha(shown: Any) -> None:
    first, last = shown.steps[1.0, MOST], shown.steps[WEAKEST, MOST]
    says(f"at a length of {first.d.norm():.2f} it is short")
    after = loss_after(shown, 1.0, MOST)
    says(f"The loss falls from {shown.loss:.2f} to {after:.2f}")
    best = min(tool.ALPHAS, key=lambda alpha: loss_after(shown, alpha, MOST))
    says(
        f"Near α = {best:g} it ends best, at a loss of {loss_after(shown, best, 4):.2f}"
    )
    lowest = shown.losses((shown.minimum @ shown.axes)[None]).item()
    says(f"the lowest point of the map has {lowest:.2f}")
    lengths = [shown.steps[alpha, MOST].d.norm().item() for alpha in tool.ALPHAS]
    assert lengths == sorted(lengths)

    says(f"at a length of {last.d.norm():.2f}. There the model")
    assert shown.loss - last.predicted < 0
    says(f"predicts a loss of −{last.predicted - shown.loss:.2f}, which no")
    says(f"The loss is {loss_after(shown, WEAKEST, MOST):.2f}, higher than at the")
    assert last.actual < 0
    well = shown.steps[0.1, MOST]
    says(f"At α = 0.1, {100 * well.actual / well.predicted:.0f} % of the promised fall")
    says(f"at α = 1 it was {100 * first.actual / first.predicted:.0f} %")


def test_page_on_iterations(shown: Any) -> None:
    one, all_ = (shown.steps[WEAKEST, k] for k in (1, MOST))
    cosine = -(one.d @ shown.gradient) / one.d.norm() / shown.gradient.norm()
    assert cosine == pytest.approx(1, abs=1e-12)
    says(f"as long as {one.d.norm():.2f}, not {all_.d.norm():.2f}")
    says(f"ends at a loss of {loss_after(shown, WEAKEST, 1):.2f}.")
    rising = [loss_after(shown, WEAKEST, k) for k in tool.ITERATIONS]
    assert rising == sorted(rising)
    promised = [shown.steps[WEAKEST, k].predicted for k in tool.ITERATIONS]
    assert promised == sorted(promised)
    # "It matters less": by how much the loss rises from its best to the weakest α.
    lost = {
        k: loss_after(shown, WEAKEST, k)
        - min(loss_after(shown, alpha, k) for alpha in tool.ALPHAS)
        for k in (1, MOST)
    }
    assert 0.2 < lost[1] < 0.5 < 2 < lost[MOST]
    best = min(tool.ALPHAS, key=lambda alpha: loss_after(shown, alpha, 1))
    says(f"near α = {best:g} the loss ends at {loss_after(shown, best, 1):.2f}")

    def turn(alpha: float, iterations: int) -> float:
        d = shown.steps[alpha, iterations].d
        return float(-(d @ shown.gradient) / d.norm())

    # Both damp: the length grows, and the step turns away from the gradient.
    away = [turn(alpha, MOST) for alpha in tool.ALPHAS]
    assert away == sorted(away, reverse=True)
    away = [turn(WEAKEST, k) for k in tool.ITERATIONS]
    assert away == sorted(away, reverse=True)
    for alpha in tool.ALPHAS:
        norms = [shown.steps[alpha, k].d.norm().item() for k in tool.ITERATIONS]
        # Where CG has converged they differ by round-off.
        assert all(a <= b * (1 + 1e-12) for a, b in pairwise(norms))


def test_page_on_another_start() -> None:
    other = tool.Slice(seed=0)
    one = loss_after(other, WEAKEST, 1)
    best = min(loss_after(other, alpha, MOST) for alpha in tool.ALPHAS)
    says(f"ends at a loss of {one:.2f}, and four")
    says(f"four iterations at their best α at {best:.2f}")


def test_page_on_the_problem(shown: Any) -> None:
    says(f"{len(shown.labels)} of them")
    model = HBPLinear(2, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(shown.start)
    right = (model(shown.inputs).argmax(1) == shown.labels).double().mean().item()
    says(f"right for {100 * right:.0f} % of the images")
    assert torch.linalg.eigvalsh(shown.hessian).min() > -1e-12  # convex
