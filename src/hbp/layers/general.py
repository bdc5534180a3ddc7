"""Layers whose rules automatic differentiation finds.

A subclass puts a rule before the ``torch.nn`` layer that computes z, and is done. A
rule of its own is faster; this one is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from hbp.core import settings
from hbp.core.jacobians import (
    Batch,
    Bilinear,
    Chain,
    Function,
    Jacobian,
    SharedJacobian,
    Spread,
)
from hbp.core.layers.shape import LinearRule
from hbp.core.module import HBPModule, Reading
from hbp.core.operators import MatrixFree, SampleBlocks, SymmetricOperator, Watched


class Dense(Jacobian):
    """Dense Jacobians of each sample; ``data`` is J, [N, z, x].

    Or [N, positions, z, x], where the positions of a sample do not mix.
    """

    def __init__(
        self, J: Tensor, in_shape: Sequence[int], out_shape: Sequence[int]
    ) -> None:
        super().__init__(in_shape, out_shape, len(J), J)

    def jvp(self, rows: Tensor) -> Tensor:
        return self._multiply(rows, self.data.mT)

    def vjp(self, rows: Tensor) -> Tensor:
        return self._multiply(rows, self.data)

    def _multiply(self, rows: Tensor, matrices: Tensor) -> Tensor:
        # One product per matrix for all rows: one per row would copy the matrices.
        matrices = matrices.flatten(0, -3)
        parts = rows.reshape(len(rows), len(matrices), -1).transpose(0, 1)
        return (parts @ matrices).transpose(0, 1).flatten(1)


class Smooth(Jacobian):
    """∂z/∂x of any smooth function, never formed; ``data`` is x, [N, ...].

    Args:
        function: x → z, [N, ...] → [N, *out_shape], sample by sample.
        x: Read, not copied.
        out_shape: Shape of one sample's z.
        reads: What else the function reads.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        out_shape: Sequence[int],
        reads: Sequence[Watched] = (),
    ) -> None:
        reads = [Watched(x, "An input"), *reads]
        super().__init__(x.shape[1:], out_shape, len(x), x, reads)
        self._function = function

    @torch.no_grad()
    def jvp(self, rows: Tensor) -> Tensor:
        push, shape = _derivative(self._function, self.data)[0], self.data.shape
        return vmap(push)(rows.reshape(-1, *shape)).flatten(1)

    @torch.no_grad()
    def vjp(self, rows: Tensor) -> Tensor:
        pull, shape = _derivative(self._function, self.data)[1], self.out_shape
        return vmap(pull)(rows.reshape(-1, self.samples, *shape)).flatten(1)

    def mean(self, batch: Batch) -> Jacobian:
        """E[J]: to all samples, through each one's J, and back to one."""
        each = batch.of_all(self)
        to_all = Spread(self.in_shape, self.in_shape, each.samples)
        return Chain([to_all, each, Mean(self.out_shape, self.out_shape, each.samples)])


class Mean(SharedJacobian):
    """E over so many samples: many in, one out."""

    def __init__(
        self, in_shape: Sequence[int], out_shape: Sequence[int], samples: int
    ) -> None:
        super().__init__(in_shape, out_shape, 1)
        self._count, self.in_size = samples, samples * self.out_size

    def jvp(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), self._count, -1).mean(1)

    def vjp(self, rows: Tensor) -> Tensor:
        return rows.repeat(1, self._count) / self._count


class WithNotes(HBPModule):
    """A layer whose function may depend on more than x: on shapes, for instance.

    They are noted as values pass, by whatever module inside has an attribute
    ``shapes``. Another forward pass notes others, but curvature goes by those of the
    pass that it belongs to.
    """

    def _as_recorded(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function of the layer, as it was in the pass that was recorded."""
        return function


class Noted(WithNotes):
    """One that keeps what was noted, with what is recorded."""

    def forward(self, input: Tensor) -> Tensor:
        """z = f(x), [N, ...] → [N, ...]."""
        output: Tensor = super().forward(input)
        record: Any = vars(self).get("last_record")
        if record and torch.is_grad_enabled():
            record.notes = self._notes()
        return output

    def _as_recorded(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        notes = vars(self.last_record)["notes"]

        def recorded(*args: Tensor) -> Tensor:
            now = self._notes()
            self._note(notes)
            try:
                return function(*args)
            finally:
                self._note(now)

        return recorded

    def _noting(self) -> list[Any]:
        return [part for part in self.modules() if hasattr(part, "shapes")]

    def _notes(self) -> list[Any]:
        return [part.shapes for part in self._noting()]

    def _note(self, notes: Sequence[Any]) -> None:
        for part, shapes in zip(self._noting(), notes, strict=True):
            part.shapes = shapes


class AffineRule(WithNotes, LinearRule):
    """z = Πx + c, the same Π and c for every sample; autograd parts the two.

    [Rule][eq-selection]: H_x = Πᵀ H_z Π, and there is no second-order term.
    """

    def jacobian(self) -> Jacobian:
        before, after = self.last_record.input_shape, self.last_record.output_shape
        push, pull = _linear_part(self._as_recorded(super().forward))

        def transpose(u: Tensor) -> Tensor:
            return pull(u, u.new_zeros(len(u), *before[1:]))

        shapes = before[1:], after[1:], before[0]
        return Function(push, *shapes, transpose, self._watched())

    def _watched(self, but: Tensor | None = None) -> list[Watched]:
        """What a product reads of the layer."""
        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return [Watched(value, "A weight") for value in own if value is not but]


class BilinearRule(AffineRule):
    """z = f(x, θ₁, θ₂, …), linear in x and in each of the layer's own parameters.

    Rules, with both Jacobians by automatic differentiation, never formed:

        H_x = JᵀH_z J, J = ∂z/∂x        H_θ = JᵀH_z J, J = ∂z/∂θ

    A constant part, such as a bias, may be added; no second-order term appears. Over
    a batch, J = ∂z/∂θ is that of x̄, or with ``average_parameter_jacobian=False``
    H_θ is E[JᵀH̄ J]. ∂z/∂x is the same for all samples.
    """

    schemes = ("average_parameter_jacobian",)

    def forward(self, input: Tensor) -> Tensor:
        """z = f(x, θ), [N, ...] → [N, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def parameter_jacobians(self) -> Iterable[tuple[Tensor, Jacobian]]:
        x, z = self.last_record.kept, self.last_record.output_shape
        for name, parameter in self.named_parameters(recurse=False):
            yield (
                parameter,
                Bilinear(
                    self._as_recorded(partial(self._push, name)),
                    self._as_recorded(partial(self._pull, name, parameter.detach())),
                    x,
                    parameter.shape,
                    z[1:],
                    self._watched(but=parameter),
                ),
            )

    def check_record(self) -> None:
        super().check_record()
        inside = [name for name, _ in self.named_parameters() if "." in name]
        inside += [n for n, v in vars(self).items() if getattr(v, "grad_fn", None)]
        if inside:
            raise TypeError(
                f"BilinearRule varies a layer's own parameters, but {inside[0]} of "
                f"{type(self).__name__} belongs to a module inside it, or is computed "
                "before each pass, as by pruning. Register it on the layer, or build "
                "the layer as an HBPSequential; undo pruning by prune.remove()."
            )

    def _push(self, name: str, x: Tensor, v: Tensor) -> Tensor:
        push, _ = _linear_part(partial(self._varied, name, x))
        return push(v)

    def _pull(self, name: str, like: Tensor, x: Tensor, u: Tensor) -> Tensor:
        _, pull = _linear_part(partial(self._varied, name, x))
        return pull(u, torch.zeros_like(like))

    def _varied(self, name: str, x: Tensor, value: Tensor) -> Tensor:
        """z with another value for one parameter; no hook runs, nothing is recorded."""
        parameters: dict[str, Any] = self._parameters
        own = parameters[name]
        parameters[name] = value
        try:
            return super().forward(x)
        finally:
            parameters[name] = own


def _linear_part(
    function: Callable[[Tensor], Tensor],
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """v ↦ Jv, and u, a v of the right shape ↦ Jᵀu, of an affine function.

    function(v) - function(0) would lose the digits of a small v beside a large
    constant.
    """

    def push(v: Tensor) -> Tensor:
        return _derivative(function, torch.zeros_like(v))[0](v)

    def pull(u: Tensor, at: Tensor) -> Tensor:
        return _derivative(function, at)[1](u)

    return push, pull


def _derivative(
    function: Callable[[Tensor], Tensor], at: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """v ↦ Jv and u ↦ Jᵀu, for the J of a function at some point.

    Forward mode would do the first, but not every function has it. u ↦ Jᵀu is linear,
    and its transpose is J.
    """
    z, back = vjp(function, at)[:2]

    def pull(u: Tensor) -> Tensor:
        result: Tensor = back(u)[0]
        return result

    def push(v: Tensor) -> Tensor:
        result: Tensor = vjp(pull, torch.zeros_like(z))[1](v)[0]
        return result

    return push, pull


class GeneralRule(WithNotes):
    """z = f(x) for any smooth function f of one sample, by automatic differentiation.

    [Rule][eq-hbp]: H_x = JᵀH_z J + mod(Σ_k ∇²z_k δ_k), J = ∂z/∂x. J is formed where it
    is small, [features, features] for every sample, or for every position if positions
    do not mix; otherwise products with it differentiate f. The second-order term is
    formed, for ``mod`` acts on its [eigenvalues][eq-mod]. Where it would be too large
    (``hbp.set_dense_limit``), exact products take the Hessian (``None``) and the GGN,
    and averaged ones the GGN.

    A subclass puts this class before the ``torch.nn`` layer that computes f. If that
    has parameters, they need ``parameter_jacobians``.

    Attributes:
        mixed: So many of the last dimensions of x depend on each other, and what is
            before them are positions; None for all.
    """

    schemes: Sequence[str] = ("average_input_jacobian",)
    mixed: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        """z = f(x), [N, ...] → [N, ...]."""
        return self.record(input, super().forward(input), keep=input)

    def jacobian(self) -> Jacobian:
        x, after = self.last_record.kept, self.last_record.output_shape
        own, out = self._apart(x), self._apart(x.new_empty(()).expand(after))
        entries = own.shape[:2].numel() * own[0, 0].numel() * out[0, 0].numel()
        small = max(own[0, 0].numel(), out[0, 0].numel()) <= settings.DENSE_FEATURES
        if not (small and _fits(entries, x)):
            own_state = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
            reads = [Watched(value, "A weight") for value in own_state]
            return Smooth(self._as_recorded(self._function), x, after[1:], reads)
        J = vmap(vmap(jacrev(self._of_one)))(own).flatten(3)
        return Dense(J, x.shape[1:], after[1:])

    def second_order_term(self, J: Jacobian, reading: Reading) -> SymmetricOperator:
        """mod(Σ_k ∇²z_k δ_k) of every sample, or of their sum: matrices."""
        x, delta = self.last_record.kept, self.last_record.delta_of(self)
        own = self._apart(x)
        features = own[0, 0].numel()
        if not _fits(x.numel() * features, x):
            return self._unformed_term(x, delta, reading)

        def projected(x: Tensor, delta: Tensor) -> Tensor:
            return self._of_one(x) @ delta

        terms = vmap(vmap(jacrev(jacrev(projected))))(
            own, self._apart(delta).flatten(2)
        )
        terms = terms.reshape(*own.shape[:2], features, features)
        total = reading.totalled(terms, self).flatten(0, 1)
        # The pass will say what is not finite; eigh would raise an error of its own.
        symmetric = ((total + total.mT) / 2).nan_to_num(0.0, 0.0, 0.0)
        values, vectors = torch.linalg.eigh(symmetric)
        modified = reading.modify(values).unsqueeze(-2)
        return SampleBlocks((vectors * modified) @ vectors.mT)

    def _unformed_term(
        self, x: Tensor, delta: Tensor, reading: Reading
    ) -> SymmetricOperator:
        """Σ_k ∇²z_k δ_k as products, for which mod has to be linear."""
        if reading.nonnegative or not reading.samples:
            size = x.numel() * self._apart(x)[0, 0].numel() * x.element_size()
            raise MemoryError(
                f"The second-order term of {self} is not diagonal. Its matrices, of "
                f"which this treatment needs the eigenvalues, take {size / 2**30:.1f} "
                "GiB for this batch. Choose 'ggn', which drops it, or a smaller batch, "
                "or raise the limit by hbp.set_dense_limit()."
            )

        function = self._as_recorded(self._function)

        def gradient(x: Tensor) -> Tensor:
            return _derivative(function, x)[1](delta)

        def product(v: Tensor) -> Tensor:
            bent = _derivative(gradient, x)[1](v.view(x.shape))
            result: Tensor = reading.modify(bent.flatten())
            return result

        term = MatrixFree(product, x.numel(), x.dtype, x.device)
        term.reads.append(Watched(x, "An input"))
        return term

    def _function(self, x: Tensor) -> Tensor:
        """f, without a record."""
        # Torch's faster attention can be differentiated only once.
        with sdpa_kernel(SDPBackend.MATH):
            result: Tensor = super().forward(x)
        return result

    def _of_one(self, x: Tensor) -> Tensor:
        """f of what mixes, flattened; it gets as many dimensions as x has."""
        missing = len(self.last_record.input_shape) - x.dim()
        return self._as_recorded(self._function)(x[(None,) * missing]).flatten()

    def _apart(self, values: Tensor) -> Tensor:
        """[N, ...] as [N, positions, what mixes]."""
        first = 1 if self.mixed is None else values.dim() - self.mixed
        return values.reshape(len(values), -1, *values.shape[first:])


def _fits(entries: int, like: Tensor) -> bool:
    return entries * like.element_size() <= settings.dense_limit


class Separate(Noted):
    """A function that somebody gives, which may not be one of each sample alone."""

    _function: Callable[[Tensor], Tensor]

    def check_record(self) -> None:
        super().check_record()
        x, function = self.last_record.kept, self._as_recorded(self._function)
        among = function(x)
        near: Any = dict.fromkeys(("rtol", "atol"), torch.finfo(among.dtype).eps ** 0.5)
        for n in (slice(0, 1), slice(len(x) - 1, len(x))):
            try:  # It may not take one sample at all.
                assert_close(function(x[n]), among[n], **near, equal_nan=True)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f"{self} makes something else of a sample alone than among others: "
                    "it mixes samples, or is random. Keep dimension 0 as it is; for "
                    "dropout, call eval()."
                ) from error


class FunctionRule(Separate, GeneralRule):
    """The rule of a function that somebody gives, of which little is known."""


class SoftmaxRule(GeneralRule):
    """A softmax, or the logarithm of one, within each sample."""

    dim: int | None

    @property
    def _over(self) -> int:
        """Which dimension of x it goes over."""
        count = len(self.last_record.input_shape)
        # Where dim is None, torch takes 0 for three dimensions, else 1.
        return (int(count != 3) if self.dim is None else self.dim) % count

    @property
    def mixed(self) -> int | None:  # type: ignore[override]  # By the x at hand.
        """The last dimension alone, if it goes over that."""
        return 1 if self._over == len(self.last_record.input_shape) - 1 else None

    def check_record(self) -> None:
        super().check_record()
        count = len(self.last_record.input_shape)
        if self._over == 0:
            raise ValueError(
                f"{self} goes over the samples of an input of {count} dimensions, so "
                "that they depend on each other. Give it another dim."
            )


class HBPSoftmax(SoftmaxRule, nn.Softmax):
    """``torch.nn.Softmax`` that sends curvature backward."""


class HBPLogSoftmax(SoftmaxRule, nn.LogSoftmax):
    """``torch.nn.LogSoftmax`` that sends curvature backward."""
