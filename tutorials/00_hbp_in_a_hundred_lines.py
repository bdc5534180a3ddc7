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
# # HBP in a hundred lines
#
# A gradient travels backward through a network: each layer turns the
# gradient at its output into the gradient at its input. This tutorial
# sends *curvature* the same way. That is Hessian backpropagation, or
# HBP, and you will see all of it in about a hundred lines of plain
# PyTorch: a network, its gradient, its curvature, and a training step
# that uses both. Reading takes ten minutes, and all that you need is
# the chain rule, some linear algebra and some PyTorch.
#
# The whole method rests on one equation. Let a layer take $x$ to $z$,
# with the Jacobian $J = \partial z / \partial x$. At its output, let
# $\delta$ be the gradient of the loss and $H_z$ its Hessian, the
# matrix of second derivatives. Then the chain rule, applied once and
# applied twice, says what they are at the input:
#
# $$
# \delta_x = J^\top \delta ,
# \qquad
# H_x = J^\top H_z J
# + \sum_k \frac{\partial^2 z_k}{\partial x \, \partial x^\top}
# \, \delta_k .
# $$
#
# The first term of $H_x$ is the curvature of everything *behind* the
# layer, seen through the layer. The second is the curvature of the
# layer itself. With a parameter in place of $x$, the same equation
# gives the curvature of the loss in that parameter.
#
# When all is in place, we train a network that starts on a plateau,
# where the loss hardly falls in any direction. SGD stays there for a
# long time, HBP does not, and we find out why. In the end the package
# `hbp` computes the same numbers once more.

# %% [markdown]
# ## Setup
#
# The first cell installs the library where it is missing, for
# instance on Colab. Otherwise it does nothing. Until the last section
# we need the library only to draw.

# %%
# @title Install hbp where it is missing
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

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
from itertools import pairwise

import torch
from sklearn.datasets import load_digits

import hbp
from hbp.tutorial.plotting import Panel, curves, matrices

torch.set_default_dtype(torch.float64)

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images / 16
print(tuple(images.shape), tuple(labels.shape))

# %% [markdown]
# These are scikit-learn's handwritten digits: 1797 images of 8 × 8
# pixels, from 0 (black) to 1 (white), each as a row of 64 numbers.
# They come with scikit-learn, so nothing is downloaded.
#
# ## Two layers, and how they send things backward
#
# In a batch, $\delta$ has one row for each sample. A Hessian for each
# sample would be a lot to carry through a network, so HBP carries a
# single one for the whole batch, and puts averages over the batch
# into the equation. That is an approximation, which makes curvature
# cheap. For a batch of one sample it changes nothing, and there we
# can check our work.
#
# **The linear layer**, $z = W x + b$. Its Jacobian with respect to
# $x$ is $W$, and with respect to $b$ it is the identity. The weight
# $W_{oi}$ acts on $z_o$ by the factor $x_i$. And since the layer is
# linear in each of the three, it has no curvature of its own. So with
# the mean input $\bar x$,
#
# $$
# H_x = W^\top H W ,
# \qquad H_b = H ,
# \qquad H_W = H \otimes \bar x \bar x^\top .
# $$
#
# The sign $\otimes$ says that every entry of $H$ is multiplied by the
# whole matrix $\bar x \bar x^\top$.
#
# The Hessian of a single parameter is called its *block*. The block
# of a weight is large: 32 × 64 weights have one of 2048 × 2048
# numbers. We never write it down. All that we will need is its
# product with a matrix $V$ of the weight's shape, and for that the
# two factors are enough:
#
# $$ V \;\mapsto\; H \, (V \bar x) \, \bar x^\top . $$
#
# A tensor has its gradient in `.grad`. Ours also get a `.hessian`,
# the function that multiplies by the block.


# %%
class Linear:
    """z = W x + b, with one sample in each row of x."""

    def __init__(self, inputs, outputs):
        bound = inputs**-0.5
        self.W = torch.empty(outputs, inputs).uniform_(-bound, bound)
        self.b = torch.empty(outputs).uniform_(-bound, bound)

    def forward(self, x):
        self.x = x
        return x @ self.W.T + self.b

    def backward(self, delta):
        self.W.grad = delta.T @ self.x
        self.b.grad = delta.sum(0)
        return delta @ self.W

    def backward_hessian(self, H):
        x = self.x.mean(0)
        self.W.hessian = lambda V: torch.outer(H @ (V @ x), x)
        self.b.hessian = lambda v: H @ v
        return self.W.T @ H @ self.W


# %% [markdown]
# **The sigmoid**, $z = \varphi(x)$ in every entry. It has no
# parameters. Its Jacobian is diagonal, with the slopes $\varphi'$,
# and it bends, so that now the second term counts. With means over
# the batch, written $\operatorname{E}$, and the sum over its samples,
#
# $$
# H_x = \operatorname{diag}(\operatorname{E}[\varphi']) \, H
# \operatorname{diag}(\operatorname{E}[\varphi'])
# + \Big| \operatorname{diag}
# \Big( \sum_n \varphi''_n \, \delta_n \Big) \Big| .
# $$
#
# The absolute value is a choice. The second term has entries of
# either sign, and where the loss bends downward, a Newton step would
# look for the top of a hill instead of the bottom of a valley. The
# absolute value keeps the size of the bend, as a reason for caution,
# and no curvature is negative any more.


# %%
class Sigmoid:
    """z = φ(x) = 1 / (1 + exp(-x)), in every entry."""

    modify = torch.abs

    def forward(self, x):
        self.z = torch.sigmoid(x)
        return self.z

    def backward(self, delta):
        self.delta = delta
        return delta * self.first()

    def backward_hessian(self, H):
        slope = self.first().mean(0)
        second = self.first() * (1 - 2 * self.z)
        bend = (second * self.delta).sum(0)
        bend = torch.diag(self.modify(bend))
        return slope[:, None] * H * slope + bend

    def first(self):
        """The derivative φ'."""
        return self.z * (1 - self.z)


# %% [markdown]
# ## Where curvature starts
#
# At the output, softmax turns ten numbers $z$ into probabilities
# $p_c = e^{z_c} / \sum_{c'} e^{z_{c'}}$, and the loss of a sample is
# $-\log p_\text{label}$. With the unit vector $y$ of the label, the
# gradient of that is $p - y$, and its Hessian is
# $\operatorname{diag}(p) - p p^\top$. The loss of the batch is the
# mean, and so is its Hessian.


# %%
def cross_entropy(z, labels):
    """The loss, its gradient and its Hessian at the output z."""
    log_p = z.log_softmax(1)
    p, y = log_p.exp(), torch.eye(10)[labels]
    loss = -(y * log_p).sum(1).mean()
    delta = (p - y) / len(z)
    H = torch.diag(p.mean(0)) - p.T @ p / len(z)
    return loss, delta, H


# %% [markdown]
# ## There and back
#
# Our network has four linear layers, with sigmoids between them. On
# the way back, the gradient and the Hessian travel side by side.


# %%
def make_network():
    torch.manual_seed(0)
    network = []
    for inputs, outputs in pairwise([64, 32, 32, 32, 10]):
        network += [Linear(inputs, outputs), Sigmoid()]
    return network[:-1]  # The last numbers go to the softmax.


def parameters(network):
    return [p for layer in network[::2] for p in (layer.W, layer.b)]


def forward(network, x):
    for layer in network:
        x = layer.forward(x)
    return x


def there_and_back(network, images, labels):
    """Return the loss; leave p.grad and p.hessian behind."""
    z = forward(network, images)
    loss, delta, H = cross_entropy(z, labels)
    for layer in reversed(network):
        delta = layer.backward(delta)
        H = layer.backward_hessian(H)
    return loss


# %% [markdown]
# Is it right? We have done without PyTorch's autograd so far, so it
# can be the judge. It computes the gradient, and the product of the
# exact Hessian with a random $V$. For one sample, and without the
# absolute value, all of ours should be the same.

# %%
network = make_network()
for layer in network[1::2]:
    layer.modify = lambda bend: bend
one_image, one_label = images[:1], labels[:1]
there_and_back(network, one_image, one_label)


def by_autograd(layer, name, V):
    """Gradient, and Hessian times V, in one parameter of a layer."""
    p = getattr(layer, name)

    def loss_at(value):
        setattr(layer, name, value)
        z = forward(network, one_image)
        return cross_entropy(z, one_label)[0]

    gradient = torch.autograd.functional.jacobian(loss_at, p)
    _, product = torch.autograd.functional.hvp(loss_at, p, V)
    setattr(layer, name, p)
    return gradient, product


for layer in network[::2]:
    for p, name in (layer.W, "W"), (layer.b, "b"):
        V = torch.randn_like(p)
        gradient, product = by_autograd(layer, name, V)
        assert (p.grad - gradient).norm() < 1e-10 * gradient.norm()
        error = p.hessian(V) - product
        assert error.norm() < 1e-10 * product.norm()
print("All eight gradients and Hessian blocks are exact.")

# %% [markdown]
# With all images as one batch, and with the absolute value, these
# are the Hessians at the outputs of the four layers. Blue is
# positive, orange is negative, and each tile has a scale of its own,
# with its largest number above it. On the way to the first layer that
# number becomes very small, which will matter below. What is left is
# mostly on the diagonal, where the sigmoids have put their own bends.

# %% alt="Four matrices, from the output back to the first layer. The first has 10 rows: positive on its diagonal, slightly negative elsewhere. The others have 32 rows, and the further back, the more of what they have is on the diagonal. The largest number shrinks at every step back." tags=["nbval-ignore-output"]
network = make_network()
there_and_back(network, images, labels)
tiles = {}
for number in (4, 3, 2, 1):
    H = network[2 * number - 2].b.hessian
    H = H(torch.eye(10 if number == 4 else 32))
    tiles[f"layer {number}, up to {H.max():.0e}"] = H
matrices(tiles, columns=4)

# %% [markdown]
# ## A Newton step
#
# If the loss were a bowl with gradient $g$ and curvature $H$, the
# step $d$ to its bottom would solve $H d = -g$. Our $H$ is flat in
# many directions, and in those such a step would have no bound. So a
# bit of the identity matrix is mixed in, and only a part of the step
# is taken:
#
# $$
# \big[ (1 - \alpha) H + \alpha I \big] \, d = -g ,
# \qquad \theta \leftarrow \theta + \mathrm{lr} \cdot d .
# $$
#
# The number $\alpha$ is called the damping. At $\alpha = 1$ the step
# is that of gradient descent. Every parameter $\theta$ has an
# equation of its own, and we solve it by *conjugate gradients*, a
# method that needs nothing but products with the matrix, one for each
# iteration. It stops when the residual $r$, which is what the
# equation still lacks, is small enough.


# %%
def conjugate_gradients(multiply, b, tolerance):
    """Solve A x = b, where multiply(p) is A p."""
    x, r, p = torch.zeros_like(b), b, b
    while r.norm() > tolerance * b.norm():
        Ap = multiply(p)
        length = r.square().sum() / (p * Ap).sum()
        x = x + length * p
        new_r = r - length * Ap
        p = new_r + new_r.square().sum() / r.square().sum() * p
        r = new_r
    return x


def newton_direction(p, alpha, tolerance=1e-3):
    def damped(V):
        return (1 - alpha) * p.hessian(V) + alpha * V

    return conjugate_gradients(damped, -p.grad, tolerance)


def newton_step(network, lr=0.1, alpha=0.01):
    for p in parameters(network):
        p += lr * newton_direction(p, alpha)


# %% [markdown]
# ## Training
#
# What is missing is a loop over random batches of 100 images. They
# are the same ones for everything that we train.


# %%
def batches(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        batch = torch.randint(1797, (100,), generator=generator)
        yield images[batch], labels[batch]


def train(network, step, count=200):
    """Take steps; return the loss before each of them."""
    losses = []
    for batch in batches(count):
        losses.append(there_and_back(network, *batch).item())
        step()
    return losses


network = make_network()
newton = train(network, lambda: newton_step(network))

# %% [markdown]
# That is the method. Now for SGD. How it does depends on its learning
# rate, so it gets four of them, without momentum and with a momentum
# of 0.9, and we draw the best of each four. Adam joins with one rate.
# All of `torch.optim` works for our network as well, since it looks
# for the gradient in `p.grad`, where we have put it.


# %% alt="The loss of a batch against the step, for four methods. All start at 2.3. HBP and Adam fall before step 100 and end near 0. SGD, with and without momentum, stays at 2.3." tags=["nbval-ignore-output"]
def train_with(optimizer, **options):
    network = make_network()
    step = optimizer(parameters(network), **options).step
    return train(network, step)


def best(runs):
    return min(runs.values(), key=lambda losses: sum(losses[-50:]))


rates = [0.3, 1, 3, 10]
SGD = torch.optim.SGD
sgd = {lr: train_with(SGD, lr=lr) for lr in rates}
momentum = {lr: train_with(SGD, lr=lr, momentum=0.9) for lr in rates}
adam = train_with(torch.optim.Adam, lr=0.01)
runs = {
    "HBP": newton,
    "SGD": best(sgd),
    "momentum": best(momentum),
    "Adam": adam,
}


def smooth(losses):
    """Means of ten losses each."""
    return torch.tensor(losses).view(-1, 10).mean(1).tolist()


steps = range(5, 200, 10)
lines = {name: (steps, smooth(run)) for name, run in runs.items()}
curves([Panel("step", "loss", lines)])

# %% [markdown]
# A loss of $\ln 10 \approx 2.3$ is that of a model that gives each
# digit the same chance. This level is the plateau. After 150 steps
# HBP is far below it, and SGD is still there with all eight settings.
# It is not caught for good: some of the settings get away later, and
# an exercise below asks when.

# %%
all_sgd = [*sgd.values(), *momentum.values()]

assert sum(newton[140:150]) < 10 * 1.0
assert sum(adam[140:150]) < 10 * 1.5
assert all(sum(run[140:150]) > 10 * 2.2 for run in all_sgd)
print("After 150 steps, HBP and Adam have left the plateau.")
print("SGD is still on it.")

# %% [markdown]
# These are steps, not seconds: our Newton step takes several times
# as long as one of SGD. The package [needs less
# time](../docs/performance.md). And Adam leaves as early as HBP. It
# divides each step by the size of past gradients, so small gradients
# do not mean small steps.
#
# ## Why it leaves
#
# Take the network as it starts, and a weight's block
# $H \otimes \bar x \bar x^\top$. Of all directions in the space of
# inputs, it knows a single one, that of the mean input $\bar x$.
# Split the gradient $g$ into the part along $\bar x$ and the rest. On
# the rest the block is zero, and the equation for the step becomes
# $\alpha d = -g$. That is plain gradient descent, at a learning rate
# of $\mathrm{lr} / \alpha = 10$. Along $\bar x$, the block holds the
# step back wherever it is larger than $\alpha$. In the last layer it
# is, by far. In the first layer it is tiny, since every sigmoid on
# the way has multiplied it by $\varphi'$ twice, and
# $\varphi' \le 1/4$. So that layer moves at the full rate.

# %%
network = make_network()
there_and_back(network, *next(batches(1)))
overshoot, share = [], []
for layer in network[::2]:
    x, H = layer.x.mean(0), layer.b.hessian(torch.eye(len(layer.b)))
    steepest = torch.linalg.eigvalsh(H).max() * (x @ x)
    overshoot.append(10 * steepest.item())

    g, along = layer.W.grad, torch.outer(x, x) / (x @ x)
    d = newton_direction(layer.W, alpha=0.01, tolerance=1e-10)
    share.append((d @ along).norm() / (g @ along / 0.01).norm())
    rest = d - d @ along
    free = -(g - g @ along) / 0.01
    assert (rest - free).norm() < 1e-6 * free.norm()

print("Apart from the mean input, the step is -g / α in all layers.")

assert share[0] > 0.8
assert share[-1] < 0.1
print("Along it, the first layer is free, and the last is held back.")

first, last = network[0].W.grad, network[-1].W.grad
assert first.norm() < last.norm() / 20
print("The gradient of the first layer is tiny.")

assert overshoot[-1] > 2
assert sgd[10][1] > sgd[10][0] + 1
print("Gradient descent at the rate of 10 overshoots, and climbs.")

# %% [markdown]
# The last of these lines explains the plateau. In a valley of
# curvature $\lambda$, gradient descent multiplies the distance to the
# bottom by $1 - \mathrm{lr} \cdot \lambda$ in each step. Where that is
# below $-1$, each step ends further away, on the other side. In the
# last layer, along $\bar x$, a rate of 10 is far beyond this, so SGD
# has to be slow there. Since it has one rate for all directions, it
# is slow in all of them, although nearly all of them are flat. The
# first layers, where gradients are tiny, need a high rate and do not
# get it.
#
# If that is the reason, then we need no curvature at all once we know
# where the loss is steep. So let us throw it away, and do gradient
# descent at the rate of 10, except that no weight ever moves along
# the mean input. The biases get a rate of 1.


# %% alt="The loss of a batch against the step. HBP, and gradient descent at the rate of 10 that leaves out the mean input, fall before step 100 and end near 0. Plain gradient descent at the rate of 10 jumps up at first and then stays where it started." tags=["nbval-ignore-output"]
def step_without_mean_input():
    for layer in network[::2]:
        x, g = layer.x.mean(0), layer.W.grad
        layer.W -= 10 * (g - torch.outer(g @ x, x) / (x @ x))
        layer.b -= layer.b.grad


network = make_network()
without = train(network, step_without_mean_input)

runs = {"HBP": newton, "rate 10": sgd[10], "without x̄": without}
lines = {name: (steps, smooth(run)) for name, run in runs.items()}
curves([Panel("step", "loss", lines)])


# %%
def leaves(losses, level=1.5):
    """The first step at which ten losses were low, on average."""
    means = torch.tensor(losses).unfold(0, 10, 1).mean(1)
    return 10 + (means < level).nonzero()[0].item()


assert leaves(without) < 1.5 * leaves(newton)
print("Without the mean input, the rate of 10 leaves as HBP does.")

# %% [markdown]
# So this is what curvature does on the plateau: it finds the few
# steep directions of each layer, and how steep they are, and holds
# the step back in them, so that it may be long in all others. On this
# network we could have guessed the directions. HBP measures them, and
# goes on measuring as the network changes.
#
# ## The same with the package
#
# `hbp` has such rules for many more layers. `hbp.convert` takes a
# model of `torch.nn`, and returns one that can send curvature
# backward. We give it our weights, and compare.

# %%
network = make_network()
model = torch.nn.Sequential(
    torch.nn.Linear(64, 32),
    torch.nn.Sigmoid(),
    torch.nn.Linear(32, 32),
    torch.nn.Sigmoid(),
    torch.nn.Linear(32, 32),
    torch.nn.Sigmoid(),
    torch.nn.Linear(32, 10),
)
model = hbp.convert(model)
loss_func = torch.nn.CrossEntropyLoss()
theirs = list(model.parameters())
pairs = list(zip(theirs, parameters(network), strict=True))
for p, ours in pairs:
    p.data.copy_(ours)

x, y = next(batches(1))
there_and_back(network, x, y)
outputs = model(x)
loss = loss_func(outputs, y)
output_hessian = hbp.batch_summed_hessian(loss, outputs)
loss.backward()
model.backward_hessian(output_hessian, modify_2nd_order_terms="abs")

for p, ours in pairs:
    vectors = torch.eye(ours.numel()).view(-1, *ours.shape)
    block = [ours.hessian(v).flatten() for v in vectors]
    error = p.hessian.to_dense() - torch.stack(block)
    assert error.norm() < 1e-10 * p.hessian.to_dense().norm()
print("All eight blocks are the same, to ten digits.")

# %% [markdown]
# The three calls before the comparison can be written as one,
# `hbp.backward`. With it, a training by the package looks as follows,
# and its losses are those of ours.

# %%
optimizer = hbp.CGNewton(
    model.parameters(), lr=0.1, alpha=0.01, cg_atol=0, cg_tol=1e-3
)
losses = []
for x, y in batches(20):
    outputs = model(x)
    loss = loss_func(outputs, y)
    optimizer.zero_grad()
    hbp.backward(model, outputs, loss)
    optimizer.step()
    losses.append(loss.item())

difference = torch.tensor(losses) - torch.tensor(newton[:20])
assert difference.abs().max() < 1e-8
print("Twenty steps of the package are twenty steps of ours.")

# %% [markdown]
# ## Try it yourself
#
# - Move weights *only* along the mean input at the rate of 10, and at
#   a rate of 1 elsewhere. Does that leave the plateau?
# - Set `Sigmoid.modify = torch.zeros_like`. This drops the second
#   term. Does it matter for this network?
# - Set the tolerance of `newton_direction` to 0.1, as the next
#   tutorials do. The gradient is longest along $\bar x$, so a loose
#   solution cares for the rest last. How many steps does that cost?
# - Give SGD 1000 steps. When do the best of its settings leave?
# - Add one more layer to the network. Who still gets off the plateau?
#
# ## Read on
#
# [One layer on MNIST](01_single_layer_mnist.ipynb) takes more time
# over a single layer, and compares its block with the true one.
# [A deep network on CIFAR-10](02_sequential_cifar10.ipynb) meets the
# plateau again, in a network of 3.8 million weights. All rules are
# derived in [the mathematics](../docs/mathematics.md).
#
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
