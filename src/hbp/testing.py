"""Check a layer of one's own against automatic differentiation.

The judge is ``hbp.reference``, which knows nothing of the layer's rules: it
differentiates ``forward``, sample by sample, and writes every matrix down.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jacobian

from hbp import reference
from hbp.core.containers import HBPSequential
from hbp.core.jacobians import Batch, Chain, Jacobian
from hbp.core.layers.linear import HBPLinear
from hbp.core.layers.shape import HBPFlatten
from hbp.core.losses import per_sample_hessian
from hbp.core.module import HBPModule
from hbp.core.operators import SymmetricOperator
from hbp.layers.functions import HBPElementwise

TREATMENTS: Final = ("none", "zero", "abs", "clip")
SCHEMES: Final = ((True, True), (True, False), (False, True), (False, False))

INPUT: Final = "input"
"""What findings call the layer's input."""

MOST_CLASSES: Final = 7
"""Classes of the loss above the layer: its curvature has up to one less in rank."""


def check_layer(
    layer: HBPModule, inputs: Tensor, tolerance: float = 1e-10, seed: int = 0
) -> None:
    """Compare every rule of a layer with automatic differentiation, in float64.

    The layer gets a nonlinear network and a loss on top, so that neither the gradient
    nor the curvature at its output is special. Then, for all four treatments, the
    averaged reading in its four batch schemes and the exact one, the curvature w.r.t.
    the input and each parameter is compared as a matrix, as a product and in its
    diagonal; and each Jacobian with its own transpose. The time grows with the cube
    of the layer's size: a few samples of some ten features are enough.

    Args:
        layer: Any HBP layer or container. A copy in float64 is checked; the layer
            itself is left as it is.
        inputs: At least two different samples, [N, ...], float64, at which the layer
            is twice differentiable.
        tolerance: Largest difference, relative to a block's largest entry.
        seed: Of the weights on top and of the products' vectors. The global random
            state is left as it is.

    Examples:
        >>> import torch
        >>> from hbp import HBPSigmoid
        >>> from hbp.testing import check_layer
        >>> check_layer(HBPSigmoid(), torch.randn(3, 4, dtype=torch.float64))

    Raises:
        AssertionError: something differs; the message lists each block with its
            reading and treatment, and by how much.
        TypeError: an argument is of the wrong type.
        ValueError: the inputs cannot show an error, or the layer is random.
    """
    _check_arguments(layer, inputs)
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        twin = copy.deepcopy(layer).double().requires_grad_()
        findings = list(_Check(twin, inputs.detach(), tolerance).findings())
    if findings:
        listed = "\n".join(f"  {finding}" for finding in findings)
        raise AssertionError(
            f"{len(findings)} readings of {type(layer).__name__} differ from "
            f"automatic differentiation:\n{listed}"
        )


def _check_arguments(layer: HBPModule, inputs: Tensor) -> None:
    if not isinstance(layer, HBPModule):
        raise TypeError(f"layer is a {type(layer).__name__}; pass an HBP layer.")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs is a {type(inputs).__name__}; pass a tensor.")
    if inputs.dtype != torch.float64:
        raise ValueError(
            f"inputs is {inputs.dtype}, whose round-off would hide errors. Pass "
            "inputs.double()."
        )
    if inputs.dim() < 2 or len(inputs) < 2:
        raise ValueError(
            f"inputs has shape {list(inputs.shape)}. Pass [N, features...] with N ≥ 2: "
            "for one sample, every average is exact."
        )
    if bool((inputs == inputs[0]).all()):
        raise ValueError(
            f"inputs holds the same sample {len(inputs)} times, for which every "
            "average is exact. Pass samples that differ, torch.randn(...) say."
        )


@torch.no_grad()
def _checked_outputs(layer: HBPModule, inputs: Tensor) -> Tensor:
    """z, [N, ...], if each z_n is a function of x_n, and of nothing else."""
    outputs = layer(inputs.clone())
    if not bool(outputs.isfinite().all()):
        raise ValueError(
            "The layer's outputs contain NaN or infinity. Pass inputs from its domain."
        )
    if not torch.equal(outputs, layer(inputs.clone())):
        raise ValueError(
            f"{layer} is random: two forward passes differ. Call eval() on it, or fix "
            "what it draws."
        )
    alone = torch.cat([layer(x.clone()) for x in inputs.split(1)])
    if alone.shape != outputs.shape or not torch.allclose(alone, outputs):
        raise AssertionError(
            f"{layer} mixes samples: a batch gives other outputs than its samples one "
            "by one. Curvature rules need z_n = f(x_n); for statistics of the batch, "
            "call eval()."
        )
    return outputs


_Blocks = dict[str, Tensor]
"""Curvature by name: of the input, and of each of the layer's parameters."""

_Operators = dict[str, SymmetricOperator | None]
"""The same, as the layer says."""


class _Check:
    """One forward and backward pass through the layer and a network on top.

    Args:
        layer: In float64, ours to change.
        inputs: [N, ...].
        tolerance: As in ``check_layer``.
    """

    def __init__(self, layer: HBPModule, inputs: Tensor, tolerance: float) -> None:
        outputs = _checked_outputs(layer, inputs)
        self._layer, self._inputs, self._tolerance = layer, inputs, tolerance
        self._model = _with_network_on_top(layer, outputs)
        # A layer that works in place must not be given a leaf.
        logits = self._model(inputs.clone().requires_grad_().clone())
        self._check_record(inputs.shape, outputs.shape)
        samples = torch.arange(len(inputs), device=inputs.device)
        labels = samples % logits.shape[1]
        loss = self._loss(logits, labels)
        self._hessians = per_sample_hessian(loss, logits)
        loss.backward()
        # A pass would refuse them; a finding says more.
        ruled = {p for _, m in _hbp_modules(layer) for p, _ in m.parameter_jacobians()}
        for parameter in layer.parameters():
            parameter.requires_grad_(parameter in ruled)
        each = zip(inputs.split(1), labels.split(1), strict=True)
        self._judge, *self._judges = (
            reference.Recursion(self._model, self._loss, *data)
            for data in [(inputs, labels), *each]
        )

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        # A mean over the batch also where only one sample of it is given.
        total = F.cross_entropy(outputs, labels, reduction="sum")
        return total / len(self._inputs)

    def _check_record(self, before: torch.Size, after: torch.Size) -> None:
        if isinstance(self._layer, HBPSequential):
            return  # It records nothing; its children do.
        name, record = type(self._layer).__name__, vars(self._layer).get("last_record")
        if record is None:
            raise AssertionError(
                f"forward of {name} recorded nothing. End it with "
                "return self.record(input, output, keep=...)."
            )
        if (record.input_shape, record.output_shape) != (before, after):
            raise AssertionError(
                f"forward of {name} maps {list(before)} to {list(after)}, but recorded "
                f"{list(record.input_shape)} and {list(record.output_shape)}. Give "
                "record() the input and the output, in this order."
            )

    def findings(self) -> Iterator[str]:
        """What differs, a line each."""
        _require_curvature(self._exact("none"))
        for what, actual, expected in self._readings():
            for name, matrix in expected.items():
                if difference := self._difference(actual[name], matrix):
                    yield f"{name}, {what}: {difference}"
        yield from self._wrong_jacobian()
        yield from self._wrong_transposes()

    def _readings(self) -> Iterator[tuple[str, _Operators, _Blocks]]:
        for how in TREATMENTS:
            actual = self._send_back(self._hessians, how)
            yield f"exact, treatment {how!r}", actual, self._exact(how)
        for x, p in SCHEMES:
            self._model.set_hbp_approximation(x, p)
            scheme = f"average_input_jacobian={x} and average_parameter_jacobian={p}"
            for how in TREATMENTS:
                actual = self._send_back(self._hessians.sum(0), how)
                expected = _of_layer(*self._judge.batch(how, x, p))
                yield f"averaged with {scheme}, treatment {how!r}", actual, expected

    def _exact(self, how: str) -> _Blocks:
        inputs, blocks = zip(*(judge.exact(how) for judge in self._judges), strict=True)
        sums = {n: torch.stack([b[n] for b in blocks]).sum(0) for n in blocks[0]}
        return _of_layer(torch.block_diag(*inputs), sums)

    def _send_back(self, hessian: Tensor, treatment: str) -> _Operators:
        for parameter in self._model.parameters():
            vars(parameter)["hessian"] = None
        of_input = self._model.backward_hessian(hessian, True, treatment)
        named = self._layer.named_parameters()
        return {INPUT: of_input, **{n: getattr(p, "hessian", None) for n, p in named}}

    def _difference(
        self, actual: SymmetricOperator | None, expected: Tensor
    ) -> str | None:
        """How an operator differs from a matrix."""
        if actual is None:
            return "there is none. Give its Jacobian in parameter_jacobians."
        if actual.shape != expected.shape:
            return f"the shape is {list(actual.shape)}, not {list(expected.shape)}"
        vectors = expected.new_empty(len(expected), 3).normal_()
        for what, value, right in [
            ("the matrix", actual.to_dense(), expected),
            ("its diagonal", actual.diagonal(), expected.diagonal()),
            ("a product with it", actual @ vectors, expected @ vectors),
        ]:
            if error := self._error(value, right, expected):
                return f"{what} {error}"
        return None

    def _error(self, value: Tensor, right: Tensor, matrix: Tensor) -> str | None:
        """By how much a value is off, next to the entries of a matrix."""
        error = float((value - right).detach().abs().max())
        largest = float(matrix.abs().max())
        if error <= self._tolerance * largest:  # Not so for NaN.
            return None
        return f"is off by {error:.2g}; its largest entry is {largest:.2g}"

    @torch.no_grad()
    def _wrong_jacobian(self) -> Iterator[str]:
        """In JᵀHJ a wrong sign of J cancels, but not beside a shortcut."""
        actual = self._layer.jacobian()
        if _is_empty(actual):
            return
        twin = copy.deepcopy(self._layer)
        with torch.enable_grad():
            expected = jacobian(lambda x: twin(x.clone()), self._inputs)
        expected = expected.reshape(-1, self._inputs.numel())
        found = actual.jvp(torch.eye(actual.in_size).to(expected)).T
        if error := self._error(found, expected, expected):
            yield f"jacobian, exact: it {error}"

    @torch.no_grad()
    def _wrong_transposes(self) -> Iterator[str]:
        """A matrix is formed by transposes alone, so each is held against its map."""
        for name, exact in _jacobians(self._layer):
            for reading, J in [("averaged", exact.mean(Batch())), ("exact", exact)]:
                expected = J.vjp(torch.eye(J.out_size).to(self._inputs))
                found = J.jvp(torch.eye(J.in_size).to(self._inputs)).T
                if error := self._error(found, expected, expected):
                    yield f"{name}, {reading}: jvp is not vjp's transpose; it {error}"


def _with_network_on_top(layer: HBPModule, outputs: Tensor) -> HBPSequential:
    """The layer, which gives these outputs, below a sigmoid and a linear layer."""
    features = outputs[0].numel()
    # Where the sigmoid saturated, no error of the layer would be seen.
    scale = float(outputs.square().mean().sqrt()) or 1.0
    linear = HBPLinear(features, min(features + 1, MOST_CLASSES))
    torch.nn.init.normal_(linear.weight, std=2 / features**0.5)
    squash = HBPElementwise(lambda z: torch.sigmoid(z / scale))
    return HBPSequential(layer, squash, HBPFlatten(), linear).to(outputs)


def _of_layer(of_input: Tensor, parameters: _Blocks) -> _Blocks:
    """The first child's blocks, by the names that they have in it."""
    own = {n[2:]: block for n, block in parameters.items() if n.startswith("0.")}
    return {INPUT: of_input, **own}


def _require_curvature(expected: _Blocks) -> None:
    zeros = [name for name, block in expected.items() if not bool(block.any())]
    if zeros:
        raise ValueError(
            f"The curvature w.r.t. {', '.join(zeros)} is zero at these inputs, where "
            "wrong rules would pass. Choose inputs at which the layer's output depends "
            "on it."
        )


def _jacobians(layer: HBPModule) -> Iterator[tuple[str, Jacobian]]:
    """Every map that a pass through the layer, or through those inside it, reads."""
    for path, module in _hbp_modules(layer):
        of = f" of {path}" if path else ""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        if not _is_empty(J := module.jacobian()):
            yield f"jacobian{of}", J
        for parameter, J in module.parameter_jacobians():
            yield f"parameter_jacobians{of}, {names[id(parameter)]}", J


def _hbp_modules(layer: HBPModule) -> list[tuple[str, HBPModule]]:
    """The layer and those inside it, by name."""
    return [(n, m) for n, m in layer.named_modules() if isinstance(m, HBPModule)]


def _is_empty(J: Jacobian) -> bool:
    """Whether it is that of a container without layers, which has no size."""
    return isinstance(J, Chain) and not J.steps
