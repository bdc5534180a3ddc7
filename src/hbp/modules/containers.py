"""Chains of layers, and shortcuts past them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from hbp.maps import ChainMap, LinearMap, SumMap
from hbp.modules.base import HBPModule, HessianPass
from hbp.operators import (
    Congruence,
    CrossTerms,
    DenseOperator,
    OperatorSum,
    SymmetricOperator,
    ZeroOperator,
)


class HBPSequential(HBPModule, nn.Sequential):
    """``torch.nn.Sequential`` of HBP layers that sends curvature backward.

    The chain rule: what comes out of a module's Hessian pass as H_x goes into the
    module below as H_z. It stops at the first module with a trainable parameter,
    unless the input Hessian is asked for. Nesting, indexing, slicing and named
    children work as in ``torch.nn.Sequential``; without children it is the identity.
    """

    def _send_back(
        self,
        output_hessian: SymmetricOperator,
        hessian_pass: HessianPass,
        compute_input_hessian: bool,
    ) -> SymmetricOperator | None:
        hessian: SymmetricOperator | None = output_hessian
        children = self._checked_children()
        while children and hessian is not None:
            module = children.pop()
            further = compute_input_hessian or _is_trainable(children)
            hessian = module._send_back(hessian, hessian_pass, further)
        return hessian if compute_input_hessian else None

    def _collect(self, hessian_pass: HessianPass, compute_input_hessian: bool) -> None:
        children = self._checked_children()
        while children:
            module = children.pop()
            further = compute_input_hessian or _is_trainable(children)
            module._collect(hessian_pass, further)
            if not further:
                break

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        """The product of the children's Jacobians."""
        maps = [child._jacobian(hessian_pass) for child in self._checked_children()]
        # An empty Sequential is the identity, of no size of its own.
        return ChainMap([step for step in maps if step.in_size], size=0)

    def _checked_children(self) -> list[HBPModule]:
        """The children, once nothing in them would make their curvature wrong."""
        children: list[HBPModule] = []
        for name, module in self.named_children():
            if not isinstance(module, HBPModule):
                raise TypeError(
                    f"Child {name!r} of this HBPSequential is {module}, which sends no "
                    "curvature backward. Use HBP layers, or convert(model)."
                )
            children.append(module)
        _check_distinct(self)
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

    def __init__(self, branch: HBPModule, shortcut: HBPModule | None = None) -> None:
        super().__init__()
        for name, module in [("branch", branch), ("shortcut", shortcut)]:
            optional = name == "shortcut" and module is None
            if not (isinstance(module, HBPModule) or optional):
                raise TypeError(
                    f"{name} is {module}, which sends no curvature backward. Use HBP "
                    "layers, or convert(model)."
                )
        self.branch = branch
        self.shortcut = shortcut

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
        past = input if self.shortcut is None else self.shortcut(input)
        if through._version != version:
            raise RuntimeError(
                "The shortcut of this HBPResidual changes its input in place, and the "
                "branch returned that input. Make its first layer out-of-place."
            )
        if through.shape != past.shape:
            raise ValueError(
                f"The branch of this HBPResidual returned {list(through.shape)} and "
                f"its shortcut {list(past.shape)}; both must have the same shape."
            )
        return self.record(input, through + past, keep=None, with_gradient=False)

    def _send_back(
        self,
        output_hessian: SymmetricOperator,
        hessian_pass: HessianPass,
        compute_input_hessian: bool,
    ) -> SymmetricOperator | None:
        _check_distinct(self)
        self._check_pass()
        self._check_hessian(output_hessian, hessian_pass)
        for path in self._paths:
            if _is_trainable([path]):
                path._send_back(output_hessian, hessian_pass, False)
        if not compute_input_hessian:
            return None
        return self._input_hessian(output_hessian, hessian_pass)

    def _collect(self, hessian_pass: HessianPass, compute_input_hessian: bool) -> None:
        _check_distinct(self)
        self._check_pass()
        for path in self._paths:
            if compute_input_hessian or _is_trainable([path]):
                path._collect(hessian_pass, compute_input_hessian)
        if compute_input_hessian:
            self._jacobians(hessian_pass)

    @property
    def _paths(self) -> list[HBPModule]:
        return [self.branch] + ([] if self.shortcut is None else [self.shortcut])

    def _input_hessian(
        self, output_hessian: SymmetricOperator, hessian_pass: HessianPass
    ) -> SymmetricOperator:
        detour = hessian_pass.without_blocks()
        if not hessian_pass.is_exact and _averages_products(self):
            return self._averaged_product(output_hessian, detour)
        # A path's H_x for H_z = 0 is its second-order term.
        zero = ZeroOperator(
            output_hessian.shape[0], output_hessian.dtype, output_hessian.device
        )
        sent = [path._send_back(zero, detour, True) for path in self._paths]
        terms = [term for term in sent if not isinstance(term, ZeroOperator | None)]
        if isinstance(output_hessian, ZeroOperator):
            size = self.last_record.input_shape[1:].numel() * hessian_pass.samples
            zero = ZeroOperator(size, zero.dtype, zero.device)
            return OperatorSum(terms) if terms else zero
        first = Congruence(output_hessian, self._jacobian(hessian_pass))
        return OperatorSum([first, *terms]) if terms else first

    def _averaged_product(
        self, output_hessian: SymmetricOperator, detour: HessianPass
    ) -> SymmetricOperator:
        terms: list[SymmetricOperator] = []
        for path in self._paths:
            sent = path._send_back(output_hessian, detour, True)
            assert sent is not None
            terms.append(sent)
        if self.shortcut is None:
            terms.append(output_hessian)
        branch, shortcut = self._jacobians(detour)
        total = OperatorSum([*terms, CrossTerms(output_hessian, branch, shortcut)])
        # Its products take three of H_z, nine below the next shortcut, and so on.
        return DenseOperator(total.to_dense()) if total.fits else total

    def _jacobians(self, hessian_pass: HessianPass) -> tuple[LinearMap, LinearMap]:
        size = self.last_record.input_shape[1:].numel() * hessian_pass.samples
        identity = ChainMap([], size)
        paths = [path._jacobian(hessian_pass) for path in self._paths]
        branch, shortcut = [*paths, identity][:2]
        return (branch if branch.in_size else identity), shortcut

    def jacobian(self, hessian_pass: HessianPass) -> LinearMap:
        """The sum of the two paths' Jacobians."""
        return SumMap(*self._jacobians(hessian_pass))


def _check_distinct(module: nn.Module) -> None:
    """Raise unless every layer and every parameter occurs once."""
    name = type(module).__name__
    leaves = list(_leaves(module))
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


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a nest of containers, each as often as it occurs."""
    if isinstance(module, HBPSequential | HBPResidual):
        for child in module._modules.values():
            if child is not None:
                yield from _leaves(child)
    else:
        yield module


def _is_trainable(modules: Sequence[nn.Module]) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def _averages_products(module: nn.Module) -> bool:
    choices = (getattr(m, "average_input_jacobian", True) for m in module.modules())
    return not all(choices)
