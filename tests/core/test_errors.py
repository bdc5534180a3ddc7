"""Bad input: an error that names the thing and the remedy, and nothing has moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    randn,
    send_back,
    small_batch,
    small_net,
    spd,
    trained,
    values,
)
from torch import Tensor, nn

import hbp
from hbp import CGNewton, HBPLinear, HBPSequential, HBPSigmoid, batch_summed_hessian
from hbp.core import settings
from hbp.operators import DenseOperator, MatrixFree

NAN, INF = float("nan"), float("inf")
H = torch.eye(3, dtype=torch.float64)


def forward(model: nn.Module, n: int = 6) -> tuple[Tensor, Tensor]:
    """Loss and outputs of ``small_net``."""
    x, y = small_batch(n)
    outputs = model(x)
    return nn.CrossEntropyLoss()(outputs, y), outputs


def same(left: Tensor, right: Tensor) -> bool:
    """Equal, NaN to NaN too."""
    return torch.equal(left.nan_to_num(7.7), right.nan_to_num(7.7))


def refuses(
    model: hbp.HBPModule,
    error: type[Exception],
    message: str,
    call: Callable[[], Any],
) -> Exception:
    """The error, and neither a parameter nor a p.hessian has changed."""
    before = values(model)
    curvature = [getattr(p, "hessian", None) for p in model.parameters()]
    with pytest.raises(error, match=f"(?s){message}") as refused:
        call()
    assert all(map(same, values(model), before))
    for p, kept in zip(model.parameters(), curvature, strict=True):
        assert getattr(p, "hessian", None) is kept
    return refused.value


# --------------------------------------------------------------------------------------
# Order of calls.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("backward", [False, True])
def test_step_before_backward_hessian(backward: bool, solver: str) -> None:
    model = small_net()
    if backward:
        forward(model)[0].backward()
    optimizer = CGNewton(model.parameters(), 0.1, 0.1, solver=solver)
    message = (
        r"gradient but no curvature for parameter 0 of group 0, shape \[5, 4\]\. "
        r"Call model\.backward_hessian"
        if backward
        else r"found no gradient\. Call loss\.backward\(\) and then "
        r"model\.backward_hessian"
    )
    refuses(model, RuntimeError, message, optimizer.step)


def test_step_after_zero_grad() -> None:
    model = trained()
    optimizer = CGNewton(model.parameters(), 0.1, 0.1)
    optimizer.zero_grad()
    refuses(model, RuntimeError, "found no gradient", optimizer.step)


def test_second_step_with_old_curvature() -> None:
    """The first step used it up; and the chain notices that weights have moved."""
    model = trained()
    optimizer = CGNewton(model.parameters(), 0.1, 0.1)
    kept = [p.hessian for p in model.parameters()]
    optimizer.step()
    refuses(model, RuntimeError, "no curvature for parameter 0", optimizer.step)
    for p, hessian in zip(model.parameters(), kept, strict=True):
        p.hessian = hessian
    refuses(model, RuntimeError, "has changed since", optimizer.step)


@pytest.mark.parametrize("grad", [True, False])
def test_backward_hessian_before_forward(grad: bool) -> None:
    model = small_net()
    if not grad:
        with torch.no_grad():
            forward(model)
    refuses(
        model,
        RuntimeError,
        r"before a forward pass through HBPLinear.*outputs = model\(inputs\)",
        lambda: model.backward_hessian(H),
    )


def test_backward_hessian_before_backward() -> None:
    model = small_net()
    forward(model)
    message = r"HBPLinear\(in_features=5.* before loss\.backward\(\)\. Call"
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))
    # batch_summed_hessian too computes gradients; they do not count.
    loss, outputs = forward(model)
    batch_summed_hessian(loss, outputs)
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))
    # A pass with gradients for validation makes the record of training obsolete.
    forward(model)[0].backward()
    forward(model)
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))
    # And so does one that keeps a graph of the gradients: its δ is not final.
    forward(model)[0].backward(create_graph=True)
    message = "without create_graph"
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))


def test_batch_summed_hessian_after_backward() -> None:
    loss, outputs = forward(small_net())
    loss.backward()
    with pytest.raises(RuntimeError, match=r"graph of loss is gone.*before loss\.back"):
        batch_summed_hessian(loss, outputs)


# --------------------------------------------------------------------------------------
# The loss and the outputs.
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda z: z.sum(1), ValueError, r"scalar tensor, got \[6\].*'mean' or 'sum'"),
        (lambda z: 1.0, ValueError, "scalar tensor, got float"),
        (lambda z: z.sum() * NAN, ArithmeticError, "loss is nan.*learning rate"),
        (lambda z: z.sum() * INF, ArithmeticError, "loss is -?inf"),
        (lambda z: z.detach().sum(), ValueError, "gradients enabled"),
        (lambda z: randn(1).requires_grad_().sum(), ValueError, "does not depend on"),
        (
            lambda z: ((z - z.detach()) ** 1.5).sum(),
            ArithmeticError,
            "output Hessian contains NaN or infinity",
        ),
    ],
)
def test_bad_losses(make: Callable, error: type[Exception], message: str) -> None:
    model = small_net()
    _, outputs = forward(model)
    refuses(model, error, message, lambda: batch_summed_hessian(make(outputs), outputs))


def test_outputs_that_the_loss_never_saw() -> None:
    loss, outputs = forward(small_net())
    with pytest.raises(ValueError, match="not detached"):
        batch_summed_hessian(loss, outputs.detach())
    with pytest.raises(ValueError, match=r"does not depend on outputs.*very tensor"):
        batch_summed_hessian(loss, outputs * 1)


@pytest.mark.parametrize("shape", [(0, 3), (0,), ()])
@pytest.mark.parametrize("loss_func", [nn.MSELoss(reduction="sum"), nn.L1Loss()])
def test_empty_batch_of_outputs(shape: tuple, loss_func: nn.Module) -> None:
    outputs = torch.zeros(shape).requires_grad_()
    message = r"outputs has shape \[.*\]; a batch \[N, \.\.\.\] with at least one"
    with pytest.raises(ValueError, match=message):
        batch_summed_hessian(outputs.sum(), outputs)
    if shape:
        with pytest.raises((ValueError, ArithmeticError), match=r"at least one|nan"):
            hbp.output_hessian(loss_func, outputs, outputs)


def test_empty_batch_through_the_model() -> None:
    model = small_net()
    model(randn(0, 4)).sum().backward()
    message = r"batch that went through HBPLinear.* is empty"
    refuses(model, ValueError, message, lambda: model.backward_hessian(H))


def test_one_unbatched_sample_is_no_batch_of_classes() -> None:
    """CrossEntropyLoss takes a vector as one sample, not as N of one feature."""
    with pytest.raises(ValueError, match=r"\[N"):
        hbp.output_hessian(nn.CrossEntropyLoss(), randn(3), torch.tensor(1))


@pytest.mark.parametrize(
    "bad", [torch.full((3, 3), NAN), torch.full((3, 3), INF)], ids=["nan", "inf"]
)
def test_output_hessian_is_checked_with_formulas_too(bad: Tensor) -> None:
    for loss_func in (nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()):
        targets = torch.tensor([0, 1, 2])
        if isinstance(loss_func, nn.BCEWithLogitsLoss):
            targets = torch.ones(3, 3)
        with pytest.raises(ArithmeticError, match=r"(?i)nan"):
            hbp.output_hessian(loss_func, bad * torch.tensor([1.0, -1, NAN]), targets)


# --------------------------------------------------------------------------------------
# What goes into backward_hessian.
# --------------------------------------------------------------------------------------


def _with(value: float) -> Tensor:
    matrix = H.clone()
    matrix[1, 1] = value
    return matrix


@pytest.mark.parametrize(
    ("hessian", "error", "message"),
    [
        (torch.eye(4).double(), ValueError, r"\[4, 4\].*3 output features: \[3, 3\]"),
        (DenseOperator(torch.eye(4).double()), ValueError, r"\[4, 4\].*\[3, 3\]"),
        (torch.ones(3).double(), ValueError, r"shape \[3\]; .* must be \[C, C\]"),
        (torch.ones(2, 6, 3).double(), ValueError, r"shape \[2, 6, 3\].*batch_summed"),
        (torch.ones(7, 3, 3).double(), ValueError, "7 samples, but 6 went"),
        (torch.ones(0, 3, 3).double(), ValueError, r"\[0, 3, 3\] is empty"),
        (torch.ones(3, 2).double(), ValueError, r"shape \[3, 2\]"),
        (H.float(), ValueError, r"float32 on cpu.*float64 on cpu.*\.to\(\.\.\.\)"),
        (torch.eye(3, dtype=torch.int64), ValueError, "int64"),
        # The only other device that every machine has.
        (
            MatrixFree(lambda v: v, 3, H.dtype, torch.device("meta")),
            ValueError,
            r"float64 on meta.*float64 on cpu.*\.to\(\.\.\.\)",
        ),
        (H.numpy(), TypeError, r"is a ndarray; pass a \[C, C\] tensor"),
        (None, TypeError, "is a NoneType"),
        (_with(NAN), ValueError, "NaN or infinity"),
        (_with(INF), ValueError, "NaN or infinity"),
        (torch.arange(9.0).view(3, 3).double(), ValueError, "is not symmetric"),
    ],
)
def test_bad_output_hessians(
    hessian: Any, error: type[Exception], message: str
) -> None:
    model = trained()
    refuses(model, error, message, lambda: model.backward_hessian(hessian))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 3), (6, 3, 3)])
def test_an_output_hessian_is_symmetric_up_to_round_off(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Off by 1 %, or by 0.1 %, is another matrix; by 10 eps, what autograd gives."""
    model = small_net().to(dtype)
    send_back(model, small_batch()[0].to(dtype), small_batch()[1])
    symmetric = spd(3).to(dtype).expand(shape)
    skew = symmetric.abs().max() * torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0.0]])
    for off in (1e-2, 1e-3):
        bent = symmetric + off * skew.to(dtype)
        message = "output_hessian is not symmetric"
        refuses(model, ValueError, message, lambda H=bent: model.backward_hessian(H))
    model.backward_hessian(symmetric + 10 * torch.finfo(dtype).eps * skew.to(dtype))


def test_an_output_hessian_may_have_a_graph() -> None:
    """Curvature does not carry it on, and so does not keep it alive."""
    model = trained()
    model.backward_hessian(2 * H.clone().requires_grad_())
    for p in model.parameters():
        assert not p.hessian.to_dense().requires_grad


@pytest.mark.parametrize("name", ["ABS", "", "true", True, 0, [], {}, ("abs",)])
def test_unknown_treatments(name: Any) -> None:
    model = trained()
    message = "modify_2nd_order_terms=.* is unknown.*'none'.*'zero'.*'abs'.*'clip'"
    refuses(
        model,
        ValueError,
        message,
        lambda: model.backward_hessian(H, modify_2nd_order_terms=name),
    )


@pytest.mark.parametrize(
    ("where", "bad"),
    [("inputs", NAN), ("inputs", INF), ("weight", NAN), ("bias", NAN)],
)
@pytest.mark.parametrize("treatment", [None, "zero"])
def test_not_finite_in_the_model(where: str, bad: float, treatment: str | None) -> None:
    """Nothing with NaN reaches p.hessian. (A bias of inf gives a flat sigmoid: 0.)"""
    model, (x, _) = small_net(), small_batch()
    target = {"inputs": x, "weight": model[0].weight, "bias": model[0].bias}[where]
    with torch.no_grad():
        target.view(-1)[0] = bad
    model(x).sum().backward()
    refuses(
        model,
        ArithmeticError,
        r"of HBP\w+\(.*NaN or infinity",
        lambda: model.backward_hessian(H, modify_2nd_order_terms=treatment),
    )


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_gradient_that_is_not_finite_is_no_second_order_term(bad: float) -> None:
    """Derivatives are finite, and so is the output Hessian that is given."""
    model = small_net()
    _, outputs = forward(model)
    (outputs * bad).sum().backward()
    message = "The second-order term of HBPSigmoid.* contains NaN or infinity"
    refuses(model, ArithmeticError, message, lambda: model.backward_hessian(H))
    model.backward_hessian(H, modify_2nd_order_terms="zero")


def test_a_child_that_is_refused_is_named_by_its_chain_alone() -> None:
    """No note tells of the layer that was looked at before."""
    inner = HBPSequential(HBPLinear(4, 3), HBPSigmoid(), HBPLinear(3, 3))
    model = HBPSequential(inner, HBPSigmoid(), HBPLinear(3, 3)).double()
    forward(model)[0].backward()
    inner.append(nn.Tanh())
    refused = refuses(
        model,
        TypeError,
        "Child '3' of this HBPSequential is Tanh",
        lambda: model.backward_hessian(H),
    )
    assert not hasattr(refused, "__notes__")


@pytest.mark.parametrize("average", [True, False])
def test_not_finite_in_a_branch_without_parameters(average: bool) -> None:
    """Its derivative is part of a sum, and is looked at as if it stood alone."""
    model = HBPSequential(
        HBPLinear(4, 3), hbp.HBPResidual(HBPSequential(HBPSigmoid())), HBPLinear(3, 3)
    ).double()
    model.set_hbp_approximation(average_input_jacobian=average)
    loss, _ = forward(model)
    loss.backward()
    model[1].branch[0].last_record.kept.data[0, 0] = NAN
    message = r"The derivative of HBP.* contains NaN or infinity"
    refused = refuses(
        model,
        ArithmeticError,
        message,
        lambda: model.backward_hessian(H, False, "zero"),
    )
    # Averaged, what is read is the sum of the two paths.
    where = "1" if average else "1.branch.0"
    assert refused.__notes__ == [f"It is layer {where!r} of the model."]


def test_a_buffer_that_has_changed() -> None:
    """Evaluation reads the running variance, and another one is another layer."""
    model = HBPSequential(
        HBPLinear(4, 3), hbp.HBPBatchNorm1d(3, affine=False), HBPLinear(3, 3)
    ).double()
    loss, _ = forward(model.eval())
    loss.backward()
    model[1].running_var.mul_(2)
    message = "A parameter or buffer of HBPBatchNorm1d.* has changed"
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))


def test_gradients_that_were_cleared_by_hand_are_no_sum() -> None:
    model = small_net()
    loss, _ = forward(model)
    for _ in range(2):
        loss.backward(retain_graph=True)
    message = "gradients of .* are a sum over several passes"
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))
    for p in model.parameters():
        p.grad = None
    loss.backward()
    model.backward_hessian(H)


def test_gradient_accumulation_is_refused() -> None:
    model = trained()
    loss, _ = forward(model)
    loss.backward()
    message = r"sum over several passes.*zero_grad\(\)"
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))
    # Twice through the same graph is the same.
    model.zero_grad()
    loss, _ = forward(model)
    loss.backward(retain_graph=True)
    loss.backward()
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))
    # So are two forward passes that one backward pass goes through.
    model.zero_grad()
    (forward(model)[0] + forward(model)[0]).backward()
    refuses(model, RuntimeError, message, lambda: model.backward_hessian(H))
    # Zeros do not add.
    model.zero_grad(set_to_none=False)
    forward(model)[0].backward()
    model.backward_hessian(H)


def test_one_vector_is_no_batch() -> None:
    layer = HBPLinear(4, 3).double()
    layer(randn(4)).sum().backward()
    message = r"HBPLinear.*\[4\]"
    refuses(layer, ValueError, message, lambda: layer.backward_hessian(H))


def test_flatten_that_swallows_the_batch() -> None:
    layer = hbp.HBPFlatten(start_dim=0)
    layer(randn(3, 1).requires_grad_()).sum().backward()
    refuses(
        layer,
        ValueError,
        r"HBPFlatten.* mapped \[3, 1\] to \[3\].*samples first",
        lambda: layer.backward_hessian(H),
    )


def test_second_order_term_without_a_gradient() -> None:
    """An activation in front of everything trainable, and inputs without gradient."""
    model = HBPSequential(HBPSigmoid(), HBPLinear(4, 3)).double()
    forward(model)[0].backward()
    refuses(
        model,
        RuntimeError,
        r"second-order term of HBPSigmoid.*inputs\.requires_grad_\(\).*'zero'",
        lambda: model.backward_hessian(H, compute_input_hessian=True),
    )
    model.backward_hessian(H)
    assert model.backward_hessian(H, True, "zero") is not None


# --------------------------------------------------------------------------------------
# What does not belong into a model.
# --------------------------------------------------------------------------------------


def test_layers_without_a_rule() -> None:
    model = HBPSequential(HBPLinear(4, 3), nn.GELU()).double()
    forward(model)[0].backward()
    message = r"Child '1' of this HBPSequential is GELU.*convert\(model\)"
    refuses(model, TypeError, message, lambda: model.backward_hessian(H))


def test_a_layer_that_occurs_twice() -> None:
    layer = HBPLinear(3, 3)
    model = HBPSequential(HBPLinear(4, 3), layer, HBPSequential(layer)).double()
    forward(model)[0].backward()
    message = "occurs twice.*use two layers"
    refuses(model, ValueError, message, lambda: model.backward_hessian(H))


def test_tied_weights() -> None:
    model = HBPSequential(HBPLinear(4, 3), HBPLinear(3, 3), HBPLinear(3, 3)).double()
    model[2].weight = model[1].weight
    forward(model)[0].backward()
    message = "share a parameter.*give each layer its own"
    refuses(model, ValueError, message, lambda: model.backward_hessian(H))


@pytest.mark.parametrize("value", [0, 1, "yes"])
@pytest.mark.parametrize(
    "name", ["average_input_jacobian", "average_parameter_jacobian"]
)
def test_bad_approximations(name: str, value: Any) -> None:
    model = small_net()
    message = f"{name}={value!r} must be True, False or None"
    with pytest.raises(TypeError, match=message):
        model.set_hbp_approximation(**{name: value})
    assert "False" not in str(model)


@pytest.mark.parametrize("options", [{"first": 3}, {"second": "x"}, {"function": None}])
def test_bad_functions(options: dict) -> None:
    (name,) = options
    with pytest.raises(TypeError, match=f"{name}=.* must be a function"):
        hbp.HBPElementwise(**{"function": torch.exp, **options})


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True, "0", None])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed=.* must be an integer from 0"):
        hbp.set_seeds(seed)


# --------------------------------------------------------------------------------------
# The optimizer's options.
# --------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("lr", -0.1, r"lr=-0\.1 must be"),
    ("lr", NAN, "lr=nan must be"),
    ("lr", INF, "lr=inf must be"),
    ("alpha", -0.01, r"alpha=-0\.01 is outside \[0, 1\].*0\.02"),
    ("alpha", 1.01, r"alpha=1\.01 is outside"),
    ("alpha", NAN, "alpha=nan is outside"),
    ("cg_tol", 0.0, r"cg_tol=0\.0 must be positive"),
    ("cg_tol", -1e-5, "cg_tol=-1e-05 must be positive"),
    ("cg_atol", -1.0, r"cg_atol=-1\.0 must not be negative.*cg_tol"),
    ("cg_maxiter", 0, "cg_maxiter=0 must be a positive integer, or None"),
    ("cg_maxiter", -1, "cg_maxiter=-1"),
    ("cg_maxiter", 1.5, r"cg_maxiter=1\.5"),
    ("solver", "CG", "solver='CG' is unknown.*'cg'.*'direct'"),
    ("solver", None, "solver=None is unknown"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_OPTIONS)
def test_bad_options(name: str, value: Any, message: str) -> None:
    """At construction, in a group, in a group added later, and at the next step."""
    model = trained()
    good = {"lr": 0.1, "alpha": 0.1}
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match=message):
        CGNewton(parameters, **{**good, name: value})
    with pytest.raises(ValueError, match=message):
        CGNewton([{"params": parameters, name: value}], **good)
    optimizer = CGNewton(parameters[:1], **good)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters[1:], name: value})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0][name] = value
    refuses(model, ValueError, message, optimizer.step)


@pytest.mark.parametrize("loss", [torch.tensor(NAN), INF, float("-inf")])
def test_closure_with_a_loss_that_is_not_finite(loss: Any) -> None:
    model = trained()
    optimizer = CGNewton(model.parameters(), 0.1, 0.1)
    message = "closure returned a loss of (nan|-?inf)"
    refuses(model, ArithmeticError, message, lambda: optimizer.step(lambda: loss))


def test_closure_without_a_loss() -> None:
    model = trained()
    optimizer = CGNewton(model.parameters(), 0.1, 0.1)
    message = "closure returned NoneType; it must return the loss"
    refuses(model, TypeError, message, lambda: optimizer.step(lambda: None))


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_not_finite_gradients(bad: float, solver: str) -> None:
    model = trained()
    model[2].weight.grad[0, 0] = bad
    optimizer = CGNewton(model.parameters(), 0.1, 0.1, solver=solver)
    message = r"No step was taken; the gradient of parameter 2 of group 0.*NaN or inf"
    refuses(model, ArithmeticError, message, optimizer.step)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_not_finite_curvature(bad: float, solver: str, alpha: float) -> None:
    """Even where alpha=1 gives it no weight: 0 · NaN is NaN."""
    model = trained()
    model[2].bias.hessian = DenseOperator(torch.full((3, 3), bad).double())
    optimizer = CGNewton(model.parameters(), 0.1, alpha, solver=solver)
    message = r"No step was taken.*parameter 3 of group 0.*(NaN|finite)"
    refuses(model, ArithmeticError, message, optimizer.step)


@pytest.mark.parametrize(
    ("curvature", "message"),
    [
        (spd(3), "is a Tensor; it must be an operator.*DenseOperator"),
        (DenseOperator(spd(4)), r"shape=\[4, 4\].*does not fit parameter 3"),
        (DenseOperator(spd(3).float()), "float32.*does not fit.*float64 on cpu"),
    ],
)
def test_curvature_that_does_not_fit(curvature: Any, message: str) -> None:
    model = trained()
    model[2].bias.hessian = curvature
    optimizer = CGNewton(model.parameters(), 0.1, 0.1)
    refuses(model, RuntimeError, message, optimizer.step)


def test_sparse_gradients() -> None:
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    embedding.weight.hessian = DenseOperator(torch.eye(6))
    optimizer = CGNewton(embedding.parameters(), 0.1, 0.1)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 0.* is sparse"):
        optimizer.step()


def test_a_frozen_parameter_is_skipped() -> None:
    """No error, no curvature, no movement."""
    model = small_net()
    model[0].weight.requires_grad_(False)
    send_back(model, *small_batch(), treatment="abs")
    before = model[0].weight.clone()
    CGNewton(model.parameters(), 0.1, 0.1).step()
    assert torch.equal(model[0].weight, before)
    assert getattr(model[0].weight, "hessian", None) is None


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_single_statistic_is_checked_too(bad: float) -> None:
    layer, x = HBPLinear(4, 3).double(), randn(6, 4)
    x[0, 0] = bad
    layer(x).sum().backward()
    message = r"input of HBPLinear.*NaN or infinity"
    refuses(layer, ArithmeticError, message, lambda: layer.backward_hessian(H))


def test_large_finite_statistics_are_no_error() -> None:
    """Their sum has no number in float32; each of them has."""
    layer = HBPLinear(4, 3)
    layer(torch.full((1, 4), 2e38)).sum().backward()
    layer.backward_hessian(H.float())
    assert layer.weight.hessian is not None


def test_a_pooling_with_two_results_is_refused() -> None:
    pool = hbp.HBPMaxPool2d(2, return_indices=True)
    with pytest.raises(ValueError, match=r"return_indices=True.* take one tensor"):
        pool(randn(1, 1, 4, 4))


def test_paths_of_different_shapes_are_refused() -> None:
    # torch would broadcast their sum.
    residual = hbp.HBPResidual(HBPLinear(3, 1), HBPLinear(3, 3)).double()
    with pytest.raises(ValueError, match=r"\[2, 1\] and its shortcut \[2, 3\]"):
        residual(randn(2, 3))


def test_dense_second_order_terms_ask_the_limit() -> None:
    layer = hbp.HBPSoftmax(1)
    limit = settings.dense_limit
    hbp.set_dense_limit(100 * 8)
    try:
        layer(randn(5, 3).requires_grad_()).sum().backward()
        layer.backward_hessian(H, True)  # 45 entries
        layer(randn(12, 3).requires_grad_()).sum().backward()
        with pytest.raises(MemoryError, match=r"HBPSoftmax.*Choose 'ggn'"):
            layer.backward_hessian(H, True, "abs")
        assert layer.backward_hessian(H, True, "ggn") is not None
    finally:
        hbp.set_dense_limit(limit)


def test_without_curvature_and_room_the_length_is_lr() -> None:
    """The model has no minimum along the step, and the bound says nothing."""
    model = HBPLinear(3, 1).double()
    optimizer = CGNewton(model.parameters(), lr=0.25, alpha=0.5, adaptive_lr=True)
    outputs = model(randn(4, 3))
    before = values(model)
    hbp.backward(model, outputs, outputs.mean() - 100)  # linear, far below 0
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    for p, start, g in zip(values(model), before, gradients, strict=True):
        torch.testing.assert_close(p, start - 0.25 * g / 0.5)


def test_the_namespace_is_tidy() -> None:
    names = dir(hbp)
    assert {"CGNewton", "HBPLinear", "backward", "convert", "inspect", "nn"} <= {*names}
    assert "__version__" in names
    assert not {"core", "fast", "line", "annotations"} & {*names}
