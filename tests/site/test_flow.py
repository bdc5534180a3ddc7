"""The figure of curvature on its way: its numbers, and what its page says of them."""

from __future__ import annotations

import copy
import json
import re
import sys
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import ROOT, close, load, same_drawing
from torch import Tensor, nn

from hbp.reference import Recursion, ggn_blocks, hessian_blocks

PAGE = " ".join((ROOT / "docs/flow.md").read_text("utf-8").split())
pytest.importorskip("sklearn")
with patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]):
    tool = load(ROOT / "tools" / "draw_flow.py")
STATES = [
    tool.State(*choices)
    for choices in product(
        tool.ACTIVATIONS, tool.SCHEMES, tool.BATCHES, tool.TREATMENTS
    )
]
POSITIVE = ("ggn", "abs", "clip")


@pytest.fixture(scope="module")
def flow() -> Any:
    return tool.Flow()


def committed() -> str:
    return tool.TARGET.read_text("utf-8")


def split(html: str) -> tuple[str, Any]:
    """The drawing, and the numbers for the script."""
    found = re.search(r'(.*id="flow-numbers">)(.*?)(</script>.*)', html, re.S)
    assert found is not None
    return found[1] + found[3], json.loads(found[2])


def plain(activation: str) -> nn.Sequential:
    """The network without this package."""
    layers: list[nn.Module] = []
    for layer in tool.network(activation):
        if isinstance(layer, nn.Linear):
            twin = nn.Linear(layer.in_features, layer.out_features).double()
            twin.load_state_dict(layer.state_dict())
            layers.append(twin)
        else:
            layers.append(nn.Sigmoid() if activation == "sigmoid" else nn.ReLU())
    return nn.Sequential(*layers)


def biases(blocks: dict[str, Tensor]) -> list[Tensor]:
    """From the first layer on."""
    return [blocks[name] for name in sorted(blocks) if name.endswith("bias")]


# --------------------------------------------------------------------------------------
# The committed figure.
# --------------------------------------------------------------------------------------


def test_drawing_is_what_its_script_draws(flow: Any) -> None:
    (drawn, _), (stored, _) = split(tool.draw(flow)), split(committed())
    same_drawing(drawn, stored)


def test_numbers_are_what_the_script_computes(flow: Any) -> None:
    """Percents up to one, and others up to one unit of their third digit."""

    def compare(new: Any, old: Any) -> None:
        if isinstance(new, dict):
            assert new.keys() == old.keys()
            for key in new:
                compare(new[key], old[key])
        elif isinstance(new, list):
            assert len(new) == len(old)
            for item, other in zip(new, old, strict=True):
                compare(item, other)
        elif isinstance(new, float):
            # 1.00 is followed by 1.01, and 9.99 by 10.0.
            assert new == pytest.approx(old, rel=1.01e-2, abs=0)
        else:
            assert abs(new - old) <= 1

    (_, new), (_, old) = split(tool.draw(flow)), split(committed())
    compare(new, old)
    assert new["place"] == old["place"]


def test_numbers_stand_for_the_matrices(flow: Any) -> None:
    """Read as the script reads them."""
    states = split(committed())[1]["states"]
    for state in STATES:
        stored = states[state.activation][state.scheme][str(state.batch)]
        blocks = flow.blocks[state]
        for (largest, percents, values), block in zip(
            stored[state.treatment], blocks, strict=True
        ):
            read = torch.zeros_like(block)
            below = tuple(torch.tril_indices(*block.shape))
            read[below] = torch.tensor(percents).double() * largest / 100
            read = read + read.tril(-1).T
            # Half a percent, and half a unit of three digits.
            assert (read - block).abs().max() < 0.0101 * block.abs().max()
            exact = torch.linalg.eigvalsh(block)
            for value, other in zip(values, exact.tolist(), strict=True):
                if value:
                    assert value == pytest.approx(other, rel=5.1e-3)
                else:
                    assert abs(other) < tool.FLOOR
            # So that JavaScript writes it as Python does.
            assert largest > 1e-6


def test_fragment_is_small_needs_no_server_and_runs_no_inline_script() -> None:
    html = committed()
    assert len(html.encode()) <= 150_000
    assert re.findall(r"\son\w+=", html) == []
    assert "://" not in html
    scripts = re.findall(r"<script([^>]*)>", html)
    assert ["application/json" in script for script in scripts] == [True]
    assert "data-search-exclude" in html


@pytest.mark.parametrize(("page", "up"), [("flow.md", "../"), ("index.md", "")])
def test_pages_say_where_style_and_script_are(page: str, up: str) -> None:
    text = (ROOT / "docs" / page).read_text("utf-8")
    before, after = text.split('--8<-- "flow/flow.html"')
    style = f'<link rel="stylesheet" href="{up}assets/flow/flow.css">'
    assert before.endswith(style + "\n")
    assert after.startswith(f'\n<script src="{up}assets/flow/flow.js" defer></script>')


def test_drawings_have_an_alternative() -> None:
    labels = re.findall(r'<svg[^>]*role="img"[^>]*aria-label="([^"]*)"', committed())
    assert len(labels) == committed().count("<svg") == 2
    assert all(len(label) > 100 for label in labels)


# --------------------------------------------------------------------------------------
# The numbers are what they are called, without the code that made them.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", tool.ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 8])
def test_blocks_are_those_of_automatic_differentiation(
    flow: Any, activation: str, batch: int
) -> None:
    """Of every scheme at batch size 1, and of the exact one at any."""
    model, loss = plain(activation), nn.CrossEntropyLoss()
    inputs, labels = flow.batch(batch)
    judges = {"none": hessian_blocks, "ggn": ggn_blocks}
    for treatment, judge in judges.items():
        expected = biases(judge(model, loss, inputs, labels))
        for scheme in tool.SCHEMES if batch == 1 else ["exact"]:
            state = tool.State(activation, scheme, batch, treatment)
            for block, other in zip(flow.blocks[state], expected, strict=True):
                # Measured: 7e-16 at most, of the largest entry.
                assert (block - other).abs().max() < 1e-13 * other.abs().max()


@pytest.mark.parametrize("activation", tool.ACTIVATIONS)
def test_blocks_are_those_of_the_recursion(flow: Any, activation: str) -> None:
    """All treatments and schemes at batch size 8, by dense Jacobians."""
    inputs, labels = flow.batch(8)
    model = plain(activation)
    judge = Recursion(copy.deepcopy(model), nn.CrossEntropyLoss(), inputs, labels)
    for scheme, treatment in product(tool.SCHEMES, tool.TREATMENTS):
        if scheme == "exact":
            found = judge.exact(treatment)
        else:
            averaged = scheme == "jacobian"
            found = judge.batch(treatment, averaged, averaged)
        state = tool.State(activation, scheme, 8, treatment)
        expected = biases(found.parameters)
        for block, other in zip(flow.blocks[state], expected, strict=True):
            assert (block - other).abs().max() < 1e-13 * other.abs().max()


def test_walk_leads_from_block_to_block(flow: Any) -> None:
    """What an activation adds is diagonal, as its treatment leaves it."""
    for activation, batch in product(tool.ACTIVATIONS, tool.BATCHES):
        model, added = plain(activation), {}
        inputs, _ = flow.batch(batch)
        for treatment in tool.TREATMENTS:
            state = tool.State(activation, "jacobian", batch, treatment)
            blocks = flow.blocks[state]
            for k, (below, scaled) in zip((3, 2, 1), flow.walks[state], strict=True):
                W: Any = model[2 * k].weight
                close(below, W.detach().T @ blocks[k] @ W.detach())
                z = model[: 2 * k - 1](inputs).detach()
                slopes = torch.func.vmap(
                    torch.func.vmap(torch.func.grad(lambda x, f=model[2 * k - 1]: f(x)))
                )(z).mean(0)
                close(scaled, slopes.diag() @ below @ slopes.diag())
                rest = blocks[k - 1] - scaled
                r = rest.diagonal()
                assert (rest - r.diag()).abs().max() < 1e-15
                added[treatment, k] = r
        for k in (3, 2, 1):
            r = added["none", k]
            # Differences of numbers below 1.
            close(added["ggn", k], torch.zeros_like(r), rtol=0, atol=1e-15)
            close(added["abs", k], r.abs(), rtol=0, atol=1e-15)
            close(added["clip", k], r.clamp(min=0), rtol=0, atol=1e-15)
            assert (r.abs().max() > 1e-4) == (activation == "sigmoid")


# --------------------------------------------------------------------------------------
# What the page says.
# --------------------------------------------------------------------------------------


def says(words: str) -> None:
    assert words in PAGE


def spectra(flow: Any, state: Any) -> list[Tensor]:
    return [torch.linalg.eigvalsh(block) for block in flow.blocks[state]]


def overtaken(flow: Any, state: Any, alpha: float) -> list[int]:
    """The layers whose eigenvalues are all smaller than α."""
    pairs = enumerate(spectra(flow, state), start=1)
    return [k for k, values in pairs if values.abs().max() < alpha]


def test_page_on_negative_curvature(flow: Any) -> None:
    assert tool.SHOWN.treatment == "none"
    says("The figure starts with the Hessian")
    says("in every layer but that of the output")
    for state in STATES:
        lowest = [values[0].item() for values in spectra(flow, state)]
        if state.treatment == "none" and state.activation == "sigmoid":
            assert max(lowest[:3]) < -1e-3
            assert lowest[3] > -1e-15
        else:
            assert min(lowest) > -1e-15
    says("the three have no negative eigenvalues")


def test_page_on_the_first_layer(flow: Any) -> None:
    def fades(treatment: str) -> float:
        first, *_, last = spectra(flow, tool.SHOWN._replace(treatment=treatment))
        return (last[-1] / first[-1]).item()

    says(f"shrinks by a factor of {fades('ggn'):.0f} between")
    says(f"with abs only by {fades('abs'):.0f}.")


def test_page_on_relu(flow: Any) -> None:
    says("the four treatments agree in every tile")
    for state in STATES:
        if state.activation == "ReLU":
            others = flow.blocks[state._replace(treatment="none")]
            for block, other in zip(flow.blocks[state], others, strict=True):
                close(block, other)


def test_page_on_batch_schemes(flow: Any) -> None:
    says("the three batch schemes agree")
    for state in STATES:
        if state.batch == 1:
            others = flow.blocks[state._replace(scheme="exact")]
            for block, other in zip(flow.blocks[state], others, strict=True):
                close(block, other, rtol=1e-12, atol=1e-16)
    state = tool.SHOWN._replace(treatment="abs")
    assert (state.activation, state.batch) == ("sigmoid", 8)
    averaged = spectra(flow, state)[0][-1]
    exact = spectra(flow, state._replace(scheme="exact"))[0][-1]
    says(f"is {averaged:.3g} for averaged Jacobians and {exact:.3g} for exact products")


def test_page_on_alpha(flow: Any) -> None:
    says("α = 0.1 overtakes layers 1 and 2, whatever else you choose, and α = 0.001 no")
    says(
        "With sigmoids and averaged Jacobians, α = 0.01 overtakes layer 1 with GGN, but"
    )
    for state in STATES:
        assert {1, 2} <= set(overtaken(flow, state, 0.1))
        assert overtaken(flow, state, 0.001) == []
        if state[:2] == ("sigmoid", "jacobian"):
            if state.treatment == "ggn":
                assert overtaken(flow, state, 0.01) == [1]
            if state.treatment == "abs":
                assert overtaken(flow, state, 0.01) == []


def test_page_on_the_problem(flow: Any) -> None:
    says(f"{len(flow.labels)} of them")
    says(f"seed {tool.SEED}, times {tool.SCALES['sigmoid']:g} for sigmoids")
    says(f"times {tool.SCALES['ReLU']:g} for ReLU")
    says("the first {}, {} or {}".format(*tool.BATCHES))
