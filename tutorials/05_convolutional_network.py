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
# loses, and train with both. At the end comes a longer run, which was
# recorded for you.

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

# @markdown Two minutes, or with `quick_run` half a minute.
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
import copy
import math
from functools import partial
from time import perf_counter

import torch
from torch.utils.data import DataLoader, TensorDataset

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
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# The network is 3c3d, with a quarter of its channels, so that a
# processor is enough. The full one has `(64, 96, 128)`: change this
# line if you have a GPU. With `quick_run` in the first cell, or with
# `HBP_TUTORIAL=quick` in the environment, network and batch are
# smaller still.

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
z = images
print("the images       ", list(z.shape))
with torch.no_grad():
    for k, layer in enumerate(model):
        z = layer(z)
        print(f"{k:2} {type(layer).__name__:14}", list(z.shape))

# %% [markdown]
# The first convolution turns an image into `channels[0]` pictures of
# 28 × 28 numbers. Curvature with respect to those is a matrix with as
# many rows and columns as there are numbers. How large is it?

# %%
features = channels[0] * 28 * 28
assert 4 * features**2 > 100e6
assert 4 * (64 * 28 * 28) ** 2 > 10e9
print("It would take over 100 MB, in the full network over 10 GB.")

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
# In code, it is the Hessian pass that you know, but for one name:
# `per_sample_hessian` keeps apart what `batch_summed_hessian` adds
# up.


# %%
def send_back(of_loss, model, images, labels, treatment):
    """Leave the blocks of a batch in the parameters."""
    outputs = model(images)
    loss = loss_func(outputs, labels)
    model.zero_grad()
    hessians = of_loss(loss, outputs)
    loss.backward()
    model.backward_hessian(hessians, modify_2nd_order_terms=treatment)
    return loss


exact = partial(send_back, per_sample_hessian)
averaged = partial(send_back, batch_summed_hessian)

# %% [markdown]
# ## Is it exact?
#
# Ask `hbp.reference`, which lets autograd differentiate twice and
# knows nothing of our rules. For a small network in float64 we can
# afford to multiply by all unit vectors, which is what `to_dense()`
# does, and compare whole blocks. With `"none"` they should be those
# of the Hessian, with `"zero"` those of the generalized Gauss-Newton
# matrix (GGN).

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

references = {"none": hessian_blocks, "zero": ggn_blocks}
for treatment, reference in references.items():
    exact(tiny, x, y, treatment)
    for name, block in reference(tiny, loss_func, x, y).items():
        own = tiny.get_parameter(name).hessian.to_dense()
        # Measured: 3e-16, a few roundings.
        assert (own - block).norm() < 1e-13 * block.norm(), name
print("Every block of 20 samples is exact, Hessian and GGN.")

# %% [markdown]
# The averaged blocks of [the MNIST
# tutorial](01_single_layer_mnist.ipynb) were exact for one sample.
# These are exact for any number.
#
# ## What a product costs
#
# Back to the real network. We compare a product with the first
# kernel's block, which goes all the way from there to the loss and
# back, with one pass forward and back for the gradient.


# %% tags=["nbval-ignore-output"]
def seconds_of(f):
    """The quickest of five calls."""
    times = []
    for _ in range(5):
        start = perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return min(times)


passes = seconds_of(
    lambda: loss_func(model(images), labels).backward()
)
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
# several times what a gradient step does. What do you get for it?
#
# ## What an average forgets
#
# Here are three images of the batch, in one colour, and the mean of
# the whole batch, on the same scale of colours.

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
# nothing. The layers above lose more in the same way, with averages
# of slopes and of what a max-pooling selects. And where two samples
# bend in opposite directions, their second-order terms cancel before
# `"abs"` can take an absolute value.
#
# Does a training notice? A damped Newton step takes the gradient's
# component along each eigenvector of the block and divides it by
# $\lambda + \alpha$, where $\lambda$ is the eigenvalue and $\alpha$
# the damping. Only eigenvalues that are not small next to $\alpha$
# make a difference. So let us draw the eigenvalues of the blocks that
# train this network, those of `"abs"`, next to the $\alpha$ that
# trains it.
#
# We take two blocks, one near the images and one near the loss. For
# the first convolution it is that of a single filter, 75 weights for
# three colours of 5 × 5 pixels: `set_hbp_blocks` splits the whole
# block into one per filter. The other is that of the last weight.

# %%
alpha = 0.001
first_filter, last_weight = {}, {}
ways = {"exact": exact, "averaged": averaged}

for name, pass_back in ways.items():
    probe = copy.deepcopy(untrained)
    probe[0].set_hbp_blocks(sub_blocks=channels[0])
    pass_back(probe, images, labels, "abs")
    block = probe[0].weight.hessian.blocks[0]
    first_filter[name] = block.to_dense().cpu()
    last_weight[name] = probe[-1].weight.hessian.to_dense().cpu()


# %% alt="Two panels of the 15 largest eigenvalues on a logarithmic scale, with a dotted level at the damping. For a filter of the first convolution, a few exact eigenvalues lie above it and all averaged ones below. For the last weight the two lines are one: nine eigenvalues far above, the others at the lower edge." tags=["nbval-ignore-output"]
def spectrum(block):
    """Eigenvalues of a block, largest first."""
    return torch.linalg.eigvalsh(block).flip(0)


def panel(title, blocks, count=15):
    lines = {}
    for name, block in blocks.items():
        # Whatever is below α/1000 is drawn there.
        values = spectrum(block)[:count].clamp(min=alpha / 1000)
        lines[name] = range(1, count + 1), values.log10().tolist()
    return Panel(title, "log₁₀", lines, {"α": math.log10(alpha)})


curves(
    [
        panel("eigenvalues of a first filter", first_filter),
        panel("eigenvalues of the last weight", last_weight),
    ]
)

# %%
assert (spectrum(first_filter["exact"]) > alpha).sum() >= 2
assert spectrum(first_filter["averaged"]).max() < alpha / 2
print("First filter: only exact eigenvalues are larger than α.")

# %%
assert all(
    (spectrum(block) > alpha).sum() == 9
    for block in last_weight.values()
)
print("Last weight: nine are, exact or averaged.")

# %% [markdown]
# At the last weight the average forgets nothing. In a network without
# training, all samples look alike by the time they get there, and ten
# probabilities, which add up to one, can bend in nine directions.
#
# At the first convolution it forgets what counts. In the averaged
# block, every direction of the filter lies below $\alpha$, and the
# step is little else than the gradient, divided by $\alpha$. The
# exact block knows a few steep directions, and takes smaller steps
# there.
#
# ## A short run
#
# Now train. All optimizers start from the same weights, and see the
# same batches in the same order, each image once.
#
# The sigmoids put this network on a plateau: at first it gives all
# classes the same chance, at a loss of $\ln 10 \approx 2.3$, and the
# gradient that arrives at the first convolution is tiny. How long
# does each optimizer stay there?


# %%
def gradients(model, images, labels, _):
    """The first-order part of `send_back`."""
    loss = loss_func(model(images), labels)
    model.zero_grad()
    loss.backward()
    return loss


def training(pass_back, optimizer_class, **options):
    model = copy.deepcopy(untrained)
    optimizer = optimizer_class(model.parameters(), **options)

    def step(images, labels):
        loss = pass_back(model, images, labels, "abs")
        optimizer.step()
        return loss.item()

    return step


newton = partial(
    CGNewton, lr=0.15, cg_atol=0.0, cg_tol=0.1, cg_maxiter=10
)
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adam = partial(torch.optim.Adam, lr=1e-2)
steps = {
    "exact": training(exact, newton, alpha=alpha),
    "averaged": training(averaged, newton, alpha=10 * alpha),
    "SGD": training(gradients, sgd),
    "Adam": training(gradients, adam),
}

# %% [markdown]
# Both Newton methods use `"abs"`: the GGN has next to no curvature in
# the first layers, as the first exercise will show. With so small an
# $\alpha$, flat directions have a rate of $\mathrm{lr}/\alpha = 150$.
# That suits the first layers, whose gradients are tiny. In the last
# ones curvature has to hold the step back, so we must trust it.
# Averages we trust less, and give $\alpha$ ten times the size: with
# the smaller one training blows up, as the record below shows. SGD
# and Adam have the learning rates that came out best in that record.

# %% tags=["nbval-ignore-output"]
data = TensorDataset(train_images, train_labels)
batches = list(DataLoader(data, batch_size))
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
lines = {}
for name, values in losses.items():
    smooth = torch.tensor(values).unfold(0, 5, 1).mean(1)
    lines[name] = range(5, num_steps + 1), smooth.tolist()
curves([Panel("steps", "batch loss, mean of 5", lines)])


# %%
def end(name):
    """The mean loss of the last ten steps."""
    return sum(losses[name][-10:]) / 10


assert end("exact") < 2.2 < end("SGD")
assert min(end("averaged"), end("SGD")) > end("exact") + 0.1
print("Exact products are off the plateau, averages and SGD behind.")

# %% tags=["nbval-ignore-output"]
times = seconds["exact"] / seconds["SGD"]
print(f"A step of exact products takes {times:.1f} times SGD's.")

# %% [markdown]
# What was counted here is steps. In the seconds that exact products
# took, SGD and Adam could have taken more of theirs. So we need a
# longer run, and a clock.
#
# ## A longer run
#
# The numbers below come with the package. With
# `make bench-convolution` you make them anew, on your machine. Every
# method tried a few settings for a few epochs, and the one with the
# lowest training loss went on; the test images had no say in this.
# Each got about the same processor time, of training alone.

# %% tags=["nbval-ignore-output"]
record = recorded("convolution")
made, settings = record["provenance"], record["settings"]
runs = {name: record["runs"][name.lower()] for name in steps}
accuracies = {k: run["test_accuracy"] for k, run in runs.items()}
epoch_seconds = {
    name: run["seconds"][-1] / len(run["seconds"])
    for name, run in runs.items()
}


def seconds_to(name, accuracy):
    """When a method first gets to a given test accuracy."""
    pairs = zip(runs[name]["seconds"], accuracies[name], strict=True)
    return next((s for s, a in pairs if a >= accuracy), math.inf)


print(settings["images"], "images, in batches of", settings["batch"])
print(f"{made['machine']}, {made['threads']} thread,", end=" ")
print(f"torch {made['versions']['torch']}, {made['date'][:10]}")
print()
print("             lr      α  epochs  s/epoch  s to 30 %  best")
for name, run in runs.items():
    print(
        f"{name:9} {run['lr']:5} {run['alpha'] or '':>6}",
        f"{len(run['seconds']):7} {epoch_seconds[name]:8.1f}",
        f"{seconds_to(name, 0.3):10.0f}",
        f"{max(accuracies[name]):5.0%}",
    )

# %% alt="Two panels of test accuracy. Against epochs, exact products rise far above averaged ones and Adam within four epochs, while SGD stays at guessing for forty. Against processor seconds, Adam rises first and stays highest, exact and averaged products follow close to each other, and SGD leaves guessing only at the end." tags=["nbval-ignore-output"]
by_epoch, by_second = {}, {}
for name, values in accuracies.items():
    by_epoch[name] = range(1, len(values) + 1), values
    by_second[name] = runs[name]["seconds"], values
guessing = {"guessing": 0.1}
curves(
    [
        Panel("epochs", "test accuracy", by_epoch, guessing),
        Panel("processor seconds", "", by_second, guessing),
    ]
)

# %%
epochs = len(accuracies["exact"])
after = {k: values[epochs - 1] for k, values in accuracies.items()}
assert after.pop("exact") > max(after.values()) + 0.1
assert max(accuracies["SGD"][:40]) < 0.15 < accuracies["SGD"][-1]
assert accuracies["exact"][0] > 0.2
print("After as many epochs, exact products are well ahead of all,")
print("and SGD needs more than forty to leave the plateau.")

# %%
best = max(accuracies["exact"])
assert epoch_seconds["exact"] > 8 * epoch_seconds["Adam"]
assert seconds_to("Adam", best) < seconds_to("exact", best) / 2
print("By the clock, Adam is more than twice as fast.")

# %%
assert best > max(accuracies["averaged"])
print("Averaged products do not get as far as exact ones.")

# %%
blown_up = [
    row["train_loss"][-1] > 100
    for row in record["grid"]
    if row["method"] == "averaged" and row["alpha"] == alpha
]
assert blown_up == [True, True]
print("With the smaller damping, averaged products blow up.")

# %% [markdown]
# So if seconds are all that counts, take Adam. Averaged products are
# cheap, and on the way about as fast as exact ones, but nervous: look
# at how their curve jumps. One seed and a small grid settle no such
# question, but they show what to expect of exact products: steps that
# are few, good, and costly, for those who want to know the curvature,
# or whose passes over the data are expensive.

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Is the curvature of `"abs"` larger or smaller than
# that of the GGN (`"zero"`), in the first convolution? By how much?
# Multiply by a few random directions.

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
# This is what the short run leaned on.

# %% [markdown]
# **Exercise 2.** Draw the two blocks of the first filter, whose
# eigenvalues you have seen. What pattern do they have in common?
# Which direction is the steepest, then?

# %% alt="Two 75 by 75 matrices, exact and averaged. Both consist of three by three squares, one for each pair of colours. Nearly all entries are positive. In the exact one, diagonal stripes run through the squares." tags=["solution", "nbval-ignore-output"]
matrices(first_filter, columns=2)

# %% [markdown] tags=["solution"]
# Three by three squares, for the pairs of colours, and nearly all
# entries are positive. Neighbouring pixels of a photograph are alike,
# and so are its colours, so the steepest direction is nearly the one
# that changes all weights by the same amount.

# %% tags=["solution"]
for block in first_filter.values():
    steepest = torch.linalg.eigh(block).eigenvectors[:, -1]
    cosine = steepest.sum().abs() / math.sqrt(75)
    assert cosine > 0.8
print("Exact or averaged, the steepest direction is nearly flat.")

# %% [markdown]
# **Exercise 3.** How much of the *largest* curvature survives the
# average, in every weight from the images to the loss?
# `extremal_eigenvalues` needs products only.

# %% tags=["solution", "nbval-ignore-output"]
largest = {}
for name, pass_back in ways.items():
    pass_back(model, images, labels, "abs")
    largest[name] = [
        extremal_eigenvalues(p.hessian).largest[0].item()
        for p in model.parameters()
        if p.dim() > 1
    ]

pairs = zip(largest["averaged"], largest["exact"], strict=True)
kept = [averaged_one / exact_one for averaged_one, exact_one in pairs]
print("kept:", ", ".join(f"{share:.1%}" for share in kept))

# %% tags=["solution"]
assert max(kept[:3]) < 1 / 2
assert kept[-1] > 0.99
print("In a convolution less than half, in the last layer all.")

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
