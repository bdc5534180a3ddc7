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
# # A convolutional network, without averages
#
# So far a batch was averaged into one virtual sample before its
# curvature was sent back. That is cheap, and it forgets what the
# samples do not share. For photographs this is nearly everything.
#
# This tutorial sends back the curvature of *every* sample, through
# three convolutions and three linear layers, and never writes a
# matrix down:
#
# > A product with the exact block costs about as much as a gradient.
#
# You will check such a product against autograd, see what an average
# loses, and train with both. At the end waits a longer run, recorded
# for you.

# %% [markdown]
# ## Setup
#
# The first cell installs the library where it is missing.

# %%
import importlib.util
import os
import subprocess
import sys

hbp_source = ""

if importlib.util.find_spec("hbp") is None:
    package = os.environ.get("HBP_INSTALL", hbp_source)
    assert package, "set HBP_INSTALL to what pip is to install"
    pip = [sys.executable, "-m", "pip", "install", "-q", package]
    subprocess.run(pip, check=True)
    importlib.invalidate_caches()

# %%
import copy
import math
from time import perf_counter

import torch
from torch.autograd import grad

from hbp import (
    CGNewton,
    HBPConv2d,
    HBPFlatten,
    HBPLinear,
    HBPMaxPool2d,
    HBPSequential,
    HBPSigmoid,
    batch_summed_hessian,
    extremal_eigenvalues,
    per_sample_hessian,
    set_seeds,
)
from hbp.reference import ggn_blocks, hessian_blocks
from hbp.tutorial.datasets import cifar10, quick, recorded
from hbp.tutorial.plotting import Panel, curves, matrices

set_seeds(0)
use_gpu = torch.cuda.is_available()
device = torch.device("cuda" if use_gpu else "cpu")

# %% [markdown]
# The network is 3c3d, with a quarter of its channels, so that a
# processor is enough. The full one has `(64, 96, 128)`: change this
# line if you have a GPU. With `HBP_TUTORIAL=quick` in the
# environment, network and batch are smaller still.

# %%
channels = (8, 12, 16) if quick() else (16, 24, 32)
batch_size, num_steps = (64, 40) if quick() else (128, 60)

# %% [markdown]
# ## The data
#
# CIFAR-10, every colour with mean 0 and deviation 1.

# %% tags=["nbval-ignore-output"]
all_images, all_labels = cifar10(train=True).tensors
center = all_images.mean((0, 2, 3), keepdim=True)
spread = all_images.std((0, 2, 3), keepdim=True)

# As many as we will train on, and each of them once.
count = num_steps * batch_size
train_images = ((all_images[:count] - center) / spread).to(device)
train_labels = all_labels[:count].to(device)
images, labels = train_images[:batch_size], train_labels[:batch_size]
print(len(train_images), "images, in batches of", batch_size)

# %% [markdown]
# ## The network
#
# Three convolutions, each with a sigmoid and a max-pooling, then
# three linear layers. Weights start from Xavier's distribution,
# biases from zero.


# %%
def network(channels):
    a, b, c = channels
    layers = []
    for convolution in (
        HBPConv2d(3, a, 5),
        HBPConv2d(a, b, 3),
        HBPConv2d(b, c, 3, padding=1),
    ):
        pooling = HBPMaxPool2d(3, stride=2, ceil_mode=True)
        layers += [convolution, HBPSigmoid(), pooling]
    layers += [HBPFlatten(), HBPLinear(9 * c, 4 * c), HBPSigmoid()]
    layers += [HBPLinear(4 * c, 2 * c), HBPSigmoid()]
    layers += [HBPLinear(2 * c, 10)]
    for layer in layers:
        if isinstance(layer, HBPConv2d | HBPLinear):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return HBPSequential(*layers)


set_seeds(0)
model = network(channels).to(device)
untrained = copy.deepcopy(model)
loss_func = torch.nn.CrossEntropyLoss()

# %% tags=["nbval-ignore-output"]
print(model)

# %% [markdown]
# The first convolution turns an image into `channels[0]` pictures of
# 28 × 28 numbers. Curvature with respect to those is a matrix with as
# many rows and columns. How large is it?

# %%
features = channels[0] * 28 * 28
assert 4 * features**2 > 100e6
print("As a matrix, it would take more than 100 MB,")

assert 4 * (64 * 28 * 28) ** 2 > 10e9
print("and in the full network more than 10 GB.")

# %% [markdown]
# That is for *one* matrix, averaged over a batch. Each sample has one
# of its own; nobody can store them all, and nobody has to.
#
# ## The rule
#
# A convolution is a linear layer that is used at every position.
# Collect the patches that the kernel sees as columns of a matrix
# $[\![X]\!]$; then $Z = W [\![X]\!]$, and the curvature $H_Z$ at the
# output becomes
#
# $$
# [H_W]_{oi,\,o'i'} = \sum_{p,p'} [\![X]\!]_{ip} \,
# [H_Z]_{op,\,o'p'} \, [\![X]\!]_{i'p'} ,
# $$
#
# where $o$ runs over the channels, $i$ over the pixels of the kernel,
# and $p$ over positions
# ([derivation](../docs/mathematics.md#convolution)). To *multiply* by
# this matrix takes no matrix at all. For a $V$ in the shape of $W$,
#
# $$
# V \;\mapsto\; V [\![X]\!] \;\mapsto\; H_Z \, (V [\![X]\!])
# \;\mapsto\; \big( H_Z \, (V [\![X]\!]) \big) \, [\![X]\!]^\top .
# $$
#
# First comes a convolution, as in the forward pass, and last a
# correlation, as in the backward pass. Between them stands $H_Z$,
# which the layers above multiply by in the same manner, until it ends
# at the loss, where $H$ is 10 × 10 for each sample.
#
# In code, it is the Hessian pass that you know, but for one name.
# `per_sample_hessian` keeps apart what `batch_summed_hessian` adds
# up.


# %%
def exact(model, images, labels, treatment):
    """Leave the exact blocks of a batch in the parameters."""
    outputs = model(images)
    loss = loss_func(outputs, labels)
    model.zero_grad()
    hessians = per_sample_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(hessians, modify_2nd_order_terms=treatment)
    return outputs, loss


def averaged(model, images, labels, treatment):
    """The same with the averages of the earlier tutorials."""
    outputs = model(images)
    loss = loss_func(outputs, labels)
    model.zero_grad()
    hessian = batch_summed_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(hessian, modify_2nd_order_terms=treatment)
    return outputs, loss


# %% [markdown]
# ## Is it exact?
#
# Ask autograd, which knows nothing of our rules. For a small network
# in float64, differentiate the gradient of the first kernel once
# more, along some direction $v$: what comes out is $H v$.

# %%
tiny = HBPSequential(
    HBPConv2d(1, 2, 3),
    HBPSigmoid(),
    HBPMaxPool2d(2),
    HBPConv2d(2, 3, 2),
    HBPSigmoid(),
    HBPFlatten(),
    HBPLinear(12, 3),
).double()
x = torch.randn(20, 1, 8, 8, dtype=torch.float64)
y = torch.arange(20) % 3

exact(tiny, x, y, "none")
kernel = tiny[0].weight
v = torch.randn_like(kernel)
product = kernel.hessian @ v.flatten()

(slope,) = grad(loss_func(tiny(x), y), kernel, create_graph=True)
(expected,) = grad((slope * v).sum(), kernel)


def difference(a, b):
    """Relative to b."""
    return (a - b).norm() / b.norm()


# The measured difference is 3e-16: a few roundings in float64.
assert difference(product, expected.flatten()) < 1e-13
print("The product is that of the Hessian.")

# %% [markdown]
# With `"zero"`, products are those of the generalized Gauss-Newton
# matrix (GGN). Multiply by all unit vectors, `to_dense()`, to compare
# whole blocks with those of `hbp.reference`.

# %%
references = {"none": hessian_blocks, "zero": ggn_blocks}
for treatment, reference in references.items():
    exact(tiny, x, y, treatment)
    for name, block in reference(tiny, loss_func, x, y).items():
        own = tiny.get_parameter(name).hessian.to_dense()
        assert difference(own, block) < 1e-13, name
print("Every block of 20 samples is exact, Hessian and GGN.")

# %% [markdown]
# The averaged blocks of [the MNIST
# tutorial](01_single_layer_mnist.ipynb) were exact for one sample.
# These are exact for any number.
#
# ## What a product costs
#
# Back to the real network. We compare a product with the first
# kernel's block, the longest way there is, with one pass forward and
# back.


# %% tags=["nbval-ignore-output"]
def seconds_of(function):
    """The quickest of five calls."""
    times = []
    for _ in range(5):
        start = perf_counter()
        function()
        if use_gpu:
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return min(times)


def forward_and_back():
    loss_func(model(images), labels).backward()


passes = seconds_of(forward_and_back)
exact(model, images, labels, "zero")
kernel = model[0].weight
direction = torch.randn(kernel.numel(), device=device)
one_product = seconds_of(lambda: kernel.hessian @ direction)

print(f"forward and back: {1000 * passes:.0f} ms")
print(f"one product:      {1000 * one_product:.0f} ms")

# %%
assert one_product < 2 * passes
print("A product costs less than two passes forward and back.")

# %% [markdown]
# A step needs several products for each parameter, and so costs
# several times what a gradient step does. That is the price.
#
# ## What an average forgets
#
# What do you get for it? Here are three images of the batch, in one
# colour, and the mean of the whole batch. All have the same scale of
# colours.

# %% alt="Four tiles on one colour scale. Three are images with strong blue and orange areas. The fourth, the mean image of the batch, is almost blank." tags=["nbval-ignore-output"]
tiles = {f"image {k}": images[k, 0] for k in range(3)}
tiles["mean image"] = images[:, 0].mean(0)
matrices(tiles, columns=4, same_scale=True)

# %%
length = images.flatten(1).norm(dim=1).mean()
share = images.mean(0).norm() / length

assert share < 1 / 2
print("The mean image is less than half as long as an image.")

# %% [markdown]
# In the mean image there are no edges left, but a kernel is there to
# look at edges. In the averaged block, $[\![X]\!]$ holds patches of
# the *mean* image, in which a kernel that looks for an edge finds
# nothing, and the block says: along this direction the loss is flat.
#
# Let us ask. Take a direction $v$ that adds a vertical edge to every
# kernel, and compare the curvature $v^\top H v$ in both blocks.

# %%
edge = torch.tensor([1.0, 1.0, 0.0, -1.0, -1.0], device=device)
edge = edge.expand_as(kernel).flatten()
edge = edge / edge.norm()


def curvature_along(v, pass_back):
    pass_back(model, images, labels, "zero")
    return (v @ (kernel.hessian @ v)).item()


exact_edge = curvature_along(edge, exact)
averaged_edge = curvature_along(edge, averaged)

# %% tags=["nbval-ignore-output"]
print(f"exact:    {exact_edge:.2e}")
print(f"averaged: {averaged_edge:.2e}")

# %%
assert 0 <= averaged_edge < exact_edge / 10
print("Of the curvature along an edge, nine tenths are forgotten.")

# %% [markdown]
# The same happens again in every layer. The averages of slopes, of
# activations and of what a max-pooling selects stand for those of the
# samples, and each forgets a little more.
#
# ## A short run
#
# Does it matter for training? We take few steps, and start all
# optimizers from the same weights, with the same batches in the same
# order. Each image is seen once.
#
# The sigmoids put this network on a plateau: at first it gives all
# classes the same chance, at a loss of $\ln 10 \approx 2.3$, and the
# gradient that arrives at the first convolution is tiny. How long
# does each optimizer stay there?


# %%
def newton(pass_back, treatment, alpha, lr=0.15):
    model = copy.deepcopy(untrained)
    optimizer = CGNewton(
        model.parameters(),
        lr=lr,
        alpha=alpha,
        cg_atol=0.0,
        cg_tol=0.1,
        cg_maxiter=10,
    )

    def step(images, labels):
        loss = pass_back(model, images, labels, treatment)[1]
        optimizer.step()
        return loss.item()

    return step


def first_order(kind, **options):
    model = copy.deepcopy(untrained)
    optimizer = kind(model.parameters(), **options)

    def step(images, labels):
        loss = loss_func(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


steps = {
    "exact": newton(exact, "abs", alpha=0.001),
    "averaged": newton(averaged, "abs", alpha=0.01),
    "SGD": first_order(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": first_order(torch.optim.Adam, lr=1e-2),
}

# %% [markdown]
# Exact products use `"abs"`: the GGN has next to no curvature in the
# first layers, as the first exercise will show. The damping $\alpha$
# is small. Where $H$ is much smaller than $\alpha$, a step is
# $-\mathrm{lr}/\alpha \cdot g$, with a rate of 150 here. That suits
# the first layers, whose gradients are tiny. In the last ones $H$ is
# larger, and has to hold the step back, so we must trust it. Averages
# we trust less, and give $\alpha$ ten times the size: with 0.001, as
# the record below shows, training blows up.
#
# SGD and Adam have the learning rates that came out best in that
# record.

# %% tags=["nbval-ignore-output"]
batches = list(
    zip(
        train_images.split(batch_size),
        train_labels.split(batch_size),
        strict=True,
    )
)
losses, seconds = {}, {}
for name, step in steps.items():
    start = perf_counter()
    losses[name] = [step(x, y) for x, y in batches]
    seconds[name] = perf_counter() - start
    print(
        f"{name:9} loss {losses[name][-1]:.3f}",
        f"after {seconds[name]:.0f} s",
    )


# %% alt="Batch loss against steps for exact and averaged products, SGD and Adam. The curve of exact products falls off the plateau at 2.3 after some twenty steps and ends lowest. The others stay at the plateau, or only just leave it." tags=["nbval-ignore-output"]
def smooth(values, width=5):
    windows = torch.tensor(values).unfold(0, width, 1)
    return windows.mean(1).tolist()


lines = {name: smooth(values) for name, values in losses.items()}
curves(
    [
        Panel(
            "steps",
            "batch loss, mean of 5",
            {
                k: (range(5, num_steps + 1), v)
                for k, v in lines.items()
            },
        )
    ]
)


# %%
def end(name):
    """The mean loss of the last ten steps."""
    return sum(losses[name][-10:]) / 10


assert end("exact") < 2.2
assert min(end("averaged"), end("SGD")) > end("exact") + 0.1
print("Exact products leave the plateau.")
print("Averaged ones and SGD are still behind.")

# %% [markdown]
# Mind what was counted: steps. A step by exact products takes several
# times as long, and in the seconds of this run SGD and Adam could
# have taken more of theirs. So we need a longer run, and a clock.

# %% [markdown]
# ## A longer run
#
# The numbers below come with the package. They were measured on one
# processor, with one thread, on 6,400 training images. With
# `make bench-convolution` you make them anew, on your machine.

# %% tags=["nbval-ignore-output"]
record = recorded("convolution")
made = record["provenance"]
print(made["machine"], "torch", made["versions"]["torch"])
print("made at", made["date"], "from commit", made["commit"])
print(record["settings"])

# %% [markdown]
# Who wins a race depends on how well the runners are set up. Every
# method got a few settings, and a few epochs for each, and the one
# with the lowest training loss went on; the test images had no say in
# this. Here is what was tried:

# %% tags=["nbval-ignore-output"]
print("method        lr  alpha  terms  epochs  training loss")
for row in record["grid"]:
    alpha, terms = row["alpha"] or "", row["treatment"] or ""
    chosen = row["lr"], row["alpha"], row["treatment"]
    best = record["runs"][row["method"]]
    star = chosen == (best["lr"], best["alpha"], best["treatment"])
    print(
        f"{row['method']:9} {row['lr']:6} {alpha:6} {terms:>6}",
        f"{len(row['train_loss']):7} {row['train_loss'][-1]:14.3f}",
        "*" if star else "",
    )

# %%
blown_up = [
    row["train_loss"][-1] > 100
    for row in record["grid"]
    if row["method"] == "averaged" and row["alpha"] == 0.001
]
assert blown_up == [True, True]
print("Averaged products with the smaller damping blow up.")

# %% [markdown]
# The methods ran for different numbers of epochs, so that each got
# about the same processor time. Seconds are those of training alone.

# %% alt="Two panels of test accuracy. Against epochs, exact products rise far above averaged ones and Adam within four epochs, while SGD stays at guessing for forty. Against processor seconds, Adam rises first and stays highest, exact and averaged products follow close to each other, and SGD leaves guessing only at the end." tags=["nbval-ignore-output"]
names = {
    "exact": "exact",
    "averaged": "averaged",
    "sgd": "SGD",
    "adam": "Adam",
}
runs = {name: record["runs"][key] for key, name in names.items()}
by_epoch = {
    name: (range(1, 1 + len(run["seconds"])), run["test_accuracy"])
    for name, run in runs.items()
}
by_second = {
    name: (run["seconds"], run["test_accuracy"])
    for name, run in runs.items()
}
curves(
    [
        Panel("epochs", "test accuracy", by_epoch, {"guessing": 0.1}),
        Panel(
            "processor seconds",
            "test accuracy",
            by_second,
            {"guessing": 0.1},
        ),
    ]
)

# %%
accuracies = {k: run["test_accuracy"] for k, run in runs.items()}
epochs = len(accuracies["exact"])
after = {k: values[epochs - 1] for k, values in accuracies.items()}
others = [value for k, value in after.items() if k != "exact"]

assert after["exact"] > max(others) + 0.1
print("After as many epochs, exact products are well ahead of all.")

assert max(accuracies["SGD"][:40]) < 0.15 < accuracies["SGD"][-1]
print("SGD takes more than forty epochs to leave the plateau.")

# %% [markdown]
# By the clock, the picture is another one, since a step by exact
# products takes as long as a dozen or so of Adam's. When does each
# method first get to a given accuracy?


# %%
def seconds_to(name, accuracy):
    run = runs[name]
    pairs = zip(run["seconds"], run["test_accuracy"], strict=True)
    return next((s for s, a in pairs if a >= accuracy), math.inf)


# %% tags=["nbval-ignore-output"]
print("seconds to a test accuracy (inf: never)")
for goal in (0.2, 0.3, 0.4):
    times = [f"{name} {seconds_to(name, goal):.0f}" for name in runs]
    print(f"{goal:.0%}:", ", ".join(times))


# %%
def step_seconds(name):
    return runs[name]["seconds"][-1] / len(runs[name]["seconds"])


best = max(accuracies["exact"])
assert step_seconds("exact") > 8 * step_seconds("Adam")
assert seconds_to("Adam", best) < seconds_to("exact", best) / 2
print("By the clock, Adam is more than twice as fast.")

assert best > max(accuracies["averaged"])
print("In all this time averaged products do not get as far.")

# %% [markdown]
# So if seconds are all that counts, take Adam. Averaged products are
# cheap, and on the way about as fast as exact ones, but they are also
# nervous: look at how their curve jumps. One seed and a small grid
# settle no such question, but they show what to expect of exact
# products: steps that are few, good, and costly.

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** `"abs"` takes the absolute value of every sample's
# own second-order term. Is the curvature that comes of it larger or
# smaller than that of the GGN (`"zero"`), in the first convolution?
# Multiply by a few random directions. By how much?

# %% tags=["solution", "nbval-ignore-output"]
directions = torch.randn(kernel.numel(), 4, device=device)
along = {}
for treatment in ("zero", "abs"):
    exact(model, images, labels, treatment)
    products = kernel.hessian @ directions
    along[treatment] = (directions * products).sum(0)
print("zero:", [f"{q:.1e}" for q in along["zero"].tolist()])
print("abs: ", [f"{q:.1e}" for q in along["abs"].tolist()])

# %% tags=["solution"]
assert (along["abs"] > 100 * along["zero"]).all()
print("Larger in every direction, by more than a factor of 100.")

# %% [markdown] tags=["solution"]
# Larger it must be: a positive semi-definite term was added, here and
# in every layer above. That it is so *much* larger is a fact about
# sigmoids. At the start the loss has hardly any curvature that gets
# past five of them, but each bends, by itself, right where it is.
# This is what the short run leaned on. Replace `"abs"` by `"zero"`
# there, and try a few seeds: some of them run away.

# %% [markdown]
# **Exercise 2.** Pick one filter of the first convolution, and draw
# its curvature, 75 × 75 numbers for three colours of 5 × 5 pixels.
# You need not multiply by the whole block: `set_hbp_blocks` splits
# it. Take 16 images only, to be quick. What pattern do you see?

# %% tags=["solution"]
# In float64: in float32 a GPU may round the factors of a
# convolution to ten bits (TF32), and the two would differ by 1e-3.
few = images[:16].double()
one = copy.deepcopy(untrained).double()
filters = channels[0]
one[0].set_hbp_blocks(sub_blocks=filters)
exact(one, few, labels[:16], "zero")
block = one[0].weight.hessian.blocks[0].to_dense()

whole = copy.deepcopy(untrained).double()
exact(whole, few, labels[:16], "zero")
v = torch.zeros_like(kernel, dtype=few.dtype)
v[0] = torch.randn_like(v[0])
product = whole[0].weight.hessian @ v.flatten()
expected = product.view_as(v)[0].flatten()

assert difference(block @ v[0].flatten(), expected) < 1e-13
print("The small block is that part of the whole.")

# %% alt="A 75 by 75 matrix of three by three squares, one for each pair of colours. Nearly all entries are positive, and within a square they differ little." tags=["solution", "nbval-ignore-output"]
matrices({"curvature of one filter": block})

# %% [markdown] tags=["solution"]
# Three by three squares, for the pairs of colours, and little detail
# within. Neighbouring pixels of a photograph are alike, and so are
# its colours, so the steepest direction is nearly the one that
# changes all weights by the same amount.

# %% tags=["solution"]
steepest = torch.linalg.eigh(block).eigenvectors[:, -1]
cosine = steepest.sum().abs() / math.sqrt(75)

assert cosine > 0.8
print("The steepest direction is nearly flat.")

# %% [markdown]
# **Exercise 3.** How much of the *largest* curvature survives the
# average? `extremal_eigenvalues` needs products only. Compare the
# largest eigenvalue of the first convolution's block, exact and
# averaged.

# %% tags=["solution"]
largest = {}
for name, pass_back in {"exact": exact, "averaged": averaged}.items():
    pass_back(model, images, labels, "zero")
    ends = extremal_eigenvalues(kernel.hessian)
    largest[name] = ends.largest[0].item()

assert largest["averaged"] < largest["exact"] / 2
print("The average keeps less than half of it.")

# %% tags=["solution", "nbval-ignore-output"]
print(f"exact:    {largest['exact']:.2e}")
print(f"averaged: {largest['averaged']:.2e}")

# %% [markdown]
# ## What you should see
#
# **An exact product is autograd's.** For all samples of a batch, and
# without a matrix.

# %%
exact(tiny, x, y, "zero")
blocks = ggn_blocks(tiny, loss_func, x, y)
for name, block in blocks.items():
    v = torch.randn(len(block), dtype=torch.float64)
    product = tiny.get_parameter(name).hessian @ v
    assert difference(product, block @ v) < 1e-13, name
print("Six blocks, six products: all exact.")

# %% [markdown]
# **It costs about as much as a gradient.** And a step needs several.

# %%
assert one_product < 2 * passes
assert seconds["exact"] > 2 * seconds["SGD"]
print("A product is cheap, a step of many products is not.")

# %% [markdown]
# **An average forgets.** Photographs have little in common, and the
# mean of a batch shows none of them.

# %%
assert averaged_edge < exact_edge / 10
assert largest["averaged"] < largest["exact"] / 2
print("Averaged curvature is a small part of the exact one.")

# %% [markdown]
# **The plateau is left within a few dozen steps.** SGD needs some two
# thousand: more than forty epochs of fifty steps.

# %%
assert end("exact") < 2.2 < end("SGD")
assert accuracies["exact"][0] > 0.2 > max(accuracies["SGD"][:40])
print("Exact products leave the plateau early, SGD late.")

# %% [markdown]
# **A good step is not a cheap one.** Adam gets to the same accuracy
# sooner, by the clock. Exact curvature is for those who want to know
# the curvature, or whose passes over the data are expensive.

# %%
epochs_of = {
    name: next(k for k, a in enumerate(values, 1) if a >= 0.3)
    for name, values in accuracies.items()
    if name != "SGD"
}
assert epochs_of["exact"] == min(epochs_of.values())
assert seconds_to("Adam", best) < seconds_to("exact", best)
print("Exact products first in epochs, Adam first in seconds.")

# %% [markdown]
# ## Read on
#
# - [Exact products](../docs/exact.md): the how-to, with sub-blocks.
# - [The mathematics](../docs/mathematics.md#exact), where the rules
#   come from.
# - [What curvature does](06_when_curvature_pays.ipynb) races the
#   averaged kind over linear layers.
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
#   The method.
