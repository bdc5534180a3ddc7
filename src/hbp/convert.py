"""From ``torch.nn`` to HBP layers that share the same parameters.

A layer becomes its HBP namesake, ``nn.Sequential`` an ``HBPSequential``. Of any other
module, ``torch.fx`` records what ``forward`` does, and from the output back to the
input this is read as a chain of layers and of shortcuts past them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from hbp.calls import LAYERS
from hbp.core.containers import HBPSequential
from hbp.core.module import HBPModule
from hbp.forwards import SavedOutside
from hbp.reading import (
    GraphReading,
    copied,
    joined,
    named,
    refuse_changed,
    refuse_unused,
    state,
    unsupported,
)
from hbp.transformers import plain_class


def convert(model: nn.Module) -> HBPModule:
    """The HBP twin of a ``torch.nn`` model. It shares parameters and buffers.

    ``model`` itself is left as it is. Training either trains both; names, and with
    them ``state_dict`` keys, are the same. Train or eval mode is that of ``model``,
    module by module. HBP layers are taken over as they are.

    A module with a ``forward`` of its own is supported if that passes one tensor
    through layers and functions that have an HBP layer, one after the other, adds
    shortcuts, ``x + branch(x)`` or ``shortcut(x) + branch(x)``, and joins values by
    differentiable functions without weights, as attention does. Functions and a second
    use of a layer without parameters, such as one ``nn.ReLU()`` for a whole block,
    become layers of their own beside the named ones.

    Args:
        model: A supported layer, or any nest of ``nn.Sequential`` and such modules.

    Raises:
        TypeError: a layer or function is not supported, or ``forward`` does something
            else than the above; the message names it, and the way out.
            Subclasses of layers are not: they may compute something else.
        ValueError: a layer has forward or backward hooks, which would be lost;
            a parameter or buffer is tied, used twice or not at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a torch.nn.Module."
        )
    _refuse_tied(model)
    return _twin(model, "", set())


def _twin(module: nn.Module, path: str, met: set[Any]) -> HBPModule:
    """The twin of what has that name in the model; layers are added to ``met``."""
    if isinstance(module, HBPModule) and not isinstance(module, HBPSequential):
        _meet(module, path, met)
        return module
    if plain := plain_class(module):
        module = copied(module, plain)
    kind = LAYERS.get(type(module))
    is_sequential = type(module).forward is nn.Sequential.forward
    # torch's other layers, and subclasses, are no chains of HBP layers.
    foreign = type(module).__module__.partition(".")[0] == "torch"
    foreign = foreign or isinstance(module, tuple(LAYERS))
    if foreign and not (kind or is_sequential):
        raise unsupported(f"{path or 'the model'}: {module}")
    refuse_changed(module, path)
    if kind is not None:
        if any(True for _ in state(module)):
            _meet(module, path, met)
        layer = copied(module, kind)
        layer.__setstate__({})  # Parameters get their hessian, None.
        return layer
    if not is_sequential:
        return GraphReading(module, path, met, _twin).twin()
    # Not named_children(), which leaves out a layer that occurs again.
    children: OrderedDict[str, nn.Module] = OrderedDict(
        (name, _twin(child, joined(path, name), met))
        for name, child in module._modules.items()
        if child is not None
    )
    twin = HBPSequential(children)
    twin.training = module.training
    refuse_unused(module, twin, path)
    return twin


def _meet(layer: nn.Module, path: str, met: set[Any]) -> None:
    if layer in met:
        raise ValueError(
            f"{named(layer, path)} is used twice. It records one forward pass, so its "
            "curvature would be wrong; use two layers."
        )
    met.add(layer)


def _refuse_tied(model: nn.Module) -> None:
    names: dict[Tensor, str] = {}
    # In a twin, such a layer and the module around it have a parameter in common.
    inside = [m for m in model.modules() if isinstance(m, SavedOutside)]
    shared = {p for layer in inside for p in layer.parameters()}
    for name, tensor in state(model):
        first = names.setdefault(tensor, name)
        if first != name and tensor not in shared:
            raise ValueError(
                f"{first} and {name} are the same tensor. Curvature of tied or reused "
                "weights is not supported; give each layer its own."
            )
