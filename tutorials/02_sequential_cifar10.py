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
# # A deep network on CIFAR-10
#
# [The MNIST tutorial](01_single_layer_mnist.ipynb) sent curvature
# through one layer. Now we send it through a whole network, and train
# that network with it.
#
# The network is a stack of sigmoids. It starts on a plateau, where
# every gradient is tiny, and a plain gradient method may stay there
# for a long time. Hessian backpropagation leaves it. A single step,
# layer by layer, will show why. Then we train, and compare with SGD
# and Adam.
#
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

# @markdown Half an hour, or with `quick_run` a minute.
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
from math import log10
from time import perf_counter
from typing import NamedTuple

import torch
from torch.nn import CrossEntropyLoss
from torch.utils.data import BatchSampler, RandomSampler

from hbp import (
    CGNewton,
    HBPFlatten,
    HBPLinear,
    HBPReLU,
    HBPSequential,
    HBPSigmoid,
    batch_summed_hessian,
    set_seeds,
)
from hbp.tutorial.datasets import cifar10, quick
from hbp.tutorial.plotting import Panel, curves

set_seeds(0)
use_gpu = torch.cuda.is_available()
device = torch.device("cuda" if use_gpu else "cpu")

# %% [markdown]
# Training three times for 30 epochs takes a while without a GPU. With
# `quick_run` in the first cell, or with `HBP_TUTORIAL=quick` in the
# environment, you get a small data set, and fewer epochs of smaller
# batches. We note the loss of every batch then, or of every 15th:

# %%
num_epochs, batch_size, apart = 30, 500, 15
if quick():
    num_epochs, batch_size, apart = 3, 80, 1

# %% [markdown]
# ## Data and model
#
# The images are downloaded the first time you ask for them, unless
# the environment variable `HBP_DATA` names a folder that has them.
# They have three colours and 32 × 32 pixels, with values from 0 to 1,
# and there is no other preprocessing.

# %% tags=["nbval-ignore-output"]
train_set = cifar10(train=True)
test_set = cifar10(train=False)
print(len(train_set), "training and", len(test_set), "test images")

# %% [markdown]
# The model has five linear layers, with sigmoids between them:

# %%
model = HBPSequential(
    HBPFlatten(),
    HBPLinear(in_features=3072, out_features=1024, bias=True),
    HBPSigmoid(),
    HBPLinear(in_features=1024, out_features=512, bias=True),
    HBPSigmoid(),
    HBPLinear(in_features=512, out_features=256, bias=True),
    HBPSigmoid(),
    HBPLinear(in_features=256, out_features=128, bias=True),
    HBPSigmoid(),
    HBPLinear(in_features=128, out_features=10, bias=True),
).to(device)
print(model[1], model[2], sep="\n")

# %% [markdown]
# The layers do what those of `torch.nn` do, and also send curvature
# backward. What they print says how they average it over a batch:
# `avg_param_jac` and `avg_input_jac` stand for the averaged Jacobians
# of the MNIST tutorial.
#
# We keep a copy of the untrained model, so that every method can
# start from the same weights. The loss is softmax cross-entropy.

# %%
untrained = copy.deepcopy(model)
loss_func = CrossEntropyLoss()

# %% [markdown]
# ## What a sigmoid does to curvature
#
# The chain rule for second derivatives has two terms. For a layer
# that takes $x$ to $z$, with Jacobian $J$ and gradient $\delta$ at
# its output,
#
# $$
# H_x = J^\top H_z J
# + \sum_k \frac{\partial^2 z_k}{\partial x \, \partial x^\top}
# \, \delta_k .
# $$
#
# For a linear layer the second term is zero, and
# $H_x = W^\top H_z W$. A sigmoid $\varphi$ bends:
#
# $$
# H_x = \operatorname{diag}(\varphi') \, H_z
# \operatorname{diag}(\varphi')
# + \operatorname{diag}(\varphi'' \odot \delta) .
# $$
#
# The entries of its second term have either sign. Where they are
# negative, $H_x$ can have negative eigenvalues: the loss bends
# downward there (this is *negative curvature*), and a Newton step may
# climb. The option `modify_2nd_order_terms` says what becomes of this
# term:
#
# - `"none"` keeps it, which gives the Hessian;
# - `"zero"` drops it, which gives the generalized Gauss-Newton matrix;
# - `"abs"` takes its size, and `"clip"` cuts it off below zero. Both
#   give a positive-curvature Hessian.
#
# [Another tutorial](03b_negative_curvature.ipynb) compares the four.
# Here we choose `"abs"`, which is careful: where the loss bends, up
# or down, the step gets shorter.
#
# ## One step
#
# Two things are new: the curvature at the output, and its way back.


# %%
def differentiate(model, images, labels):
    """Give each parameter its gradient and its curvature."""
    # Values go forward.
    outputs = model(images)
    loss = loss_func(outputs, labels)

    # The curvature at the output, 10 x 10 numbers.
    model.zero_grad()
    hessian = batch_summed_hessian(loss, outputs)

    # Gradients go backward, and then so does the curvature.
    loss.backward()
    model.backward_hessian(hessian, modify_2nd_order_terms="abs")
    return outputs


def newton_step(model, optimizer):
    """A step of Hessian backpropagation."""

    def step(images, labels):
        outputs = differentiate(model, images, labels)
        optimizer.step()
        return outputs

    return step


# %% [markdown]
# For each parameter $\theta$, with gradient $g$ and curvature block
# $H$, the optimizer solves
#
# $$
# \big[ (1 - \alpha) H + \alpha I \big] \, d = -g
# $$
#
# by conjugate gradients (CG), and then moves by
# $\theta \leftarrow \theta + \mathrm{lr} \cdot d$. A solution counts
# as good enough when the residual is a tenth of the gradient.

# %%
lr, alpha = 0.15, 0.02
cg = {"cg_atol": 0.0, "cg_tol": 0.1, "cg_maxiter": 50}


def newton(model):
    return CGNewton(model.parameters(), lr=lr, alpha=alpha, **cg)


# %% [markdown]
# ## Why it will leave the plateau
#
# Before we train, take one step on one batch, and look at the five
# weights, from the first layer to the last, in four respects:
#
# - the norm of the gradient $g$;
# - the largest eigenvalue of the block. Averaged over the batch, the
#   block of a weight is $\bar H \otimes \bar x \bar x^\top$, with the
#   averaged curvature $\bar H$ at the layer's output and the mean
#   $\bar x$ of its inputs (the MNIST tutorial has derived it). So it
#   is $\lambda_{\max}(\bar H) \, \lVert \bar x \rVert^2$, to be
#   compared with $\alpha$;
# - the share of the longest step. Where $H$ is small beside $\alpha$,
#   the equation says $\alpha d = -g$, so the step $d$ has the length
#   $\lVert g \rVert / \alpha$ at most. How much of that is left?
# - the share of $\lVert g \rVert^2$ that lies along $\bar x$. It is
#   the only direction in which a row of the weight can move and meet
#   any curvature in its block.

# %%
images, labels = (part[:500].to(device) for part in train_set.tensors)
fresh = copy.deepcopy(untrained)
differentiate(fresh, images, labels)

gradients, largest, along, means = [], [], [], []
x = images
for layer in fresh:
    if isinstance(layer, HBPLinear):
        g, mean = layer.weight.grad, x.mean(0)
        block = layer.bias.hessian.eigvalsh().max() * (mean @ mean)
        part = (g @ mean).norm() / mean.norm()
        gradients.append(g.norm().item())
        largest.append(block.item())
        along.append((part / g.norm()).item() ** 2)
        means.append(mean)
    with torch.no_grad():
        x = layer(x)

# Only now do the weights move.
optimizer = newton(fresh)
optimizer.step()
shares = [
    optimizer.last_step[fresh[k].weight].step_norm * alpha / norm
    for k, norm in zip([1, 3, 5, 7, 9], gradients, strict=True)
]

# %% alt="Four panels against the layers, 1 to 5. The norm of the gradient, as a power of ten, rises from layer to layer. So does the largest eigenvalue of the block, which is below the line of alpha in the first layers and far above it in the last two. The share of the longest step falls from nearly 1 to nearly 0. The share of the squared gradient along the mean input is large in the first layer, and almost 1 in all others." tags=["nbval-ignore-output"]
numbers = range(1, 6)


def panel(label, name, values, levels=None):
    return Panel("layer", label, {name: (numbers, values)}, levels)


curves(
    [
        panel(
            "log10 of ‖g‖", "gradient", [log10(v) for v in gradients]
        ),
        panel(
            "log10 of the largest eigenvalue",
            "block",
            [log10(v) for v in largest],
            {"α": log10(alpha)},
        ),
        panel("share of the longest step", "step", shares),
        panel(
            "share of g² along the mean input",
            "gradient",
            along,
            {"nothing": 0.0},
        ),
    ]
)

# %%
assert sorted(gradients) == gradients
assert gradients[0] < gradients[-1] / 100
print("On its way back, the gradient all but vanishes.")

assert sorted(largest) == largest
assert largest[0] < alpha / 10
assert largest[-1] > 10 * alpha
print("The first block is small beside alpha, the last one large.")

assert sorted(shares, reverse=True) == shares
assert shares[0] > 0.95
assert shares[-1] < 0.05
print("The first layer takes nearly the longest step it can.")
print("The last layer is held back.")

# %% [markdown]
# A sigmoid shrinks a gradient that passes it by the factor
# $\varphi' \le 1/4$, and the curvature from above twice, once on
# either side. So in the first layers the block is small beside
# $\alpha$, and the step is gradient descent at the rate of
# $\mathrm{lr} / \alpha = 7.5$. In the last layers curvature holds the
# step back. Is that necessary? Move the last weight alone, down its
# gradient, at the rate of the first. Then do the same again with what
# is left of the gradient when its part along $\bar x$ is taken out.


# %%
@torch.no_grad()
def reckless(direction):
    """The loss after moving the last weight alone."""
    moved = copy.deepcopy(untrained)
    moved[9].weight -= lr / alpha * direction
    return loss_func(moved(images), labels).item()


g, mean = fresh[9].weight.grad, means[-1]
across = g - torch.outer(g @ mean, mean) / (mean @ mean)
loss = reckless(0 * g)

assert reckless(g) > loss
print("At the rate of the first layer, the last one climbs.")

assert reckless(across) < loss + 0.01
print("Without the part along the mean input, it does not.")

# %% [markdown]
# So that is how the method leaves the plateau: every layer gets a
# rate of its own, and nobody had to choose it.
#
# How much of this is curvature? What is held back is a single
# direction, that of $\bar x$. In the last layer hardly anything of
# the gradient is left without it, so the loss stays. This direction
# would vanish if the inputs of each layer were *centred*, that is, if
# their mean were taken off. So a good part of what the curvature does
# here can be had without it:
# [What curvature does](06_when_curvature_pays.ipynb) lets the two
# race.
#
# ## The training loop
#
# The loop notes loss and accuracy of a batch now and then, and those
# on the test images after each epoch. The same seed gives the same
# batches to everyone who trains. The clock runs during training only,
# and if you interrupt it, the numbers so far are kept.


# %%
class Row(NamedTuple):
    """What is noted of a batch, or of the test images."""

    epochs: float
    loss: float
    accuracy: float
    seconds: float


def scores(outputs, labels):
    """The loss, and the share of right answers."""
    right = (outputs.argmax(dim=1) == labels).float().mean()
    return loss_func(outputs, labels).item(), right.item()


@torch.no_grad()
def test_scores(model):
    images, labels = (part.to(device) for part in test_set.tensors)
    return scores(model(images), labels)


# %%
def train(model, step):
    """Train; return the rows of the batches and of the tests."""
    shuffle = torch.Generator().manual_seed(0)
    order = RandomSampler(train_set, generator=shuffle)
    loader = BatchSampler(order, batch_size, drop_last=False)
    batches, tests, seconds = [], [], 0.0
    try:
        for epoch in range(num_epochs):
            start = perf_counter()
            for i, chosen in enumerate(loader):
                images, labels = train_set[chosen]
                images, labels = images.to(device), labels.to(device)
                outputs = step(images, labels)

                if (epoch * len(loader) + i) % apart == 0:
                    noted = scores(outputs, labels)
                    passed = seconds + perf_counter() - start
                    epochs = epoch + i / len(loader)
                    batches.append(Row(epochs, *noted, passed))
                if i == 0:
                    loss, accuracy = scores(outputs, labels)
                    print(
                        f"Epoch [{epoch + 1}/{num_epochs}], "
                        f"Iter. [{i + 1}/{len(loader)}], "
                        f"Loss: {loss:.4f}, Acc.: {accuracy:.4f}"
                    )
            scores(outputs, labels)  # A GPU is done only now.
            seconds += perf_counter() - start
            noted = test_scores(model)
            tests.append(Row(epoch + 1, *noted, seconds))
    except KeyboardInterrupt:
        print("Interrupted. The metrics so far are kept.")
    return batches, tests


# %% [markdown]
# Now train. Expect a loss close to $\ln 10 \approx 2.3$ at first: the
# model has no idea, and gives each class the same chance. That is the
# plateau.

# %% tags=["nbval-ignore-output"]
optimizer = newton(model)
hbp_batches, hbp_tests = train(model, newton_step(model, optimizer))
steps = optimizer.last_step.values()

# %%
assert all(step.iterations <= 50 for step in steps)
assert not any(step.negative_curvature for step in steps)
print("CG met no negative curvature: the blocks are positive.")

# %% [markdown]
# Is that good? Let us compare with two methods that use the gradient
# only, on the same initial weights and the same batches.


# %%
def first_order_step(model, optimizer):
    def step(images, labels):
        outputs = model(images)
        loss = loss_func(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return outputs

    return step


# %% tags=["nbval-ignore-output"]
sgd_model = copy.deepcopy(untrained)
sgd = torch.optim.SGD(sgd_model.parameters(), lr=0.1, momentum=0.9)
sgd_batches, sgd_tests = train(
    sgd_model, first_order_step(sgd_model, sgd)
)

adam_model = copy.deepcopy(untrained)
adam = torch.optim.Adam(adam_model.parameters(), lr=1e-3)
adam_batches, adam_tests = train(
    adam_model, first_order_step(adam_model, adam)
)

# %% [markdown]
# ## What came of it

# %% alt="Four panels: batch loss above, test accuracy below, against epochs on the left and seconds on the right, each for HBP, SGD and Adam. SGD stays at the loss of guessing. HBP leaves it after a few epochs. Adam leaves it first and ends lowest. Against seconds, the curve of HBP is stretched." tags=["nbval-ignore-output"]
batch_rows = {
    "HBP": hbp_batches,
    "SGD": sgd_batches,
    "Adam": adam_batches,
}
test_rows = {"HBP": hbp_tests, "SGD": sgd_tests, "Adam": adam_tests}


def column(rows, name):
    return [getattr(row, name) for row in rows]


def lines(rows_of, unit, name):
    return {
        method: (column(rows, unit), column(rows, name))
        for method, rows in rows_of.items()
    }


curves(
    [
        Panel(unit, f"{kind} {name}", lines(rows_of, unit, name))
        for kind, rows_of, name in [
            ("batch", batch_rows, "loss"),
            ("test", test_rows, "accuracy"),
        ]
        for unit in ["epochs", "seconds"]
    ]
)


# %% tags=["nbval-ignore-output"]
def final(rows, name):
    """The mean over the last tenth of the training."""
    last = [row for row in rows if row.epochs > 0.9 * num_epochs]
    return sum(column(last, name)) / max(len(last), 1)


def leaves(rows):
    """The epoch in which a run gets off the plateau."""
    return next(row.epochs for row in rows if row.loss < 2.1)


print("means over the last tenth of the training; seconds of all")
for method, rows in batch_rows.items():
    print(
        f"{method:4} loss {final(rows, 'loss'):.3f},",
        f"accuracy {final(rows, 'accuracy'):.3f},",
        f"on test images {final(test_rows[method], 'accuracy'):.3f},",
        f"{max(column(rows, 'seconds'), default=0):4.0f} s",
    )

# %% [markdown]
# **HBP leaves the plateau.** The loss falls well below $\ln 10$, and
# images that were not used for training gain from it, too.

# %%
assert final(hbp_batches, "loss") < (2.0 if quick() else 1.5)
print("HBP left the plateau.")

assert final(hbp_tests, "accuracy") > (0.15 if quick() else 0.4)
print("On test images, it is clearly better than guessing.")

# %% [markdown]
# **SGD stays.** Its learning rate is a common one, but small for the
# first layers. A larger one would be too much for the last one, as we
# have seen.

# %%
assert final(sgd_batches, "loss") > 2.2
print("SGD with these settings is still on the plateau.")

# %% [markdown]
# **Adam is ahead.** It, too, gives small gradients large steps. It
# leaves the plateau before HBP does, and ends with a lower loss. On
# this network there is no need for second-order information, if all
# you want is a low loss soon. What HBP offers is a step that you can
# take apart, block by block, as we did above.

# %%
assert leaves(adam_batches) < leaves(hbp_batches)
assert final(adam_batches, "loss") < final(hbp_batches, "loss")
print("Adam left the plateau first, and ended lower.")

# %% [markdown]
# The experiment and its settings follow the CIFAR-10 tutorial of the
# original implementation. Its text builds two ReLUs, but it ran the
# four sigmoids that we reproduce (see the
# [errata](../docs/differences.md#errata)). With other settings all
# three methods learn sooner on this network, as
# [tutorial 06](06_when_curvature_pays.ipynb) shows.
#
# ## Try it yourself
#
# **Exercise 1.** Which rate suits a layer? Move the first weight
# alone, down its gradient, at rates of 0.1, 10 and 1000. Then do the
# same with the last one. Where is the loss lowest?


# %% tags=["solution"]
@torch.no_grad()
def best_rate(layer):
    """The rate at which one weight lowers the loss most."""
    losses = {}
    for rate in [0.1, 10, 1000]:
        moved = copy.deepcopy(untrained)
        moved[layer].weight -= rate * fresh[layer].weight.grad
        losses[rate] = loss_func(moved(images), labels).item()
    return min(losses, key=losses.get)


assert best_rate(1) == 1000
assert best_rate(9) == 0.1
print("No single rate suits both.")

# %% [markdown] tags=["solution"]
# That is the difficulty of SGD: what the first layer could use, the
# last one cannot bear.

# %% [markdown]
# **Exercise 2.** How many weights keep less than half of their
# longest step, $\lVert g \rVert / \alpha$? Predict it from the panel
# with the eigenvalues, for our damping and for a tenth of it.


# %% tags=["solution"]
def held_back(damping):
    model = copy.deepcopy(untrained)
    differentiate(model, images, labels)
    optimizer = newton(model)
    optimizer.param_groups[0]["alpha"] = damping
    optimizer.step()
    lengths = [
        optimizer.last_step[model[k].weight].step_norm
        for k in (1, 3, 5, 7, 9)
    ]
    pairs = zip(lengths, gradients, strict=True)
    return sum(length * damping < g / 2 for length, g in pairs)


predicted = [sum(v > a for v in largest) for a in (alpha, alpha / 10)]
assert predicted == [held_back(alpha), held_back(alpha / 10)]
print("Those whose largest eigenvalue is above the damping.")

# %% [markdown] tags=["solution"]
# If the gradient points along an eigenvector with the eigenvalue
# $\lambda$, the step has the length
# $\lVert g \rVert / ((1 - \alpha) \lambda + \alpha)$. That is about
# half of $\lVert g \rVert / \alpha$ where $\lambda = \alpha$.

# %% [markdown]
# **Exercise 3.** Replace the sigmoids by `HBPReLU`, and look at the
# gradients of the five weights again. Where has the plateau gone?

# %% tags=["solution"]
relu_model = HBPSequential(
    *(
        HBPReLU() if isinstance(layer, HBPSigmoid) else layer
        for layer in copy.deepcopy(untrained)
    )
)
differentiate(relu_model, images, labels)
relu_gradients = [
    relu_model[k].weight.grad.norm().item() for k in (1, 3, 5, 7, 9)
]
assert relu_gradients[0] > relu_gradients[-1]
assert relu_gradients[0] > 10 * gradients[0]
print("The gradient of the first weight is not small any more.")

# %% [markdown] tags=["solution"]
# Where a ReLU is on, its slope is 1. So the gradient passes it
# unharmed, and so does the curvature.

# %% [markdown]
# ## References
#
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
#   The method, and the experiment.
# - S.-W. Chen, C.-N. Chou, E. Y. Chang.
#   [EA-CG: An Approximate Second-Order Method for Training
#   Fully-Connected Neural
#   Networks](https://arxiv.org/abs/1802.06502), 2018. The averaged
#   Jacobian, and the solution of the equation by conjugate gradients.
# - A. Botev, H. Ritter, D. Barber.
#   [Practical Gauss-Newton Optimisation for Deep
#   Learning](https://arxiv.org/abs/1706.03662). ICML 2017. The
#   averaged product.
