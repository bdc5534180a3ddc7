"""The contenders: each a function that takes one full optimizer step on a batch.

A step is forward, loss, backward, curvature, solve and update. All second-order
methods damp by the same α, and those that use conjugate gradients (CG) stop at the
same tolerance and number of products.

They do not compute the same thing. hbp averages over the batch first, by default the
Jacobians themselves, and takes the positive-curvature Hessian ("abs") of tutorial 02;
its exact products are those of the blocks of the GGN, of which CG solves each.
The others compute the GGN: exactly, of all parameters together (autograd) or in a block
for each (GGNMP), or in Kronecker factors (KFRA, KFLR, KFAC). KFRA's factors are those
of hbp with both kinds of averaged products and "zero".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.distributed import ProcessGroup

from hbp import CGNewton, cg, convert, output_hessian, per_sample_hessian

ALPHA, CG_TOL, CG_MAXITER = 0.02, 0.1, 50
LOSS = nn.CrossEntropyLoss()
Step = Callable[[Tensor, Tensor], object]
Make = Callable[[nn.Module, float], Step]
# By name: what makes the step, and a learning rate with which it trains.
Methods = Mapping[str, tuple[Make, float]]


class Newton:
    """hbp's step. Optimizer and model are at hand for those who look inside.

    Attributes:
        process_group: Processes that share the batch, if it is shared.
        treatment: Of second-order terms.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        solver: Literal["cg", "direct"] = "cg",
        **scheme: bool,
    ) -> None:
        self.solver = solver
        self.process_group: ProcessGroup | None = None
        self.treatment = "abs"
        self.model = convert(model)
        self.model.set_hbp_approximation(**scheme)
        self.optimizer = CGNewton(
            self.model.parameters(),
            lr=lr,
            alpha=ALPHA,
            cg_atol=0.0,
            cg_tol=CG_TOL,
            cg_maxiter=CG_MAXITER,
            solver=solver,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        outputs = self.model(images)
        loss = LOSS(outputs, labels)
        self.optimizer.zero_grad()
        hessian = output_hessian(LOSS, outputs, labels)
        loss.backward()
        self.model.backward_hessian(
            hessian,
            modify_2nd_order_terms=self.treatment,
            process_group=self.process_group,
        )
        self.optimizer.step()

    def split(self, sub_blocks: int) -> Newton:
        """The same, with blocks of fewer output features."""
        self.model.set_hbp_blocks(sub_blocks)
        return self

    def products(self) -> list[int]:
        """CG's products in the last step by layer, weight and bias together."""
        infos = self.optimizer.last_step
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        return [
            infos[layer.weight].iterations + infos[layer.bias].iterations
            for layer in layers
        ]


class ExactNewton(Newton):
    """hbp's step by exact products: the block diagonal of the GGN, not averaged."""

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        outputs = self.model(images)
        loss = LOSS(outputs, labels)
        self.optimizer.zero_grad()
        hessian = per_sample_hessian(loss, outputs)
        loss.backward()
        self.model.backward_hessian(hessian, modify_2nd_order_terms="zero")
        self.optimizer.step()


class Damped:
    """(1-α)A + αI for a function that multiplies by A."""

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self.product = product

    def __matmul__(self, vector: Tensor) -> Tensor:
        return torch.lerp(self.product(vector), vector, ALPHA)


def solve_by_cg(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """The same CG for all who need one, so that only the products differ."""
    return cg(Damped(product), b, tol=CG_TOL, maxiter=CG_MAXITER).x


def sgd(model: nn.Module, lr: float) -> Step:
    return _first_order(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))


def adam(model: nn.Module, lr: float) -> Step:
    return _first_order(model, torch.optim.Adam(model.parameters(), lr=lr))


def _first_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(images: Tensor, labels: Tensor) -> None:
        loss = LOSS(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def hessian_free(model: nn.Module, lr: float) -> Step:
    """CG on the GGN of all parameters together, its products by double backward.

    With J = ∂outputs/∂θ, the product is Jᵀ H J v. Autograd gives Jᵀu; that is linear
    in u, so differentiating it once more w.r.t. u gives J v.
    """
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]

    def pieces(vector: Tensor) -> list[Tensor]:
        parts = zip(vector.split(sizes), parameters, strict=True)
        return [part.view_as(p) for part, p in parts]

    def step(images: Tensor, labels: Tensor) -> None:
        outputs = model(images)
        logits = outputs.detach().requires_grad_()
        (slope,) = grad(LOSS(logits, labels), logits, create_graph=True)
        u = torch.zeros_like(outputs, requires_grad=True)
        transposed = grad(outputs, parameters, u, create_graph=True)

        def pull_back(at_outputs: Tensor) -> Tensor:
            return _flat(grad(outputs, parameters, at_outputs, retain_graph=True))

        def product(vector: Tensor) -> Tensor:
            (jv,) = grad(transposed, u, pieces(vector), retain_graph=True)
            (hjv,) = grad(slope, logits, jv, retain_graph=True)
            return pull_back(hjv)

        direction = solve_by_cg(product, pull_back(slope.detach()))
        with torch.no_grad():
            for p, d in zip(parameters, pieces(direction), strict=True):
                p.sub_(d, alpha=lr)

    return step


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def direct(model: nn.Module, lr: float) -> Step:
    return Newton(model, lr, "direct")


def direct_ggn(model: nn.Module, lr: float) -> Step:
    newton = Newton(model, lr, "direct")
    newton.treatment = "ggn"
    return newton


def direct_in_4_blocks(model: nn.Module, lr: float) -> Step:
    return Newton(model, lr, "direct").split(4)


def direct_in_16_blocks(model: nn.Module, lr: float) -> Step:
    return Newton(model, lr, "direct").split(16)


def averaged_products_of_slopes(model: nn.Module, lr: float) -> Step:
    return Newton(model, lr, average_input_jacobian=False)


def averaged_products_of_inputs(model: nn.Module, lr: float) -> Step:
    return Newton(model, lr, average_parameter_jacobian=False)


def averaged_products(model: nn.Module, lr: float) -> Step:
    return Newton(
        model, lr, average_input_jacobian=False, average_parameter_jacobian=False
    )


OWN: dict[str, tuple[Make, float]] = {
    "SGD, momentum": (sgd, 0.1),
    "Adam": (adam, 1e-3),
    "hbp, cg": (Newton, 0.15),
    "hbp, direct": (direct, 0.15),
    "hbp, direct, GGN": (direct_ggn, 0.15),
    "hbp, direct, 4 sub-blocks": (direct_in_4_blocks, 0.15),
    "hbp, direct, 16 sub-blocks": (direct_in_16_blocks, 0.15),
    "hbp, cg, E[φ'φ'ᵀ]": (averaged_products_of_slopes, 0.15),
    "hbp, cg, E[xxᵀ]": (averaged_products_of_inputs, 0.15),
    "hbp, cg, E[φ'φ'ᵀ], E[xxᵀ]": (averaged_products, 0.15),
    "hbp, cg, exact products": (ExactNewton, 0.1),
    "autograd, GGN by CG": (hessian_free, 0.1),
}


def contenders(
    model: nn.Module, methods: Methods, lr: float | None = None
) -> dict[str, Step]:
    """A step by each method, on its own copy of the model.

    Args:
        model: Where all start. Stays as it is.
        methods: ``OWN``, or a part of it, or with the peers of ``peers.available()``.
        lr: One learning rate for all; by default each has that of the table.
    """
    return {
        name: make(copy.deepcopy(model), own_lr if lr is None else lr)
        for name, (make, own_lr) in methods.items()
    }
