"""From ``torch.nn`` to HBP layers that share the same parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from hbp.modules import (
    HBPFlatten,
    HBPLinear,
    HBPModule,
    HBPReLU,
    HBPSequential,
    HBPSigmoid,
    HBPTanh,
)


def convert(model: nn.Module) -> HBPModule:
    """The HBP twin of a ``torch.nn`` model. It shares the model's parameters.

    ``model`` itself is left as it is. Training either trains both; names, and with
    them ``state_dict`` keys, are the same. HBP layers are taken over as they are.

    Args:
        model: A supported layer, or an ``nn.Sequential`` nest of them.

    Raises:
        TypeError: a layer is not supported; the message names it and lists those
            that are. Subclasses are not: they may compute something else.
        ValueError: a layer has forward or backward hooks, which would be lost.
    """
    return _convert(model, path="")


def _convert(model: nn.Module, path: str) -> HBPModule:
    if isinstance(model, HBPModule) and not isinstance(model, HBPSequential):
        return model
    rule = _RULES.get(type(model))
    if rule is None:
        names = ", ".join(
            f"nn.{kind.__name__}"
            for kind in _RULES
            if kind.__module__.startswith("torch.")
        )
        raise TypeError(
            f"convert() does not know {path or 'the model'}: {model}. Supported are "
            f"{names} and HBP layers."
        )
    if any(getattr(model, name) for name in _HOOKS):
        raise ValueError(
            f"{path or 'The model'} ({type(model).__name__}) has hooks, which "
            "convert() would lose. Remove them first."
        )
    return rule(model, path).train(model.training)


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _linear(layer: nn.Module, path: str) -> HBPModule:
    assert isinstance(layer, nn.Linear)
    # On the meta device nothing is allocated, and no random number drawn.
    twin = HBPLinear(layer.in_features, layer.out_features, device="meta")
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin


def _flatten(layer: nn.Module, path: str) -> HBPModule:
    assert isinstance(layer, nn.Flatten)
    return HBPFlatten(layer.start_dim, layer.end_dim)


def _relu(layer: nn.Module, path: str) -> HBPModule:
    assert isinstance(layer, nn.ReLU)
    return HBPReLU(layer.inplace)


def _sequential(model: nn.Module, path: str) -> HBPModule:
    # Not named_children(), which leaves out a layer that occurs again.
    children = [(name, child) for name, child in model._modules.items() if child]
    twins = [
        (name, _convert(child, f"{path}.{name}".lstrip(".")))
        for name, child in children
    ]
    return HBPSequential(OrderedDict(twins))


_RULES: dict[type[nn.Module], Callable[[nn.Module, str], HBPModule]] = {
    nn.Linear: _linear,
    nn.Sigmoid: lambda layer, path: HBPSigmoid(),
    nn.Tanh: lambda layer, path: HBPTanh(),
    nn.ReLU: _relu,
    nn.Flatten: _flatten,
    nn.Sequential: _sequential,
    HBPSequential: _sequential,
}
