"""Models, optimizers and threads at once: each gets, bitwise, what it gets alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_equal, values
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hbp

Batch = tuple[Tensor, Tensor]
SHAPE = (10, 1, 6, 6)


def fully_connected(seed: int) -> hbp.HBPSequential:
    torch.manual_seed(seed)
    return hbp.HBPSequential(
        hbp.HBPFlatten(), hbp.HBPLinear(36, 6), hbp.HBPSigmoid(), hbp.HBPLinear(6, 4)
    )


def convolutional(seed: int) -> hbp.HBPSequential:
    torch.manual_seed(seed)
    return hbp.HBPSequential(
        hbp.HBPConv2d(1, 2, 3),
        hbp.HBPReLU(inplace=True),
        hbp.HBPMaxPool2d(2),
        hbp.HBPFlatten(),
        hbp.HBPLayerNorm(8),
        hbp.HBPLinear(8, 4),
    )


def batches(seed: int, count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(SHAPE[0]) % 4
    return [(torch.randn(SHAPE, generator=generator), labels) for _ in range(count)]


def optimizer_of(model: nn.Module, **options: Any) -> hbp.CGNewton:
    return hbp.CGNewton(model.parameters(), **{"lr": 0.3, "alpha": 0.05, **options})


def stages(
    model: hbp.HBPModule, optimizer: hbp.CGNewton, batch: Batch, exact: bool = False
) -> Iterator[None]:
    """One training step, with a pause after each call."""
    outputs = model(batch[0])
    yield
    loss = F.cross_entropy(outputs, batch[1])
    optimizer.zero_grad()
    yield
    make = hbp.per_sample_hessian if exact else hbp.batch_summed_hessian
    H = make(loss, outputs)
    yield
    loss.backward()
    yield
    model.backward_hessian(H, modify_2nd_order_terms="abs")
    yield
    optimizer.step()


def train(
    model: hbp.HBPModule, data: list[Batch], exact: bool = False, **options: Any
) -> list[Tensor]:
    optimizer = optimizer_of(model, **options)
    for batch in data:
        for _ in stages(model, optimizer, batch, exact):
            pass
    return values(model)


# --------------------------------------------------------------------------------------
# Turn by turn.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_two_models_in_turn_after_every_call(exact: bool) -> None:
    """Two of one kind, and a third of another."""
    makers = [fully_connected, fully_connected, convolutional]
    alone = [
        train(make(seed), batches(seed), exact) for seed, make in enumerate(makers)
    ]
    models = [make(seed) for seed, make in enumerate(makers)]
    optimizers = [optimizer_of(model) for model in models]
    data = [batches(seed) for seed in range(3)]
    for step in range(4):
        turns = [
            stages(model, optimizer, own[step], exact)
            for model, optimizer, own in zip(models, optimizers, data, strict=True)
        ]
        for _ in zip(*turns, strict=True):
            pass
        for turn in turns:  # zip stops at the first that is done.
            list(turn)
    for model, right in zip(models, alone, strict=True):
        assert all_equal(values(model), right)


def test_two_optimizers_on_parts_of_one_model() -> None:
    """As one optimizer with two groups."""
    data = batches(0)
    whole, model = fully_connected(0), fully_connected(0)
    groups = [{"params": whole[1].parameters()}, {"params": whole[3].parameters()}]
    one = hbp.CGNewton([groups[0], {**groups[1], "alpha": 0.2}], lr=0.3, alpha=0.05)
    two = [optimizer_of(model[1]), optimizer_of(model[3], alpha=0.2)]
    for x, labels in data:
        for _ in stages(whole, one, (x, labels)):
            pass
        outputs = model(x)
        loss = F.cross_entropy(outputs, labels)
        for optimizer in two:
            optimizer.zero_grad()
        H = hbp.batch_summed_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(H, modify_2nd_order_terms="abs")
        # A step reads its own block; the one above reads no weight below it.
        two[0].step()
        two[1].step()
    assert all_equal(values(model), values(whole))


def test_the_upper_optimizer_first_is_told_that_curvature_is_stale() -> None:
    """A lower block reads the weights above it; a step there has changed them."""
    model = fully_connected(0)
    optimizer = optimizer_of(model[3])
    for _ in stages(model, optimizer, batches(0)[0]):
        pass
    below, before = optimizer_of(model[1]), values(model[1])
    with pytest.raises(RuntimeError, match="has changed since backward_hessian"):
        below.step()
    assert all_equal(values(model[1]), before)


def test_a_layer_in_two_models() -> None:
    """Step by step in turn: as if the weight were copied over and back."""
    torch.manual_seed(0)
    shared = hbp.HBPLinear(36, 6)
    tops = [hbp.HBPLinear(6, 4), hbp.HBPLinear(6, 4)]
    copies = copy.deepcopy((shared, tops))

    def chain(first: hbp.HBPModule, top: hbp.HBPModule) -> hbp.HBPSequential:
        return hbp.HBPSequential(hbp.HBPFlatten(), first, hbp.HBPSigmoid(), top)

    models = [chain(shared, top) for top in tops]
    optimizers = [optimizer_of(model) for model in models]
    apart = [chain(copy.deepcopy(copies[0]), top) for top in copies[1]]
    theirs = [optimizer_of(model) for model in apart]
    for step, batch in enumerate(batches(0)):
        turn = step % 2
        for _ in stages(models[turn], optimizers[turn], batch):
            pass
        for _ in stages(apart[turn], theirs[turn], batch):
            pass
        apart[1 - turn][1].load_state_dict(apart[turn][1].state_dict())
    for model, right in zip(models, apart, strict=True):
        assert all_equal(values(model), values(right))


@pytest.mark.parametrize("pause", range(5))
def test_a_copy_in_the_middle_of_a_step(pause: int) -> None:
    """The copy trains, and so does its copy; the step goes on as it would have."""
    data = batches(0)
    right = train(fully_connected(0), data[:1])
    copied = train(fully_connected(0), data[1:])
    model = fully_connected(0)
    twin: hbp.HBPSequential | None = None
    for number, _ in enumerate(stages(model, optimizer_of(model), data[0])):
        if number == pause:
            twin = copy.deepcopy(model)
            train(copy.deepcopy(twin), data[2:])
    assert twin is not None
    assert all_equal(values(model), right)
    assert all_equal(train(twin, data[1:]), copied)


def test_a_pass_within_a_pass() -> None:
    """A teacher, itself trained, gives the targets between forward and backward."""
    data = batches(0)
    teacher = fully_connected(1)
    right = train(fully_connected(0), data)
    taught = train(copy.deepcopy(teacher), data)
    model = fully_connected(0)
    optimizer, inner = optimizer_of(model), optimizer_of(teacher)
    for batch in data:
        for number, _ in enumerate(stages(model, optimizer, batch)):
            if number == 2:
                for _ in stages(teacher, inner, batch):
                    pass
            if number == 3:  # Evaluation records nothing.
                with torch.no_grad():
                    model(batch[0] + 1)
    assert all_equal(values(model), right)
    assert all_equal(values(teacher), taught)


# --------------------------------------------------------------------------------------
# Threads and processes.
# --------------------------------------------------------------------------------------

TASKS: list[tuple[Callable[[int], hbp.HBPModule], bool, str]] = [
    (fully_connected, False, "cg"),
    (fully_connected, False, "direct"),
    (fully_connected, True, "cg"),
    (convolutional, False, "cg"),
    (convolutional, True, "cg"),
    (convolutional, False, "direct"),
]


def test_threads_each_with_a_model() -> None:
    """More of them than cores, all averaged and exact kinds at once, three times."""
    models = [make(seed) for seed, (make, _, _) in enumerate(TASKS)]

    def run(seed: int) -> list[Tensor]:
        _, exact, solver = TASKS[seed]
        model = copy.deepcopy(models[seed])
        return train(model, batches(seed, 6), exact, solver=solver)

    alone = [run(seed) for seed in range(len(TASKS))]
    with ThreadPoolExecutor(len(TASKS)) as pool:
        for _ in range(3):
            together = list(pool.map(run, range(len(TASKS))))
            for found, right in zip(together, alone, strict=True):
                assert all_equal(found, right)


def test_grad_mode_and_autocast_of_one_thread_are_not_those_of_another() -> None:
    def run(_: int) -> list[Tensor]:
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        return train(fully_connected(0), batches(0))

    right = run(0)
    with torch.no_grad(), torch.autocast("cpu"), ThreadPoolExecutor(1) as pool:
        (found,) = pool.map(run, [0])
    assert all_equal(found, right)


class Images(Dataset[Batch]):
    """Ten samples; a worker looks at a model that its parent trains."""

    def __init__(self, model: hbp.HBPModule) -> None:
        self.model = model

    def __len__(self) -> int:
        return SHAPE[0]

    def __getitem__(self, index: int) -> Batch:
        x, labels = batches(0)[0]
        with torch.no_grad():
            assert self.model(x).isfinite().all()
        return x[index], labels[index]


def test_workers_of_a_data_loader() -> None:
    """Forked in the middle of a training, when there are records and curvature."""
    data = batches(0)
    right = train(fully_connected(0), data[:1] * 3)
    model = fully_connected(0)
    optimizer = optimizer_of(model)
    for _ in range(3):
        loader = DataLoader(
            Images(model),
            SHAPE[0],
            num_workers=1,
            multiprocessing_context="fork",
        )
        for x, labels in loader:
            for _ in stages(model, optimizer, (x, labels)):
                pass
    assert all_equal(values(model), right)
