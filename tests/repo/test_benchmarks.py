"""The benchmarks time real optimizers, count right, and their tables are not typed.

No test here looks at a time: a machine under load must not fail them.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as harness
from benchmarks import growth, measure, memory, peers, points, stages, work
from benchmarks.steps import ALPHA, LOSS, OWN, Newton, contenders
from helpers import ROOT, load
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hbp
from hbp.reference import ggn_blocks

RESULTS = ROOT / "docs" / "assets" / "benchmarks"
pytest.importorskip("matplotlib")
draw = load(ROOT / "tools" / "draw_benchmarks.py")

pytestmark = [
    # BackPACK hooks every layer, also the first, which has nothing to send back.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    # linear_operator, which curvlinops imports, still compiles functions by torch.jit.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*"),
]
METHODS = [*OWN, *peers.PEERS]
SIZES = [6, 5, 4]
MODEL_SEED = 3


def method(name: str) -> tuple[Callable, float]:
    """The maker of a step, or a skip where its package is missing."""
    if name in OWN:
        return OWN[name]
    package, make, lr = peers.PEERS[name]
    pytest.importorskip(package)
    return make, lr


def problem(count: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network in float64, and a batch of labelled points around centres."""
    torch.manual_seed(MODEL_SEED)
    labels = torch.arange(count) % SIZES[-1]
    centres = torch.rand(SIZES[-1], SIZES[0])
    images = centres[labels] + 0.1 * torch.rand(count, SIZES[0])
    return points.network(SIZES).double(), images.double(), labels


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(LOSS(model(images), labels))


def moved(model: nn.Module, step_of: Callable, batch: tuple[Tensor, Tensor]) -> dict:
    """By how much one step of a fresh optimizer changes each parameter."""
    twin = copy.deepcopy(model)
    step_of(twin)(*batch)
    before = dict(model.named_parameters())
    return {name: (p - before[name]).detach() for name, p in twin.named_parameters()}


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    values = torch.autograd.grad(LOSS(model(images), labels), list(parameters.values()))
    return dict(zip(parameters, values, strict=True))


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def near(actual: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * 1e-3)


# --- What is timed is a real optimizer ----------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_contender_trains(name: str) -> None:
    make, lr = method(name)
    model, images, labels = problem()
    before = loss_of(model, images, labels)
    step = make(model, lr)
    for _ in range(40):
        step(images, labels)
    assert loss_of(model, images, labels) < before - 0.02


@pytest.mark.parametrize("name", METHODS)
def test_a_contender_stays_where_it_is_timed(name: str) -> None:
    make, _ = method(name)
    model, images, labels = problem()
    before = [p.detach().clone() for p in model.parameters()]
    step = make(model, measure.STILL)
    for _ in range(measure.WARMUP + harness.FULL.rounds):
        step(images, labels)
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, old)
        assert (p - old).abs().max() < 1e-3 * old.abs().max()


def test_each_contender_has_its_own_model() -> None:
    model, images, labels = problem()
    before = [p.detach().clone() for p in model.parameters()]
    for step in contenders(model, OWN | peers.available()).values():
        step(images, labels)
    assert all(
        torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
    )


def test_a_missing_package_is_skipped_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda package: None)
    assert peers.available() == {}
    assert peers.skipped() == {
        name: f"{package} is not installed"
        for name, (package, _, _) in peers.PEERS.items()
    }


# --- Their steps are those of the mathematics ---------------------------------


@pytest.mark.parametrize("damping", ["outer", "inner"])
def test_factored_solve_is_the_dense_solve(damping: str) -> None:
    outer, inner = torch.rand(3, 8).double(), torch.rand(4, 8).double()
    outer, inner = outer @ outer.T, inner @ inner.T
    if damping == "inner":  # π is far from 1, on either side.
        outer = outer / 1e6
    weight, bias = torch.rand(3, 4).double(), torch.rand(3).double()
    balance = (inner.trace() / 4 / (outer.trace() / 3)).sqrt()
    damped_outer = outer + ALPHA**0.5 / balance * identity(3)
    damped_inner = inner + ALPHA**0.5 * balance * identity(4)
    dense = torch.kron(damped_outer, damped_inner)
    weight_step, bias_step = peers.solve_layer(outer, inner, weight, bias)
    near(weight_step.flatten(), torch.linalg.solve(dense, weight.flatten()))
    near(bias_step, torch.linalg.solve(damped_outer, bias))


def check_kronecker_step(
    step: dict[str, Tensor],
    outers: dict[int, Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
) -> None:
    """The step is that of the given factors B and of A = E[xxᵀ], for each layer."""
    g = gradients(model, images, labels)
    x = images
    for layer, outer in outers.items():
        expected = peers.solve_layer(
            outer.clone(),
            x.T @ x / len(x),
            g[f"{layer}.weight"],
            g[f"{layer}.bias"],
        )
        near(step[f"{layer}.weight"], -expected[0])
        near(step[f"{layer}.bias"], -expected[1])
        x = torch.sigmoid(model[layer](x)).detach()


def factors_by_hbp(images: Tensor, labels: Tensor, model: nn.Module) -> hbp.HBPModule:
    """KFRA in the words of hbp: the GGN, with averaged products throughout."""
    twin = hbp.convert(copy.deepcopy(model))
    twin.set_hbp_approximation(
        average_input_jacobian=False, average_parameter_jacobian=False
    )
    outputs = twin(images)
    loss = LOSS(outputs, labels)
    curvature = hbp.output_hessian(LOSS, outputs, labels)
    loss.backward()
    twin.backward_hessian(curvature, modify_2nd_order_terms="zero")
    return twin


def test_kfra_has_the_blocks_of_hbp_and_solves_with_them() -> None:
    pytest.importorskip("backpack")
    from backpack import backpack, extend, extensions

    model, images, labels = problem()
    twin = factors_by_hbp(images, labels, model)
    extended = extend(copy.deepcopy(model))
    loss = extend(nn.CrossEntropyLoss())(extended(images), labels)
    with backpack(extensions.KFRA()):
        loss.backward()
    step = moved(model, lambda m: peers.kfra(m, 1.0), (images, labels))
    outers = {
        layer: twin.get_parameter(f"{layer}.bias").hessian.to_dense()
        for layer in (1, 3)
    }
    for name, p in extended.named_parameters():
        block = twin.get_parameter(name).hessian.to_dense()
        dense = p.kfra[0] if len(p.kfra) == 1 else kron(*p.kfra)
        near(dense, block)
    check_kronecker_step(step, outers, model, images, labels)


def test_kflr_solves_with_exact_bias_blocks() -> None:
    """KFLR's B is the exact GGN block of the bias, and A is E[xxᵀ]."""
    pytest.importorskip("backpack")
    model, images, labels = problem()
    step = moved(model, lambda m: peers.kflr(m, 1.0), (images, labels))
    blocks = ggn_blocks(model, LOSS, images, labels)
    outers = {layer: blocks[f"{layer}.bias"] for layer in (1, 3)}
    check_kronecker_step(step, outers, model, images, labels)


def kron(outer: Tensor, inner: Tensor) -> Tensor:
    # BackPACK's factors are views with strides that torch.kron does not take.
    return torch.kron(outer.contiguous(), inner.contiguous())


def damped(matrix: Tensor) -> Tensor:
    return (1 - ALPHA) * matrix + ALPHA * identity(len(matrix))


@pytest.fixture
def _accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CG solve, where a benchmark lets it stop early."""
    monkeypatch.setattr("benchmarks.steps.CG_TOL", 1e-13)
    monkeypatch.setattr("benchmarks.steps.CG_MAXITER", None)


@pytest.mark.usefixtures("_accurate")
def test_ggnmp_solves_with_the_exact_ggn_blocks() -> None:
    pytest.importorskip("backpack")
    model, images, labels = problem()
    step = moved(model, lambda m: peers.ggnmp(m, 1.0), (images, labels))
    blocks = ggn_blocks(model, LOSS, images, labels)
    for name, g in gradients(model, images, labels).items():
        expected = torch.linalg.solve(damped(blocks[name]), g.flatten())
        near(step[name].flatten(), -expected)


@pytest.mark.usefixtures("_accurate")
def test_autograd_solves_with_the_whole_ggn() -> None:
    model, images, labels = problem()
    step = moved(
        model, lambda m: OWN["autograd, GGN by CG"][0](m, 1.0), (images, labels)
    )
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = torch.func.jacrev(
        lambda values: torch.func.functional_call(model, values, images)
    )(parameters)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)
    p = torch.softmax(model(images), dim=1).detach()
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    ggn = torch.einsum("nci,ncd,ndj->ij", J, H, J) / len(images)
    g = torch.cat([g.flatten() for g in gradients(model, images, labels).values()])
    actual = torch.cat([change.flatten() for change in step.values()])
    near(actual, -torch.linalg.solve(damped(ggn), g))


def test_kfac_solves_with_its_own_factors() -> None:
    """The factors are those of one sampled label, so they are taken as they are."""
    pytest.importorskip("curvlinops")
    from curvlinops import KFACLinearOperator

    model, images, labels = problem()
    step = moved(model, lambda m: peers.kfac(m, 1.0), (images, labels))
    operator = KFACLinearOperator(
        model,
        LOSS,
        list(model.parameters()),
        [(images, labels)],
        check_deterministic=False,  # The check would add the factors up twice.
    )
    operator.compute_kronecker_factors()
    g = gradients(model, images, labels)
    for layer in ("1", "3"):
        expected = peers.solve_layer(
            operator._gradient_covariances[layer].clone(),
            operator._input_covariances[layer].clone(),
            g[f"{layer}.weight"],
            g[f"{layer}.bias"],
        )
        near(step[f"{layer}.weight"], -expected[0])
        near(step[f"{layer}.bias"], -expected[1])


# --- What is counted and fitted -----------------------------------------------


@pytest.mark.parametrize("power", [0, 0.5, 1, 3])
def test_exponent_of_a_power_law(power: float) -> None:
    x = [10, 30, 100, 300, 1000]
    assert growth.exponent(x, [7e-3 * v**power for v in x]) == pytest.approx(power)


def test_exponent_is_the_best_of_the_logarithms() -> None:
    """Errors of equal factors, up and down in turn, leave a symmetric fit alone."""
    x = [1, 2, 4, 8, 16]
    factors = [1.1, 1, 1 / 1.21, 1, 1.1]
    y = [v**2 * f for v, f in zip(x, factors, strict=True)]
    assert growth.exponent(x, y) == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "solver", "power"),
    [
        ("width", "sgd", 2),
        ("width", "cg", 2),
        ("width", "direct", 3),
        ("depth", "sgd", 1),
        ("depth", "direct", 1),
        ("batch", "cg", 1),
        ("classes", "sgd", 1),
        ("classes", "cg", 2),
        ("classes", "direct", 3),
    ],
)
def test_counted_arithmetic_grows_as_it_must(
    name: str, solver: str, power: float
) -> None:
    """In the limit of one large number the leading power is left."""
    values = [2**16, 2**17]
    shapes = [growth.Shape(**{**SHAPE, name: value}) for value in values]

    def flops(shape: growth.Shape) -> float:
        if solver == "sgd":
            return work.total_flops(work.first_order(shape.sizes, shape.batch))
        products = [4] * (shape.depth + 1)
        return work.total_flops(work.newton(shape.sizes, shape.batch, solver, products))

    fitted = growth.exponent(values, [flops(shape) for shape in shapes])
    assert fitted == pytest.approx(power, abs=0.01)


SHAPE = {"width": 16, "depth": 2, "batch": 10, "classes": 3}


def test_forward_and_backward_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, images, labels = problem()
    counter = FlopCounterMode(display=False)
    with counter:
        LOSS(model(images), labels).backward()
    counted = work.first_order(SIZES, len(images))
    expected = counted["forward"].flops + counted["backward"].flops
    assert counter.get_total_flops() == expected


# --- Timing, stages, memory ---------------------------------------------------


def test_methods_alternate_and_slow_ones_stop_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock is one that each step moves by what it costs."""
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def step(name: str, cost: float) -> Callable:
        def run(images: Tensor, labels: Tensor) -> None:
            calls.append(name)
            now[0] += cost

        return run

    steps = {"a": step("a", 1.0), "b": step("b", 2.0), "slow": step("slow", 50.0)}
    seconds = measure.alternate(steps, torch.ones(1), torch.ones(1), 6, budget=60.0)
    assert calls[:6] == ["a", "b", "slow"] * 2
    assert [len(times) for times in seconds.values()] == [6, 6, measure.FEWEST]
    result = measure.summary(seconds)
    assert [r.times_sgd for r in result.values()] == [1, 2, 50]
    assert [r.rounds for r in result.values()] == [6, 6, measure.FEWEST]


def test_the_stages_are_the_step() -> None:
    """Taken apart or not, it leads to the same weights."""
    model, images, labels = problem()
    whole, parts = Newton(copy.deepcopy(model), 0.15), Newton(model, 0.15)
    whole(images, labels)
    seconds = stages.stages(parts, images, labels)
    for a, b in zip(whole.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    counted = work.newton(SIZES, len(labels), "cg", whole.products())
    assert list(seconds) == list(counted)


def test_peak_memory_is_that_of_the_allocations() -> None:
    kept = []

    def step(images: Tensor, labels: Tensor) -> None:
        first = torch.empty(1000, 250)
        kept.append(torch.empty(1000, 250))
        del first
        torch.empty(1000, 125)

    # Second step: 1 MB kept before, 1 MB passing, 1 MB kept now.
    assert memory.peak(step, torch.ones(1), torch.ones(1)) == pytest.approx(3e6, 1e-3)


def test_training_leaves_the_start() -> None:
    model = points.network(SIZES)
    _, images, labels = problem(40)
    data = TensorDataset(images.float(), labels)
    before = loss_of(model, images.float(), labels)
    points.train(model, data, epochs=20)
    assert loss_of(model, images.float(), labels) < before


def test_mid_training_is_trained_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = TensorDataset(torch.rand(20, 3, 32, 32), torch.arange(20) % 10)
    sets = iter([data])
    monkeypatch.setattr(points, "cifar10", lambda train: next(sets))
    monkeypatch.setattr(points, "CACHE", tmp_path / "build" / "mid.pt")
    monkeypatch.setattr(points, "EPOCHS", 1)
    first = points.mid_training("cpu")
    second = points.mid_training("cpu")  # There is no second set to train on.
    start = points.initial()
    for name, p in second.named_parameters():
        assert torch.equal(p, first.get_parameter(name))
        assert not torch.equal(p, start.get_parameter(name))


def test_without_official_data_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HBP_DATA", str(tmp_path))
    monkeypatch.delenv("HBP_TUTORIAL", raising=False)
    full = harness.full_problem("cpu")
    assert full.models["mid-training"] == "the official CIFAR-10 is not here"
    assert full.images.shape == (500, 3072)


# --- The report, its tables and its figures -----------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the command writes, in a rehearsal."""
    folder = tmp_path_factory.mktemp("benchmarks")
    arguments = ["benchmarks", "--quick", "--device", "cpu", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        harness.main()
    return json.loads((folder / "cpu.json").read_text("utf-8"))


def test_report_says_where_it_comes_from(report: dict) -> None:
    made = report["provenance"]
    for key in ("date", "commit", "machine", "threads", "processors", "python"):
        assert made[key]
    assert made["versions"]["torch"] == torch.__version__.partition("+")[0]
    taking_part = set(report["float32"]["steps"]["initialisation"]["methods"])
    assert taking_part | set(report["skipped"]) == set(METHODS)


def test_report_has_all_sections(report: dict) -> None:
    part = report["float32"]
    assert set(part) == {
        "steps",
        "stages",
        "ceilings",
        "memory",
        "growth",
        "convolution",
    }
    assert next(iter(part["steps"]["initialisation"]["methods"])) == "SGD, momentum"
    assert "skipped" in part["steps"]["mid-training"]
    assert set(part["stages"]["initialisation"]) == {"hbp, cg", "hbp, direct"}
    assert min(part["stages"]["initialisation"]["hbp, cg"]["products"]) >= 1
    assert set(part["memory"]["peak_bytes"]) >= set(OWN)
    assert set(part["growth"]["panels"]) == set(growth.RANGES["cpu"].values)


def test_pages_show_the_numbers_of_the_report(report: dict) -> None:
    pages = draw.tables(report)
    adam = report["float32"]["steps"]["initialisation"]["methods"]["Adam"]
    (row,) = [line for line in pages["steps"].splitlines() if "Adam" in line]
    assert f"| {draw.short(adam['times_sgd'])} |" in row
    assert report["provenance"]["commit"] in pages["machine"]
    assert {"stages-initialisation-cg", "growth", "memory", "ceilings"} <= set(pages)
    for page in pages.values():
        lines = page.splitlines()
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1


def test_figures_are_the_same_every_time(report: dict) -> None:
    first, second = draw.figures(report), draw.figures(report)
    assert set(first) == {"steps", "growth"}
    for name, drawing in first.items():
        svg = drawing.svg()
        assert svg == second[name].svg()
        assert "date" not in svg


def test_growth_figure_names_both_exponents(report: dict) -> None:
    axes = draw.figures(report)["growth"].figure.axes[0]
    fit = report["float32"]["growth"]["panels"]["width"]["methods"]["hbp, cg"]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[1] == f"hbp, cg: {fit['fitted']:.2f} ({fit['predicted']:.2f})"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.0012, "1e−03"),
        (0.05, "0.05"),
        (-1.234, "−1.23"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (99.96, "100"),
        (1234.5, "1234"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert draw.short(value) == text


def check_pages(folder: Path) -> None:
    """Every table in a folder is what its JSON file says, and none is left over."""
    expected = {
        f"{path.stem}-{name}.md": page
        for path in folder.glob("*.json")
        for name, page in draw.tables(json.loads(path.read_text("utf-8"))).items()
    }
    found = {path.name: path.read_text("utf-8") for path in folder.glob("*.md")}
    assert found == expected


def test_committed_pages_are_those_of_the_committed_numbers() -> None:
    check_pages(RESULTS)


def test_a_typed_number_would_be_noticed(report: dict, tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps(report), "utf-8")
    draw.main(tmp_path)
    assert (tmp_path / "cpu-growth.svg").exists()
    check_pages(tmp_path)
    page = tmp_path / "cpu-steps.md"
    page.write_text(page.read_text("utf-8").replace("1.00", "0.99", 1), "utf-8")
    with pytest.raises(AssertionError):
        check_pages(tmp_path)
