"""Chains of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from hbp.modules.base import HBPModule, HessianPass
from hbp.operators import SymmetricOperator


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
        leaves = list(_leaves(self))
        if len(set(leaves)) < len(leaves):
            raise ValueError(
                "A layer occurs twice in this HBPSequential. It records one forward "
                "pass, so its curvature would be wrong; use two layers."
            )
        parameters = [p for leaf in leaves for p in leaf.parameters()]
        if len(set(parameters)) < len(parameters):
            raise ValueError(
                "Two layers of this HBPSequential share a parameter. Curvature of tied "
                "weights is not supported; give each layer its own."
            )
        return children


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a nest of sequentials, each as often as it occurs."""
    if isinstance(module, HBPSequential):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def _is_trainable(modules: Sequence[nn.Module]) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())
