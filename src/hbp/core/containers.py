"""Chains of layers, and shortcuts past them."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from torch import Tensor, nn

from .jacobians import Chain, Jacobian, Sum
from .module import HBPModule, Reading
from .operators import DenseOperator, OperatorSum, ZeroOperator
from .operators import SymmetricOperator as Operator


class HBPSequential(HBPModule, nn.Sequential):
    """``torch.nn.Sequential`` of HBP layers that sends curvature backward.

    The chain rule: what comes out of a module's Hessian pass as H_x goes into the
    module below as H_z. It stops at the first module with a trainable parameter,
    unless the input Hessian is asked for. Nesting, indexing, slicing and named
    children work as in ``torch.nn.Sequential``; without children it is the identity.
    """

    is_nest = True

    def pull_back(
        self, H: Operator, reading: Reading, further: bool
    ) -> Operator | None:
        hessian: Operator | None = H
        children = self._checked_children()
        while children and not (further or _is_trained(children[0])):
            del children[0]
        for child in reversed(children):
            assert hessian is not None
            below = further or child is not children[0]
            hessian = child.pull_back(hessian, reading, below)
        return hessian if further else None

    def jacobian(self) -> Jacobian:
        """The product of the children's Jacobians."""
        maps = [child.jacobian() for child in self._checked_children()]
        # An empty Sequential is the identity, of no size of its own.
        return Chain([J for J in maps if not isinstance(J, Chain) or J.steps])

    def _checked_children(self) -> list[HBPModule]:
        """The children, once nothing in them would make their curvature wrong."""
        children = [checked(m, f"Child {n!r}", self) for n, m in self.named_children()]
        require_distinct(self)
        return children


class HBPResidual(HBPModule):
    """z = t(x) + s(x): a branch s and a shortcut t, the identity if there is none.

    [Rule][eq-skip] (Dangel, Harmeling & Hennig 2020, with the cross terms of both
    paths):

        H_x = (J_t + J_s)ᵀ H_z (J_t + J_s) + second-order terms of s and t

    and the parameters of either path get what it leaves for H_z. Over a batch, J_s
    and J_t are averaged; a layer in them that averages the product instead makes it
    AᵀHB + BᵀHA, for A = E[J_s] and B = E[J_t], and the two paths' own H_x.

    Args:
        branch: s, an HBP module.
        shortcut: t, an HBP module, or ``None`` for the identity.

    Raises:
        TypeError: one of them is no HBP module.
    """

    is_nest = True

    def __init__(self, branch: HBPModule, shortcut: HBPModule | None = None) -> None:
        super().__init__()
        past = HBPSequential() if shortcut is None else shortcut
        self.branch = checked(branch, "branch", self)
        self.shortcut = checked(past, "shortcut", self)

    def forward(self, input: Tensor) -> Tensor:
        """z = t(x) + s(x), [N, ...] → [N, ...].

        Raises:
            RuntimeError: the branch overwrites x, which the shortcut needs, or the
                shortcut overwrites what the branch returned.
            ValueError: the two paths differ in shape.
        """
        version = input._version
        through = self.branch(input)
        if input._version != version:
            raise RuntimeError(
                "The branch of this HBPResidual changes its input in place, but the "
                "shortcut needs it. Make its first layer out-of-place."
            )
        version = through._version
        past = self.shortcut(input)
        if through._version != version:
            raise RuntimeError(
                "The shortcut of this HBPResidual changes its input in place, and the "
                "branch returned that input. Make its first layer out-of-place."
            )
        if through.shape != past.shape:
            raise ValueError(
                f"The branch of this HBPResidual returned {list(through.shape)} and "
                f"its shortcut {list(past.shape)}. Expand one, as by x.expand(-1, 4)."
            )
        return self.record(input, through + past, keep=None, with_gradient=False)

    def pull_back(
        self, H: Operator, reading: Reading, further: bool
    ) -> Operator | None:
        require_distinct(self)
        self._require_usable(H, reading)
        for path in (self.branch, self.shortcut):
            if _is_trained(path):
                path.pull_back(H, reading, False)
        return self.input_hessian(H, reading) if further else None

    def input_hessian(self, H: Operator, reading: Reading) -> Operator:
        layers = [m for m in self.modules() if isinstance(m, HBPModule)]
        if not (reading.samples or all(m.average_input_jacobian for m in layers)):
            return self._averaged_product(H, reading)
        # The paths are linear maps; for H = 0 they send back second-order terms.
        sent = self._sent_back(ZeroOperator(H.shape[0], H), reading)
        first = reading.through(H, self.jacobian(), self, True, None)
        terms = [t for t in (first, *sent) if not isinstance(t, ZeroOperator)]
        return OperatorSum(terms) if len(terms) > 1 else (terms or [first])[0]

    def _averaged_product(self, H: Operator, reading: Reading) -> Operator:
        """E[JᵀHJ] of each path, and what couples them."""
        J = self.jacobian().mean(reading.batch)
        total = OperatorSum([*self._sent_back(H, reading), _CrossTerms(H, J)])
        # Its products take three of H_z, nine below the next shortcut, and so on.
        return DenseOperator(total.to_dense()) if total.fits else total

    def _sent_back(self, H: Operator, reading: Reading) -> list[Operator]:
        """H_x of each path; the parameters have their blocks already."""
        detour = replace(reading, blocks={})
        paths = self.branch, self.shortcut
        sent = [path.pull_back(H, detour, True) for path in paths]
        return [hessian for hessian in sent if hessian is not None]

    def jacobian(self) -> Sum:
        """The sum of the two paths' Jacobians."""
        before, after = self.last_record.input_shape, self.last_record.output_shape
        shapes = before[1:], after[1:], before[0]
        return Sum(self.branch.jacobian(), self.shortcut.jacobian(), *shapes)


class _CrossTerms(Operator):
    """AᵀHB + BᵀHA, by which (A + B)ᵀH(A + B) exceeds AᵀHA + BᵀHB; see eq-skip."""

    def __init__(self, H: Operator, J: Sum) -> None:
        super().__init__(J.in_size, H, [*J.reads, *H.reads])
        self._H, self._A, self._B = H, J.first, J.second

    def product(self, rows: Tensor) -> Tensor:
        A, B, H = self._A, self._B, self._H
        return A.vjp(H.product(B.jvp(rows))) + B.vjp(H.product(A.jvp(rows)))


def checked(module: object, name: str, of: nn.Module) -> HBPModule:
    """The module, if it sends curvature backward; or TypeError."""
    if not isinstance(module, HBPModule):
        raise TypeError(
            f"{name} of this {type(of).__name__} is {module}, which sends no curvature "
            "backward. Use HBP layers, or convert(model)."
        )
    return module


def require_distinct(module: nn.Module) -> None:
    """Raise unless every layer and every parameter occurs once."""
    name, leaves = type(module).__name__, leaves_of(module)
    if len(set(leaves)) < len(leaves):
        raise ValueError(
            f"A layer occurs twice in this {name}. It records one forward pass, so "
            "its curvature would be wrong; use two layers."
        )
    parameters = [p for leaf in leaves for p in leaf.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError(
            f"Two layers of this {name} share a parameter. Curvature of tied weights "
            "is not supported; give each layer its own."
        )


def leaves_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a nest of containers, each as often as it occurs."""
    # Not children(), which leaves out a layer that occurs again.
    children = [child for child in module._modules.values() if child is not None]
    inside = [leaves_of(c) if getattr(c, "is_nest", 0) else [c] for c in children]
    return list(chain(*inside))


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
