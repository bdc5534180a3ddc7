"""Functions that join several values in a ``forward``, and what of them is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, randn, seed
from torch import Tensor, nn
from torch.nn import Linear

import hbp
from hbp import reference

Forward = Callable[[Any, Any], Any]


class Net(nn.Module):
    """A ``forward`` as a function of (self, x), and what it uses."""

    def __init__(self, forward: Forward, **members: Any) -> None:
        super().__init__()
        self.step = forward
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def queries(m: Any, x: Any) -> Any:
    q = m.a(x)
    k, v = m.wide(x).chunk(2, -1)
    return m.out((q @ k.mT).softmax(-1) @ v)


def halves(m: Any, x: Any) -> Any:
    gate, value = m.wide(x).chunk(2, -1)
    return m.out(gate.sigmoid() * value)


def over_a_sum(m: Any, x: Any) -> Any:
    h = x + m.a(x).tanh()
    return m.out(h * h.sin() + h)


def shared(m: Any, x: Any) -> Any:
    v = x.sin()
    return m.out(m.a(v * x) * m.b(v.cos() * x))


def own_norm(m: Any, x: Any) -> Any:
    h = m.a(x)
    scale = (h.var(-1, keepdim=True) + 1).rsqrt()
    return m.out(torch.mul(torch.sub(h, h.mean(-1, keepdim=True).expand(-1, 4)), scale))


def masked(m: Any, x: Any) -> Any:
    scores = m.a(x) @ m.b(x).mT
    later = torch.ones(3, 3).triu(1).bool()
    return m.out(scores.masked_fill(later, -9.0).softmax(-1) @ x)


def token_in_front(m: Any, x: Any) -> Any:
    return m.out(torch.cat([m.p.expand(x.size(0), 1, -1), m.a(x)], dim=1))


def pooled_by_attention(m: Any, x: Any) -> Any:
    h = m.a(x)
    return m.out((h * (h @ m.p).softmax(1)[..., None]).sum(1))


def overwritten(m: Any, x: Any) -> Any:
    b = m.b(x)
    return m.out(b * m.silu(b))


def view_overwritten(m: Any, x: Any) -> Any:
    a = m.a(x)
    return m.out(torch.cat([m.silu(a[:, :2]), a[:, 2:]], 1) * a)


def alias_overwritten(m: Any, x: Any) -> Any:
    b = m.b(x)
    return m.out(m.silu(m.same(b)) * b)


def overwritten_at_the_end(m: Any, x: Any) -> Any:
    a = m.a(x)
    return m.out(m.b(F.threshold(a, 0.1, 0.0, inplace=True)) * a)


def size_of_a_later_path(m: Any, x: Any) -> Any:
    b = m.b(x)
    return m.out(m.a(x) * m.p[: b.size(1)] * m.c(b))


def overwritten_by_option(m: Any, x: Any) -> Any:
    b = m.b(x)
    return m.out(b * F.silu(b, inplace=True))


SQUARE, VECTOR = (2, 3, 4), (3, 4)
STEPS: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "q, k, v": (queries, SQUARE),
    "halves": (halves, VECTOR),
    "gate with x": (lambda m, x: m.out(m.a(x).sigmoid() * x), VECTOR),
    "over a sum": (over_a_sum, VECTOR),
    "shared": (shared, VECTOR),
    "own norm": (own_norm, VECTOR),
    "mask made inside": (masked, SQUARE),
    "transposed": (lambda m, x: m.narrow(m.a(x) @ x.mT), SQUARE),
    "transposed alone": (lambda m, x: m.narrow(m.a(x).mT.tanh()), SQUARE),
    "count of dimensions": (lambda m, x: m.out(m.a(x) * x.ndim), VECTOR),
    "einsum": (lambda m, x: m.narrow(torch.einsum("nti,nsi->nts", m.a(x), x)), SQUARE),
    "constant": (lambda m, x: m.out(m.a(x) * torch.tensor(2.0)), VECTOR),
    "buffer": (lambda m, x: m.out(m.a(x) * m.factor), VECTOR),
    "own weights": (
        lambda m, x: m.out(F.linear(x, m.V) * F.linear(x, m.W, bias=m.p)),
        VECTOR,
    ),
    "a shift as a path": (lambda m, x: m.out((m.a(x) + m.p) * m.b(x)), VECTOR),
    "kept statistics": (lambda m, x: m.out(m.norm(m.a(x)) * m.b(x)), VECTOR),
    "layer in place": (lambda m, x: m.out(m.a(x) * m.silu(m.b(x))), VECTOR),
    "function in place": (
        lambda m, x: m.out(m.a(x) * F.silu(m.b(x), inplace=True)),
        VECTOR,
    ),
    "scaled by a parameter": (lambda m, x: m.out(x - m.p * m.a(x)), VECTOR),
    "times a matrix": (lambda m, x: m.out((m.a(x) @ m.V).tanh() @ m.W), VECTOR),
    "turned": (lambda m, x: m.out(m.a(x) @ m.W.T @ m.V.t()), VECTOR),
    "expanded": (
        lambda m, x: m.out(x - m.a(x).mean(1, keepdim=True).expand(-1, 4)),
        VECTOR,
    ),
    "scaled by a number": (lambda m, x: m.out(x + m.g * m.a(x)), VECTOR),
    "in place inside": (
        lambda m, x: m.out(m.a(x) * m.deep(m.b(x))),
        VECTOR,
    ),
    "parameter first": (lambda m, x: m.out(m.C @ m.a(x)), SQUARE),
    "einsum with a parameter": (
        lambda m, x: m.out(torch.einsum("ni,io->no", m.a(x), m.V)),
        VECTOR,
    ),
    "token in front": (token_in_front, SQUARE),
    "pooled by attention": (pooled_by_attention, SQUARE),
    "softmax": (lambda m, x: m.out(m.soft(m.a(x)) * m.act(m.b(x))), VECTOR),
}
MEMBERS: dict[str, Callable[[], Any]] = {
    "a": lambda: Linear(4, 4),
    "b": lambda: Linear(4, 4),
    "out": lambda: Linear(4, 2),
    "wide": lambda: Linear(4, 8),
    "narrow": lambda: Linear(3, 2),
    "norm": lambda: nn.BatchNorm1d(4, affine=False).eval(),
    "soft": lambda: nn.Softmax(-1),
    "act": lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.0)),
    "silu": lambda: nn.SiLU(inplace=True),
    "deep": lambda: nn.Sequential(nn.SiLU(inplace=True)),
    "C": lambda: parameter(3, 3),
    "g": lambda: parameter(),
    "V": lambda: parameter(4, 4),
    "W": lambda: parameter(4, 4),
    "p": lambda: parameter(4),
    "factor": lambda: torch.rand(4),
}


def net(forward: Forward, **members: Any) -> nn.Module:
    """With those of MEMBERS that its code names, and others."""
    seed(0)
    names = set(forward.__code__.co_names) - {"mul", "sub"}
    own = {name: make() for name, make in MEMBERS.items() if name in names}
    return Net(forward, **{**own, **members}).double()


@pytest.mark.parametrize("name", STEPS)
def test_values_names_and_exact_curvature(name: str) -> None:
    forward, shape = STEPS[name]
    model = net(forward)
    twin, x = hbp.convert(model), randn(*shape)
    assert list(twin.state_dict()) == list(model.state_dict())
    outputs = twin(x)
    close(outputs.detach(), model(x).detach())
    target = torch.arange(len(x))

    def loss_of(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(1), y)

    loss = loss_of(outputs, target % outputs[0].numel())
    hessians = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    judges = {"ggn": reference.ggn_blocks, "none": reference.hessian_blocks}
    for treatment, judge in judges.items():
        twin.backward_hessian(hessians, modify_2nd_order_terms=treatment)
        expected = judge(model, loss_of, x, target % outputs[0].numel())
        for key, block in expected.items():
            vectors = randn(len(block), 2)
            found = model.get_parameter(key).hessian @ vectors
            close(found, block @ vectors, what=f"{key}, {treatment}")


def asking(m: Any, x: Any) -> Any:
    h = m.first(x)
    return m.out(m.a(h.sum(1)) * m.b(h.sum(1)) * h.shape[1])


def test_an_evaluation_of_other_sizes_changes_nothing() -> None:
    """Between the pass with gradients and that of curvature, and afterwards."""
    model = net(asking, first=Linear(5, 4))
    twin, x, blocks = hbp.convert(model), randn(3, 4, 5), []
    for evaluated in (False, True):
        outputs = twin(x)
        loss = outputs.square().sum()
        twin.zero_grad()
        hessians = hbp.per_sample_hessian(loss, outputs)
        if evaluated:
            with torch.no_grad():
                assert twin(randn(3, 8, 5)).shape == (3, 2)
        loss.backward()
        twin.backward_hessian(hessians, modify_2nd_order_terms="ggn")
        if evaluated:
            with torch.no_grad():
                twin(randn(2, 7, 5))
        blocks.append(model.first.weight.hessian.to_dense())
    close(*blocks)


def test_a_buffer_has_one_home() -> None:
    model = net(*STEPS["buffer"][:1]).float()
    twin = copy.deepcopy(hbp.convert(model)).double()
    state = {**twin.state_dict(), "factor": torch.full((4,), 7.0)}
    twin.load_state_dict(state)
    model.double().load_state_dict(state)
    x = randn(*VECTOR)
    close(twin(x).detach(), model(x).detach())


def test_modes_inside_a_function_are_kept() -> None:
    model = net(lambda m, x: m.out(m.drop(m.a(x)) * m.b(x)), drop=nn.Dropout().eval())
    x = randn(*VECTOR)
    close(hbp.convert(model)(x).detach(), model(x).detach())


def in_another_order(m: Any, x: Any) -> Any:
    q = m.q(x)
    return m.out(torch.atan2(m.k(x), q))


def test_layers_draw_in_the_order_of_forward() -> None:
    paths = {name: nn.Sequential(Linear(4, 4), nn.Dropout()) for name in "qk"}
    model, x, found = net(in_another_order, **paths), randn(*VECTOR), []
    for each in (model, hbp.convert(model)):
        torch.manual_seed(0)
        found.append(each(x).detach())
    close(*found)


def test_a_parameter_of_the_twin_stays() -> None:
    twin = hbp.convert(net(lambda m, x: m.out(m.a(x) + m.p)))
    with pytest.raises(AttributeError, match=r"'p'.*cannot be replaced"):
        twin.p = parameter(4)


def test_a_twin_may_be_part_of_a_model() -> None:
    own = nn.Linear(2, 2).double()
    model = nn.Sequential(net(lambda m, x: m.out(m.a(x) + m.p)), own)
    twin = hbp.convert(nn.Sequential(hbp.convert(model[0]), own))
    assert list(twin.state_dict()) == list(model.state_dict())
    outputs = twin(randn(*VECTOR))
    hbp.backward(twin, outputs, outputs.square().sum())
    assert all(p.hessian is not None for p in model.parameters())


def on_another_path(m: Any, x: Any) -> Any:
    b = m.b(x)
    return m.out(m.c(b).tanh() * m.a(x * b.size(-1) * x))


REFUSED: dict[str, tuple[Forward, dict[str, Any], str]] = {
    "bent parameter": (lambda m, x: m.out(m.a(x) + m.p.exp()), {}, r"know self\.p in"),
    "a parameter twice": (lambda m, x: m.out(m.a(x) + m.p + m.p), {}, "again"),
    "positions with a norm": (
        lambda m, x: m.out(m.a(x) + m.places(torch.arange(1))),
        {"places": nn.Embedding(4, 4, max_norm=0.5)},
        r"know self\.places in",
    ),
    "layer in place": (overwritten, {}, r"self\.silu overwrites what"),
    "option in place": (overwritten_by_option, {}, r"F\.silu overwrites what"),
    "view in place": (view_overwritten, {}, r"self\.silu overwrites what"),
    "alias in place": (
        alias_overwritten,
        {"same": nn.Identity()},
        r"self\.silu overwrites what",
    ),
    "end in place": (overwritten_at_the_end, {}, r"threshold overwrites what"),
    "a parameter twice in one": (
        lambda m, x: m.out(torch.einsum("ni,i,i->ni", m.a(x), m.p, m.p)),
        {},
        r"know self\.p",
    ),
    "parameter by a size on another path": (
        size_of_a_later_path,
        {"c": Linear(4, 4)},
        "asks for a size on another path",
    ),
    "divided by a parameter": (lambda m, x: m.out(m.a(x) / m.p), {}, r"know self\.p"),
    "a list": (lambda m, x: m.out(m.a([x])), {}, "other arguments than one tensor"),
    "a layer of a constant": (
        lambda m, x: m.out(m.a(x) * m.b(torch.ones(1, 4)).tanh()),
        {},
        r"know self\.b in",
    ),
    "function in place": (
        lambda m, x: m.out(torch.tanh_(m.a(x)) * x),
        {},
        r"tanh_ is in place",
    ),
    "size on another path": (
        on_another_path,
        {"c": Linear(4, 4)},
        "asks for a size on another path",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    forward, members, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        hbp.convert(net(forward, **members))


MIXING: dict[str, Forward] = {
    "sum over earlier samples": lambda m, x: m.out(torch.cumsum(m.a(x), 0)),
    "minus the mean": lambda m, x: m.out(m.a(x) * (x - x.mean(0, keepdim=True))),
    "matrix over samples": lambda m, x: m.out(m.C @ m.a(x)),
    "random": lambda m, x: m.out(m.a(x) * torch.rand_like(x)),
}


@pytest.mark.parametrize("name", MIXING)
def test_functions_that_mix_samples_are_refused_in_the_pass(name: str) -> None:
    twin = hbp.convert(net(MIXING[name]))
    outputs = twin(randn(*VECTOR))
    with pytest.raises(ValueError, match="mixes samples, or is random"):
        hbp.backward(twin, outputs, outputs.square().sum())


def test_hooks_inside_a_function_are_refused() -> None:
    model = net(STEPS["softmax"][0])
    model.soft.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"soft \(Softmax\) has hooks"):
        hbp.convert(model)


def test_integers_are_no_path() -> None:
    model = Net(lambda m, x: m.e(x) * x.unsqueeze(-1), e=nn.Embedding(9, 2))
    with pytest.raises(TypeError, match="ends in integers"):
        hbp.convert(model)(torch.arange(4).view(2, 2))


def test_a_matrix_per_position_fits_the_last_dimension() -> None:
    model = hbp.convert(nn.Sequential(nn.Conv1d(2, 3, 1))).double()
    outputs = model(randn(2, 2, 5)).transpose(1, 2).flatten(0, 1)
    loss = F.cross_entropy(outputs, torch.arange(10) % 3)
    hessians = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    with pytest.raises(ValueError, match="matrices for 10 samples, but 2 went"):
        model.backward_hessian(hessians, modify_2nd_order_terms="ggn")
