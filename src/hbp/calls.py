"""What ``convert`` knows: layers, and the functions that a ``forward`` calls."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hbp import nn as layers
from hbp.core.layers.shape import RearrangementRule
from hbp.core.module import HBPModule
from hbp.layers.dropout import DropoutRule

# Layers: nn.X becomes HBPX. Errors list them in this order.
_NAMES = [key[3:] for key in ("HBPLinear", *vars(layers)) if key.startswith("HBP")]
LAYERS: dict[type[nn.Module], type[HBPModule]] = {
    getattr(nn, name): getattr(layers, f"HBP{name}")
    for name in _NAMES
    if hasattr(nn, name) and name not in ("Module", "Sequential")
}


# What ends torch's attention is a linear layer, by another name.
LAYERS[NonDynamicallyQuantizableLinear] = layers.HBPLinear


# Functions, and methods of tensors by name: what makes an HBP layer of the arguments
# after the first, which is the tensor. Several are the same for torch.fx. A layer
# without weights takes the arguments of F's function of the same name, by their names.
_WITHOUT_WEIGHTS = {
    layer.__name__.lower(): kind
    for layer, kind in LAYERS.items()
    if not hasattr(layer, "reset_parameters")
}
FUNCTIONS: dict[Any, type[HBPModule]] = {
    function: _WITHOUT_WEIGHTS[name.replace("_", "")]
    for name, function in vars(F).items()
    # F.relu_ works in place, and F._max_pool1d is torch's own.
    if name == name.strip("_") and name.replace("_", "") in _WITHOUT_WEIGHTS
}
for _name in ("relu", "sigmoid", "tanh", "softmax", "log_softmax"):
    FUNCTIONS[getattr(torch, _name)] = FUNCTIONS[getattr(F, _name)]
    FUNCTIONS[_name] = FUNCTIONS[getattr(F, _name)]
RESHAPES = (torch.reshape, "reshape", "view")
# What is affine in a tensor, by the function that a layer calls. Moves leave the
# features of each sample in their order.
MOVES = ("flatten", "squeeze", "unsqueeze", "unflatten", "contiguous", "clone")
_TURNS = ("permute", "transpose", "movedim")
REDUCTIONS = (torch.mean, torch.sum, "mean", "sum")
CALLS: dict[Any, Any] = {f: f for f in (F.pad, F.interpolate, operator.neg)}
for _name in ("mean", "sum", "neg", *_TURNS, *MOVES):
    _names = _name, getattr(torch, _name, _name)
    CALLS |= dict.fromkeys(_names, getattr(Tensor, _name))
VIEWS = [name for name, f in CALLS.items() if f.__name__ in MOVES + _TURNS]
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
SUB = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_MUL = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
DIV = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
CALLS |= {name: names[0] for names in (_ADD, SUB, _MUL, DIV) for name in names}
IN_PLACE = [name for names in (_ADD, SUB, _MUL, DIV) for name in names[1::3]]
# The same with the tensor last, as in 1 - x.
REVERSED: dict[Any, Any] = {operator.add: operator.add, operator.mul: operator.mul}
REVERSED |= {operator.sub: torch.rsub, operator.truediv: torch.reciprocal}
SUMS = _ADD + SUB
STEPS = (*FUNCTIONS, *RESHAPES, *CALLS)
# What is linear in a tensor and in a parameter, but for what may be added.
BILINEAR = {*SUMS, *_MUL, operator.matmul, torch.matmul, "matmul"}
BILINEAR = BILINEAR - {*IN_PLACE} | {torch.cat, torch.einsum}
LINEAR = (operator.getitem, "expand", "t", *RESHAPES, *VIEWS)
# What may return a view, or its very input.
ALIASES = (DropoutRule, RearrangementRule)
# Functions whose result has memory of its own.
NEW = {name for name, kind in FUNCTIONS.items() if not issubclass(kind, ALIASES)}
NEW = NEW | {*SUMS, *_MUL, *DIV, operator.matmul, torch.matmul} - {*IN_PLACE}
PICKS = (operator.getitem, torch.split, torch.chunk, "split", "chunk")
