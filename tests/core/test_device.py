"""On a device that is not the CPU: the same curvature and the same steps as on it.

It is a GPU where there is one, and everywhere a pretended one, which refuses to mix
with the CPU (``tests/pretended.py``).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pretended
import pytest
import test_layers
import torch
from helpers import SCHEMES as PAIRS
from helpers import TREATMENTS, randn, seed, values
from test_cost import READERS, SOLVERS, Iteration, Reads
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hbp
from hbp import CGNewton, HBPModule, batch_summed_hessian, convert, per_sample_hessian

CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU here"
    ),
)
PRETENDED = pytest.param(
    pretended.NAME,
    marks=pytest.mark.skipif(
        pretended.set_up is None, reason="torch is too old for a backend in Python"
    ),
)
ON_DEVICES = pytest.mark.parametrize("device", [PRETENDED, CUDA])
ON_CUDA = pytest.mark.parametrize("device", [CUDA])
ON_PRETENDED = pytest.mark.parametrize("device", [PRETENDED])


class Shortcut(nn.Module):
    """A model of torch with a ``forward`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return torch.relu(x + self.second(x)).view(x.shape[0], -1)


NETWORKS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "dense": (
        lambda: [nn.Linear(12, 9), nn.Sigmoid(), nn.Linear(9, 7), nn.ReLU()],
        (12,),
    ),
    "more features than samples": (lambda: [nn.Linear(40, 20), nn.Tanh()], (40,)),
    "convolutions": (
        lambda: [
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
        ],
        (2, 10, 10),
    ),
    "transposed": (
        lambda: [nn.ConvTranspose2d(2, 3, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten()],
        (2, 6, 6),
    ),
    "norms": (
        lambda: [nn.Linear(12, 8), nn.LayerNorm(8), nn.SiLU(), nn.Dropout(0.0)],
        (12,),
    ),
    "batch norm": (
        lambda: [nn.Linear(12, 8), nn.BatchNorm1d(8).eval(), nn.Softplus()],
        (12,),
    ),
    "a forward of its own": (lambda: [Shortcut()], (9,)),
}
SCHEMES = ["averaged Jacobians", "E[xxᵀ]", "E[φ'φ'ᵀ]", "exact"]


def prepared(network: str, scheme: str) -> tuple[HBPModule, Tensor, Tensor]:
    make, shape = NETWORKS[network]
    layers, x = make(), torch.randn(6, *shape)
    with torch.no_grad():
        features = nn.Sequential(*layers)(x).shape[1]
    model = convert(nn.Sequential(*layers, nn.Linear(features, 4)))
    model.set_hbp_approximation(
        average_input_jacobian=scheme != "E[φ'φ'ᵀ]",
        average_parameter_jacobian=scheme != "E[xxᵀ]",
    )
    return model, x, torch.randint(4, (6,))


def here_and_there(
    network: str, scheme: str, device: str
) -> list[tuple[HBPModule, Tensor, Tensor]]:
    """The same in float64 on the CPU and on the device."""
    model, x, y = prepared(network, scheme)
    here, x = model.double(), x.double()
    there = copy.deepcopy(here).to(device)
    return [(here, x, y), (there, x.to(device), y.to(device))]


def same(there: Tensor, here: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """On the device, with the numbers of the CPU.

    Rounded in another order, even on the pretended device: autograd takes a layer norm
    apart there, which is one operation on the CPU. There 4e-16 was measured at most.
    """
    assert there.device.type != "cpu"
    torch.testing.assert_close(there.cpu(), here, rtol=rtol, atol=atol)


def backward(
    model: HBPModule, x: Tensor, y: Tensor, scheme: str, treatment: str
) -> None:
    outputs = model(x)
    loss = cross_entropy(outputs, y)
    exact = scheme == "exact"
    hessian = (per_sample_hessian if exact else batch_summed_hessian)(loss, outputs)
    loss.backward()
    model.backward_hessian(hessian, modify_2nd_order_terms=treatment)


@ON_DEVICES
@pytest.mark.parametrize("treatment", ["none", "zero", "abs", "clip"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_are_those_of_the_cpu(
    network: str, scheme: str, treatment: str, device: str
) -> None:
    twins = here_and_there(network, scheme, device)
    for model, x, y in twins:
        backward(model, x, y, scheme, treatment)
    for p, q in zip(*(model.parameters() for model, *_ in twins), strict=True):
        assert q.hessian.device == q.device
        same(q.hessian.to_dense(), p.hessian.to_dense())


@ON_DEVICES
@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_are_those_of_the_cpu(
    network: str, scheme: str, solver: str, device: str
) -> None:
    twins = here_and_there(network, scheme, device)
    for twin, inputs, labels in twins:
        options = {"alpha": 0.3, "cg_tol": 1e-9, "solver": solver}
        optimizer = CGNewton(twin.parameters(), lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            backward(twin, inputs, labels, scheme, "abs")
            optimizer.step()
    for p, q in zip(*(model.parameters() for model, *_ in twins), strict=True):
        # After two steps 3e-11 was measured at most, on the pretended device 2e-12.
        same(q.detach(), p.detach(), rtol=1e-8, atol=1e-9)


@ON_DEVICES
@pytest.mark.parametrize("layer", test_layers.LAYERS)
def test_every_layer(layer: str, device: str) -> None:
    """All treatments of all schemes, and an exact product."""
    make, shape = test_layers.LAYERS[layer]
    below = make().double()
    x, y = test_layers.batch(below, shape)
    # A plain layer above it sends δ and H: most of the time would go into more.
    above = hbp.HBPLinear(below(x)[0].numel(), 3).double()
    here = hbp.HBPSequential(below, hbp.HBPFlatten(), above)
    # How products of parameters are averaged matters to those who have some.
    pairs = [pair for pair in PAIRS if list(below.parameters()) or pair[1]]
    ways = list(itertools.product(pairs, TREATMENTS[1:], [True]))
    ways.append((pairs[0], "abs", False))
    probe = randn(1, max(p.numel() for p in [x, *here.parameters()]))
    products: list[list[Tensor]] = []
    for twin in (copy.deepcopy(here).to(device), here):
        to = next(twin.parameters()).device
        _, hessians = test_layers.run(twin, x.detach().to(to), y.to(to))
        products.append([])
        for pair, treatment, averaged in ways:
            twin.set_hbp_approximation(*pair)
            hessian = hessians.sum(0) if averaged else hessians
            H = twin.backward_hessian(hessian, True, treatment)
            assert H is not None
            for block in [H, *(p.hessian for p in twin[0].parameters())]:
                vector = probe[:, : block.shape[0]].to(to)
                products[-1].append(block.product(vector)[0])
    same(*map(torch.cat, products))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


# Torch gives no array of NumPy from a device.
@pytest.mark.parametrize("reader", [name for name in READERS if name != "numpy"])
@ON_PRETENDED
def test_the_counter_counts_there_too(reads: Reads, reader: str, device: str) -> None:
    x = torch.arange(3.0).to(device)
    assert reads.of(lambda: READERS[reader](x)) == 1


CROSSINGS: dict[str, Callable[[Tensor], Any]] = {
    "to the host": lambda x: x.to("cpu"),
    "from the host": lambda x: torch.ones(3).to(x),
    "copied to the host": lambda x: torch.ones(3).copy_(x),
    "copied from the host": lambda x: x.copy_(torch.ones(3)),
}


@ON_PRETENDED
@pytest.mark.parametrize("crossing", CROSSINGS)
def test_the_counter_counts_copies(reads: Reads, crossing: str, device: str) -> None:
    x = torch.arange(3.0).to(device)
    assert reads.of(lambda: CROSSINGS[crossing](x)) == 1
    assert reads.of(lambda: x.clone().copy_(x).to(torch.float64)) == 0


MIXED: dict[str, Callable[[Tensor], Any]] = {
    "a sum": lambda x: x + torch.ones(3),
    "a sum in place": lambda x: x.add_(torch.ones(3)),
    "a sum on the CPU": lambda x: torch.ones(3).add_(x),
    "a number on the CPU": lambda x: torch.zeros(()).add_(x.sum()),
    "an index": lambda x: x[torch.tensor([0])],
    "a mask": lambda x: x[torch.ones(3) > 0],
    "parts": lambda x: torch.cat([x, torch.ones(3)]),
    "parts that are numbers": lambda x: torch.stack([x.sum(), torch.ones(())]),
    "out": lambda x: torch.exp(x, out=torch.ones(3)),
    "a product": lambda x: x @ torch.ones(3),
}


@ON_PRETENDED
@pytest.mark.parametrize("mixed", MIXED)
def test_the_pretended_device_refuses_to_mix(mixed: str, device: str) -> None:
    x = torch.arange(3.0).to(device)
    with pytest.raises(RuntimeError, match="of the CPU"):
        MIXED[mixed](x)
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4]


@ON_PRETENDED
def test_the_pretended_device_draws_no_numbers(device: str) -> None:
    """So nothing that is tested here needs a generator on its device."""
    with pytest.raises(NotImplementedError, match="Generator"):
        torch.Generator(device)


DEPTHS = pytest.mark.parametrize("depth", [2, 4, 8])
# H̄ is finite; it arrives symmetric; so are the statistics of all layers.
BEFORE = [0, 1, 2]


@ON_PRETENDED
@DEPTHS
@SOLVERS
@pytest.mark.parametrize(("pair", "sub_blocks"), [(PAIRS[0], 1), (PAIRS[-1], 3)])
def test_reads_of_a_step(
    reads: Reads,
    pair: tuple[bool, bool],
    sub_blocks: int,
    solver: str,
    depth: int,
    device: str,
) -> None:
    """The same number at every depth: three for four iterations of CG, one without."""
    training = Iteration(depth, solver, "abs", device, cg_tol=1e-12, cg_maxiter=4)
    training.model.set_hbp_approximation(*pair)
    training.model.set_hbp_blocks(sub_blocks)
    for _ in range(2):
        assert [reads.of(part) for part in training.parts()] == BEFORE
        assert reads.of(training.optimizer.step) == (3 if solver == "cg" else 1)


@ON_PRETENDED
@DEPTHS
def test_reads_of_the_default_step(reads: Reads, depth: int, device: str) -> None:
    training = Iteration(depth, "cg", "abs", device)
    parameters = training.model.parameters()
    training.optimizer = CGNewton(parameters, cg_tol=1e-12, cg_maxiter=4)

    def default_backward() -> None:
        training.optimizer.zero_grad()
        outputs = training.model(training.x)
        hbp.backward(training.model, outputs, training.loss_func(outputs, training.y))

    for _ in range(2):
        # The loss is finite, and the last layer got the gradient of the outputs.
        assert reads.of(default_backward) == sum(BEFORE) + 2
        # Whether gradients were accumulated, and what is known along the step.
        assert reads.of(training.optimizer.step) == 3 + 2


def both(work: Callable[[str], list[Tensor]], device: str) -> None:
    """The same from the same seed on the device and on the CPU."""
    found = []
    for place in (device, "cpu"):
        seed(0)
        found.append(work(place))
    for there, here in zip(*found, strict=True):
        same(there, here)


def small(device: str) -> tuple[HBPModule, Tensor, Tensor]:
    """Convolutions, a shortcut and dense layers, with some samples."""
    branch = hbp.HBPSequential(hbp.HBPConv2d(3, 3, 3, padding=1), hbp.HBPTanh())
    layers = hbp.HBPConv2d(1, 3, 3), hbp.HBPResidual(branch), hbp.HBPMaxPool2d(2)
    dense = hbp.HBPLinear(12, 6), hbp.HBPSigmoid(), hbp.HBPLinear(6, 4)
    model = hbp.HBPSequential(*layers, hbp.HBPFlatten(), *dense).double()
    x, y = randn(5, 1, 6, 6), torch.randint(4, (5,))
    return model.to(device), x.to(device), y.to(device)


def train(
    model: HBPModule, x: Tensor, y: Tensor, optimizer: CGNewton, scheme: str = ""
) -> list[Tensor]:
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, x, y, scheme, "abs")
        optimizer.step()
    return values(model)


@ON_DEVICES
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", [{}, {"solver": "direct"}, {"trust_radius": 0.01}])
def test_sub_blocks_and_trust_radius(
    options: dict[str, Any], scheme: str, device: str
) -> None:
    def work(place: str) -> list[Tensor]:
        model, x, y = small(place)
        model.set_hbp_approximation("φ" not in scheme, "x" not in scheme)
        model.set_hbp_blocks(2)
        optimizer = CGNewton(model.parameters(), 0.1, 0.3, cg_tol=1e-9, **options)
        found = train(model, x, y, optimizer, scheme)
        infos = optimizer.last_step.values()
        assert any(info.on_boundary for info in infos) == ("trust_radius" in options)
        return found

    both(work, device)


@ON_DEVICES
def test_default_step_with_adaptive_damping(device: str) -> None:
    def work(place: str) -> list[Tensor]:
        model, x, y = small(place)
        # Solved far below what is compared, for round-off may cost an iteration.
        options = {"cg_tol": 1e-12, "cg_atol": 0.0, "weight_decay": 1e-3}
        optimizer = CGNewton(model.parameters(), **options)
        adapter = hbp.LevenbergMarquardt(optimizer)
        for _ in range(3):
            outputs = model(x)
            loss = cross_entropy(outputs, y)
            optimizer.zero_grad()
            hbp.backward(model, outputs, loss)
            optimizer.step()
            with torch.no_grad():
                adapter.step(loss, cross_entropy(model(x), y))
        alpha = optimizer.param_groups[0]["alpha"]
        assert alpha != hbp.line.DAMPING
        return [*values(model), torch.tensor(alpha).to(place)]

    both(work, device)


@ON_DEVICES
@pytest.mark.parametrize("rows", [1024, 8])
def test_inspection(rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact spectra, and where 8 rows are too many, those of Lanczos and of probes."""
    monkeypatch.setattr(hbp.inspect, "SMALL", rows)

    def work(place: str) -> list[Tensor]:
        model, x, y = small(place)
        blocks = []
        for treatment in ("abs", "none"):
            model.zero_grad()
            backward(model, x, y, "", treatment)
            blocks.append(next(model.parameters()).hessian)  # Of 27 weights.
        found = hbp.extremal_eigenvalues(blocks[1], count=2)
        numbers = [hbp.estimate_trace(blocks[1], products=9).value]
        numbers += hbp.compare_curvature(*blocks, samples=4)
        for row in hbp.inspect_curvature(model, alpha=0.1).rows:
            numbers += [row.trace, row.largest, row.condition or 0.0]
            numbers.append(row.negative_mass or 0.0)
        assert found.converged
        return [*found[:2], torch.tensor(numbers).to(place)]

    both(work, device)


@ON_DEVICES
def test_products_of_your_own(device: str) -> None:
    """``cg`` with a start, and a step by ``p.hvp``."""

    def work(place: str) -> list[Tensor]:
        root = randn(6, 6).to(place)
        A, b = root @ root.T + torch.eye(6, device=place), root[0]
        p = nn.Parameter(b.clone())
        p.grad, p.hvp = b, A.mv  # type: ignore[attr-defined]
        CGNewton([p], lr=1.0, alpha=0.1, cg_tol=1e-9).step()
        return [hbp.cg(A, b, x0=root[1], tol=1e-9).x, p.detach()]

    both(work, device)


LOSSES: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
    "labels": (nn.CrossEntropyLoss(), lambda: torch.arange(5) % 4),
    "weights": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]), label_smoothing=0.1),
        lambda: torch.arange(5) % 4,
    ),
    "soft targets": (nn.CrossEntropyLoss(), lambda: randn(5, 4).softmax(1)),
    "squares": (nn.MSELoss(), lambda: randn(5, 4)),
    "two classes": (
        nn.BCEWithLogitsLoss(torch.rand(4), pos_weight=torch.rand(4)),
        lambda: randn(5, 4).sigmoid(),
    ),
}


@ON_DEVICES
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(reads: Reads, loss: str, device: str) -> None:
    """Formulas of the losses, for which the host waits once."""
    loss_func, make = LOSSES[loss]

    def work(place: str) -> list[Tensor]:
        model, x, _ = small(place)
        there, targets = copy.deepcopy(loss_func).double().to(place), make().to(place)
        outputs, found = model(x), []
        count = reads.of(
            lambda: found.append(hbp.output_hessian(there, outputs, targets))
        )
        assert count == 1
        return [found[0].to_dense()]

    both(work, device)


@ON_DEVICES
def test_a_state_goes_on_elsewhere(device: str) -> None:
    """From the device to the CPU, and back, in the middle of a training."""

    def work(*places: str) -> list[Tensor]:
        seed(0)
        states: list[Any] = []
        for place in places:
            model, x, y = small(place)
            optimizer = CGNewton(model.parameters(), 0.1, 0.3, cg_tol=1e-9)
            if states:
                model.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
            seed(0)
            train(model, x, y, optimizer)
            optimizer.param_groups[0]["alpha"] /= 2
            states = [model.state_dict(), optimizer.state_dict()]
        return list(states[0].values())

    stayed = work("cpu", "cpu", "cpu")
    for there, here in zip(work(device, "cpu", device), stayed, strict=True):
        same(there, here)


@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("network", ["dense", "convolutions"])
def test_trains_under_autocast_with_a_grad_scaler(
    network: str, dtype: torch.dtype, device: str
) -> None:
    model, x, y = prepared(network, "averaged Jacobians")
    model, x, y = model.to(device), x.to(device), y.to(device)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    optimizer, losses = CGNewton(model.parameters(), lr=0.1, alpha=0.1), []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            outputs = model(x)
            loss = cross_entropy(outputs, y)
        hessian = batch_summed_hessian(loss, outputs)
        scaler.scale(loss).backward()
        model.backward_hessian(
            hessian, modify_2nd_order_terms="abs", loss_scale=scaler.get_scale()
        )
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@ON_DEVICES
@pytest.mark.parametrize("network", NETWORKS)
def test_lengths_are_those_of_the_cpu(network: str, device: str) -> None:
    lengths: list[list[float]] = []
    for twin, inputs, labels in here_and_there(network, "averaged Jacobians", device):
        optimizer = CGNewton(twin.parameters(), cg_tol=1e-9)
        lengths.append([])
        for _ in range(3):
            outputs = twin(inputs)
            optimizer.zero_grad()
            hbp.backward(twin, outputs, cross_entropy(outputs, labels))
            optimizer.step()
            assert optimizer.last_line is not None
            lengths[-1].append(optimizer.last_line.length)
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-6)


@ON_CUDA
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lengths_under_autocast(dtype: torch.dtype, device: str) -> None:
    model, x, y = prepared("convolutions", "averaged Jacobians")
    model, x, y = model.to(device), x.to(device), y.to(device)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    optimizer, losses = CGNewton(model.parameters()), []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            outputs = model(x)
            loss = cross_entropy(outputs, y)
        hbp.backward(model, outputs, loss, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
