"""What the pages that choose a treatment and compare with other code say is true."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from helpers import COMPARED, ROOT, SHARE, close, examples_of, small_batch, small_net
from torch import Tensor, nn

import hbp
from hbp.core import settings
from hbp.operators import DenseOperator

DOCS = ROOT / "docs"


def number(word: str) -> float | None:
    try:
        return float(word.rstrip(".,%"))
    except ValueError:
        return None


SHOWN = [
    pytest.param(code, shown, COMPARED[page.name], id=f"{page.name}-{number}")
    for page in (ROOT / "README.md", DOCS / "treatments.md", DOCS / "uses.md")
    for number, (code, shown) in enumerate(examples_of(page))
    if shown
]


def test_three_pages_show_what_examples_print() -> None:
    names = [str(example.id).partition("-")[0] for example in SHOWN]
    assert Counter(names) == {"README.md": 1, "treatments.md": 2, "uses.md": 3}


@pytest.mark.parametrize(("code", "shown", "tolerance"), SHOWN)
def test_a_page_shows_what_its_example_prints(
    code: str, shown: str, tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert len(shown.splitlines()) == len(printed.splitlines())
    for word, other in zip(shown.split(), printed.split(), strict=True):
        value = number(word)
        if value is None:
            assert other == word
        else:
            share = SHARE if "%" in word else tolerance
            assert number(other) == pytest.approx(value, rel=share)


def test_the_page_on_layers_says_up_to_which_size_jacobians_are_formed() -> None:
    page = (DOCS / "layers.md").read_text("utf-8")
    assert f"up to {settings.DENSE_FEATURES} features" in page


def test_first_blocks_are_far_below_the_largest_alpha() -> None:
    """As the page says: a fifth of 0.01. Measured: 4e-4 and 1e-3."""
    page = (DOCS / "treatments.md").read_text("utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)[-1]
    example = {"__name__": "example"}
    found = []

    class Inspected(hbp.CGNewton):
        """Looks at the blocks of the first step, and ends the example there."""

        def step(self, closure=None) -> None:
            for p in self.param_groups[0]["params"][::2]:
                found.append(hbp.extremal_eigenvalues(p.hessian, 1).largest.max())
            raise StopIteration

    exec(compile(code.split("alphas =")[0], "treatments.md", "exec"), example)
    example["CGNewton"] = Inspected
    with pytest.raises(StopIteration):
        example["train"]("abs", 0.01)
    assert max(found[:2]) < 0.01 / 5
    assert min(found[2:]) > 0.01


def test_alpha_scales_with_the_loss() -> None:
    """Up to the factor of (1-α)H, which is close to 1 for a small α."""
    hbp.set_seeds(0)
    factor = torch.randn(6, 6, dtype=torch.float64)
    H, g = factor @ factor.T, torch.randn(6, dtype=torch.float64)
    step = DenseOperator(H).solve(-g, 0.001)
    close(DenseOperator(10 * H).solve(-10 * g, 0.01), step, rtol=0.02, atol=0)


def block_of_first_bias(
    model: hbp.HBPSequential, x: Tensor, y: Tensor, treatment: str, power: int
) -> Tensor:
    """Σ_n D Wᵀ H_n W D + mod(diag(φ'' ⊙ δ^power)) of a 4-5-3 net with a sigmoid."""
    first, _, last = model
    hidden = first(x).sigmoid().detach().requires_grad_()
    outputs = last(hidden)
    loss = nn.functional.cross_entropy(outputs, y)
    (delta,) = torch.autograd.grad(loss, hidden)
    slope = hidden * (1 - hidden)
    residual = slope * (1 - 2 * hidden) * delta**power
    residual = residual.abs() if treatment == "abs" else residual.clamp(min=0)
    jacobians = last.weight * slope[:, None]  # [n, classes, features]
    p = outputs.softmax(1)
    hessians = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(x)
    blocks = jacobians.mT @ hessians @ jacobians + torch.diag_embed(residual)
    return blocks.sum(0).detach()


@pytest.mark.parametrize("treatment", ["abs", "clip"])
def test_backpack_has_the_gradient_twice(treatment: str) -> None:
    """What docs/differences.md says of PCHMP."""
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model, (x, y) = small_net(), small_batch()
    plain = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    plain.load_state_dict(model.state_dict())
    loss = backpack.extend(nn.CrossEntropyLoss())(
        backpack.extend(plain)(x.requires_grad_()), y
    )
    with backpack.backpack(extensions.PCHMP(modify=treatment)):
        loss.backward()
    eye = torch.eye(5, dtype=torch.float64)
    theirs = plain[0].bias.pchmp(eye)
    close(theirs, block_of_first_bias(model, x, y, treatment, power=2))

    outputs = model(x)
    loss = nn.functional.cross_entropy(outputs, y)
    hessians = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(hessians, modify_2nd_order_terms=treatment)
    ours = model[0].bias.hessian.to_dense()
    close(ours, block_of_first_bias(model, x, y, treatment, power=1))
    # Measured: 0.4 to 0.95 of the largest entry.
    assert (ours - theirs).abs().max() > 0.1 * ours.abs().max()


def test_the_errors_that_are_explained_are_those_of_the_package() -> None:
    page = (DOCS / "diverges.md").read_text("utf-8")
    said = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(said) >= 10
    sources = [path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")]
    # A sentence goes on in the next literal.
    code = re.sub(r'"\s*f?"', "", "".join(sources))
    assert [words for words in said if words not in code] == []
