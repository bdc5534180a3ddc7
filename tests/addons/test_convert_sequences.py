"""``convert`` of small transformers, written in the ways that people write them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, randn, seed
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import hbp
from hbp import reference

VOCABULARY, LENGTH, WIDTH, HEADS = 5, 6, 8, 2


class PlainAttention(nn.Module):
    """Every step by hand, with a mask in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.0)
        mask = torch.ones(LENGTH, LENGTH).tril().view(1, 1, LENGTH, LENGTH)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        y = self.drop(F.softmax(scores, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.proj(y)


class Heads(nn.Module):
    """A linear layer each for q, k and v, and torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class TorchsAttention(nn.Module):
    """nn.MultiheadAttention, as a forward calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, key=x, value=x, attn_mask=None, need_weights=False)
        return y


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.out = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.value(x))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, norm: Any) -> None:
        super().__init__()
        self.norm1, self.attention = norm(WIDTH), attention
        self.norm2, self.mlp = norm(WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Positions by an embedding, or by a parameter of the model itself."""

    def __init__(self, blocks: list[nn.Module], embedded: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.embedded = embedded
        if embedded:
            self.positions = nn.Embedding(LENGTH, WIDTH)
        else:
            self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, indices: Tensor) -> Tensor:
        _, T = indices.shape
        x = self.tokens(indices)
        if self.embedded:
            x = x + self.positions(torch.arange(T, device=indices.device))
        else:
            x = x + self.position[:T]
        return self.head(self.norm(self.blocks(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))


def plain() -> nn.Module:
    return GPT([Block(PlainAttention(), mlp(), nn.LayerNorm)], True)


def modern() -> nn.Module:
    return GPT([Block(Heads(), Gated(), nn.RMSNorm)], False)


def torchs() -> nn.Module:
    return GPT([Block(TorchsAttention(), mlp(), nn.LayerNorm)], False)


def encoder(norm_first: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 12, 0.0, F.gelu, batch_first=True, norm_first=norm_first
        )
        last = nn.LayerNorm(WIDTH) if norm_first else None
        encoder = nn.TransformerEncoder(layer, 2, last, enable_nested_tensor=False)
        return GPT([encoder], True)

    return build


# Before torch 2.9, torch.arange takes no size that torch.fx has only a name for.
SIZES_PASS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
MODELS = {
    "plain": plain,
    "modern": modern,
    "torch's": torchs,
    "encoder": encoder(False),
    "encoder, norm first": encoder(True),
}
if not SIZES_PASS:
    MODELS = {"modern": modern, "torch's": torchs}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    seed(0)
    return MODELS[request.param]().double()


def text(count: int = 3, length: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = torch.randint(VOCABULARY, (count, length + 1), generator=generator)
    return found[:, :-1], found[:, 1:]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def test_values_names_and_gradients(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    twin = hbp.convert(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(twin.state_dict()) == list(before)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in twin.named_parameters()] == names
    for length in (4, 2):  # It was converted without data, for every length.
        indices, targets = text(length=length)
        gradients = []
        for each in (model, twin):
            each.zero_grad()
            loss_of(each(indices), targets).backward()
            gradients.append([p.grad.clone() for p in each.parameters()])
        close(twin(indices), model(indices), rtol=1e-14, atol=1e-14)
        for own, other in zip(*gradients, strict=True):
            close(own, other, rtol=1e-12, atol=1e-14)
    twin.load_state_dict(before)


def test_a_copy_is_whole(model: nn.Module) -> None:
    twin = hbp.convert(model)
    other = copy.deepcopy(twin)
    indices, targets = text()
    expected = twin(indices)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    close(other(indices), expected, rtol=0, atol=0)
    outputs = other(indices)
    hbp.backward(other, outputs, loss_of(outputs, targets), curvature="ggn")


@pytest.mark.parametrize(
    ("treatment", "judge"),
    [("ggn", reference.ggn_blocks), ("none", reference.hessian_blocks)],
)
def test_exact_curvature(
    model: nn.Module, treatment: str, judge: Callable[..., dict[str, Tensor]]
) -> None:
    twin, (indices, targets) = hbp.convert(model), text()
    outputs = twin(indices).flatten(0, 1)
    loss = F.cross_entropy(outputs, targets.flatten())
    hessians = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    twin.backward_hessian(hessians, modify_2nd_order_terms=treatment)
    for name, block in judge(model, loss_of, indices, targets).items():
        parameter = model.get_parameter(name)
        vectors = randn(parameter.numel(), 2)
        close(parameter.hessian @ vectors, block @ vectors, what=name)


def test_averaged_curvature_of_equal_samples_is_exact(model: nn.Module) -> None:
    """Of samples that are alike nothing is lost by taking their mean."""
    twin, (indices, targets) = hbp.convert(model), text(1)
    indices, targets = indices.repeat(3, 1), targets.repeat(3, 1)
    blocks = []
    for exact in (False, True):
        outputs = twin(indices)
        loss = loss_of(outputs, targets)
        twin.zero_grad()
        hbp.backward(twin, outputs, loss, curvature="ggn", exact=exact)
        seed(1)
        blocks.append([p.hessian @ randn(p.numel()) for p in twin.parameters()])
    for averaged, own in zip(*blocks, strict=True):
        close(averaged, own)


def test_the_default_step_trains_it(model: nn.Module) -> None:
    twin, (indices, targets) = hbp.convert(model.float()), text(16)
    optimizer, losses = hbp.CGNewton(twin.parameters()), []
    for _ in range(15):
        outputs = twin(indices)
        loss = loss_of(outputs, targets)
        optimizer.zero_grad()
        hbp.backward(twin, outputs, loss, curvature="ggn")
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.skipif(not SIZES_PASS, reason="its positions ask for a size")
def test_attention_drops_weights_as_the_model_does() -> None:
    model = plain()
    model.blocks[0].attention.drop.p = 0.5
    twin, (indices, targets) = hbp.convert(model), text()
    found = []
    for each in (model, twin):
        torch.manual_seed(3)
        found.append(each(indices))
    close(*(outputs.detach() for outputs in found))
    hbp.backward(twin, found[1], loss_of(found[1], targets), curvature="ggn")
    assert model.blocks[0].attention.qkv.weight.hessian.trace() > 0


def test_a_vision_transformer() -> None:
    """torchvision's: patches, a token in front, positions, and torch's attention."""
    seed(0)
    model = VisionTransformer(4, 2, 1, HEADS, WIDTH, 8, num_classes=3).double()
    nn.init.normal_(model.heads.head.weight)  # It is zero, and nothing gets through.
    twin = hbp.convert(model)
    images, labels = randn(2, 3, 4, 4), torch.tensor([0, 2])
    outputs = twin(images)
    close(outputs.detach(), model(images).detach())
    hbp.backward(
        twin, outputs, F.cross_entropy(outputs, labels), curvature="ggn", exact=True
    )
    found = reference.ggn_blocks(model, F.cross_entropy, images, labels)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, block in found.items():
        vector = randn(len(block))
        close(model.get_parameter(name).hessian @ vector, block @ vector, what=name)


def weighed(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    y, weights = attention(x, x, x)
    return y + weights.sum((1, 2))[:, None, None]


class Calls(nn.Module):
    """An attention, called in some way."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.attention, x)


def test_torchs_attention_needs_a_batch() -> None:
    twin = hbp.convert(Calls(lambda attention, x: attention(x, x, x)[0]))
    with pytest.raises(RuntimeError, match="dimensions"):
        twin(torch.rand(3, WIDTH))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.tokens(indices))


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "tied": (Tied, ValueError, r"tokens\.weight and head\.weight are the same"),
    "random attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True),
        ValueError,
        r"dropout=0\.1.*layer\.self_attn\.dropout",
    ),
    "attention weights": (lambda: Calls(weighed), TypeError, "arguments than one"),
    "masked by position": (
        lambda: Calls(lambda a, x: a(x, x, x, torch.eye(2).bool())[0]),
        TypeError,
        "arguments than one",
    ),
    "attention to something else": (
        lambda: Calls(lambda attention, x: attention(x, x.tanh(), x)[0]),
        TypeError,
        "arguments than one",
    ),
    "masked attention": (
        lambda: Calls(lambda a, x: a(x, x, x, attn_mask=torch.eye(2))[0]),
        TypeError,
        "arguments than one",
    ),
    "time first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0),
        ValueError,
        "batch_first=True",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    build, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        hbp.convert(build())
