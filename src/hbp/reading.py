"""The ``forward`` of a module, read as a chain of layers.

``torch.fx`` records it without data. From the output back to the input this is read as
layers one after the other, as shortcuts past them, and as functions that join several
values.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from hbp import calls
from hbp.core.containers import HBPResidual, HBPSequential
from hbp.core.module import HBPModule
from hbp.forwards import (
    BilinearOfLayer,
    BilinearOfModule,
    Buffer,
    Constant,
    Converted,
    LinearOfModule,
    NotedShape,
    Region,
    Tracer,
    asks,
    called_by,
    described,
    is_tuple,
    summary,
)
from hbp.layers.functions import HBPCall, HBPFunction, HBPRearrangement
from hbp.layers.paths import HBPJoin
from hbp.layers.shape import HBPIdentity, HBPReshape
from hbp.transformers import plain_calls

M = TypeVar("M", bound=nn.Module)


_WAY_OUT = (
    "What it knows is on the page Curvature for a model you have.\n"
    "For the rest put a layer of your own into the model, such as "
    "class HBPMine(GeneralRule, Mine) for a module Mine: see the page Write a layer."
)


def copied(module: nn.Module, kind: type[M]) -> M:
    """One of another class, with dictionaries of its own, but the same tensors.

    Nothing is drawn or allocated.
    """
    twin = kind.__new__(kind)
    for name, value in vars(module).items():
        if name != "_compiled_call_impl":  # It would run the user's layer instead.
            is_shared = not isinstance(value, dict | list | set)
            vars(twin)[name] = value if is_shared else copy.copy(value)
    return twin


class GraphReading:
    """The ``forward`` of a module, read as a chain of layers and shortcuts.

    Args:
        module: A module with a forward of its own.
        path: Its name in the model.
        met: The layers and parameters that were met before.
        twin_of: What makes the twin of a module inside, given its path and ``met``.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        met: set[Any],
        twin_of: Callable[[nn.Module, str, set[Any]], HBPModule],
    ) -> None:
        self._module, self._path, self._met = module, path, met
        self._twin_of = twin_of
        self._where = f"the forward of {named(module, path)}"
        self._graph = self._trace()
        self._children: dict[str, HBPModule] = {}
        self._made: dict[fx.Node, HBPModule] = {}
        self._read: set[fx.Node] = set()
        # Values of which a later function asks the shape, and who notes it.
        self._noted: dict[fx.Node, NotedShape] = {}
        # Buffers that functions read, and who reads them.
        self._homes: dict[str, Buffer] = {}
        # What depends on the input, other than by its shape.
        self._depends: set[fx.Node] = set()
        # The latest value that all paths to a value go through.
        self._before: dict[fx.Node, fx.Node] = {}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._depends.add(node)
            elif node.op.startswith("call") and not asks(node) and self._values(node):
                self._depends.add(node)
                values = self._values(node)
                first, *others = map(self._line, values)
                past = [set(line) for line in others]
                self._before[node] = next(
                    v for v in first if all(v in line for line in past)
                )
        # Once it is known who else uses what they take.
        for node in self._before:
            self._operands(node)

    def twin(self) -> HBPModule:
        end, start = self._ends()
        steps = self._steps(end, start)
        chain = HBPSequential(*self._noting(start), *steps)
        for node in self._before:
            if node not in self._read:
                raise self._error(f"the result of {described(node)} is not used")
        refuse_unused(self._module, chain, self._path, self._homes)
        children = dict(self._tree(self._module, ""))
        named = {layer for child in children.values() for layer in child.modules()}
        for node in reversed(self._made):
            if self._made[node] not in named:
                name = node.name
                while name in children:
                    name += "_"
                children[name] = self._made[node]
        twin = Converted(chain, children, self._module)
        for home in self._homes.values():
            home.owner.append(twin)
        twin.training = self._module.training
        return twin

    def _trace(self) -> fx.Graph:
        """What ``forward`` does; the same in training and evaluation, but dropout."""
        in_training, in_evaluation = self._traced(True), self._traced(False)
        if summary(in_training, True) != summary(in_evaluation, False):
            raise self._error(
                "it does different things in training and in evaluation mode (for "
                "dropout, use nn.Dropout or F.dropout(x, training=self.training))"
            )
        plain_calls(in_training, self._module)
        return in_training

    def _traced(self, training: bool) -> fx.Graph:
        # What forward may assign to self, and torch.fx does, goes to a copy.
        # It also gets what forward makes without looking at x: constants.
        stand_in = self._stand_in = copied(self._module, type(self._module))
        stand_in.training = training
        try:
            return Tracer().trace(stand_in)
        except Exception as error:
            raise self._error(
                "it cannot be followed without data: it decides, counts or converts "
                "by values or sizes of tensors, or makes layers as it runs"
            ) from error

    def _ends(self) -> tuple[fx.Node, fx.Node]:
        """The output and the input."""
        inputs = [node for node in self._graph.nodes if node.op == "placeholder"]
        (result,) = list(self._graph.nodes)[-1].args
        if len(inputs) != 1 or not isinstance(result, fx.Node):
            raise self._error("it must take one tensor and return one")
        return result, inputs[0]

    def _values(self, node: fx.Node) -> list[fx.Node]:
        """The values that a step takes, each as often as it does."""
        found = _nodes_in((node.args, node.kwargs))
        return [value for value in found if value in self._depends]

    def _is_joint(self, node: fx.Node) -> bool:
        """Whether it is no layer's step, nor a sum of two: then autograd knows it."""
        values, called = self._values(node), called_by(node)
        others = [n for n in node.all_input_nodes if n not in self._depends]
        if called is None:
            return False
        if called in calls.SUMS and len(values) == 2 and not others:
            broadcasts = called not in calls.IN_PLACE and any(
                map(_keeps_a_place, values)
            )
            return broadcasts or is_tuple(self._before[node])
        if called not in calls.STEPS or len(values) > 1:
            return True
        sizes = called in calls.RESHAPES and all(map(_is_batch_size, others))
        reversed_division = called in calls.DIV and node.args[0] is not values[0]
        return reversed_division or bool(others and not sizes)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The values of a step, once nothing speaks against it."""
        values, called = self._values(node), called_by(node)
        name = str(getattr(called, "__name__", called))
        in_place = called in calls.IN_PLACE or name.endswith("_")
        is_sum = called in calls.SUMS and len(values) == 2
        options = node.kwargs.keys() - {"alpha"} if is_sum else {"out"} & {*node.kwargs}
        if options:
            raise self._error(f"{described(node)} has other options: {min(options)}")
        if in_place and self._is_joint(node):
            raise self._error(f"{described(node)} is in place; write it out of place")
        if in_place or (node.kwargs.get("inplace") and self._is_joint(node)):
            self._refuse_overwriting(node)
        return values

    def _refuse_overwriting(self, node: fx.Node) -> None:
        if self._is_used_elsewhere(self._values(node)[0]):
            raise self._error(
                f"{described(node)} overwrites what is used elsewhere, too; write it "
                "out of place, as x + y"
            )

    def _is_used_elsewhere(self, value: fx.Node) -> bool:
        """Whether something else reads a value, or that of which it may be a view."""
        if sum(user in self._depends for user in value.users) > 1:
            return True
        old = [] if self._is_new(value) else self._operands(value)
        return any(map(self._is_used_elsewhere, old))

    def _is_new(self, value: fx.Node) -> bool:
        """Whether it surely has memory of its own."""
        if value.op != "call_module":
            return called_by(value) in calls.NEW and not value.kwargs.get("inplace")
        module = self._module.get_submodule(str(value.target))
        if (kind := calls.LAYERS.get(type(module))) is None:
            return self._has_weights(value)
        return not (getattr(module, "inplace", 0) or issubclass(kind, calls.ALIASES))

    def _line(self, node: fx.Node) -> Iterator[fx.Node]:
        """The values that all paths to a value go through, from it to the input."""
        yield node
        while node in self._before:
            node = self._before[node]
            yield node

    def _steps(self, end: fx.Node, start: fx.Node) -> list[HBPModule]:
        """The layers that lead from one value to a later one."""
        steps = []
        while end is not start:
            if end in self._read:
                raise self._error(
                    f"the result of {described(end)} is used more than once, and "
                    "not as x + branch(x) or shortcut(x) + branch(x)"
                )
            steps += self._noting(end)
            self._read.add(end)
            if weighted := self._linear(end) or self._bilinear(end):
                steps.append(weighted)
                end = self._before[end]
                continue
            if self._is_joint(end):
                step, end = self._joint(end)
                steps.append(step)
                continue
            is_sum = called_by(end) in calls.SUMS and len(self._operands(end)) == 2
            read = self._residual if is_sum else self._step
            steps.append(read(end))
            end = self._before[end]
        return [step for step in reversed(steps) if not _is_empty(step)]

    def _noting(self, value: fx.Node) -> list[HBPModule]:
        """Who notes the shape of a value, if anybody wants to know it; once."""
        if self._noted.get(value) in (None, *self._made.values()):
            return []
        self._made[value] = self._noted[value]
        return [self._noted[value]]

    def _residual(self, node: fx.Node) -> HBPModule:
        # Random layers draw in the order of forward, and a branch comes first.
        order = list(self._graph.nodes)
        first, second = self._operands(node)
        alpha: Any = node.kwargs.get("alpha", 1)
        factor = -alpha if node.target in calls.SUB else alpha
        scale: list[HBPModule] = [] if factor == 1 else [HBPCall(operator.mul, factor)]
        ends = sorted([(first, []), (second, scale)], key=lambda e: order.index(e[0]))
        paths = [self._steps(end, self._before[node]) + last for end, last in ends]
        # A path without layers is the identity.
        branch, *shortcut = [path for path in paths if path] or [[]]
        return HBPResidual(
            HBPSequential(*branch), *(HBPSequential(*path) for path in shortcut)
        )

    def _step(self, node: fx.Node) -> HBPModule:
        if node.op == "call_module":
            twin = self._child(node)
        elif node.target in calls.RESHAPES:
            twin = HBPReshape(*self._shape(node))
            twin.training = self._module.training
        else:
            twin = self._function(node)
            twin.training = self._module.training
        self._made[node] = twin
        return twin

    def _joint(self, node: fx.Node) -> tuple[HBPModule, fx.Node]:
        """A layer for a function of several values, and where its paths begin.

        It is as small as it can be, if all whose sizes it asks are known where it is.
        """
        start = self._before[node]
        inside, leaves = self._between(start, node)
        while is_tuple(start) or self._asked(inside) - {*inside, *self._line(start)}:
            if start not in self._before:
                raise self._error(f"{described(node)} asks for a size on another path")
            start = self._before[start]
            inside, leaves = self._between(start, node)
        self._read |= inside
        function = Region(self, leaves, inside).function(node)
        if len(leaves) == 1:
            affine, start = all(map(self._is_affine, inside)), leaves[0]
            step: HBPModule = (HBPCall if affine else HBPFunction)(function)
            self._made[node] = step
        else:
            paths = [self._steps(leaf, start) or [HBPIdentity()] for leaf in leaves]
            step = HBPJoin(function, *(HBPSequential(*path) for path in paths))
            # The layers of the paths have names already, the function gets one.
            self._made[node] = cast(HBPModule, step[1])
        self._made[node].training = self._module.training
        return step, start

    def _between(
        self, start: fx.Node, node: fx.Node
    ) -> tuple[set[fx.Node], list[fx.Node]]:
        """What leads to a node without weights, and from which values, in order."""
        inside, leaves, waiting = {node}, set[fx.Node](), [node]
        while waiting:
            for value in self._values(waiting.pop()):
                if value is start or self._is_leaf(value):
                    leaves.add(value)
                elif value not in inside:
                    self._operands(value)
                    if value.kwargs.get("inplace"):
                        self._refuse_overwriting(value)
                    inside.add(value)
                    waiting.append(value)
        # Random layers draw in the order of forward.
        return inside, [value for value in self._graph.nodes if value in leaves]

    def _asked(self, inside: set[fx.Node]) -> set[fx.Node]:
        """The values for whose sizes a function asks."""
        found, waiting = set[fx.Node](), list(inside)
        while waiting:
            node = waiting.pop()
            if asks(node) and node.args[0] in self._depends:
                found.add(cast(fx.Node, node.args[0]))
            else:
                waiting += [n for n in node.all_input_nodes if n not in self._depends]
        return found

    def _is_leaf(self, value: fx.Node) -> bool:
        """Whether a joint function takes a value that something else has made.

        It is so if there are weights in it, or if it is random.
        """
        name = str(getattr(called_by(value), "__name__", called_by(value)))
        if value.op == "call_module":
            name = type(self._module.get_submodule(str(value.target))).__name__
        layer = self._has_weights(value) or called_by(value) is F.linear
        weighted = layer or self._weights_beside(value) is not None
        return weighted or "dropout" in name.lower()

    def _weights_beside(self, node: fx.Node) -> fx.Node | None:
        """The parameter or embedding, or what it is a view of, that joins a value.

        There is none if the function is not linear in both.
        """
        # A weight that is there twice is no linear one.
        found = _nodes_in((node.args, node.kwargs))
        others = [n for n in found if n not in self._depends]
        is_one = len(self._values(node)) == len(others) == 1
        if (
            not is_one
            or called_by(node) not in calls.BILINEAR
            or node.kwargs.keys() - {"dim"}
        ):
            return None
        source: Any = others[0]
        while isinstance(source, fx.Node) and _is_linear(source):
            source = source.args[0]
        if not isinstance(source, fx.Node):
            return None
        own = source.op == "get_attr" and str(source.target) in self._module._parameters
        return source if own or self._has_weights(source) else None

    def _linear(self, node: fx.Node) -> HBPModule | None:
        """F.linear(x, W, b) of parameters of the module; None if it is no such call."""
        values = self._values(node)
        if called_by(node) is not F.linear or list(node.args[:1]) != values:
            return None
        given = dict(zip(("weight", "bias"), node.args[1:], strict=False))
        own: dict[str, Any] = dict.fromkeys(("weight", "bias"))
        for name, value in {**given, **node.kwargs}.items():
            if value is not None:
                source = cast(fx.Node, value)
                known = self._module._parameters if source.op == "get_attr" else {}
                own[name] = known.get(str(source.target))
                self._meet(own[name], node)
        self._made[node] = LinearOfModule(**own)
        return self._made[node]

    def _meet(self, parameter: Any, node: fx.Node) -> None:
        """A parameter of the module is used once, and it is its own."""
        if parameter is None:
            raise unsupported(f"{described(node)} in {self._where}")
        if parameter in self._met:
            raise self._error(f"{described(node)} uses a parameter again")
        self._met.add(parameter)

    def _bilinear(self, node: fx.Node) -> HBPModule | None:
        """x + w, x * w or such, w of the module itself or of an embedding."""
        if not (source := self._weights_beside(node)):
            return None
        (value,) = self._values(node)
        if self._asked({node}) - {*self._line(value)}:
            raise self._error(f"{described(node)} asks for a size on another path")
        name, path = str(source.target), joined(self._path, str(source.target))
        region = Region(self, [value], set())
        weight = region.copies[source] = region.graph.placeholder("weight")
        own = self._module._parameters.get(name) if source.op == "get_attr" else None
        if own is not None:
            self._meet(own, node)
            self._made[node] = BilinearOfModule(own, region.function(node))
            return self._made[node]
        layer = self._module.get_submodule(name)
        options = "padding_idx", "max_norm", "scale_grad_by_freq", "sparse"
        if type(layer) is not nn.Embedding or any(
            getattr(layer, option) not in (None, False) for option in options
        ):
            raise unsupported(f"{described(source)} in {self._where}")
        refuse_changed(layer, path)
        self._meet(layer, node)
        weights = cast(nn.Parameter, layer.weight)
        args = *fx.node.map_arg(source.args, region.copied), weight
        region.copies[source] = region.graph.call_function(F.embedding, args)
        self._children[name] = BilinearOfLayer(weights, region.function(node))
        return self._children[name]

    def _has_weights(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self._module.get_submodule(str(node.target))
        return isinstance(module, HBPModule) or any(True for _ in state(module))

    def _is_affine(self, node: fx.Node) -> bool:
        known = called_by(node) in (*calls.PICKS, *calls.RESHAPES, *calls.CALLS)
        first = len(self._values(node)) == 1 and node.args[0] in self._depends
        return (known and first) or called_by(node) in calls.SUMS

    def noted(self, value: fx.Node) -> NotedShape:
        """Who notes the shape of a value as it runs."""
        return self._noted.setdefault(value, NotedShape())

    def constant(self, node: fx.Node) -> nn.Module:
        """What gives a buffer of the module, or what ``forward`` has made itself."""
        name = str(node.target)
        if name in self._module._buffers:
            return self._homes.setdefault(name, Buffer(name))
        value = vars(self._stand_in).get(name)
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            raise unsupported(f"{described(node)} in {self._where}")
        return Constant(value)

    def without_weights(self, node: fx.Node) -> nn.Module:
        """A copy of a module that has none, and may be called inside a function."""
        module = self._module.get_submodule(str(node.target))
        if self._has_weights(node):
            raise unsupported(f"{described(node)} in {self._where}")
        refuse_changed(module, joined(self._path, str(node.target)))
        module = copy.deepcopy(module)
        for part in module.modules():
            if getattr(part, "inplace", False):
                self._refuse_overwriting(node)
                vars(part)["inplace"] = False  # Autograd runs it again.
        return module

    def _function(self, node: fx.Node) -> HBPModule:
        (value,), options, target = self._operands(node), node.kwargs, node.target
        args = [arg for arg in node.args if arg is not value]
        if function := calls.CALLS.get(target):
            over_all = not args and options.get("dim") is None
            mixes = over_all and target in calls.REDUCTIONS
            bends = bool(options) and function in calls.REVERSED
            if node.args[0] is not value:
                function = calls.REVERSED[function]
            if mixes or bends:
                raise unsupported(f"{described(node)} in {self._where}")
            kind = HBPRearrangement if function.__name__ in calls.MOVES else HBPCall
            return kind(function, *args, **options)
        # _trace has seen that training follows the module; None and [] are no options.
        names = [k for k, v in options.items() if v is not None and v != []]
        given = {k: options[k] for k in names if k not in ("training", "_stacklevel")}
        try:
            return calls.FUNCTIONS[target](*args, **given)
        except TypeError as error:
            raise self._error(f"{described(node)} has other options") from error

    def _child(self, node: fx.Node) -> HBPModule:
        name = str(node.target)
        if node.kwargs or list(node.args) != self._values(node)[:1]:
            raise self._error(
                f"self.{name} is called with other arguments than one tensor"
            )
        child = self._module.get_submodule(name)
        twin = self._twin_of(child, joined(self._path, name), self._met)
        self._children[name] = twin
        return twin

    def _shape(self, node: fx.Node) -> list[int | None]:
        """The arguments of a reshape, with None for the number of samples."""
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = tuple(sizes[0])
        shape: list[Any] = [None if _is_batch_size(size) else size for size in sizes]
        if not shape or shape[0] not in (None, -1) or None in shape[1:]:
            raise self._error(
                f"{described(node)} does not keep the samples apart; write "
                "x.flatten(1), or x.reshape(x.size(0), ...)"
            )
        return shape

    def _tree(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        """The children under their names, some in containers that do not run."""
        for name, child in module._modules.items():
            path = prefix + name
            if path in self._children:
                yield name, self._children[path]
            elif child is not None and any(
                used.startswith(f"{path}.") for used in self._children
            ):
                container = copied(child, type(child))
                container._modules = dict(self._tree(child, f"{path}."))
                yield name, container

    def _error(self, what: str) -> TypeError:
        return TypeError(
            f"convert() cannot turn {self._where} into HBP layers: {what}.\n{_WAY_OUT}"
        )


def _keeps_a_place(node: fx.Node) -> bool:
    """Whether it is a mean or the like with keepdim, which a sum would broadcast."""
    return bool(node.kwargs.get("keepdim")) or node.args[2:] == (True,)


def _is_batch_size(size: Any) -> bool:
    """Whether it is x.size(0), x.size()[0] or x.shape[0]."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return size.args[1:] == (0,) or size.kwargs == {"dim": 0}
    return size.target is operator.getitem and size.args[1:] == (0,)


def _nodes_in(arguments: Any) -> list[fx.Node]:
    """Each as often as it is there."""
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


def _is_linear(node: fx.Node) -> bool:
    """Whether it is linear in its first argument."""
    turned = called_by(node) is getattr and node.args[1] in ("T", "mT")
    return bool(node.args) and (turned or called_by(node) in calls.LINEAR)


def _is_empty(module: nn.Module) -> bool:
    return isinstance(module, HBPSequential) and all(map(_is_empty, module))


def joined(path: str, name: str) -> str:
    """The path of what has a name inside."""
    return f"{path}.{name}".lstrip(".")


def named(module: nn.Module, path: str) -> str:
    """A module, as an error calls it."""
    return f"{path or 'the model'} ({type(module).__name__})"


def state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each under all its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def refuse_unused(
    module: nn.Module, twin: nn.Module, path: str, but: Iterable[str] = ()
) -> None:
    """Raise ValueError if a parameter or buffer is in no layer of the twin."""
    used = {tensor for _, tensor in state(twin)}
    unused = [name for name, t in state(module) if t not in used and name not in but]
    if unused:
        unused = [joined(path, name) for name in unused]
        raise ValueError(
            f"No layer that runs uses {', '.join(unused)}, so there is no curvature "
            "for it. Delete it from the model first."
        )


def refuse_changed(module: nn.Module, path: str) -> None:
    """Raise ValueError if a module has hooks, or another forward than its class."""
    what = named(module, path or "The model")
    kinds = "forward", "forward_pre", "backward", "backward_pre"
    if any(getattr(module, f"_{kind}_hooks") for kind in kinds):
        raise ValueError(
            f"{what} has hooks, which convert() would lose. Remove them first."
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{what} was given another forward, which convert() would lose. Put it "
            "into a class."
        )


def unsupported(what: str) -> TypeError:
    """What to raise for what nobody knows."""
    return TypeError(f"convert() does not know {what}.\n{_WAY_OUT}")
