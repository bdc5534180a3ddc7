"""What may depend on what, how large it may become, and the names that stay."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, load

import hbp

PACKAGE = ROOT / "src" / "hbp"
CORE = PACKAGE / "core"

# --------------------------------------------------------------------------------------
# One direction: add-ons import the core, and the core imports no add-on.
# --------------------------------------------------------------------------------------


def imported(source: str, package: str) -> Iterator[str]:
    """Modules that a file in a package imports, also inside functions, by full names.

    Of ``from a import b`` it is a.b, which may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("import_module", "__import__"):
                yield ast.unparse(node)


def foreign(source: str, package: str) -> list[str]:
    """Of these, the ones that belong to hbp, but not to its core."""
    found = (name for name in imported(source, package) if "hbp" in name)
    return [name for name in found if not f"{name}.".startswith("hbp.core.")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch, math", []),
        ("from hbp.core.guards import is_number", []),
        ("from ..operators import System", []),
        ("from . import linear", []),
        ("import hbp.core.cg", []),
        ("import hbp", ["hbp"]),
        ("import torch, hbp.fast as fast", ["hbp.fast"]),
        ("from hbp import core, fast", ["hbp.fast"]),
        ("from hbp.corelike import x", ["hbp.corelike.x"]),
        ("from ... import fast", ["hbp.fast"]),
        ("from ...fast import FastBatch", ["hbp.fast.FastBatch"]),
        ("def f():\n    from ...layers import general", ["hbp.layers.general"]),
        ("if TYPE_CHECKING:\n    from hbp.fast import x", ["hbp.fast.x"]),
        (
            "importlib.import_module('hbp.fast')",
            ["importlib.import_module('hbp.fast')"],
        ),
    ],
)
def test_the_check_of_imports_can_tell(source: str, expected: list[str]) -> None:
    assert foreign(source, "hbp.core.layers") == expected


@pytest.mark.parametrize(
    "path", sorted(CORE.rglob("*.py")), ids=lambda p: p.relative_to(CORE).as_posix()
)
def test_the_core_imports_nothing_of_hbp_outside_itself(path: Path) -> None:
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
    assert foreign(path.read_text("utf-8"), package) == []


def test_the_core_works_alone() -> None:
    """A step of a network, while no other module of the package can be imported."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('hbp')\n"
        f"package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['hbp'] = package\n"
        "import torch\n"
        "from hbp.core.containers import HBPSequential\n"
        "from hbp.core.layers.elementwise import HBPSigmoid\n"
        "from hbp.core.layers.linear import HBPLinear\n"
        "from hbp.core.losses import batch_summed_hessian\n"
        "from hbp.core.newton import CGNewton\n"
        "model = HBPSequential(HBPLinear(4, 5), HBPSigmoid(), HBPLinear(5, 3))\n"
        "optimizer = CGNewton(model.parameters(), lr=0.1, alpha=0.1)\n"
        "before = [p.clone() for p in model.parameters()]\n"
        "for average in (True, False):\n"
        "    model.set_hbp_approximation(average, average)\n"
        "    outputs = model(torch.randn(6, 4))\n"
        "    loss = torch.nn.CrossEntropyLoss()(outputs, torch.arange(6) % 3)\n"
        "    optimizer.zero_grad()\n"
        "    H = batch_summed_hessian(loss, outputs)\n"
        "    loss.backward()\n"
        "    model.backward_hessian(H, modify_2nd_order_terms='abs')\n"
        "    optimizer.step()\n"
        "moved = [not p.equal(b) for p, b in zip(model.parameters(), before)]\n"
        "assert all(moved)\n"
        "others = [n for n in sys.modules if n.startswith('hbp.')]\n"
        "assert all((n + '.').startswith('hbp.core.') for n in others), others\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------
# Size, as `make size` counts it.
# --------------------------------------------------------------------------------------


def lines_of(files: list[Path]) -> dict[str, int]:
    code_lines = load(ROOT / "tools" / "size.py").code_lines
    return {path.relative_to(PACKAGE).as_posix(): code_lines(path) for path in files}


def test_lines_of_code_are_neither_comments_nor_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        '"""Three\n\nlines."""\n'
        "# A comment.\n\n"
        "import math  # One.\n"
        "x = 1\n"
        '"""What x is."""\n\n'
        "def f(\n    a,\n):\n"
        '    """A docstring."""\n'
        '    text = """Of\n\n    three."""\n'
        "    return text\n",
        "utf-8",
    )
    assert load(ROOT / "tools" / "size.py").code_lines(path) == 2 + 3 + 3 + 1


def test_no_file_is_long() -> None:
    lines = lines_of(list(PACKAGE.rglob("*.py")))
    assert {name: n for name, n in lines.items() if n > 500} == {}


@pytest.mark.parametrize(("folder", "most"), [(CORE, 1900), (PACKAGE, 5970)])
def test_the_package_is_small(folder: Path, most: int) -> None:
    lines = lines_of(list(folder.rglob("*.py")))
    assert sum(lines.values()) <= most


# --------------------------------------------------------------------------------------
# Every name that users of hbp 0.1 import is still there.
# --------------------------------------------------------------------------------------

LAYERS = """
    BilinearRule ElementwiseRule GeneralRule HBPAdaptiveAvgPool1d HBPAdaptiveAvgPool2d
    HBPAdaptiveAvgPool3d HBPAvgPool1d HBPAvgPool2d HBPAvgPool3d HBPBatchNorm1d
    HBPBatchNorm2d HBPBatchNorm3d HBPCELU HBPConv1d HBPConv2d HBPConv3d
    HBPConvTranspose1d HBPConvTranspose2d HBPConvTranspose3d HBPDropout HBPDropout1d
    HBPDropout2d HBPDropout3d HBPELU HBPElementwise HBPFlatten HBPGELU HBPHardswish
    HBPHardtanh HBPIdentity HBPLayerNorm HBPLeakyReLU HBPLinear HBPLogSigmoid
    HBPMaxPool1d HBPMaxPool2d HBPMaxPool3d HBPMish HBPModule HBPReLU HBPReLU6
    HBPResidual HBPSELU HBPSequential HBPSiLU HBPSigmoid HBPSoftplus HBPSoftsign HBPTanh
    HBPUnflatten HBPZeroPad1d HBPZeroPad2d HBPZeroPad3d LinearRule
"""

NAMES = {
    "hbp": f"""
        {LAYERS} CGNewton CGResult LevenbergMarquardt batch_summed_hessian cg
        compare_curvature condition_number convert estimate_trace extremal_eigenvalues
        inspect_curvature negative_mass output_hessian per_sample_hessian
        set_dense_limit set_seeds
    """,
    "hbp.modules": LAYERS,
    "hbp.optim": "CGNewton CGResult LevenbergMarquardt StepInfo cg",
    "hbp.losses": "batch_summed_hessian output_hessian per_sample_hessian",
    "hbp.operators": """
        Congruence DenseOperator DiagonalOperator KroneckerBlock MatrixFree OperatorSum
        SampleBlocks SymmetricOperator ZeroOperator set_dense_limit
    """,
    "hbp.inspect": """
        CurvatureComparison CurvatureReport CurvatureRow ExtremalEigenvalues
        NegativeMass TraceEstimate compare_curvature condition_number estimate_trace
        extremal_eigenvalues inspect_curvature negative_mass
    """,
    "hbp.distributed": "average joint_weight",
    "hbp.reference": """
        Curvature batch_blocks exact_blocks ggn_blocks hessian hessian_blocks
    """,
    "hbp.testing": "check_layer",
    "hbp.seeds": "set_seeds",
}

# What `import hbp` alone makes known.
SUBMODULES = "blocks distributed inspect losses modules nn operators optim seeds"


@pytest.mark.parametrize("module", NAMES)
def test_every_name_stays(module: str) -> None:
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert missing == []


def test_layers_are_the_same_under_both_names() -> None:
    modules = importlib.import_module("hbp.modules")
    for name in LAYERS.split():
        assert getattr(modules, name) is getattr(hbp, name)
    with pytest.raises(AttributeError, match=r"'hbp\.modules' has no attribute 'Nope'"):
        modules.Nope  # noqa: B018


def test_import_hbp_makes_its_submodules_known() -> None:
    """As in ``hbp.optim.StepInfo`` after ``import hbp``; here nothing else imports."""
    code = f"import hbp\nfor name in {SUBMODULES.split()}: getattr(hbp, name)\n"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
