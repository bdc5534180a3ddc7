"""Exact curvature by automatic differentiation: slow, obvious, and the judge.

Nothing here shares code with the rest of the package. Use it on small models, to
check a block or to see what an approximation leaves out. Parameters' blocks come as
a dict from ``state_dict`` names to dense [n, n] matrices, n entries flattened
row-major. Models are copied first, so none is changed.

* ``hessian_blocks``, ``ggn_blocks``: any model, by ``torch.func``.
* ``exact_blocks``: Hessian, GGN and both PCHs of a chain of layers, the HBP
  recursion with dense Jacobians, sample by sample.
* ``batch_blocks``: the same recursion with averages over the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from hbp.core.module import TREATMENTS

LossFunction = Callable[[Tensor, Tensor], Tensor]


def hessian(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """∂²function/∂x∂xᵀ, shape [*x, *x], for a scalar function of x and constants.

    Reverse mode twice: ``torch.func.hessian`` needs forward mode, which not every
    layer has.
    """
    return jacrev(jacrev(function))


# Torch's faster attention can be differentiated only once.
@sdpa_kernel(SDPBackend.MATH)
def hessian_blocks(
    model: nn.Module, loss_func: LossFunction, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """∂²loss/∂θ∂θᵀ of every parameter θ.

    Args:
        model: Any differentiable model.
        loss_func: maps outputs and targets to a scalar.
        inputs: What ``model`` takes, [N, ...].
        targets: What ``loss_func`` takes as its second argument.

    Returns:
        [n, n] for each of the parameters, by name.
    """
    model = copy.deepcopy(model)
    parameters = _parameters(model)

    def block(name: str) -> Tensor:
        def loss(parameter: Tensor) -> Tensor:
            varied = {**parameters, name: parameter}
            return loss_func(functional_call(model, varied, (inputs,)), targets)

        size = parameters[name].numel()
        return hessian(loss)(parameters[name]).reshape(size, size)

    return {name: block(name) for name in parameters}


@sdpa_kernel(SDPBackend.MATH)
def ggn_blocks(
    model: nn.Module, loss_func: LossFunction, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Jᵀ H_z J of every parameter, J = ∂z/∂θ over all samples and outputs.

    Arguments and result as in ``hessian_blocks``.
    """
    model = copy.deepcopy(model)
    parameters = _parameters(model)
    with torch.no_grad():
        outputs = model(inputs)
    size = outputs.numel()
    curvature = hessian(loss_func)(outputs, targets).reshape(size, size)

    def block(name: str) -> Tensor:
        def predict(parameter: Tensor) -> Tensor:
            return functional_call(model, {**parameters, name: parameter}, (inputs,))

        jacobian = jacrev(predict)(parameters[name]).reshape(size, -1)
        return jacobian.T @ curvature @ jacobian

    return {name: block(name) for name in parameters}


class Curvature(NamedTuple):
    """What the recursion finds.

    Attributes:
        input: w.r.t. the model's input, [features, features].
        parameters: w.r.t. each parameter, [n, n], by name.
    """

    input: Tensor
    parameters: dict[str, Tensor]


def exact_blocks(
    model: nn.Module,
    loss_func: LossFunction,
    inputs: Tensor,
    targets: Tensor,
    modify_2nd_order_terms: str | None = None,
) -> Curvature:
    """The HBP recursion for each sample on its own, then summed: no averaging.

    With ``None`` these are the Hessian's diagonal blocks, with ``"zero"`` the GGN's,
    with ``"abs"`` and ``"clip"`` PCHs whose second-order terms are modified sample
    by sample: one [of the two kinds][eq-two-pchs].

    Args:
        model: A layer, or a nest of ``nn.Sequential`` and of residual blocks: modules
            with a ``branch`` and a ``shortcut``, or None for the identity.
        loss_func: A sum or mean over samples.
        inputs: [N, ...].
        targets: [N, ...].
        modify_2nd_order_terms: ``None`` or ``"none"``, ``"ggn"`` or ``"zero"``,
            ``"abs"`` or ``"clip"``.

    Returns:
        The sum over samples.
    """
    return Recursion(model, loss_func, inputs, targets).exact(modify_2nd_order_terms)


def batch_blocks(
    model: nn.Module,
    loss_func: LossFunction,
    inputs: Tensor,
    targets: Tensor,
    modify_2nd_order_terms: str | None = None,
    average_input_jacobian: bool = True,
    average_parameter_jacobian: bool = True,
) -> Curvature:
    """The HBP recursion with averages over the batch, as the layers compute it.

    With H̄ the batch-summed curvature w.r.t. a layer's output and J_n its Jacobian at
    sample n, an averaged Jacobian gives E[J]ᵀ H̄ E[J], an averaged product
    E[Jᵀ H̄ J]; see [the two schemes][eq-averaging]. Second-order terms are [summed over
    the batch first][eq-sum-then-modify], then modified.
    Where two paths of averaged Jacobians A and B meet in a sum, their curvatures and
    AᵀH̄B + BᵀH̄A add up.

    Args:
        model: A layer, or a nest of ``nn.Sequential`` and of residual blocks: modules
            with a ``branch`` and a ``shortcut``, or None for the identity.
        loss_func: A sum or mean over samples.
        inputs: [N, ...].
        targets: [N, ...].
        modify_2nd_order_terms: As in ``exact_blocks``.
        average_input_jacobian: Which of the two, for J = ∂z/∂x.
        average_parameter_jacobian: Which of the two, for J = ∂z/∂θ.

    Returns:
        The approximate curvature.
    """
    return Recursion(model, loss_func, inputs, targets).batch(
        modify_2nd_order_terms, average_input_jacobian, average_parameter_jacobian
    )


class _Leaf(NamedTuple):
    """A layer, its input x, [N, ...], and its output z, [N, ...]."""

    prefix: str
    layer: nn.Module
    input: Tensor
    output: Tensor


class _Chain(NamedTuple):
    """Steps one after the other."""

    steps: list[_Step]


class _Fork(NamedTuple):
    """Paths from the same x, whose outputs are added. An empty chain is x itself."""

    paths: list[_Step]


_Step = _Leaf | _Chain | _Fork


class Recursion:
    """The HBP recursion of one batch, for several readings and treatments.

        judge = Recursion(model, loss_func, inputs, targets)
        judge.exact("abs"), judge.batch("zero"), judge.batch("abs", False)

    It keeps every derivative that it has taken, so that several questions cost hardly
    more than one. Arguments are those of ``exact_blocks``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: LossFunction,
        inputs: Tensor,
        targets: Tensor,
    ) -> None:
        self.leaves: list[_Leaf] = []
        self._taken: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        x = inputs.detach().requires_grad_()
        self.root, x = self._run(copy.deepcopy(model), "", x)
        loss = loss_func(x, targets)
        outputs = [leaf.output for leaf in self.leaves]
        gradients = torch.autograd.grad(loss, outputs)
        # By the order of the forward pass: a layer may occur twice.
        self.output_gradients = {
            id(leaf): delta for leaf, delta in zip(self.leaves, gradients, strict=True)
        }
        n, size = len(x), x.numel()
        full = hessian(loss_func)(x.detach(), targets).reshape(size, size)
        blocks = full.reshape(n, size // n, n, size // n)
        self.output_hessians = torch.stack([blocks[i, :, i] for i in range(n)])

    def exact(self, modify_2nd_order_terms: str | None = None) -> Curvature:
        """What ``exact_blocks`` returns."""
        results = [
            self._send_back(
                slice(n, n + 1), _Averaging(modify_2nd_order_terms, True, True)
            )
            for n in range(len(self.output_hessians))
        ]
        parameters = {
            name: torch.stack([result.parameters[name] for result in results]).sum(0)
            for name in results[0].parameters
        }
        return Curvature(torch.stack([r.input for r in results]).sum(0), parameters)

    def batch(
        self,
        modify_2nd_order_terms: str | None = None,
        average_input_jacobian: bool = True,
        average_parameter_jacobian: bool = True,
    ) -> Curvature:
        """What ``batch_blocks`` returns."""
        averages = average_input_jacobian, average_parameter_jacobian
        rules = _Averaging(modify_2nd_order_terms, *averages)
        return self._send_back(slice(None), rules)

    def _send_back(self, samples: slice, rules: _Averaging) -> Curvature:
        H = self.output_hessians[samples].sum(0)
        parameters: dict[str, Tensor] = {}
        H, _ = _send_back_step(self, self.root, samples, rules, H, parameters)
        return Curvature(H, parameters)

    def derivatives(self, leaf: _Leaf, name: str = "") -> tuple[Tensor, Tensor]:
        """J_n, [N, z, v], and Σ_k ∇²z_k δ_nk, [N, v, v], by a parameter, or by x."""
        key = id(leaf), name
        if key not in self._taken:
            function = partial(_vary_input, leaf.layer)
            arguments: list[tuple[Tensor, ...]] = [(x,) for x in leaf.input]
            if name:
                function = partial(_vary_parameter, leaf.layer, name)
                theta = _parameters(leaf.layer)[name]
                arguments = [(theta, x) for x in leaf.input]
            deltas = self.output_gradients[id(leaf)]
            self._taken[key] = _derivatives(function, arguments, deltas)
        return self._taken[key]

    def _run(self, module: nn.Module, prefix: str, x: Tensor) -> tuple[_Step, Tensor]:
        if isinstance(module, nn.Sequential):
            chain = _Chain([])
            # Not named_children(), which leaves out a layer that occurs again.
            for name, child in module._modules.items():
                assert child is not None
                step, x = self._run(child, f"{prefix}{name}.", x)
                chain.steps.append(step)
            return chain, x
        if "branch" in module._modules:
            # Without a shortcut, x itself: a chain of no steps.
            sequences = [
                (name, module._modules.get(name) or nn.Sequential())
                for name in ("branch", "shortcut")
            ]
            ran = [self._run(path, f"{prefix}{name}.", x) for name, path in sequences]
            return _Fork([step for step, _ in ran]), ran[0][1] + ran[1][1]
        # A clone, so that an in-place layer overwrites nothing that is kept.
        leaf = _Leaf(prefix, module, x.detach(), module(x.clone()))
        self.leaves.append(leaf)
        # Another one, so that the next layer leaves z alone.
        return leaf, leaf.output.clone()


class _Averaging(NamedTuple):
    """What a recursion does at each layer."""

    modify: str | None
    average_input_jacobian: bool
    average_parameter_jacobian: bool


def _send_back_step(
    recursion: Recursion,
    step: _Step,
    samples: slice,
    rules: _Averaging,
    H: Tensor,
    parameters: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """H_x and E[∂z/∂x] of a step; the blocks of its parameters join ``parameters``.

    A leaf goes by eq-hbp, a fork by eq-skip.
    """
    if isinstance(step, _Chain):
        jacobian = torch.eye(len(H), dtype=H.dtype)
        for below in reversed(step.steps):
            H, J = _send_back_step(recursion, below, samples, rules, H, parameters)
            jacobian = jacobian @ J
        return H, jacobian
    if isinstance(step, _Fork):
        (H_s, A), (H_t, B) = [
            _send_back_step(recursion, path, samples, rules, H, parameters)
            for path in step.paths
        ]
        # With one J for all samples, (A + B)ᵀH(A + B) and second-order terms.
        return H_s + H_t + A.T @ H @ B + B.T @ H @ A, A + B
    for name in _parameters(step.layer):
        jacobians, second_order = (
            part[samples] for part in recursion.derivatives(step, name)
        )
        block = _pull_back(H, jacobians, rules.average_parameter_jacobian)
        block = block + _modify(second_order.sum(0), rules.modify)
        parameters[step.prefix + name] = block
    jacobians, second_order = (part[samples] for part in recursion.derivatives(step))
    H = _pull_back(H, jacobians, rules.average_input_jacobian)
    return H + _modify(second_order.sum(0), rules.modify), jacobians.mean(0)


@sdpa_kernel(SDPBackend.MATH)
def _vary_parameter(layer: nn.Module, name: str, theta: Tensor, x: Tensor) -> Tensor:
    """One sample's output, [z], as a function of one parameter."""
    varied = {**_parameters(layer), name: theta}
    return functional_call(layer, varied, (x[None],)).flatten()


@sdpa_kernel(SDPBackend.MATH)
def _vary_input(layer: nn.Module, x: Tensor) -> Tensor:
    """One sample's output, [z], as a function of its input."""
    return functional_call(layer, _parameters(layer), (x[None].clone(),)).flatten()


def _derivatives(
    function: Callable[..., Tensor],
    arguments: Sequence[tuple[Tensor, ...]],
    deltas: Tensor,
) -> tuple[Tensor, Tensor]:
    """J_n of every sample, [N, z, v], and Σ_k ∇²z_k δ_nk, [N, v, v].

    Both w.r.t. the function's first argument, of v entries. They are what
    eq-second-differential is made of.
    """
    size = arguments[0][0].numel()
    jacobians, curvatures = [], []
    for args, delta in zip(arguments, deltas, strict=True):

        def projected(*args: Tensor, delta: Tensor = delta) -> Tensor:
            return function(*args) @ delta.flatten()

        jacobians.append(jacrev(function)(*args).reshape(-1, size))
        curvatures.append(hessian(projected)(*args).reshape(size, size))
    return torch.stack(jacobians), torch.stack(curvatures)


def _pull_back(H: Tensor, jacobians: Tensor, average_jacobian: bool) -> Tensor:
    """E[J]ᵀ H E[J], or E[Jᵀ H J], for J of shape [N, z, v]; eq-averaging."""
    if average_jacobian:
        jacobians = jacobians.mean(0, keepdim=True)
    return (jacobians.mT @ H @ jacobians).mean(0)


def _modify(second_order: Tensor, how: str | None) -> Tensor:
    """The treatment of a symmetric matrix, on its eigenvalues; eq-mod."""
    if how in (None, "none"):
        return second_order
    if TREATMENTS[how] is None:  # Whatever the names of the GGN are.
        return torch.zeros_like(second_order)
    values, vectors = torch.linalg.eigh(second_order)
    values = {"abs": values.abs(), "clip": values.clamp(min=0)}[how]
    return vectors * values @ vectors.mT


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}
