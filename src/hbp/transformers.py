"""torch's transformer, written plainly, so that ``convert`` can read it.

The classes of torch choose between several ways to the same numbers as they run. Each
of these has the attributes of its namesake, and takes one of them.
"""

from __future__ import annotations

import inspect
import operator
from typing import Final

import torch.nn.functional as F
from torch import Tensor, fx, nn


class Attention(nn.MultiheadAttention):
    """Self-attention, [N, T, features] → [N, T, features], without a mask."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x W_o of the heads' softmax(qkᵀ/√d) v."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = projected.chunk(3, dim=-1)
        q, k, v = self.by_head(q), self.by_head(k), self.by_head(v)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def by_head(self, x: Tensor) -> Tensor:
        """[N, T, features] → [N, heads, T, features of a head]."""
        # Not transpose(1, 2), which would take one sequence without a batch.
        return x.unflatten(-1, (self.num_heads, -1)).permute(0, 2, 1, 3)


class EncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and two linear layers, each with a shortcut and a norm."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[N, T, features] → [N, T, features]."""
        if self.norm_first:
            x = x + self.attend(self.norm1(x))
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.feed(x))

    def attend(self, x: Tensor) -> Tensor:
        """The first branch."""
        return self.dropout1(self.self_attn(x))

    def feed(self, x: Tensor) -> Tensor:
        """The second branch."""
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.dropout2(self.linear2(hidden))


class Encoder(nn.TransformerEncoder):
    """Several such layers."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[N, T, features] → [N, T, features]."""
        for layer in self.layers:
            x = layer(x)
        return x if self.norm is None else self.norm(x)


_ABOUT_WEIGHTS: Final = "need_weights", "average_attn_weights"

PLAIN: Final[dict[type, type[nn.Module]]] = {
    nn.MultiheadAttention: Attention,
    nn.TransformerEncoderLayer: EncoderLayer,
    nn.TransformerEncoder: Encoder,
}


def plain_calls(graph: fx.Graph, module: nn.Module) -> None:
    """attention(x, x, x)[0] becomes attention(x), as the plain class takes it."""
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" else ""
        if type(module.get_submodule(name)) is not nn.MultiheadAttention:
            continue
        names = inspect.signature(nn.MultiheadAttention.forward).parameters
        given = {**dict(zip([*names][1:], node.args, strict=False)), **node.kwargs}
        given = {k: v for k, v in given.items() if k not in _ABOUT_WEIGHTS}
        values = [value for value in given.values() if value is not None]
        is_self = len(values) == 3 and values[0] == values[1] == values[2]
        outputs = [(user.target, user.args) for user in node.users if user.users]
        if is_self and {*outputs} == {(operator.getitem, (node, 0))}:
            node.args, node.kwargs = (given["query"],), {}
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph.erase_node(user)


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """What is read in place of the class of a module, if anything is.

    Raises:
        ValueError: it is an attention with options that it has no forward for.
    """
    if type(module) is nn.MultiheadAttention:
        usual = module.in_proj_weight is not None and module.bias_k is None
        if not (usual and module.batch_first) or module.add_zero_attn:
            raise ValueError(
                f"{module} has to have batch_first=True, and keys and values of the "
                "same size as queries, from the same input."
            )
        if module.dropout:
            raise ValueError(
                f"{module} drops weights at random, with dropout={module.dropout}. Set "
                "its attribute dropout to 0; that of a TransformerEncoderLayer is "
                "layer.self_attn.dropout."
            )
    return PLAIN.get(type(module))
