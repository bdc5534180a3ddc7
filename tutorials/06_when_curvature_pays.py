# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What curvature does, and when it pays
#
# A second-order step knows more than a gradient step, and costs more.
# What exactly does it know, and is that worth its price? First we
# look at what the curvature of
# [tutorial 02](02_sequential_cifar10.ipynb) can see at all. Then we
# race four optimizers over two networks, and in the second race a
# fifth:
#
# - **HBP**: `CGNewton` with Hessian backpropagation,
# - **centred SGD**, which has no curvature, only the one insight that
#   we will find in the curvature,
# - **Adam**, with the best of a few learning rates,
# - **SGD** with momentum, likewise,
# - **Muon**, which joins in the second race.

# %% [markdown]
# ## Setup
#
# The first cell installs the library where it is missing, for
# instance on Colab. Otherwise it does nothing.

# %%
# @title Install hbp where it is missing
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# @markdown Half an hour, or with `quick_run` one minute.
quick_run = False  # @param {type: "boolean"}
if quick_run:
    os.environ["HBP_TUTORIAL"] = "quick"

hbp_source = ""

if importlib.util.find_spec("hbp") is None:
    here = Path.cwd()
    checkouts = [p for p in here.parents if (p / "src/hbp").is_dir()]
    known = [*here.glob("hbp-*.whl"), *checkouts, hbp_source]
    package = os.environ.get("HBP_INSTALL", known[0])
    if not package:
        try:
            from google.colab import files
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "hbp is missing. Put its wheel, hbp-*.whl, beside "
                "this notebook, or say what pip is to install, as "
                "in HBP_INSTALL=../hbp"
            ) from None
        print("Choose the wheel, hbp-*.whl, on your disk.")
        (package,) = files.upload()
    pip = [sys.executable, "-m", "pip", "install", "-q", package]
    subprocess.run(pip, check=True)
    importlib.invalidate_caches()

# %%
import math
from functools import partial
from itertools import pairwise
from time import perf_counter

import torch
from torch import nn

from hbp import CGNewton, backward, convert, output_hessian, set_seeds
from hbp.tutorial.datasets import cifar10, quick
from hbp.tutorial.plotting import Panel, curves

use_gpu = torch.cuda.is_available()
device = torch.device("cuda" if use_gpu else "cpu")

# %% [markdown]
# ## The same for all
#
# Images have mean 0 and deviation 1 in every colour.

# %% tags=["nbval-ignore-output"]
train_images, train_labels = cifar10(train=True).tensors
test_images, test_labels = cifar10(train=False).tensors
print(
    len(train_images), "training images,", len(test_images), "others"
)

# %%
center = train_images.mean((0, 2, 3), keepdim=True)
spread = train_images.std((0, 2, 3), keepdim=True)
train_images = ((train_images - center) / spread).to(device)
test_images = ((test_images - center) / spread).to(device)
train_labels = train_labels.to(device)
test_labels = test_labels.to(device)

# %% [markdown]
# Both networks are stacks of linear layers and sigmoids, written in
# plain PyTorch. Weights start from Xavier's distribution, biases from
# zero. With the same seed, all optimizers start from the same place
# and see the same batches in the same order.


# %%
batch_size, widest = (50, 192) if quick() else (100, 1024)


def network(sizes, between=nn.Sigmoid):
    set_seeds(0)
    layers = [nn.Flatten()]
    sizes = [sizes[0], *(min(size, widest) for size in sizes[1:])]
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, between()]
    # None at the end.
    return nn.Sequential(*layers[:-1]).to(device)


# %% [markdown]
# A step takes a batch, and returns the model's outputs. For HBP,
# `convert` replaces each layer by one that sends curvature backward.

# %%
loss_func = nn.CrossEntropyLoss()


def newton(model, lr, alpha, mean_input=True):
    model = convert(model)
    model.set_hbp_approximation(average_parameter_jacobian=mean_input)
    optimizer = CGNewton(
        model.parameters(),
        lr=lr,
        alpha=alpha,
        cg_atol=0.0,
        cg_tol=0.1,
        cg_maxiter=50,
    )

    def step(images, labels):
        outputs = model(images)
        loss = loss_func(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        model.backward_hessian(
            output_hessian(loss_func, outputs, labels),
            modify_2nd_order_terms="abs",
        )
        optimizer.step()
        return outputs

    return step, optimizer


def first_order(model, optimizer, change=lambda: None):
    """A step by the gradient; `change` is called before it moves."""

    def step(images, labels):
        outputs = model(images)
        loss = loss_func(outputs, labels)
        model.zero_grad()
        loss.backward()
        change()
        optimizer.step()
        return outputs

    return step, optimizer


def adam(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return first_order(model, optimizer)


def sgd(model):
    p = model.parameters()
    return first_order(
        model, torch.optim.SGD(p, lr=0.3, momentum=0.9)
    )


# %% [markdown]
# ## What an averaged block sees
#
# Averaged over the batch, the curvature of a weight is
# $H \otimes \bar x \bar x^\top$, with the mean $\bar x$ of the
# layer's inputs. So of all directions in which a row of the weight
# can move, it knows a single one, that of $\bar x$. In all others it
# is zero, and there the step that, with the damping $\alpha$, solves
#
# $$ \big[ (1 - \alpha) H_W + \alpha I \big] \, d = -g $$
#
# is $d = -g / \alpha$: gradient descent at the rate of
# $\mathrm{lr} / \alpha$. Along $\bar x$ the largest eigenvalue of
# the block is $\lambda_{\max}(H) \, \lVert \bar x \rVert^2$. Only
# where that is not small beside $\alpha$ does the block change the
# step at all. Let us look, layer by layer, at the deep network of the
# second race, as it starts.

# %%
shallow = [3072, 1024, 512, 256, 128, 10]
deep = [3072, 1024, 512, 256, 128, 64, 32, 16, 10]


def look(sizes, between=nn.Sigmoid):
    """Of each layer, λ_max of H, the inputs and the gradient."""
    model = convert(network(sizes, between))
    x, labels = train_images[:500], train_labels[:500]
    outputs = model(x)
    loss = loss_func(outputs, labels)
    hessian = output_hessian(loss_func, outputs, labels)
    loss.backward()
    model.backward_hessian(hessian, modify_2nd_order_terms="abs")
    found = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            top = layer.bias.hessian.eigvalsh().max()
            found.append((top, x.flatten(1), layer.weight.grad))
        with torch.no_grad():
            x = layer(x)
    return found


def share_along_mean(x, g):
    """How much of g² lies along x̄."""
    mean = x.mean(0)
    along = (g @ mean).square().sum() / (mean @ mean)
    return (along / g.square().sum()).item()


layers = look(deep)
squares = [x.mean(0).square().sum() for _, x, _ in layers]
largest = [
    (top * square).item()
    for (top, _, _), square in zip(layers, squares, strict=True)
]
along = [share_along_mean(x, g) for _, x, g in layers]
numbers = range(1, len(layers) + 1)

# %% alt="Two panels against the layers, 1 to 8. On the left, the largest eigenvalue of the block, as a power of ten, rises from layer to layer, and passes the line of alpha in the fifth. On the right, the share of the squared gradient along the mean input is about a third in the first layer, and almost 1 in all others." tags=["nbval-ignore-output"]
curves(
    [
        Panel(
            "layer",
            "log10 of the largest eigenvalue",
            {"block": (numbers, [math.log10(v) for v in largest])},
            levels={"α": math.log10(0.01)},
        ),
        Panel(
            "layer",
            "share of g² along the mean input",
            {"gradient": (numbers, along)},
        ),
    ]
)

# %%
assert max(largest[:3]) < 0.01 / 4
print("The first three blocks are small beside the damping.")

assert largest[-1] > 10 * 0.01
print("The last one is not.")

# %% [markdown]
# In the first layers the step is gradient descent, in all directions
# and at a rate of 10. What the curvature does, it does near the
# output: it holds the step back along $\bar x$, where the loss is
# steep, and where nearly all of the gradient points.
#
# **Predict.** How much of what HBP wins is this holding back alone?
# Let us take all curvature away, and keep only that: gradient descent
# at the same rate of $\mathrm{lr} / \alpha$, in which no weight ever
# moves along its layer's mean input. The biases, which have no
# inputs, get a tenth of the rate. We call it *centred SGD*, because
# it moves weights as if every layer's inputs had been centred.


# %%
def centred(model, lr, where=slice(None)):
    layers = [m for m in model if isinstance(m, nn.Linear)]
    means = {}

    def remember(layer, inputs, outputs):
        means[layer] = inputs[0].detach().mean(0)

    for layer in layers:
        layer.register_forward_hook(remember)
    groups = [
        {"params": [layer.weight for layer in layers]},
        {"params": [layer.bias for layer in layers], "lr": lr / 10},
    ]

    def centre():
        for layer in layers[where]:
            g, mean = layer.weight.grad, means[layer]
            g -= torch.outer(g @ mean, mean) / (mean @ mean)

    return first_order(model, torch.optim.SGD(groups, lr=lr), centre)


# %% [markdown]
# ## The race
#
# The training loop is the same for all. After each epoch it measures
# the accuracy on the test images, multiplies the learning rate by
# `decay`, and prints a dot. If you interrupt a race, the numbers so
# far are kept.


# %%
def train(model, step, optimizer, epochs, decay, log):
    """Add an entry to the log for every epoch."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(
        optimizer, decay
    )
    shuffle = torch.Generator().manual_seed(0)
    count, seconds = len(train_images), 0.0
    for epoch in range(1, epochs + 1):
        start, hits = perf_counter(), 0
        order = torch.randperm(count, generator=shuffle)
        for batch in order.split(batch_size):
            labels = train_labels[batch]
            outputs = step(train_images[batch], labels)
            hits += (outputs.argmax(1) == labels).sum()
        hits = int(hits)  # A GPU is done only now.
        seconds += perf_counter() - start
        schedule.step()
        with torch.no_grad():
            right = model(test_images).argmax(1) == test_labels
        entry = {
            "epochs": epoch,
            "seconds": seconds,
            "train": hits / count,
            "test": right.float().mean().item(),
        }
        log.append(entry)
        print(".", end="", flush=True)


def race(sizes, starts, epochs, decay):
    """Train with every optimizer; return the logs by name."""
    logs = {name: [] for name in starts}
    try:
        for name, start in starts.items():
            print(f"{name:8}", end="", flush=True)
            model = network(sizes)
            step, optimizer = start(model)
            log = logs[name]
            train(model, step, optimizer, epochs, decay, log)
            print(
                f" test accuracy {log[-1]['test']:.3f}",
                f"after {log[-1]['seconds']:.0f} s",
            )
    except KeyboardInterrupt:
        print("\nInterrupted. The metrics so far are kept.")
    units = ["epochs", "seconds", "train", "test"]
    return {
        name: {unit: [entry[unit] for entry in log] for unit in units}
        for name, log in logs.items()
    }


def draw(logs, units=("epochs", "seconds")):
    return curves(
        [
            Panel(
                unit,
                f"{kind} accuracy",
                {
                    k: (log[unit], log[kind])
                    for k, log in logs.items()
                },
            )
            for kind in ("train", "test")
            for unit in units
        ]
    )


# %% [markdown]
# ## A shallow network
#
# Five linear layers. The learning rates of Adam and SGD are the best
# of a grid, found with the schedule that is used here. That of
# centred SGD was not looked for: it is 0.15 / 0.05 = 3, as in HBP.

# %% tags=["nbval-ignore-output"]
starts = {
    "HBP": partial(newton, lr=0.15, alpha=0.05),
    "centred": partial(centred, lr=0.15 / 0.05),
    "Adam": adam,
    "SGD": sgd,
}
shallow_logs = race(shallow, starts, 4 if quick() else 5, decay=0.7)

# %% alt="Four panels: training accuracy above, test accuracy below, against epochs on the left and seconds on the right. The curves of HBP, centred SGD, Adam and SGD rise side by side. HBP ends a little above the others." tags=["nbval-ignore-output"]
draw(shallow_logs)


# %% [markdown]
# All four learn. HBP is ahead at the end, but not by much, and
# centred SGD, which knows nothing of curvature, is close to it all
# the way.


# %%
def ends(logs, kind="test"):
    return {name: log[kind][-1] for name, log in logs.items()}


test = ends(shallow_logs)
assert abs(test["HBP"] - test["Adam"]) < 0.1
print("HBP and Adam end less than ten points apart.")

assert min(test.values()) > 0.3
print("The others are not lost, either.")

assert abs(test["HBP"] - test["centred"]) < 0.1
print("The centring alone does about as much.")

# %% tags=["nbval-ignore-output"]
if not quick():
    assert test["HBP"] > max(test["Adam"], test["SGD"])
    print("On CIFAR-10, HBP ends ahead.")
    assert test["centred"] > max(test["Adam"], test["SGD"])
    print("Centred SGD, without any curvature, is next.")

# %% [markdown]
# By the clock, on the right, the race is closer still, because a step
# of HBP takes longer than one of SGD.
#
# **Predict.** Counted in steps of SGD, is the price of such a step
# higher with small batches, or with large ones?


# %% tags=["nbval-ignore-output"]
def time_step(name, count):
    """The shortest of ten steps."""
    step, _ = starts[name](network(shallow))
    times = []
    for _ in range(10):
        begin = perf_counter()
        step(train_images[:count], train_labels[:count])
        if use_gpu:
            torch.cuda.synchronize()
        times.append(perf_counter() - begin)
    return min(times)


for count in [20, 100, 500]:
    times = time_step("HBP", count) / time_step("SGD", count)
    print(f"batch of {count}: {times:.2f} times")

# %% [markdown]
# On a processor (CPU) with small ones: curvature is averaged over the
# batch before it flows backward, so that its price does not depend on
# the batch, while that of the rest shrinks with it.
#
# ### More than one direction
#
# The averaged block is not all that HBP can see. With averaged
# *products*, the block of a weight is
# $H \otimes \operatorname{E}[x x^\top]$, which knows every direction
# in which the inputs of the batch vary, at a higher price.
#
# **Predict.** Is there more to be won than by centring? The rate and
# the damping are those of the deep network below; nothing was tuned.

# %% tags=["nbval-ignore-output"]
all_inputs = partial(newton, mean_input=False)
start = {"E[xxᵀ]": partial(all_inputs, lr=0.1, alpha=0.01)}
more = race(shallow, start, 1 if quick() else 5, decay=0.7)

# %% alt="Training accuracy on the left, test accuracy on the right, against epochs. In training, the curve of E of x x transposed lies above all others from the first epoch on, and its lead grows. On the test images it starts ahead, and levels off where HBP goes on rising." tags=["nbval-ignore-output"]
draw({**more, **shallow_logs}, ["epochs"])

# %%
leads = [
    ahead - behind
    for name in ("HBP", "centred")
    for ahead, behind in zip(
        more["E[xxᵀ]"]["train"],
        shallow_logs[name]["train"],
        strict=False,
    )
]
assert min(leads) > 0.02
print("On the training images it is ahead after every epoch.")

assert more["E[xxᵀ]"]["test"][0] > shallow_logs["HBP"]["test"][0]
print("On the test images it is, too, at first.")

# %% tags=["nbval-ignore-output"]
ahead, behind = more["E[xxᵀ]"], shallow_logs["HBP"]
times = ahead["seconds"][0] / behind["seconds"][0]
print(f"It takes {times:.1f} times the time of HBP.")
if not quick():
    assert ahead["test"][-1] < behind["test"][-1]
    print("On CIFAR-10, HBP has overtaken it at the end.")

# %% [markdown]
# So a block that knows more directions fits the data sooner, which
# centring can't do. But the network soon memorises, so that the lead
# on the test images is gone after a few epochs, and for each weight
# such a step solves one system per image of the batch.

# %% [markdown]
# ### Where many directions are steep
#
# These networks of sigmoids are a special case: what a sigmoid puts
# out lies around 1/2, so that the mean input is long and all else is
# short. What a tanh puts out lies around zero. Let us count how many
# directions of the inputs are steep. A direction of
# $\operatorname{E}[x x^\top]$ with eigenvalue $\lambda$ has a
# curvature of $\lambda_{\max}(H) \, \lambda$; we call it steep
# if that is above $\alpha = 0.01$.
#
# **Predict.** How many are there in each layer, with sigmoids? With
# tanh, or with ReLU?


# %% tags=["nbval-ignore-output"]
def count_steep(between, alpha=0.01):
    counts = []
    for top, x, _ in look(shallow, between):
        # The smaller of two that share all eigenvalues but 0.
        products = x @ x.T if len(x) < x.shape[1] else x.T @ x
        eigenvalues = torch.linalg.eigvalsh(products) / len(x)
        counts.append((top * eigenvalues > alpha).sum().item())
    return counts


kinds = {"tanh": nn.Tanh, "ReLU": nn.ReLU, "sigmoid": nn.Sigmoid}
steep = {name: count_steep(kind) for name, kind in kinds.items()}
for name, counts in steep.items():
    print(f"{name:8}", counts)

# %% alt="How many directions are steep, against the layers 1 to 5. With tanh some three hundred in the first layer, falling to some fifty in the last. With ReLU about half as many. With sigmoids one or two in every layer." tags=["nbval-ignore-output"]
layer_numbers = range(1, len(shallow))
curves(
    [
        Panel(
            "layer",
            "steep directions",
            {k: (layer_numbers, n) for k, n in steep.items()},
        )
    ]
)

# %%
assert max(steep["sigmoid"]) <= 2
print("With sigmoids, there are at most two in a layer.")

assert min(steep["tanh"]) > 20
assert min(steep["ReLU"]) > 10
print("With tanh and with ReLU there are many in every one.")

# %% [markdown]
# So with sigmoids the mean input is about all there is to be seen.
# Now take the steps of the race, with the same rates, to the network
# with tanh. One is new: `CGNewton` without a rate, which goes as far
# as the curvature along its step allows, up to a tenth of the step,
# and promises to take at most a fifth off the loss.
#
# **Predict.** Which of them holds?


# %%
def own_length(model):
    model = convert(model)
    optimizer = CGNewton(model.parameters())

    def step(images, labels):
        outputs = model(images)
        loss = loss_func(outputs, labels)
        optimizer.zero_grad()
        backward(model, outputs, loss)
        optimizer.step()
        return outputs

    return step, optimizer


def losses(between, start):
    """The loss of each of the first batches."""
    count = 30 if quick() else 100
    model = network(shallow, between)
    step, _ = start(model)
    shuffle = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train_images), generator=shuffle)
    found = []
    for batch in order.split(batch_size)[:count]:
        labels = train_labels[batch]
        outputs = step(train_images[batch], labels)
        found.append(loss_func(outputs, labels).item())
    return found


four = {
    "HBP": starts["HBP"],
    "centred": starts["centred"],
    "E[xxᵀ]": partial(all_inputs, lr=0.15, alpha=0.05),
    "HBP, own length": own_length,
}
with_tanh = {k: losses(nn.Tanh, start) for k, start in four.items()}

# %% alt="The logarithm of the loss against the step, for four methods on the network with tanh. HBP and centred SGD rise within a few steps to tens of times the loss of guessing, and stay high. E of x x transposed, and HBP with a length of its own, fall from the start." tags=["nbval-ignore-output"]
curves(
    [
        Panel(
            "step",
            "log10 of the loss",
            {
                k: (range(len(found)), [math.log10(v) for v in found])
                for k, found in with_tanh.items()
            },
            levels={"guessing": math.log10(math.log(10))},
        )
    ]
)


# %%
def end(found):
    """The mean of the last losses."""
    return sum(found[-20:]) / 20


assert min(end(with_tanh[k]) for k in ["HBP", "centred"]) > 5
print("A block that knows the mean input alone does not hold.")

assert end(with_tanh["E[xxᵀ]"]) < 2.3
print("One that knows all directions does.")

assert end(with_tanh["HBP, own length"]) < 2.3
print("So does the first, if it measures how far it may go.")

# %% [markdown]
# This is what curvature is for. Where hundreds of directions are
# steep, holding back one does not help: in the others, the rate of 3
# is far too high. A block that knows them all holds each one back as
# much as it needs. And the curvature along the step, a single number,
# tells that a step would be too long,
# [whatever the blocks have missed](../docs/diverges.md).

# %% [markdown]
# ## A deep network
#
# Eight linear layers. On its way back the gradient has to pass seven
# sigmoids, and each takes at least three quarters of it.
#
# The damping is smaller now. In the first layers, both gradient and
# curvature are tiny, and 0.1 / 0.01 = 10 is the fastest rate at which
# a layer can move.

# %% [markdown]
# Here *Muon* joins, which knows nothing of curvature either. It takes
# a weight's gradient as a matrix, and gives all of its singular
# values the size 1, so that the step goes equally far in every
# direction that the gradient has. Five Newton-Schulz iterations do
# that, roughly. Muon moves the *hidden* weights, all but the first
# and the last, and AdamW moves the rest. The learning rates are usual
# ones.
#
# **Predict.** How much of such a step lies along $\bar x$?


# %%
def orthogonal(g):
    """A matrix like g: large singular values go to about 1."""
    x = g / g.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
    return x


def muon(model, lr):
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    hidden = weights[1:-1]
    rest = [weights[0], weights[-1]]
    rest += [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(rest, lr=1e-3)
    momenta = [torch.zeros_like(w) for w in hidden]

    @torch.no_grad()
    def move():
        # As the rate of AdamW falls, so does this one.
        rate = lr / 1e-3 * adamw.param_groups[0]["lr"]
        for w, momentum in zip(hidden, momenta, strict=True):
            momentum.lerp_(w.grad, 0.05)
            ahead = w.grad.lerp(momentum, 0.95)
            w -= rate * orthogonal(ahead)

    return first_order(model, adamw, move)


hidden = layers[1:-1]
left = [share_along_mean(x, orthogonal(g)) for _, x, g in hidden]

assert max(left[:3]) < 0.15 < 0.5 < min(along[1:4])
print("In the wide hidden layers, it is a small part.")

assert left[-1] > 0.8
print("In the last one, it is not.")

# %% [markdown]
# So in the wide layers Muon, too, holds the mean input back, in
# another way: there it is one direction among many, and the step goes
# no further along it than along the others. Close to the output,
# where nearly all of the gradient lies along $\bar x$, its other
# singular values are so small that five iterations do not bring them
# up to 1.

# %% tags=["nbval-ignore-output"]
deep_logs = race(
    deep,
    {
        "HBP": partial(newton, lr=0.1, alpha=0.01),
        "centred": partial(centred, lr=0.1 / 0.01),
        "Muon": partial(muon, lr=0.02),
        "Adam": adam,
        "SGD": sgd,
    },
    epochs=3 if quick() else 6,
    decay=0.8,
)

# %% alt="The same four panels for the deep network. Muon is ahead by epochs from the first on. HBP and centred SGD, which is a little ahead of it, follow. Then comes Adam, at some distance, and SGD stays at the accuracy of guessing. Against seconds, the curve of Muon is stretched most." tags=["nbval-ignore-output"]
draw(deep_logs)

# %% [markdown]
# Here the curves part. SGD sits on the plateau. Adam leaves it, and
# then learns slowly. HBP goes ahead of both, and centred SGD, which
# has no curvature, goes as far in less time. Muon goes furthest, and
# on a processor at the highest price. So it does not take the size of
# the curvature to get this far. HBP and centred SGD hold back one
# steep direction of each layer, and Muon does so in the wide ones, so
# that all others may move fast.

# %%
test, fit = ends(deep_logs), ends(deep_logs, "train")
# After so few steps, the few test images say little.
far = fit if quick() else test

assert far["SGD"] < 0.15
print("SGD has not left the plateau.")

assert sorted(far.values())[1] > (0.16 if quick() else 0.2)
print("All others have.")

assert far["centred"] > far["HBP"] - 0.05
print("Centred SGD goes about as far as HBP.")

# %% tags=["nbval-ignore-output"]
if not quick():
    assert test["HBP"] > test["Adam"] + 0.03
    assert fit["HBP"] > fit["Adam"] + 0.03
    print("On CIFAR-10, HBP is well ahead of Adam,")
    assert test["Muon"] > max(test["HBP"], test["centred"])
    print("and Muon ahead of all.")

# %% [markdown]
# ## So what is curvature for, and when does it pay?
#
# - On both networks, most of what the step with averaged Jacobians
#   wins is centring, and centring alone is cheaper.
# - What HBP adds is that nobody had to know it: at every step it
#   finds which directions are steep in which layer, and how much.
# - Muon does not ask which directions are steep, and on the deep
#   network it is the best of these.
# - A block of averaged products knows more than one direction, and
#   fits the data in fewer steps, each of which takes longer. Where
#   many are steep, as behind tanh and ReLU, one is not enough.
#   [A convolutional network](05_convolutional_network.ipynb) shows
#   what exact products see besides, and what they cost.
# - No race here was fair, with one seed and settings from elsewhere.
#   On the [performance page](../docs/performance.md#accuracy) all
#   methods get as many trials, on images that were held out, and
#   three seeds. Two more races there have ReLUs or larger batches.
#
# ## Try it yourself
#
# **Exercise 1.** Which layer's mean input matters? Let centred SGD
# leave it out in the last layer alone, or in all but the last, and
# take 100 steps on the shallow network.

# %% tags=["solution", "nbval-ignore-output"]
places = {
    "all": slice(None),
    "the last": slice(-1, None),
    "all but the last": slice(-1),
    "none": slice(0),
}
found = {
    name: end(losses(nn.Sigmoid, partial(centred, lr=3, where=where)))
    for name, where in places.items()
}
for name, value in found.items():
    print(f"{name:16} {value:.3f}")

# It is above all the last one's.
assert found["the last"] < found["all but the last"] - 0.1
assert found["the last"] < found["none"] - 0.1

# %% [markdown]
# **Exercise 2.** In the deep network with sigmoids nearly all of the
# gradient lies along the mean input. How much does with tanh? Predict
# it from the counts of steep directions, then look.

# %% tags=["solution", "nbval-ignore-output"]
shares = [share_along_mean(x, g) for _, x, g in look(deep, nn.Tanh)]
print(" ".join(f"{share:.2f}" for share in shares))

assert max(shares) < 0.3 < 0.9 < min(along[2:])

# %% [markdown]
# **Exercise 3.** Take the four methods that we tried with tanh to the
# same network with ReLU. Which of them holds there?

# %% tags=["solution", "nbval-ignore-output"]
held = []
for name, start in four.items():
    try:
        final = end(losses(nn.ReLU, start))
    except ArithmeticError:  # The step would be infinite.
        final = math.inf
    print(f"{name:16} {final:.2g}")
    held += [name] * (final < 2.3)

# Averaged products know the inputs, though not with which Hessian
# each of them comes, and here that matters.
assert held == ["HBP, own length"]

# %% [markdown]
# ## References
#
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
# - X. Glorot, Y. Bengio. Understanding the difficulty of training
#   deep feedforward neural networks. AISTATS 2010.
# - K. Jordan et al. Muon: An optimizer for hidden layers in neural
#   networks. 2024.
