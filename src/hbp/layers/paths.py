"""Several paths from one input, and the function that joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hbp.core.containers import HBPSequential, checked, require_distinct
from hbp.core.jacobians import Batch, Jacobian, SharedJacobian
from hbp.core.module import HBPModule, Reading
from hbp.core.operators import Congruence, OperatorSum, ZeroOperator
from hbp.core.operators import SymmetricOperator as Operator
from hbp.layers.general import FunctionRule


class HBPParallel(HBPModule):
    """z = (s₁(x), …, s_m(x)): what several paths make of x, flattened, in one row.

    [Rule][eq-paths], with H_ij the part of H_z that couples paths i and j:

        H_x = Σ_ij J_iᵀ H_ij J_j + second-order terms of the paths

    and the parameters of path i get what it leaves for H_ii. Over a batch the J_i are
    averaged. A layer that averages the product does so for H_ii; what couples two paths
    keeps the averaged Jacobians.

    Args:
        paths: HBP modules, at least one.

    Raises:
        TypeError: one of them is no HBP module, or there is none.
    """

    is_nest = True

    def __init__(self, *paths: HBPModule) -> None:
        super().__init__()
        for path in paths or (None,):
            checked(path, "A path", self)
        self.shapes = self.recorded_shapes = list[torch.Size]()
        self._modules.update({str(i): path for i, path in enumerate(paths)})

    def forward(self, input: Tensor) -> Tensor:
        """z, [N, ...] → [N, features of all paths].

        Raises:
            RuntimeError: a path overwrites x, which the others need.
            TypeError: a path ends in integers.
        """
        version = input._version
        outputs = [path(input) for path in self._paths]
        if input._version != version:
            raise RuntimeError(
                "A path of this HBPParallel changes its input in place, but the others "
                "need it. Make its first layer out-of-place."
            )
        if not all(output.is_floating_point() for output in outputs):
            raise TypeError(
                "A path of this HBPParallel ends in integers, which have no curvature. "
                "Convert them to floats in the path, or compute with them in the loss."
            )
        self.shapes = [output.shape[1:] for output in outputs]
        joined = torch.cat([output.flatten(1) for output in outputs], 1)
        if torch.is_grad_enabled():
            self.recorded_shapes = self.shapes
        return self.record(input, joined, keep=None, with_gradient=False)

    def pull_back(
        self, H: Operator, reading: Reading, further: bool
    ) -> Operator | None:
        require_distinct(self)
        self._require_usable(H, reading)
        for path, own in zip(self._paths, self._alone(H, reading), strict=True):
            if any(p.requires_grad for p in path.parameters()):
                path.pull_back(own, reading, False)
        return self.input_hessian(H, reading) if further else None

    def input_hessian(self, H: Operator, reading: Reading) -> Operator:
        layers = [m for m in self.modules() if isinstance(m, HBPModule)]
        alone, detour = self._alone(H, reading), replace(reading, blocks={})
        if reading.samples or all(m.average_input_jacobian for m in layers):
            # The paths are linear maps; for H = 0 they send back second-order terms.
            coupled = reading.through(H, self.jacobian(), self, True, None)
            alone = [ZeroOperator(own.shape[0], own) for own in alone]
        else:
            coupled = _Coupled(H, self.jacobian().mean(reading.batch), alone)
        pairs = zip(self._paths, alone, strict=True)
        sent = [path.pull_back(own, detour, True) for path, own in pairs]
        terms = [term for term in (coupled, *sent) if term is not None]
        bent = [term for term in terms if not isinstance(term, ZeroOperator)]
        return OperatorSum(bent) if len(bent) > 1 else (bent or terms)[0]

    def jacobian(self) -> Stack:
        """Each path's Jacobian, one below the other."""
        x, z = self.last_record.input_shape, self.last_record.output_shape
        maps = [path.jacobian() for path in self._paths]
        return Stack(maps, self._sizes, x[1:], z[1:], x[0])

    @property
    def _paths(self) -> list[Any]:
        return list(self._modules.values())

    @property
    def _sizes(self) -> list[int]:
        return [shape.numel() for shape in self.recorded_shapes]

    def _alone(self, H: Operator, reading: Reading) -> list[Operator]:
        """H_ii of each path."""
        sizes, samples = self._sizes, reading.samples or 1
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [
            Part(start, size, sum(sizes), samples)
            for start, size in zip(starts, sizes, strict=True)
        ]
        return [Congruence(H, part) for part in parts]


class Part(SharedJacobian):
    """Some of the features, of each sample, as all of them: the others are zero."""

    def __init__(self, start: int, size: int, whole: int, samples: int) -> None:
        super().__init__((size,), (whole,), samples)
        self._own = slice(start, start + size)

    def jvp(self, rows: Tensor) -> Tensor:
        whole = rows.new_zeros(len(rows), self.samples, *self.out_shape)
        whole[..., self._own] = rows.reshape(len(rows), self.samples, -1)
        return whole.flatten(1)

    def vjp(self, rows: Tensor) -> Tensor:
        whole = rows.reshape(len(rows), self.samples, -1)
        return whole[..., self._own].flatten(1)


class Stack(Jacobian):
    """(J₁, …, J_m): several paths from x, of ``in_shape``, to parts of z.

    Args:
        maps: J₁, …, J_m.
        sizes: How many features of z each of them makes.
        in_shape: As in ``Jacobian``, like the next two.
        out_shape: See ``in_shape``.
        samples: See ``in_shape``.
    """

    def __init__(
        self,
        maps: Sequence[Jacobian],
        sizes: Sequence[int],
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        samples: int,
    ) -> None:
        self.maps, self._each = list(maps), list(sizes)
        self.parts = [part for J in maps for part in J.parts or (J,)]
        reads = [watched for part in self.parts for watched in part.reads]
        super().__init__(in_shape, out_shape, samples, reads=reads)

    def jvp(self, rows: Tensor) -> Tensor:
        shape = len(rows), self.samples, -1
        return torch.cat([J.jvp(rows).view(shape) for J in self.maps], 2).flatten(1)

    def vjp(self, rows: Tensor) -> Tensor:
        parts = rows.reshape(len(rows), self.samples, -1).split(self._each, dim=2)
        pairs = zip(self.maps, parts, strict=True)
        return torch.stack([J.vjp(part.flatten(1)) for J, part in pairs]).sum(0)

    def mean(self, batch: Batch) -> Stack:
        maps = [J.mean(batch) for J in self.maps]
        return Stack(maps, self._each, self.in_shape, self.out_shape, 1)


class _Coupled(Operator):
    """Σ_(i ≠ j) J_iᵀ H_ij J_j: JᵀHJ, without what each path has alone."""

    def __init__(self, H: Operator, J: Stack, alone: Sequence[Operator]) -> None:
        super().__init__(J.in_size, H, [*J.reads, *H.reads])
        self._H, self._J, self._alone = H, J, alone

    def product(self, rows: Tensor) -> Tensor:
        result = self._J.vjp(self._H.product(self._J.jvp(rows)))
        for J, own in zip(self._J.maps, self._alone, strict=True):
            result = result - J.vjp(own.product(J.jvp(rows)))
        return result


class HBPJoin(HBPSequential):
    """z = f(s₁(x), …, s_m(x)): a function of what several paths make of x.

    Args:
        function: f, smooth, of m tensors [N, ...], sample by sample. It has no
            parameters; those are in the paths.
        paths: HBP modules; ``HBPIdentity()`` for x itself.

    Examples:
        >>> import operator
        >>> from hbp import HBPJoin, HBPLinear, HBPSequential, HBPSiLU
        >>> gate = HBPSequential(HBPLinear(4, 8), HBPSiLU())
        >>> gated = HBPJoin(operator.mul, gate, HBPLinear(4, 8))

    Raises:
        TypeError: an argument is of another kind.
    """

    def __init__(self, function: Callable[..., Tensor], *paths: HBPModule) -> None:
        if not callable(function):
            raise TypeError(f"function={function!r} must be a function of tensors.")
        super().__init__()
        self._modules.update(paths=HBPParallel(*paths), join=_Joint(function))

    def forward(self, input: Tensor) -> Tensor:
        """z, [N, ...] → [N, ...]."""
        paths, join = self._modules.values()
        joined = paths(input)
        join.shapes = paths.shapes
        result: Tensor = join(joined)
        return result


class _OfRow(nn.Module):
    """f of tensors that come flattened, in one row."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.shapes = function, list[torch.Size]()

    def forward(self, input: Tensor) -> Tensor:
        parts = input.split([shape.numel() for shape in self.shapes], dim=1)
        shaped = zip(parts, self.shapes, strict=True)
        return self.function(*(part.unflatten(1, shape) for part, shape in shaped))

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", "")


class _Joint(FunctionRule, _OfRow):
    """The same, for ``HBPJoin``."""
