"""Sequences: embeddings, positions, attention, gates, and a small transformer."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import SCHEMES, TREATMENTS, close, randn, seed
from torch import Tensor

import hbp
from hbp import reference
from hbp.layers.functions import HBPCall

VOCABULARY, LENGTH, WIDTH = 5, 4, 6


def transformer(blocks: int = 1) -> hbp.HBPSequential:
    """Embedding, positions, blocks of causal attention and a gated layer, logits."""

    def block() -> list[hbp.HBPModule]:
        attention = hbp.HBPSequential(
            hbp.HBPLayerNorm(WIDTH),
            hbp.HBPLinear(WIDTH, 3 * WIDTH),
            hbp.HBPAttention(2, causal=True),
            hbp.HBPLinear(WIDTH, WIDTH),
        )
        gate = hbp.HBPSequential(hbp.HBPLinear(WIDTH, 3), hbp.HBPSiLU())
        gated = hbp.HBPSequential(
            hbp.HBPRMSNorm(WIDTH),
            hbp.HBPJoin(operator.mul, gate, hbp.HBPLinear(WIDTH, 3)),
            hbp.HBPLinear(3, WIDTH),
        )
        return [hbp.HBPResidual(attention), hbp.HBPResidual(gated)]

    seed(0)
    layers = [layer for _ in range(blocks) for layer in block()]
    return hbp.HBPSequential(
        hbp.HBPEmbedding(VOCABULARY, WIDTH),
        hbp.HBPPosition(LENGTH, WIDTH),
        *layers,
        hbp.HBPLinear(WIDTH, VOCABULARY),
    ).double()


def tokens(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def send_back(model: hbp.HBPModule, treatment: str, flat: bool = True) -> None:
    """Exact curvature of a batch of tokens."""
    inputs, targets = tokens()
    outputs = model(inputs)
    seen = outputs.flatten(0, 1) if flat else outputs
    loss = F.cross_entropy(seen.view(-1, VOCABULARY), targets.flatten())
    hessians = hbp.per_sample_hessian(loss, seen)
    model.zero_grad()
    loss.backward()
    model.backward_hessian(hessians, modify_2nd_order_terms=treatment)


JUDGES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "none": reference.hessian_blocks,
    "ggn": reference.ggn_blocks,
}


@pytest.mark.parametrize("flat", [True, False], ids=["by position", "by sample"])
@pytest.mark.parametrize("limit", [2**29, 2500], ids=["formed", "in products"])
@pytest.mark.parametrize("treatment", JUDGES)
def test_exact_blocks_of_a_transformer(treatment: str, limit: int, flat: bool) -> None:
    model = transformer()
    expected = JUDGES[treatment](model, loss_of, *tokens())
    if not flat and limit < 2**29:
        pytest.skip("The output Hessian itself would not fit.")
    before = hbp.set_dense_limit(limit)
    try:
        send_back(model, treatment, flat)
        for name, parameter in model.named_parameters():
            vectors = randn(parameter.numel(), 2)
            found = parameter.hessian @ vectors
            close(found, expected[name] @ vectors, what=name)
    finally:
        hbp.set_dense_limit(before)


def test_large_second_order_terms_are_refused_by_name() -> None:
    model = transformer()
    before = hbp.set_dense_limit(2500)
    try:
        with pytest.raises(
            MemoryError, match=r"second-order term of .* not diagonal.*Choose 'ggn'"
        ):
            send_back(model, "abs")
        assert all(p.hessian is None for p in model.parameters())
    finally:
        hbp.set_dense_limit(before)


def test_abs_and_clip_are_nonnegative() -> None:
    model = transformer()
    for treatment in ("abs", "clip"):
        send_back(model, treatment)
        for p in model.parameters():
            values = p.hessian.eigvalsh()
            assert values[0] > -1e-12 * values[-1]


def as_linear(layer: hbp.HBPEmbedding) -> hbp.HBPLinear:
    twin = hbp.HBPLinear(VOCABULARY, 2, bias=False).double()
    with torch.no_grad():
        twin.weight.copy_(layer.weight.T)
    return twin


@pytest.mark.parametrize("padding", [None, 1])
def test_an_embedding_is_a_linear_layer_of_one_hot_vectors(padding: int | None) -> None:
    seed(0)
    layer = hbp.HBPEmbedding(VOCABULARY, 2, padding_idx=padding).double()
    inputs, _ = tokens()
    one_hot = F.one_hot(inputs, VOCABULARY).double()
    if padding is not None:
        one_hot[..., padding] = 0
    top = [hbp.HBPTanh(), hbp.HBPFlatten(), hbp.HBPLinear(2 * LENGTH, 3)]
    top = [part.double() for part in top]
    twin = as_linear(layer)
    labels = torch.arange(len(inputs)) % 3
    found = []
    for first, x in ((layer, inputs), (twin, one_hot)):
        model = hbp.HBPSequential(first, *top)
        outputs = model(x)
        loss = F.cross_entropy(outputs, labels)
        hessians = hbp.per_sample_hessian(loss, outputs)
        model.zero_grad()
        loss.backward()
        blocks = []
        for treatment in TREATMENTS[1:]:
            model.backward_hessian(hessians, modify_2nd_order_terms=treatment)
            blocks.append(first.weight.hessian)
            for scheme in SCHEMES:
                model.set_hbp_approximation(*scheme)
                H = hessians.sum(0)
                model.backward_hessian(H, modify_2nd_order_terms=treatment)
                blocks.append(first.weight.hessian)
        found.append(blocks)
    order = torch.arange(2 * VOCABULARY).view(2, VOCABULARY).T.flatten()
    for own, other in zip(*found, strict=True):
        expected = other.to_dense()[order][:, order]
        if padding is not None:
            row = slice(2 * padding, 2 * padding + 2)
            expected[row], expected[:, row] = 0, 0
        close(own.to_dense(), expected)
        vectors = randn(len(expected), 3)
        close(own @ vectors, expected @ vectors)


def test_the_default_step_trains_a_transformer() -> None:
    model = transformer(2).float()
    inputs, targets = tokens(16)
    optimizer = hbp.CGNewton(model.parameters())
    losses = []
    for _ in range(30):
        outputs = model(inputs)
        loss = loss_of(outputs, targets)
        optimizer.zero_grad()
        hbp.backward(model, outputs, loss, curvature="ggn")
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def blocks_of(model: hbp.HBPSequential, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Exact and averaged block of the first layer's weight."""
    outputs = model(x)
    loss = F.cross_entropy(outputs, labels)
    hessians = hbp.per_sample_hessian(loss, outputs)
    model.zero_grad()
    loss.backward()
    found = []
    for H in (hessians, hessians.sum(0)):
        model.backward_hessian(H, modify_2nd_order_terms="ggn")
        found.append(model[0].weight.hessian.to_dense())
    return found


def test_below_a_sum_over_positions_inputs_add_up() -> None:
    """K-FAC's *reduce* is right there; so is the sum over pairs of positions."""
    layer, x, labels = hbp.HBPLinear(3, 4, bias=False), randn(5, LENGTH, 3), [0, 1, 2]
    pool = HBPCall(torch.sum, 1)
    own = hbp.HBPSequential(layer.double(), pool)
    reduced = hbp.HBPSequential(copy.deepcopy(layer))
    targets = torch.tensor([*labels, 3, 0])
    found = blocks_of(own, x, targets), blocks_of(reduced, x.sum(1), targets)
    for block, expected in zip(*found, strict=True):
        close(block, expected)


def test_positions_that_nothing_couples_are_like_samples() -> None:
    """K-FAC's *expand* is right there."""
    layer, x = hbp.HBPLinear(3, 4, bias=False).double(), randn(5, LENGTH, 3)
    labels = torch.arange(5 * LENGTH) % 4
    model = hbp.HBPSequential(layer)
    outputs = model(x).flatten(0, 1)
    loss = F.cross_entropy(outputs, labels)
    hessians = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(hessians, modify_2nd_order_terms="ggn")
    block = layer.weight.hessian.to_dense()
    expanded = hbp.HBPSequential(copy.deepcopy(layer))
    close(block, blocks_of(expanded, x.flatten(0, 1), labels)[0])


@pytest.mark.parametrize("treatment", ["ggn", "none"])
def test_paths_that_average_the_product(treatment: str) -> None:
    """E[J_iᵀH_ii J_i] of each path, and what couples them by E[J_i]; see eq-paths."""
    seed(0)
    paths = [
        hbp.HBPSequential(hbp.HBPLinear(4, 3), hbp.HBPSigmoid()),
        hbp.HBPSequential(hbp.HBPLinear(4, 2), hbp.HBPTanh()),
    ]
    model = hbp.HBPParallel(*paths).double()
    model.set_hbp_approximation(average_input_jacobian=False)
    x, weights, H = randn(6, 4).requires_grad_(), randn(6, 5), randn(5, 5)
    (model(x) * weights).sum().backward()
    found = model.backward_hessian(H + H.T, True, treatment)
    assert found is not None
    jacobian = torch.func.vmap(torch.func.jacrev(model))
    J = jacobian(x.detach()[:, None])[:, 0, :, 0]  # [6, 5, 4]
    mean, own = J.mean(0), torch.block_diag(torch.ones(3, 3), torch.ones(2, 2))
    alone, coupled = (H + H.T) * own, (H + H.T) * (1 - own)
    expected = (J.mT @ alone @ J).mean(0) + mean.T @ coupled @ mean
    if treatment == "none":

        def weighed(x: Tensor, delta: Tensor) -> Tensor:
            return (model(x[None])[0] * delta).sum()

        bent = torch.func.vmap(torch.func.hessian(weighed))(x.detach(), weights)
        expected = expected + bent.sum(0)
    close(found.to_dense(), expected)


def test_a_layer_in_two_paths_is_refused() -> None:
    layer = hbp.HBPTanh()
    model = hbp.HBPSequential(layer, hbp.HBPJoin(operator.mul, layer, hbp.HBPTanh()))
    outputs = model(randn(3, 4).requires_grad_())
    outputs.sum().backward()
    with pytest.raises(ValueError, match="A layer occurs twice"):
        model.backward_hessian(torch.eye(4).double(), True)


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_options_of_an_embedding_are_refused(option: str) -> None:
    value = 1.0 if option == "max_norm" else True
    layer = hbp.HBPEmbedding(VOCABULARY, 2, **{option: value})
    model = hbp.HBPSequential(layer, hbp.HBPFlatten())
    outputs = model(tokens()[0])
    outputs.square().sum().backward()
    with pytest.raises(ValueError, match=rf"{option}=.*no linear function of its"):
        model.backward_hessian(torch.eye(2 * LENGTH))


def test_indices_have_no_curvature() -> None:
    model = hbp.HBPSequential(hbp.HBPEmbedding(VOCABULARY, 2), hbp.HBPFlatten())
    model(tokens()[0]).square().sum().backward()
    with pytest.raises(TypeError, match="takes indices, which have no curvature"):
        model.backward_hessian(torch.eye(2 * LENGTH), True)


def test_paths_are_hbp_modules_and_functions_callable() -> None:
    with pytest.raises(TypeError, match="A path of this HBPParallel is None"):
        hbp.HBPParallel()
    with pytest.raises(TypeError, match="A path of this HBPParallel is Linear"):
        hbp.HBPJoin(operator.mul, torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="function=3 must be a function"):
        hbp.HBPJoin(3, hbp.HBPTanh())


def test_a_path_that_overwrites_its_input_is_refused() -> None:
    model = hbp.HBPJoin(operator.mul, hbp.HBPReLU(inplace=True), hbp.HBPTanh())
    with pytest.raises(RuntimeError, match="changes its input in place"):
        model(randn(3, 4))


def test_a_function_that_mixes_samples_is_refused() -> None:
    model = hbp.HBPSequential(hbp.HBPFunction(lambda x: x - x.mean(0)))
    model(randn(3, 4).requires_grad_()).square().sum().backward()
    with pytest.raises(ValueError, match="mixes samples, or is random"):
        model.backward_hessian(torch.eye(4).double(), True)


def test_an_averaged_jacobian_in_products_is_that_of_the_matrices() -> None:
    """E[J] of a function in products is that of its matrices."""
    layer = hbp.HBPSequential(hbp.HBPFunction(torch.sin), hbp.HBPFlatten()).double()
    found = []
    x = randn(3, 4)
    for limit in (2**29, 8):
        before = hbp.set_dense_limit(limit)
        try:
            layer(x.clone().requires_grad_()).square().sum().backward()
            H = hbp.operators.DiagonalOperator(torch.arange(1.0, 5).double())
            sent = layer.backward_hessian(H, True, "ggn")
            assert sent is not None
            found.append(sent @ randn(4).fill_(1))
        finally:
            hbp.set_dense_limit(before)
    close(*found)
