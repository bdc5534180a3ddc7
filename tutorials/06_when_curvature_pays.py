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
# # When curvature pays
#
# A second-order step knows more than a gradient step, and costs more.
# Is it worth it? That depends on the network, on what you count, and
# on how well the competitors are set up. This tutorial races three
# optimizers over two networks, on equal terms:
#
# - **HBP**: `CGNewton` with Hessian backpropagation,
# - **Adam**, with the best of a few learning rates,
# - **SGD** with momentum, likewise.
#
# One network is shallow, one is deep. We count epochs, and we count
# seconds. Sometimes the answer differs.

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
    assert package, "set HBP_INSTALL to what pip shall install"
    pip = [sys.executable, "-m", "pip", "install", "-q", package]
    subprocess.run(pip, check=True)
    importlib.invalidate_caches()

# %%
from itertools import pairwise
from statistics import median
from time import perf_counter

import torch
from torch import nn

from hbp import CGNewton, convert, output_hessian, set_seeds
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
train_labels, test_labels = (
    train_labels.to(device),
    test_labels.to(device),
)

assert train_images.mean().abs() < 1e-4
assert (train_images.std((0, 2, 3)) - 1).abs().max() < 1e-3
print("Every colour has mean 0 and deviation 1.")

# %% [markdown]
# Both networks are stacks of linear layers and sigmoids, written in
# plain PyTorch. Weights start from Xavier's distribution, biases from
# zero. With the same seed, all optimizers start from the same place
# and see the same batches in the same order: of 100 images. On the
# small stand-in data of a quick run there are fewer in a batch, and
# no layer is wider than 256.


# %%
batch_size, widest = (50, 256) if quick() else (100, 1024)


def network(sizes):
    set_seeds(0)
    layers = [nn.Flatten()]
    sizes = [sizes[0], *(min(size, widest) for size in sizes[1:])]
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Sigmoid()]
    # No sigmoid at the end.
    return nn.Sequential(*layers[:-1]).to(device)


shallow = [3072, 1024, 512, 256, 128, 10]
deep = [3072, 1024, 512, 256, 128, 64, 32, 16, 10]

# %% [markdown]
# A step takes a batch, and returns the model's outputs. For HBP we
# convert the model: `convert` replaces each layer by one that knows
# how to send curvature backward, and shares its parameters.

# %%
loss_func = nn.CrossEntropyLoss()


def newton(model, lr, alpha):
    model = convert(model)
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


def first_order(model, optimizer):
    def step(images, labels):
        outputs = model(images)
        loss = loss_func(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return outputs

    return step, optimizer


def adam(model, lr):
    return first_order(
        model, torch.optim.Adam(model.parameters(), lr=lr)
    )


def sgd(model, lr):
    return first_order(
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    )


# %% [markdown]
# The training loop is the same for all. After each epoch it measures
# the accuracy on the test images, multiplies the learning rate by
# `decay`, and prints a dot. The clock runs during training only. If
# you interrupt a race, the numbers so far are kept.


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
            print(f"{name:5} ", end="", flush=True)
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


def draw(logs):
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
            for unit in ("epochs", "seconds")
        ]
    )


# %% [markdown]
# ## What a step costs
#
# First the price. We time single steps of the three, in turn, on the
# shallow network, and divide by SGD's time.


# %% tags=["nbval-ignore-output"]
def time_steps(sizes, count, rounds=5):
    steps = {
        "HBP": newton(network(sizes), lr=1e-7, alpha=0.05)[0],
        "Adam": adam(network(sizes), lr=1e-7)[0],
        "SGD": sgd(network(sizes), lr=1e-7)[0],
    }
    images, labels = train_images[:count], train_labels[:count]
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = perf_counter()
            step(images, labels)
            if use_gpu:
                torch.cuda.synchronize()
            times[name].append(perf_counter() - start)
    return {name: median(t) for name, t in times.items()}


print("time of a step, in steps of SGD")
for count in [100, 500]:
    times = time_steps(shallow, count)
    ratios = [f"{k} {t / times['SGD']:.2f}" for k, t in times.items()]
    print(f"batch of {count}:", ", ".join(ratios))

# %% [markdown]
# A step of HBP costs more, and the smaller the batch, the more so:
# curvature is averaged over the batch before it flows backward, so
# its price does not depend on the batch, while that of the rest
# shrinks with it. The [performance page](../docs/performance.md) has
# careful measurements.
#
# ## A shallow network
#
# Five linear layers. The learning rates of Adam and SGD are the best
# of a grid, found with the schedule that is used here.

# %% tags=["nbval-ignore-output"]
shallow_logs = race(
    shallow,
    {
        "HBP": lambda model: newton(model, lr=0.15, alpha=0.05),
        "Adam": lambda model: adam(model, lr=1e-3),
        "SGD": lambda model: sgd(model, lr=0.3),
    },
    epochs=5,
    decay=0.7,
)

# %% alt="Four panels: training accuracy above, test accuracy below, against epochs on the left and seconds on the right. The curves of HBP, Adam and SGD rise side by side. HBP ends a little above the others." tags=["nbval-ignore-output"]
draw(shallow_logs)


# %% [markdown]
# All three learn. HBP is ahead at the end, but not by much. Look at
# the panels on the right, too: by the clock, the race is closer, and
# it depends on what you count as the goal.


# %%
def last(logs, kind):
    return {name: log[kind][-1] for name, log in logs.items()}


test = last(shallow_logs, "test")
assert abs(test["HBP"] - test["Adam"]) < 0.1
print("HBP and Adam end less than ten points apart.")

assert min(test.values()) > 0.3
print("The others are not lost, either.")

# %% tags=["nbval-ignore-output"]
if quick():
    print("On the stand-in data, Adam may end a little ahead.")
else:
    assert test["HBP"] > max(test["Adam"], test["SGD"])
    print("On CIFAR-10, HBP ends ahead.")

# %% [markdown]
# ## A deep network
#
# Eight linear layers, each narrower than the one before it. The
# gradient has to pass seven sigmoids on its way back, and each takes
# at least three quarters of it. This is where the original paper
# tried its method, too.
#
# The damping is smaller now. In the first layers, both gradient and
# curvature are tiny, and $\mathrm{lr} / \alpha$ is the fastest that a
# layer can move. The learning rate is a little smaller, too: with
# 0.15, one seed in three never left the plateau.

# %% tags=["nbval-ignore-output"]
deep_logs = race(
    deep,
    {
        "HBP": lambda model: newton(model, lr=0.1, alpha=0.01),
        "Adam": lambda model: adam(model, lr=1e-3),
        "SGD": lambda model: sgd(model, lr=0.3),
    },
    epochs=8,
    decay=0.8,
)

# %% alt="The same four panels for the deep network. HBP leaves the others behind after two epochs. Adam follows at some distance. SGD stays at the accuracy of guessing." tags=["nbval-ignore-output"]
draw(deep_logs)

# %% [markdown]
# Here the curves part. SGD sits on the plateau. Adam leaves it, and
# then learns slowly. HBP goes ahead. Its epochs take longer, but it
# needs fewer of them to get where Adam ends. What that comes to in
# seconds depends on the machine.

# %%
test, train_accuracy = (
    last(deep_logs, "test"),
    last(deep_logs, "train"),
)

assert test["SGD"] < 0.15
print("SGD has not left the plateau.")

assert min(test["HBP"], test["Adam"]) > 0.2
print("HBP and Adam have.")


# %%
def first(log, unit, accuracy):
    """Epochs, or seconds, until a test accuracy is reached."""
    pairs = zip(log[unit], log["test"], strict=True)
    return next((x for x, a in pairs if a >= accuracy), float("inf"))


# %% tags=["nbval-ignore-output"]
goal = max(deep_logs["Adam"]["test"])
for name in ["HBP", "Adam"]:
    epochs = first(deep_logs[name], "epochs", goal)
    seconds = first(deep_logs[name], "seconds", goal)
    print(
        f"{name} gets to Adam's best, {goal:.3f},",
        f"in {epochs} epochs, {seconds:.0f} s",
    )

if quick():
    print("The stand-in data are too few for this race.")
else:
    assert test["HBP"] > test["Adam"] + 0.03
    assert train_accuracy["HBP"] > train_accuracy["Adam"] + 0.03
    print("On CIFAR-10, HBP is well ahead of Adam,")
    assert first(deep_logs["HBP"], "epochs", goal) <= 6
    print("which it overtakes with epochs to spare.")

# %% [markdown]
# ## So when does it pay?
#
# - **Depth and saturation.** Where layers see gradients of very
#   different size, each needs a rate of its own. Curvature gives it.
#   Adam gives each weight a rate, too, but from gradients alone.
# - **Large batches.** The price of curvature does not grow with the
#   batch.
# - **Epochs that are dear**, because data are few or slow to come by.
#
# And when not?
#
# - With ReLUs, normalisation layers or skip connections, gradients
#   keep their size. Much of what curvature repairs is not broken.
# - Where a tuned Adam is good enough, it has fewer knobs. HBP has its
#   learning rate and its damping, and the damping had to change with
#   the depth.
#
# The [performance page](../docs/performance.md#accuracy) shows the
# same race with three seeds and with the grids of learning rates.
#
# ## Try it yourself
#
# - Set HBP's damping to 0.05 in the deep network. What happens?
# - Give Adam the learning rate 3e-3, or 3e-4.
# - Use batches of 500 for everyone. Who suffers most?
# - Replace the sigmoids by `nn.Tanh`, or by `nn.ReLU`.
#
# ## References
#
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
# - X. Glorot, Y. Bengio. Understanding the difficulty of training
#   deep feedforward neural networks. AISTATS 2010. Xavier's initial
#   weights, and why sigmoids are hard.
