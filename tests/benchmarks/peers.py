"""Steps by other libraries, each used as its documentation shows, and for speed.

BackPACK and curvlinops compute curvature; the rest of a step is left to their users.
That rest is here: factored damping as of Martens & Grosse (2015), and Cholesky
factors, which are cheaper than the eigendecompositions of ``backpack.utils``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.steps import ALPHA, LOSS, Make, Step, solve_by_cg


def kfra(model: nn.Module, lr: float) -> Step:
    return _kronecker(model, lr, "KFRA")


def kflr(model: nn.Module, lr: float) -> Step:
    return _kronecker(model, lr, "KFLR")


def _kronecker(model: nn.Module, lr: float, name: str) -> Step:
    """BackPACK's Kronecker factors B ⊗ A for a weight, B for a bias."""
    from backpack import backpack, extend, extensions

    extension = getattr(extensions, name)()
    model, loss_function = extend(model), extend(nn.CrossEntropyLoss())
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]

    def step(images: Tensor, labels: Tensor) -> None:
        loss = loss_function(model(images), labels)
        model.zero_grad()
        with backpack(extension):
            loss.backward()
        with torch.no_grad():
            for layer in layers:
                outer, inner = getattr(layer.weight, extension.savefield)
                weight_step, bias_step = solve_layer(
                    outer, inner, gradient(layer.weight), gradient(layer.bias)
                )
                layer.weight.sub_(weight_step, alpha=lr)
                layer.bias.sub_(bias_step, alpha=lr)

    return step


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def solve_layer(
    outer: Tensor, inner: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """(B + λ_B I)⁻¹ G (A + λ_A I)⁻¹ for the weight, (B + λ_B I)⁻¹ g for the bias.

    λ_A = π√α and λ_B = √α/π, where π² is the ratio of the mean eigenvalues of A and
    B (Martens & Grosse 2015, section 6.3). Both factors are overwritten.

    Args:
        outer: B, [out, out].
        inner: A, [in, in].
        weight: G, the gradient of the weight, [out, in].
        bias: g, the gradient of the bias, [out].
    """
    balance = (inner.diagonal().mean() / outer.diagonal().mean()).sqrt()
    inner.diagonal().add_(ALPHA**0.5 * balance)
    outer.diagonal().add_(ALPHA**0.5 / balance)
    # Two triangular solves take fewer operations than an inverse and a product.
    left, right = torch.linalg.cholesky(outer), torch.linalg.cholesky(inner)
    half = torch.cholesky_solve(weight, left)
    weight_step = torch.cholesky_solve(half.T, right).T
    return weight_step, torch.cholesky_solve(bias.unsqueeze(1), left).squeeze(1)


def ggnmp(model: nn.Module, lr: float) -> Step:
    """BackPACK's products with the exact GGN block of each parameter, and CG.

    Its tutorial does so with a CG that spends one product more, on A · 0.
    """
    from backpack import backpack, extend, extensions

    extension = extensions.GGNMP()
    model, loss_function = extend(model), extend(nn.CrossEntropyLoss())

    def step(images: Tensor, labels: Tensor) -> None:
        loss = loss_function(model(images), labels)
        model.zero_grad()
        with backpack(extension):
            loss.backward()
        directions = []
        for p in model.parameters():
            shape, multiply = (1, *p.shape), getattr(p, extension.savefield)

            def product(
                vector: Tensor,
                shape: tuple[int, ...] = shape,
                multiply: Callable[[Tensor], Tensor] = multiply,
            ) -> Tensor:
                return multiply(vector.view(shape)).flatten()

            directions.append(solve_by_cg(product, gradient(p).flatten()))
        with torch.no_grad():
            # Not before all are solved: the products read the weights.
            for p, direction in zip(model.parameters(), directions, strict=True):
                p.sub_(direction.view_as(p), alpha=lr)

    return step


def kfac(model: nn.Module, lr: float) -> Step:
    """curvlinops' KFAC with its default, cheapest curvature: one sampled label."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    parameters = list(model.parameters())

    def step(images: Tensor, labels: Tensor) -> None:
        gradients = torch.autograd.grad(LOSS(model(images), labels), parameters)
        curvature = KFACLinearOperator(
            model,
            LOSS,
            parameters,
            [(images, labels)],
            # Each of these three spares it a pass over the data.
            check_deterministic=False,
            num_data=len(labels),
            num_per_example_loss_terms=1,
        )
        inverse = KFACInverseLinearOperator(
            curvature, damping=ALPHA, use_heuristic_damping=True
        )
        directions = inverse @ list(gradients)
        with torch.no_grad():
            for p, direction in zip(parameters, directions, strict=True):
                p.sub_(direction, alpha=lr)

    return step


# By name: the package, what makes the step, and a learning rate with which it trains.
PEERS: dict[str, tuple[str, Make, float]] = {
    "BackPACK, KFRA": ("backpack", kfra, 0.15),
    "BackPACK, KFLR": ("backpack", kflr, 0.15),
    "BackPACK, GGNMP by CG": ("backpack", ggnmp, 0.1),
    "curvlinops, KFAC": ("curvlinops", kfac, 0.15),
}


def available() -> dict[str, tuple[Make, float]]:
    """Those whose package is installed, in the form of ``steps.OWN``."""
    return {
        name: (make, lr)
        for name, (package, make, lr) in PEERS.items()
        if find_spec(package)
    }


def skipped() -> dict[str, str]:
    """Those whose package is missing, and why they do not take part."""
    return {
        name: f"{package} is not installed"
        for name, (package, _, _) in PEERS.items()
        if not find_spec(package)
    }
