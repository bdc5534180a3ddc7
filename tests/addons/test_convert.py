"""convert(): the same function, the same parameters, curvature on top."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import all_equal, close, randn, send_back, values
from torch import Tensor, nn

import hbp
from hbp import reference
from hbp.layers.shape import HBPReshape
from hbp.testing import check_layer


def _torch_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(4, 5, bias=False),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 3), nn.Tanh()),
        nn.Sigmoid(),
        nn.Linear(3, 2),
    ).double()


def test_the_twin_computes_the_same_with_the_same_parameters() -> None:
    model = _torch_model()
    rng = torch.get_rng_state()
    twin = hbp.convert(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert isinstance(twin, hbp.HBPSequential)
    x = randn(3, 2, 2)
    assert torch.equal(twin(x), model(x))
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    for (name, p), (twin_name, q) in pairs:
        assert name == twin_name
        assert p is q
    assert list(model.state_dict()) == list(twin.state_dict())
    described = str(twin).replace("HBP", "")
    for scheme in (", avg_param_jac: True", ", avg_input_jac: True"):
        described = described.replace(scheme, "")
    assert described.replace("avg_input_jac: True", "") == str(model)


def test_training_the_twin_trains_the_model() -> None:
    model = _torch_model()
    twin = hbp.convert(model)
    x, y = randn(3, 4), torch.tensor([0, 1, 0])
    before = values(model)
    send_back(twin, x, y, treatment="abs")
    hbp.CGNewton(twin.parameters(), lr=0.1, alpha=0.1).step()
    assert not all_equal(values(model), before)
    assert torch.equal(twin(x), model(x))


def test_curvature_of_the_twin() -> None:
    model = _torch_model()
    twin = hbp.convert(model)
    x, y = randn(3, 2, 2), torch.tensor([0, 1, 0])
    send_back(twin, x, y, treatment="clip")
    loss_func = nn.CrossEntropyLoss()
    expected = reference.batch_blocks(model, loss_func, x, y, "clip").parameters
    for name, p in twin.named_parameters():
        close(p.hessian.to_dense(), expected[name])


def test_the_model_itself_is_left_alone() -> None:
    model = _torch_model()
    before = [type(m) for m in model.modules()]
    hbp.convert(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_mode_dtype_and_frozen_are_kept(training: bool, frozen: bool) -> None:
    model = _torch_model().train(training)
    model[1].requires_grad_(not frozen)
    twin = hbp.convert(model)
    assert [m.training for m in twin.modules()] == [training] * 9
    assert twin[1].weight.requires_grad is not frozen
    assert twin[1].bias is None
    assert {p.dtype for p in twin.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(2, 3),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.ReLU(inplace=True),
        nn.Flatten(2, 3),
        nn.Sequential(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_single_layers(layer: nn.Module) -> None:
    twin = hbp.convert(layer)
    assert type(twin).__name__ == f"HBP{type(layer).__name__}"
    for name in ("inplace", "start_dim", "end_dim", "in_features", "out_features"):
        assert getattr(twin, name, None) == getattr(layer, name, None)


def test_hbp_layers_are_taken_over() -> None:
    layer = hbp.HBPLinear(2, 2)
    layer.set_hbp_approximation(average_parameter_jacobian=False)
    act = hbp.HBPElementwise(torch.exp)
    twin = hbp.convert(nn.Sequential(layer, act, nn.Linear(2, 1)))
    assert twin[0] is layer
    assert twin[1] is act
    twice = hbp.convert(twin)
    assert [type(m) for m in twice] == [type(m) for m in twin]
    assert hbp.convert(layer) is layer


def test_an_activation_that_occurs_twice_stays_in_both_places() -> None:
    """One nn.ReLU() for a whole network is common."""
    act = nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 3), act, nn.Linear(3, 2), act).double()
    twin = hbp.convert(model)
    x, y = randn(3, 4), torch.tensor([0, 1, 0])
    assert torch.equal(twin(x), model(x))
    send_back(twin, x, y, treatment="abs")
    separate = nn.Sequential(model[0], nn.Tanh(), model[2], nn.Tanh())
    expected = reference.batch_blocks(
        separate, nn.CrossEntropyLoss(), x, y, "abs"
    ).parameters
    for name, p in twin.named_parameters():
        close(p.hessian.to_dense(), expected[name])


class _Custom(nn.Linear):
    pass


# How an error ends: with the page that says what is supported, and with the way out.
WAY_OUT = (
    r"\nWhat it knows is on the page Curvature for a model you have\.\nFor the rest .* "
    r"class HBPMine\(GeneralRule, Mine\) .* the page Write a layer\.$"
)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.RReLU())), r"1\.0: RReLU"),
        (_Custom(1, 2), r"the model: _Custom"),
        (nn.Sequential(nn.LazyLinear(2)), r"0: LazyLinear"),
        (nn.ModuleList([nn.Linear(1, 1)]), "the model: ModuleList"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "the model"),
    ],
    ids=["nested", "subclass", "lazy", "list", "parametrized"],
)
def test_unsupported_layers_are_named(model: nn.Module, named: str) -> None:
    with pytest.raises(
        TypeError, match=rf"(?s)does not know {named}.*{WAY_OUT}"
    ) as info:
        hbp.convert(model)
    assert len(str(info.value).splitlines()) >= 3


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_are_not_lost_silently(register: str) -> None:
    model = _torch_model()
    getattr(model[2][1], register)(lambda *args: None)
    with pytest.raises(ValueError, match=r"2\.1 \(Linear\) has hooks.*Remove"):
        hbp.convert(model)


def test_tied_weights_are_named() -> None:
    first = nn.Linear(3, 3).double()
    second = copy.deepcopy(first)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"0\.weight and 2\.weight are the same"):
        hbp.convert(nn.Sequential(first, nn.Sigmoid(), second))


def test_a_layer_of_weights_used_twice_is_named() -> None:
    layer = nn.BatchNorm1d(2, affine=False)
    with pytest.raises(ValueError, match=r"0\.running_mean and 1\.running_mean"):
        hbp.convert(nn.Sequential(layer, layer))
    act = hbp.HBPTanh()
    with pytest.raises(ValueError, match=r"1 \(HBPTanh\) is used twice"):
        hbp.convert(nn.Sequential(act, act))


def test_a_forward_set_on_a_layer_is_not_lost_silently() -> None:
    layer = nn.Linear(2, 2)
    vars(layer)["forward"] = lambda x: x
    with pytest.raises(ValueError, match=r"0 \(Linear\) was given another forward"):
        hbp.convert(nn.Sequential(layer))


# --------------------------------------------------------------------------------------
# Every layer.
# --------------------------------------------------------------------------------------

IMAGE, SIGNAL, VOLUME, VECTOR = (3, 2, 6, 6), (3, 2, 6), (3, 2, 4, 4, 4), (3, 6)
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 2, bias=False), VECTOR),
    (nn.Conv1d(2, 4, 3, stride=2, padding=1), SIGNAL),
    (nn.Conv2d(2, 4, (3, 2), groups=2, padding="same", padding_mode="reflect"), IMAGE),
    (nn.Conv3d(2, 1, 2, dilation=2, bias=False), VOLUME),
    (nn.ConvTranspose1d(2, 3, 2, stride=2, output_padding=1), SIGNAL),
    (nn.ConvTranspose2d(2, 3, 2, padding=1), IMAGE),
    (nn.ConvTranspose3d(2, 3, 2), VOLUME),
    (nn.Sigmoid(), VECTOR),
    (nn.Tanh(), VECTOR),
    (nn.ReLU(inplace=True), VECTOR),
    (nn.ReLU6(), VECTOR),
    (nn.LeakyReLU(0.3, inplace=True), VECTOR),
    (nn.ELU(0.7), VECTOR),
    (nn.SELU(), VECTOR),
    (nn.CELU(0.7), VECTOR),
    (nn.GELU("tanh"), VECTOR),
    (nn.SiLU(), VECTOR),
    (nn.Mish(), VECTOR),
    (nn.Softplus(2.0, 0.5), VECTOR),
    (nn.Softsign(), VECTOR),
    (nn.LogSigmoid(), VECTOR),
    (nn.Hardtanh(-0.5, 0.3), VECTOR),
    (nn.Hardswish(), VECTOR),
    (nn.Hardsigmoid(), VECTOR),
    (nn.PReLU(6), VECTOR),
    (nn.Softmax(1), VECTOR),
    (nn.LogSoftmax(-1), SIGNAL),
    (nn.GroupNorm(1, 2), SIGNAL),
    (nn.RMSNorm((6,)), SIGNAL),
    (nn.AdaptiveMaxPool1d(4), SIGNAL),
    (nn.AdaptiveMaxPool2d((4, None)), IMAGE),
    (nn.AdaptiveMaxPool3d(1), VOLUME),
    (nn.ReflectionPad1d((1, 2)), SIGNAL),
    (nn.ReflectionPad2d(1), IMAGE),
    (nn.ReflectionPad3d(1), VOLUME),
    (nn.ReplicationPad1d((1, 2)), SIGNAL),
    (nn.ReplicationPad2d(1), IMAGE),
    (nn.ReplicationPad3d(1), VOLUME),
    (nn.CircularPad1d((1, 2)), SIGNAL),
    (nn.CircularPad2d(1), IMAGE),
    (nn.CircularPad3d(1), VOLUME),
    (nn.ConstantPad1d((1, 2), 0.5), SIGNAL),
    (nn.ConstantPad2d(1, 0.5), IMAGE),
    (nn.ConstantPad3d(1, 0.5), VOLUME),
    (nn.PixelShuffle(2), (3, 4, 2, 2)),
    (nn.PixelUnshuffle(2), IMAGE),
    (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    (nn.MaxPool1d(3, 1, 1), SIGNAL),
    (nn.MaxPool2d((2, 1), ceil_mode=True, dilation=2), IMAGE),
    (nn.MaxPool3d(2), VOLUME),
    (nn.AvgPool1d(2), SIGNAL),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    (nn.AvgPool3d(2), VOLUME),
    (nn.AdaptiveAvgPool1d(4), SIGNAL),
    (nn.AdaptiveAvgPool2d((4, None)), IMAGE),
    (nn.AdaptiveAvgPool3d(1), VOLUME),
    (nn.BatchNorm1d(6, momentum=None), VECTOR),
    (nn.BatchNorm2d(2, eps=0.1), IMAGE),
    (nn.BatchNorm3d(2, affine=False), VOLUME),
    (nn.LayerNorm((6, 6)), IMAGE),
    (nn.Dropout(0.3, inplace=True), VECTOR),
    (nn.Dropout1d(0.3), SIGNAL),
    (nn.Dropout2d(), IMAGE),
    (nn.Dropout3d(), VOLUME),
    (nn.ZeroPad1d((1, 2)), SIGNAL),
    (nn.ZeroPad2d(1), IMAGE),
    (nn.ZeroPad3d(1), VOLUME),
    (nn.Flatten(2, 3), IMAGE),
    (nn.Unflatten(1, (2, 3)), VECTOR),
    (nn.Identity(), VECTOR),
]


def _names(module: nn.Module) -> tuple[list[str], list[str]]:
    return list(module.state_dict()), [name for name, _ in module.named_parameters()]


def _same_in_both_modes(twin: hbp.HBPModule, model: nn.Module, *shape: int) -> None:
    """Forward bit for bit, and gradients; a copy of the model is the judge."""
    original = copy.deepcopy(model)
    for training in (True, False):
        twin.train(training)
        original.train(training)
        x = randn(*shape)
        results = []
        for module in (twin, original):
            module.zero_grad()
            torch.manual_seed(1)
            input = x.clone().requires_grad_()
            output = module(input.clone())
            output.square().sum().backward()
            gradients = [p.grad for p in module.parameters()]
            results.append([output, input.grad, *gradients, *module.buffers()])
        assert len(results[0]) == len(results[1])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("training", [True, False])
def test_every_layer(layer: nn.Module, shape: tuple[int, ...], training: bool) -> None:
    layer = copy.deepcopy(layer).double().train(training)
    before = vars(layer).copy()
    rng = torch.get_rng_state()
    twin = hbp.convert(layer)
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(twin) is getattr(hbp, f"HBP{type(layer).__name__}")
    assert vars(layer) == before
    assert vars(twin).keys() == before.keys()
    assert twin.training is training
    for name, value in before.items():
        if isinstance(value, dict):  # Its own dictionaries, the same tensors.
            assert vars(twin)[name] is not value
        assert vars(twin)[name] == value
    assert _names(twin) == _names(layer)
    _same_in_both_modes(twin, layer, *shape)
    twin.register_forward_hook(lambda *args: None)
    assert not layer._forward_hooks


def test_every_layer_of_the_library_is_known() -> None:
    own = {"Module", "Sequential", "Residual", "Elementwise", "Function", "Parallel"}
    own |= {"Join", "Attention", "Position", "Embedding"}
    names = {name[3:] for name in vars(hbp) if name.startswith("HBP")}
    assert {type(layer).__name__ for layer, _ in LAYERS} == names - own


def test_modes_are_kept_module_by_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)), nn.Dropout())
    model[0][0].eval()
    twin = hbp.convert(model)
    assert [m.training for m in twin.modules()] == [True, True, False, True]


def test_a_compiled_layer_still_records() -> None:
    layer = nn.Linear(2, 2)
    vars(layer)["_compiled_call_impl"] = lambda x: x
    twin = hbp.convert(layer)
    twin(torch.ones(1, 2))
    assert twin.last_record is not None


# --------------------------------------------------------------------------------------
# A forward of its own.
# --------------------------------------------------------------------------------------


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3)
        self.conv2 = nn.Conv2d(2, 3, 2)
        self.drop = nn.Dropout2d(0.4)
        self.fc1 = nn.Linear(12, 4)
        self.fc2 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2, stride=1)
        x = F.avg_pool2d(self.drop(self.conv2(x).sigmoid()), 2, 1)
        x = x.view(x.size(0), -1)
        x = F.dropout(F.softplus(self.fc1(x)), 0.2, self.training)
        return self.fc2(x)


class Block(nn.Module):
    """As torchvision's BasicBlock, with a smooth activation that is used twice."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential()
        if channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out)
            )
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out)
        self.act = nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.act(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(1, 2), Block(2, 2)])
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(torch.flatten(self.pool(x), 1))


class Paths(nn.Module):
    """Shortcuts inside of shortcuts, random layers on both paths."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(5, 5)
        self.first = nn.Linear(5, 5)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        past = self.drop(self.first(x))
        through = self.drop(self.second(x).tanh())
        through = through + F.silu(through)
        x = torch.add(through, past)
        return self.last(x + x)


NETS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (LeNet, (4, 1, 7, 7)),
    (ResNet, (3, 1, 4, 4)),
    (Paths, (4, 5)),
    (lambda: nn.Sequential(nn.Sequential(Paths()), nn.Tanh()), (4, 5)),
]
NET = pytest.mark.parametrize(
    ("make", "shape"), NETS, ids=["lenet", "resnet", "paths", "nested"]
)


def _net(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    """In eval mode, with statistics of no special value."""
    model = make().double()
    with torch.no_grad():
        model(randn(*shape))
        for name, p in model.named_parameters():
            if "bn" in name or ".1." in name:
                p.normal_()
    return model.eval()


@NET
def test_nets_compute_the_same(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = _net(make, shape)
    before = {module: vars(module).copy() for module in model.modules()}
    twin = hbp.convert(model)
    assert {module: vars(module) for module in model.modules()} == before
    assert _names(twin) == _names(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        assert p is q
        assert p.hessian is None
    for p, q in zip(twin.buffers(), model.buffers(), strict=True):
        assert p is q
    _same_in_both_modes(twin, model, *shape)


@NET
def test_states_are_loaded_both_ways(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, other = _net(make, shape), _net(make, shape)
    x = randn(*shape)
    twin = hbp.convert(copy.deepcopy(model))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), other(x))
    other.load_state_dict(hbp.convert(model).state_dict())
    assert torch.equal(other(x), model(x))


@NET
@pytest.mark.parametrize("treatment", [None, "none", "zero"])
def test_exact_curvature_of_nets(
    make: Callable[[], nn.Module], shape: tuple[int, ...], treatment: str | None
) -> None:
    model = _net(make, shape)
    twin = hbp.convert(model)
    x, y, loss_func = randn(*shape), torch.arange(shape[0]) % 3, nn.CrossEntropyLoss()
    outputs = twin(x.clone().requires_grad_())
    loss = loss_func(outputs, y)
    curvature = hbp.per_sample_hessian(loss, outputs)
    loss.backward()
    twin.backward_hessian(curvature, modify_2nd_order_terms=treatment)
    blocks = reference.ggn_blocks if treatment == "zero" else reference.hessian_blocks
    original = make().double().eval()
    original.load_state_dict(model.state_dict())
    expected = blocks(original, loss_func, x, y)
    assert expected.keys() == dict(twin.named_parameters()).keys()
    for name, p in twin.named_parameters():
        close(p.hessian.to_dense(), expected[name])


def test_averaged_curvature_of_a_forward_is_that_of_a_sequence() -> None:
    class Net(nn.Module):
        def __init__(self, first: nn.Module, last: nn.Module) -> None:
            super().__init__()
            self.first, self.last = first, last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sigmoid(self.first(x)))

    first, last = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
    x, y = randn(5, 4), torch.tensor([0, 1, 0, 1, 1])
    for choice in (True, False):  # Functions hear of the scheme, too.
        twin = hbp.convert(Net(first, last))
        twin.set_hbp_approximation(choice, choice)
        send_back(twin, x, y, treatment="abs")
        sequence = nn.Sequential(first, nn.Sigmoid(), last)
        expected = reference.batch_blocks(
            sequence, nn.CrossEntropyLoss(), x, y, "abs", choice, choice
        ).parameters
        for name, p in twin.named_parameters():
            place = name.replace("first", "0").replace("last", "2")
            close(p.hessian.to_dense(), expected[place])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_of_a_converted_model_are_whole(
    copied: Callable[[hbp.HBPModule], hbp.HBPModule],
) -> None:
    twin = hbp.convert(_net(ResNet, (3, 1, 4, 4)))
    x, y = randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    twin(x)
    other = copied(twin)
    assert torch.equal(other(x), twin(x))
    send_back(other, x, y, treatment="abs")
    assert all(p.hessian is None for p in twin.parameters())
    assert all(p.hessian is not None for p in other.parameters())
    hbp.CGNewton(other.parameters(), lr=0.1, alpha=0.1).step()
    assert not torch.equal(other(x), twin(x))


def test_an_empty_shortcut_is_the_identity() -> None:
    """Many write ``self.shortcut = nn.Sequential()``."""
    twin = hbp.convert(ResNet())
    shortcuts = [block._chain[0].shortcut for block in twin.blocks]
    assert [len(shortcut) > 0 for shortcut in shortcuts] == [True, False]


def test_a_refusal_names_the_layer_by_its_path() -> None:
    """As the model that was converted calls it."""
    model = ResNet()
    model.train()
    twin = hbp.convert(model)
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 1])
    outputs = twin(x)
    loss = nn.CrossEntropyLoss()(outputs, y)
    with pytest.raises(ValueError, match="statistics of the batch") as refused:
        hbp.backward(twin, outputs, loss)
    (note,) = refused.value.__notes__
    path = note.split("'")[1]
    assert isinstance(model.get_submodule(path), nn.BatchNorm2d)
    assert note == f"It is layer {path!r} of the model."


def test_layers_of_a_converted_model_stay() -> None:
    twin = hbp.convert(_net(ResNet, (3, 1, 4, 4)))
    assert isinstance(twin.blocks[0].conv1, hbp.HBPConv2d)
    with pytest.raises(
        AttributeError, match=r"'fc'.*Replace it in the torch\.nn model"
    ):
        twin.fc = hbp.HBPLinear(8, 5)
    assert hbp.convert(twin) is twin


# What a forward may be made of, and what is refused: functions of (self, x), where
# self has a linear layer fc, 6 → 6, an nn.ReLU act and a parameter scale.
Step = Callable[[Any, Any], Any]


class NamedLikeMethods(nn.Module):
    """Its layers have the names of what a tensor can do."""

    def __init__(self) -> None:
        super().__init__()
        self.add = nn.Linear(4, 4)
        self.add_ = nn.Linear(4, 4)
        self.size = nn.Linear(4, 4)
        self.view = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.view(self.size(self.add_(self.add(x)))) + x


def test_layers_may_be_named_like_methods() -> None:
    model = NamedLikeMethods().double()
    twin, x = hbp.convert(model), torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(twin(x), model(x))
    assert list(twin.state_dict()) == list(model.state_dict())
    branch = nn.Sequential(model.add, model.add_, model.size, model.view)
    twin(x).square().sum().backward()
    of_input = twin.backward_hessian(2 * 3 * torch.eye(4).double(), True, "zero")
    mean = torch.stack(
        [torch.autograd.functional.jacobian(branch, one) for one in x]
    ).mean(0)
    J = mean + torch.eye(4)
    assert of_input is not None
    torch.testing.assert_close(of_input.to_dense(), 6 * J.T @ J)


def _in_place(m: Any, x: Any) -> Any:
    y = x.view(x.size(0), -1) + 0.3
    y += 1
    y -= F.silu(x)
    y *= 3
    y /= 0.7
    return y.mul_(2)


class Free(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.fc = nn.Linear(6, 6)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.step(self, x))


STEPS: dict[str, tuple[Step, tuple[int, ...]]] = {
    "nothing": (lambda m, x: x, VECTOR),
    "relu": (lambda m, x: F.relu(torch.relu(x)), VECTOR),
    "method": (lambda m, x: x.tanh().sigmoid().relu(), VECTOR),
    "in place": (lambda m, x: F.relu(x, inplace=True), VECTOR),
    "relu6": (lambda m, x: F.relu6(x), VECTOR),
    "leaky": (lambda m, x: F.leaky_relu(x, 0.3), VECTOR),
    "elu": (lambda m, x: F.elu(x, alpha=0.4), VECTOR),
    "selu": (lambda m, x: F.selu(x), VECTOR),
    "celu": (lambda m, x: F.celu(x, 0.4), VECTOR),
    "gelu": (lambda m, x: F.gelu(x, approximate="tanh"), VECTOR),
    "silu": (lambda m, x: F.silu(x), VECTOR),
    "mish": (lambda m, x: F.mish(x), VECTOR),
    "softplus": (lambda m, x: F.softplus(x, 2, threshold=0.5), VECTOR),
    "softsign": (lambda m, x: F.softsign(x), VECTOR),
    "logsigmoid": (lambda m, x: F.logsigmoid(x), VECTOR),
    "hardtanh": (lambda m, x: F.hardtanh(x, -0.5, 0.3), VECTOR),
    "hardswish": (lambda m, x: F.hardswish(x), VECTOR),
    "hardsigmoid": (lambda m, x: F.hardsigmoid(x), VECTOR),
    "softmax": (lambda m, x: F.softmax(x, 1).softmax(dim=-1), VECTOR),
    "log softmax": (lambda m, x: torch.log_softmax(F.log_softmax(x, 1), 1), VECTOR),
    "adaptive max 1d": (lambda m, x: F.adaptive_max_pool1d(x, 6), (3, 2, 9)),
    "adaptive max 2d": (lambda m, x: F.adaptive_max_pool2d(x, (1, 6)), (3, 2, 3, 9)),
    "adaptive max 3d": (lambda m, x: F.adaptive_max_pool3d(x, 6), (2, 1, 7, 7, 7)),
    "max 1d": (lambda m, x: F.max_pool1d(x, 1, 2, ceil_mode=True), (3, 2, 12)),
    "max 2d": (
        lambda m, x: F.max_pool2d(x, (2, 1), (2, 1), 0, dilation=1),
        (3, 2, 2, 6),
    ),
    "max 3d": (lambda m, x: F.max_pool3d(x, 1), (3, 1, 1, 1, 6)),
    "average 1d": (lambda m, x: F.avg_pool1d(x, 2), (3, 2, 12)),
    "average 2d": (
        lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        (3, 1, 2, 6),
    ),
    "average 3d": (lambda m, x: F.avg_pool3d(x, 1), (3, 1, 1, 1, 6)),
    "adaptive 1d": (lambda m, x: F.adaptive_avg_pool1d(x, 6), (3, 2, 9)),
    "adaptive 2d": (lambda m, x: F.adaptive_avg_pool2d(x, (1, 6)), (3, 2, 3, 9)),
    "adaptive 3d": (lambda m, x: F.adaptive_avg_pool3d(x, 6), (2, 1, 7, 7, 7)),
    "dropout": (lambda m, x: F.dropout(x, 0.3, m.training), VECTOR),
    "dropout 1d": (lambda m, x: F.dropout1d(x, training=m.training), (3, 4, 6)),
    "dropout 2d": (lambda m, x: F.dropout2d(x, training=m.training), (3, 4, 2, 6)),
    "dropout 3d": (lambda m, x: F.dropout3d(x, training=m.training), (3, 4, 1, 2, 6)),
    "flatten": (lambda m, x: torch.flatten(x, 1), (4, 2, 3)),
    "flatten method": (lambda m, x: x.flatten(start_dim=1), (4, 2, 3)),
    "flatten some": (lambda m, x: torch.flatten(x, 1, 2), (4, 2, 3, 6)),
    "view": (lambda m, x: x.view(x.size(0), -1), (4, 2, 3)),
    "view keyword": (lambda m, x: x.view(x.size(dim=0), -1), (4, 2, 3)),
    "view shape": (lambda m, x: x.view((x.shape[0], 6)), (4, 2, 3)),
    "view by columns": (lambda m, x: x.view(-1, 6), (4, 2, 3)),
    "reshape": (lambda m, x: x.tanh().reshape(x.size()[0], 2, -1), (4, 12)),
    "reshape function": (lambda m, x: torch.reshape(x, [x.shape[0], -1]), (4, 2, 3)),
    "twice": (lambda m, x: m.act(m.act(x).tanh()), VECTOR),
    "sum": (lambda m, x: x.tanh() + x, VECTOR),
    "sum in place": (lambda m, x: F.silu(x).add_(x), VECTOR),
    "sum method": (lambda m, x: x.add(x.sigmoid()), VECTOR),
    "squeezed everywhere": (lambda m, x: torch.squeeze(x), (3, 1, 6, 1)),
    "scaled branch": (lambda m, x: x + 0.3 * F.silu(x), VECTOR),
    "scaled shortcut": (lambda m, x: x.mul(0.3) + x.tanh() / 7, VECTOR),
    "scaled sum": (lambda m, x: torch.add(x, x.tanh(), alpha=2), VECTOR),
    "difference": (lambda m, x: x - x.tanh(), VECTOR),
    "difference of branches": (lambda m, x: x.sigmoid() - x.tanh(), VECTOR),
    "difference with identity": (lambda m, x: x.tanh().sub(x, alpha=0.5), VECTOR),
    "difference in place": (lambda m, x: F.silu(x).sub_(x), VECTOR),
    "difference of nothing": (lambda m, x: x.tanh() + (x - x), VECTOR),
    "centred": (lambda m, x: x - x.mean(1, keepdim=True), VECTOR),
    "centred by position": (lambda m, x: x.sum(1, True).sub(x, alpha=2), (3, 2, 6)),
    "centred and shifted": (lambda m, x: 2 - (x.mean(1, keepdim=True) - x), VECTOR),
    "without the norm": (lambda m, x: x - x.norm(dim=1, keepdim=True), VECTOR),
    "with the mean of a place": (
        lambda m, x: F.silu(x).add_(F.avg_pool1d(x, 3, 1, 1, False, True)),
        (3, 2, 6),
    ),
    "of a branch's mean": (lambda m, x: x + x.tanh().mean(1, keepdim=True), VECTOR),
    "scaled": (lambda m, x: 2 * x / 3 * 0.7, VECTOR),
    "scaled by methods": (lambda m, x: x.mul(2).div(3).neg(), VECTOR),
    "scaled by functions": (lambda m, x: -torch.neg(torch.div(x * 2, 3)), VECTOR),
    "shifted": (lambda m, x: 1 - (x + 2) - 0.5, VECTOR),
    "shifted by functions": (lambda m, x: torch.sub(x.add(1), 3), VECTOR),
    "in place arithmetic": (_in_place, VECTOR),
    "squeezed": (lambda m, x: x.squeeze(-1), (3, 6, 1)),
    "unsqueezed": (lambda m, x: x.unsqueeze(1).tanh().squeeze(1), VECTOR),
    "unflattened": (lambda m, x: x.unflatten(1, (2, 6)), (3, 12)),
    "flatten from the end": (lambda m, x: x.flatten(-2), (3, 2, 3)),
    "contiguous": (lambda m, x: x.permute(0, 2, 1).contiguous(), (3, 6, 2)),
    "mean": (lambda m, x: x.mean((2, 3)), (3, 6, 2, 3)),
    "mean kept": (lambda m, x: x.mean(dim=[1], keepdim=True), (3, 2, 6)),
    "mean function": (lambda m, x: torch.mean(x, -1), (3, 6, 2)),
    "sum over a dimension": (lambda m, x: torch.sum(x.sum(1), dim=(1,)), (3, 2, 2, 6)),
    "permute": (lambda m, x: torch.permute(x, (0, 3, 1, 2)), (3, 2, 6, 3)),
    "transpose": (lambda m, x: x.transpose(1, -1), (3, 6, 2)),
    "movedim": (lambda m, x: torch.movedim(x, 1, -1), (3, 6, 2)),
    "pad": (lambda m, x: F.pad(x, (1, 2)), (3, 3)),
    "pad by a constant": (lambda m, x: F.pad(x, (1, 2), value=0.7), (3, 3)),
    "pad by reflection": (lambda m, x: F.pad(x, (1, 2), "reflect"), (3, 2, 3)),
    "interpolate": (lambda m, x: F.interpolate(x, scale_factor=2), (3, 1, 3)),
    "interpolate bilinear": (
        lambda m, x: F.interpolate(x, (5, 6), mode="bilinear", align_corners=True),
        (3, 1, 3, 3),
    ),
    "other function": (lambda m, x: F.softmin(x, 1), VECTOR),
    "power": (lambda m, x: x**2, VECTOR),
    "square": (lambda m, x: x * x, VECTOR),
    "product": (lambda m, x: x * x.tanh(), VECTOR),
    "product of functions": (lambda m, x: x.sin() * F.silu(x).cos(), VECTOR),
    "inverse": (lambda m, x: 1 / (2 + x), VECTOR),
    "index": (lambda m, x: x[:, 0] + x[:, -1], (3, 4, 6)),
    "concatenation": (lambda m, x: torch.cat([x.tanh(), x], 1), (3, 3)),
    "parts": (lambda m, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], (3, 12)),
    "sum of parts": (lambda m, x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1], (3, 12)),
    "one of the parts": (lambda m, x: x.split(6, dim=1)[1], (3, 12)),
    "size": (lambda m, x: F.avg_pool2d(x, x.size(3)).flatten(1), (3, 6, 2, 2)),
    "other size": (lambda m, x: x.tanh().view(x.size(0), x.size(1)), (3, 6, 1)),
    "other shape": (lambda m, x: x.view(x.shape[0], x.dim() * 2), (3, 2, 3)),
    "half of the features": (lambda m, x: x[:, : x.shape[1] // 2], (3, 12)),
    "constant": (lambda m, x: x * torch.arange(6, device=x.device), VECTOR),
    "pixel shuffle": (lambda m, x: F.pixel_shuffle(x, 2), (3, 4, 2, 3)),
    "pixel unshuffle": (lambda m, x: F.pixel_unshuffle(x, 2), (3, 1, 4, 12)),
}
# Before torch 2.9, its functions take no size that torch.fx has only a name for.
SIZES_PASS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
if not SIZES_PASS:
    del STEPS["reshape function"], STEPS["constant"]


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_a_forward(name: str) -> None:
    step, shape = STEPS[name]
    model = Free(step).double()
    rng = torch.get_rng_state()
    twin = hbp.convert(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert _names(twin) == _names(model)
    _same_in_both_modes(twin, model, *shape)


def _decide(m: Any, x: Any) -> Any:
    return x if x.sum() > 0 else -x


def _wasted(m: Any, x: Any) -> Any:
    m.act(x)
    return x


def _overwritten(m: Any, x: Any) -> Any:
    y = x
    y += x.tanh()
    return y + x


def _shared(m: Any, x: Any) -> Any:
    h = x.tanh()
    return h + (h.sigmoid() + x)


def _changed(change: Callable[[Any], Any]) -> Step:
    """It uses a value, and then, by another name, changes it."""

    def step(m: Any, x: Any) -> Any:
        h = x.tanh()
        y = h.sigmoid()
        change(h.unsqueeze(1).squeeze(1))
        return h + y

    return step


REFUSED: dict[str, tuple[Step, str]] = {
    "method": (lambda m, x: x.mean(), r"know Tensor\.mean in the forward"),
    "mean of all": (lambda m, x: torch.mean(x, dim=None), r"know torch\.mean in the"),
    "sum of all": (lambda m, x: x.sum(), r"know Tensor\.sum in the forward"),
    "weights": (lambda m, x: F.linear(x, m.fc.weight), r"know F\.linear in"),
    "parameter": (lambda m, x: x + m.fc.bias, r"know self\.fc\.bias in"),
    "parameter first": (lambda m, x: m.fc.bias * x, r"know self\.fc\.bias in"),
    "parameter last": (lambda m, x: x * m.fc.bias, r"know self\.fc\.bias in"),
    "product in place": (lambda m, x: x.tanh().mul_(x), r"Tensor\.mul_ is in place"),
    "rounded": (
        lambda m, x: x.div(2, rounding_mode="floor"),
        r"know Tensor\.div in the forward",
    ),
    "option": (
        lambda m, x: F.softmax(x, 1, dtype=torch.float32),
        r"F\.softmax has other options",
    ),
    "sum with options": (
        lambda m, x: torch.add(x, x, out=x),
        r"torch\.add has other options: out",
    ),
    "changed": (_changed(lambda h: h.mul_(2)), r"Tensor\.mul_ overwrites what is used"),
    "changed in place": (
        _changed(lambda h: operator.isub(h, 1)),
        r"operator\.isub overwrites what is used elsewhere",
    ),
    "decision": (_decide, "cannot be followed without data: it decides"),
    "made inside": (lambda m, x: nn.ReLU()(x), "cannot be followed without data"),
    "always dropped": (
        lambda m, x: F.dropout(x, 0.5),
        r"in evaluation mode.*training=self\.training",
    ),
    "never dropped": (lambda m, x: F.dropout(x, 0.5, False), "in evaluation mode"),
    "mode": (lambda m, x: x.tanh() if m.training else x, "in evaluation mode"),
    "samples mixed": (lambda m, x: x.view(6, -1), r"Tensor\.view does not keep the"),
    "samples second": (lambda m, x: x.view(-1, x.size(0)), "does not keep the"),
    "wasted": (_wasted, r"the result of self\.act is not used"),
    "overwritten": (_overwritten, r"operator\.iadd overwrites what is used elsewhere"),
    "tangled": (_shared, r"the result of Tensor\.tanh is used more than once"),
    "two tensors": (
        lambda m, x: m.act(x, x),
        "self.act is called with other arg",
    ),
}
if not SIZES_PASS:
    REFUSED["size"] = (STEPS.pop("size")[0], "cannot be followed without data")
    REFUSED["reshape function"] = (
        lambda m, x: torch.reshape(x, [x.shape[0], -1]),
        "cannot be followed without data",
    )


@pytest.mark.parametrize("name", REFUSED)
def test_refused_forwards(name: str) -> None:
    step, message = REFUSED[name]
    model = nn.Sequential(nn.Sequential(Free(step)))
    before = {module: vars(module).copy() for module in model.modules()}
    with pytest.raises(TypeError, match=rf"(?s){message}.*{WAY_OUT}") as info:
        hbp.convert(model)
    assert r"the forward of 0.0 (Free)" in str(info.value)
    assert len(str(info.value).splitlines()) == 3
    assert {module: vars(module) for module in model.modules()} == before


def test_a_layer_of_a_forward_used_twice_is_named() -> None:
    model = nn.Sequential(Free(lambda m, x: m.fc(x)))
    with pytest.raises(ValueError, match=r"0\.fc \(Linear\) is used twice"):
        hbp.convert(model)


def test_weights_that_nothing_uses_are_named() -> None:
    model = Free(lambda m, x: x)
    model.aux = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"uses 0\.aux\.weight, 0\.aux\.bias"):
        hbp.convert(nn.Sequential(model))
    with pytest.raises(ValueError, match=r"uses aux\.weight, aux\.bias"):
        hbp.convert(model)
    sequence = nn.Sequential(nn.Linear(1, 1))
    sequence.register_buffer("calls", torch.zeros(()))
    with pytest.raises(ValueError, match="uses calls, so there is no curvature"):
        hbp.convert(sequence)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, y: self.fc(x),
        lambda self, x: (self.fc(x), x),
        lambda self: None,
    ],
)
def test_one_tensor_in_and_one_out(forward: Callable[..., Any]) -> None:
    kind = type("Net", (Free,), {"forward": forward})
    with pytest.raises(TypeError, match="must take one tensor and return one"):
        hbp.convert(kind(None))


def test_a_branch_that_overwrites_its_input_is_refused_as_it_runs() -> None:
    twin = hbp.convert(Free(lambda m, x: F.relu(x, inplace=True) + x).double())
    with pytest.raises(RuntimeError, match="changes its input in place"):
        twin(randn(2, 6))


def test_a_view_that_changes_the_number_of_samples_is_refused_as_it_runs() -> None:
    twin = hbp.convert(Free(lambda m, x: x.view(-1, 6)).double())
    message = r"HBPReshape\(-1, 6\) made \[4, 6\] of \[2, 12\]"
    with pytest.raises(ValueError, match=message):
        twin(randn(2, 12))
    assert str(HBPReshape(None, 2, -1)) == "HBPReshape(N, 2, -1)"


class Bare(nn.Module):
    """The step alone, without weights."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


OF_FEATURES = list(STEPS)[list(STEPS).index("scaled branch") :]


@pytest.mark.parametrize("name", ["softmax", "log softmax", *OF_FEATURES])
def test_curvature_of_steps(name: str) -> None:
    """The judge differentiates the layers one by one: see that they are the step."""
    step, (_, *shape) = STEPS[name]
    x, model = randn(2, *shape), Bare(step)
    chain = hbp.convert(model)._chain
    # One multiplication and addition for the two of a scaled sum.
    close(chain(x), model(x), rtol=1e-15, atol=1e-15)
    check_layer(chain, x)


def test_samples_that_a_step_mixes_are_refused_in_the_pass() -> None:
    for step, shape in [
        (lambda m, x: x.transpose(0, 1), (6, 6)),
        (lambda m, x: x.mean(0, keepdim=True), (1, 6)),
        # In the pass, where there are more rows, these would be other functions.
        (lambda m, x: x * x.size(0), (5, 6)),
        (lambda m, x: x / x.shape[0], (2, 6)),
        # One sample goes into all.
        (lambda m, x: x - x[:1].mean(1, keepdim=True), (4, 6)),
        (lambda m, x: x[1:2] - x.mean(1, keepdim=True), (4, 6)),
        (lambda m, x: x[-1] - x.mean(1, keepdim=True), (4, 6)),
        (lambda m, x: x - x[:2].mean(0, keepdim=True), (4, 6)),
    ]:
        twin = hbp.convert(Free(step).double())
        outputs = twin(randn(*shape).requires_grad_())
        outputs.sum().backward()
        with pytest.raises(ValueError, match="does not keep the samples apart"):
            twin.backward_hessian(torch.eye(6).double(), True)


def test_inserted_layers_take_no_name_that_is_there() -> None:
    model = Free(lambda m, x: m.tanh(x.tanh().tanh()).tanh())
    model.tanh = nn.Linear(6, 6)
    model.tanh_1 = nn.Sequential()
    model.double().eval()
    twin = hbp.convert(model)
    assert _names(twin) == _names(model)
    assert not any(module.training for module in twin.modules())
    assert sum(isinstance(m, hbp.HBPTanh) for m in twin.modules()) == 3
    _same_in_both_modes(twin, model, 2, 6)


@pytest.mark.parametrize(
    ("name", "size"), [("alexnet", 64), ("vgg11", 32), ("resnet18", 32)]
)
def test_models_of_torchvision(name: str, size: int) -> None:
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, name)(weights=None, num_classes=3).double().eval()
    twin = hbp.convert(model)
    assert _names(twin) == _names(model)
    x = randn(2, 3, size, size)
    assert torch.equal(twin(x), model(x))
    first, *_, last = model.parameters()
    model.requires_grad_(False)
    first.requires_grad_(True)
    last.requires_grad_(True)
    outputs = twin(x)
    loss = F.cross_entropy(outputs, torch.tensor([0, 1]))
    curvature = hbp.batch_summed_hessian(loss, outputs)
    loss.backward()
    twin.backward_hessian(curvature, modify_2nd_order_terms="zero")
    close(last.hessian.to_dense(), curvature)
    product = first.hessian @ first.detach().reshape(-1, 1)
    assert product.isfinite().all()
    assert product.any()


@pytest.mark.parametrize(
    "name",
    [
        "regnet_y_400mf",
        "squeezenet1_0",
        "shufflenet_v2_x0_5",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
    ],
)
def test_more_models_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, name)(num_classes=3).double().eval()
    twin, x = hbp.convert(model), randn(2, 3, 64, 64)
    assert _names(twin) == _names(model)
    close(twin(x).detach(), model(x).detach())


class Shadowed(nn.Module):
    """Its layers have the names that torch.fx gives to the function, and the next."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.relu_ = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu_(self.relu(F.relu(x)))


def test_a_layer_for_a_function_takes_no_name_of_another() -> None:
    model = Shadowed().double()
    twin = hbp.convert(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    x = randn(5, 4)
    assert torch.equal(twin(x), model(x))
    assert len(list(twin.children())) == 3
