"""What ``torch.fx`` records of a ``forward``, and parts of it as functions.

``convert`` reads it. What is no layer, as attention or a gate, becomes a function of
the values that lead to it. A shape that it asks of another value is noted as that
passes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partialmethod
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from hbp.core.containers import HBPSequential
from hbp.core.jacobians import Jacobian
from hbp.core.layers.linear import HBPLinear
from hbp.core.module import HBPModule, Reading
from hbp.core.operators import SymmetricOperator
from hbp.layers.general import BilinearRule, Separate
from hbp.layers.shape import HBPIdentity


# Some releases of torch ship no types for fx.Proxy: a base class of type Any.
class _Proxy(fx.Proxy):  # type: ignore[no-any-unimported, misc, unused-ignore]
    """What stands for a tensor; torch.fx itself takes ``+=`` for ``+``, and so on."""

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


for _way in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Proxy, f"__{_way.__name__}__", partialmethod(_Proxy._in_place, _way))


class Tracer(fx.Tracer):
    """Records the calls of a module's own ``forward``, and none inside its children."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class Converted(HBPModule):
    """The twin of a module that has a ``forward`` of its own.

    Its children have the names that they have in that module. What runs is a chain
    of the same children, which is no child itself, so that names stay as they are.

    Args:
        chain: What ``forward`` does.
        children: The layers in it, by name; they may be inside plain containers.
        own: The module, of which parameters and buffers of its own are taken.
    """

    _chain: HBPSequential

    def __init__(
        self, chain: HBPSequential, children: dict[str, nn.Module], own: nn.Module
    ) -> None:
        super().__init__()
        vars(self)["_chain"] = chain
        self._modules.update(children)
        for name, parameter in own._parameters.items():
            self.register_parameter(name, parameter)
        self._buffers.update(own._buffers)
        self._non_persistent_buffers_set.update(own._non_persistent_buffers_set)

    def forward(self, input: Tensor) -> Tensor:
        """What the module's ``forward`` computes."""
        return self._chain(input)

    def pull_back(
        self, H: SymmetricOperator, reading: Reading, further: bool
    ) -> SymmetricOperator | None:
        return self._chain.pull_back(H, reading, further)

    def jacobian(self) -> Jacobian:
        """That of the chain."""
        return self._chain.jacobian()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another layer, which would not be in the chain."""
        if any(
            name in vars(self).get(kind, {}) for kind in ("_modules", "_parameters")
        ):
            raise AttributeError(
                f"{name!r} of a converted model cannot be replaced. Replace it in the "
                "torch.nn model, and convert() that again."
            )
        super().__setattr__(name, value)


class NotedShape(HBPIdentity):
    """It passes x on, and notes its shape for a function further up."""

    shapes: Sequence[torch.Size] = ()

    def forward(self, input: Tensor) -> Tensor:
        self.shapes = [input.shape]
        return super().forward(input)


class ShapeLike(nn.Module):
    """The shape that was noted, for as many samples as a tensor has."""

    def __init__(self, noted: NotedShape) -> None:
        super().__init__()
        self.noted = noted

    def forward(self, input: Tensor) -> torch.Size:
        (shape,) = self.noted.shapes
        return torch.Size([len(input), *shape[1:]])


class Constant(nn.Module):
    """What ``forward`` has made without looking at x; it is no state."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value


class Buffer(nn.Module):
    """A buffer of the twin, wherever ``to`` or ``load_state_dict`` have put it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        # In a list, so that its owner does not count as a module inside.
        self.owner: list[nn.Module] = []

    def forward(self) -> Tensor:
        (owner,) = self.owner
        buffer: Any = owner._buffers[self.name]
        return cast(Tensor, buffer)


class WithWeight(nn.Module):
    """A function of x and a parameter, linear in each, as x + w, x * w or x @ w."""

    def __init__(self, weight: nn.Parameter, function: fx.GraphModule) -> None:
        super().__init__()
        self.weight, self.function = weight, function

    def forward(self, input: Tensor) -> Tensor:
        return self._function(input)

    def _function(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x, self.weight)
        return result


class BilinearOfLayer(Separate, BilinearRule, WithWeight):
    """The same, with the weight of an embedding."""


class SavedOutside(HBPModule):
    """A layer of parameters that the module around it saves and loads."""

    def _save_to_state_dict(self, *args: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class BilinearOfModule(SavedOutside, Separate, BilinearRule, WithWeight):
    """The same, with a parameter of the module around it."""


class LinearOfModule(SavedOutside, HBPLinear):
    """``F.linear`` with parameters of the module around it."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        outputs, inputs = weight.shape
        super().__init__(inputs, outputs, bias is not None, device="meta")
        self.weight = weight
        if bias is not None:
            self.bias = bias


class Owner(Protocol):
    """Who knows the module of which the graph is."""

    def noted(self, value: fx.Node) -> NotedShape:
        """Who notes the shape of a value as it runs."""

    def constant(self, node: fx.Node) -> nn.Module:
        """What gives a buffer of the module, or what ``forward`` has made itself."""

    def without_weights(self, node: fx.Node) -> nn.Module:
        """A copy of a module that has none."""


class Region:
    """A part of a graph as a function of its own.

    Args:
        reading: Whose graph it is.
        inputs: What the function takes.
        inside: The values that it computes from them.
    """

    def __init__(
        self, reading: Owner, inputs: list[fx.Node], inside: set[fx.Node]
    ) -> None:
        self._reading, self._inside = reading, {*inputs, *inside}
        self._root, self.graph = nn.Module(), fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        for index, value in enumerate(inputs):
            self.copies[value] = self.graph.placeholder(f"input_{index}")
        self._like = self.copies[inputs[0]]

    def function(self, end: fx.Node) -> fx.GraphModule:
        """inputs → end."""
        self.graph.output(self.copied(end))
        return fx.GraphModule(self._root, self.graph)

    def copied(self, node: fx.Node) -> Any:
        if node not in self.copies:
            elsewhere = asks(node) and node.args[0] not in self._inside
            self.copies[node] = self._answer(node) if elsewhere else self._made(node)
        return self.copies[node]

    def _made(self, node: fx.Node) -> fx.Node:
        name = str(node.target).replace(".", "_")
        if node.op == "get_attr":
            self._root.add_module(name, self._reading.constant(node))
            return self.graph.call_module(name)
        if node.op == "call_module":
            self._root.add_module(name, self._reading.without_weights(node))
            args = fx.node.map_arg(node.args, self.copied)
            return self.graph.call_module(name, args, node.kwargs)
        made = self.graph.node_copy(node, self.copied)
        if "inplace" in made.kwargs:
            made.update_kwarg("inplace", False)
        return made

    def _answer(self, node: fx.Node) -> fx.Node:
        """A shape, or what it is on, of a value that is not computed here."""
        value, *rest = node.args
        if rest == ["device"]:
            return self.graph.call_function(getattr, (self._like, "device"))
        assert isinstance(value, fx.Node)
        name = f"shape_of_{value.name}"
        self._root.add_module(name, ShapeLike(self._reading.noted(value)))
        shape = self.graph.call_module(name, (self._like,))
        if node.target == "size" and (rest or node.kwargs):
            which = rest[0] if rest else node.kwargs["dim"]
            return self.graph.call_function(operator.getitem, (shape, which))
        counts = node.target == "dim" or rest == ["ndim"]
        return self.graph.call_function(len, (shape,)) if counts else shape


def is_tuple(node: fx.Node) -> bool:
    """Whether it is that of x.chunk() or the like: it is always taken apart."""
    users = [user for user in node.users if not asks(user)]
    picks = [user for user in users if called_by(user) is operator.getitem]
    return bool(users) and picks == users and all(type(p.args[1]) is int for p in picks)


def asks(node: fx.Node) -> bool:
    """Whether it is x.size(), x.dim(), x.shape, x.device or the like."""
    if called_by(node) is getattr:
        return node.args[1] in ("shape", "ndim", "device")
    return called_by(node) in ("size", "dim")


def called_by(node: fx.Node) -> Any:
    """A function or a method's name; None for a layer, which may have such a name."""
    return None if node.op == "call_module" else node.target


def summary(graph: fx.Graph, training: bool) -> list[tuple[Any, ...]]:
    """All that is done, but for options that say that this is training, or is not."""
    steps = []
    for node in graph.nodes:
        options = dict(node.kwargs)
        if options.get("training") is training:
            del options["training"]
        steps.append((node.op, node.target, str(node.args), str(options)))
    return steps


def described(node: fx.Node) -> str:
    """A step, as a reader of the model's code would call it."""
    if node.op in ("call_function", "call_method"):
        return function_name(node.target)
    return f"self.{node.target}"


def function_name(function: Any) -> str:
    """A function, likewise."""
    if isinstance(function, str):
        return f"Tensor.{function}"
    homes = {"torch.nn.functional": "F", "torch._C._nn": "F", "_operator": "operator"}
    home = str(function.__module__)
    return f"{homes.get(home, home)}.{function.__name__}"
