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
# # Write your own layer
#
# [The CIFAR-10 tutorial](02_sequential_cifar10.ipynb) sent curvature
# through linear layers and sigmoids. Your network may hold something
# else, something that nobody has thought of yet. This tutorial shows
# how to teach it to `hbp`.
#
# You will write two layers, a bump and a linear layer of low rank,
# put them into a network, and train it on two spirals with Newton
# steps. Each layer takes two lines beyond what PyTorch wants anyway.
# The point is to know *why* two lines are enough, and how to notice
# when they are wrong.
#
# [Write a layer](../docs/layers.md) is the short page on the same
# subject, and has more kinds of layers. No data set is needed, and no
# GPU.

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
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian

from hbp import (
    BilinearRule,
    CGNewton,
    ElementwiseRule,
    HBPLinear,
    HBPResidual,
    HBPSequential,
    per_sample_hessian,
    set_seeds,
)
from hbp.testing import check_layer
from hbp.tutorial.plotting import matrices

set_seeds(0)

# %% [markdown]
# ## What a layer must know
#
# A layer takes $x$ to $z$, and perhaps it has parameters $\theta$.
# Something above it turns $z$ into a loss. Call the loss's gradient
# there $\delta = \partial \ell / \partial z$, and its curvature
# $H_z$. The layer has to hand down the curvature w.r.t. $x$. The
# chain rule, applied twice, says what that is:
#
# $$
# H_x = J^\top H_z J
# + \operatorname{mod}\Big( \sum_k \nabla^2 z_k \, \delta_k \Big),
# \qquad J = \frac{\partial z}{\partial x} .
# $$
#
# $H_z$ and $\delta$ come from above. All that is the layer's own are
# three rules:
#
# 1. its **Jacobian** $J$;
# 2. its **second-order term** $\sum_k \nabla^2 z_k \, \delta_k$, how
#    the layer itself bends. `mod` stands for what you choose to do
#    about it: keep it, drop it, or make it positive;
# 3. its **parameter Jacobians** $\partial z / \partial \theta$, if it
#    has parameters. They give the blocks
#    $H_\theta = (\partial z / \partial \theta)^\top H_z \,
#    (\partial z / \partial \theta)$.
#
# Let us do it by hand once, in plain PyTorch. Our layer is a bump,
#
# $$
# z = \varphi(x) = e^{-x^2/2}, \qquad
# \varphi' = -x \, z, \qquad
# \varphi'' = (x^2 - 1) \, z ,
# $$
#
# applied to every number of $x$ on its own. As the loss above it, we
# take half the square of how much the bumps exceed 4 together.


# %%
def bump(x):
    return torch.exp(-x.square() / 2)


def loss_above(z):
    return (z.sum(-1) - 4).square().sum() / 2


# %% [markdown]
# First comes what is handed down from above. The loss sees only the
# sum of $z$, so all entries of $\delta$ are the same, and those of
# $H_z$ are 1. Then follows what the layer knows. Entry $k$ of $z$
# depends on entry $k$ of $x$ alone, so $J$ is a diagonal matrix, and
# so is the second-order term:
#
# $$
# H_x = \operatorname{diag}(\varphi') \, H_z
# \operatorname{diag}(\varphi')
# + \operatorname{diag}(\varphi'' \odot \delta) .
# $$

# %%
x = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
z = bump(x)
delta = (z.sum() - 4) * torch.ones_like(z)
H_z = torch.ones(11, 11).double()

J = torch.diag(-x * z)
from_above = J.T @ H_z @ J
second_order = torch.diag((x.square() - 1) * z * delta)

by_autograd = hessian(lambda x: loss_above(bump(x)), x)
by_hand = from_above + second_order

assert torch.allclose(by_hand, by_autograd, atol=1e-12)
print("Rules 1 and 2 give the Hessian that autograd finds.")

# %% alt="Three 11 by 11 matrices on one colour scale. The first, from above, is a plaid of blue and orange quarters: positive where two inputs lie on the same side of zero, negative otherwise. The second is a diagonal, orange in the middle and blue towards the ends. The third is their sum." tags=["nbval-ignore-output"]
matrices(
    {
        "from above": from_above,
        "second order": second_order,
        "the sum": by_hand,
    },
    same_scale=True,
)

# %% [markdown]
# The first picture is curvature that was there already, seen through
# the slopes. The second is new: it is made by the bump itself, and is
# negative where the bump bends downward, around zero.
#
# The third rule needs a parameter. Scale every input by a number of
# its own, $z = s \odot x$. Then
# $\partial z / \partial s = \operatorname{diag}(x)$:

# %%
s = torch.linspace(0.5, 1.5, 11, dtype=torch.float64)
B = torch.diag(x)
by_autograd = hessian(lambda s: loss_above(s * x), s)

assert torch.allclose(B.T @ H_z @ B, by_autograd, atol=1e-12)
print("Rule 3 gives the block of the parameter.")

# %% [markdown]
# That is all there is to know about a layer. What follows is about
# letting the computer know it.
#
# ## An elementwise layer in two lines
#
# For a layer that treats every number on its own, only $\varphi'$ and
# $\varphi''$ are missing, and automatic differentiation can find
# both. So write the layer as you would for PyTorch, and then two more
# lines, which put `ElementwiseRule` in front of it.


# %%
class Bump(nn.Module):
    def forward(self, x):
        return torch.exp(-x.square() / 2)


class HBPBump(ElementwiseRule, Bump):
    """z = exp(-x²/2)."""


# %% [markdown]
# `ElementwiseRule` must come first: it calls the `forward` of `Bump`,
# and remembers what went through.
#
# Is it right? `check_layer` puts a network and a loss on top and
# compares the layer's curvature with automatic differentiation, for
# every treatment of the second-order term and for every way of
# treating a batch. It returns nothing if all agree.

# %%
samples = torch.randn(2, 3, dtype=torch.float64)

check_layer(HBPBump(), samples)
print("HBPBump agrees with automatic differentiation.")

# %% [markdown]
# ### The four treatments
#
# The sign of $\varphi''$ is that of $x^2 - 1$: the bump bends
# downward for $|x| < 1$, and upward outside. So its second-order term
# has both signs, and the four treatments differ. Send curvature back
# through the layer, for the $x$ and the loss of the beginning.


# %%
def input_hessian(layer, x, treatment):
    """H_x of every sample below loss_above, as one matrix."""
    layer.zero_grad()
    z = layer(x.clone().requires_grad_())
    loss = loss_above(z)
    H_z = per_sample_hessian(loss, z)
    loss.backward()
    H_x = layer.backward_hessian(
        H_z,
        compute_input_hessian=True,
        modify_2nd_order_terms=treatment,
    )
    return H_x.to_dense()


treatments = ["none", "zero", "abs", "clip"]
one_sample = x.unsqueeze(0)
four = {
    name: input_hessian(HBPBump(), one_sample, name)
    for name in treatments
}

# %% alt="Four 11 by 11 matrices on one colour scale. All share the plaid of blue and orange quarters. On the diagonal, 'none' adds orange in the middle and blue outside, 'zero' nothing, 'abs' blue everywhere, and 'clip' only the blue outside." tags=["nbval-ignore-output"]
matrices(four, columns=4, same_scale=True)

# %%
lowest = {
    name: torch.linalg.eigvalsh(H_x).min().item()
    for name, H_x in four.items()
}

assert torch.allclose(four["none"], by_hand, atol=1e-12)
assert lowest["none"] < -0.1
assert min(lowest[name] for name in treatments[1:]) > -1e-12
print("Only with 'none' is there a negative eigenvalue.")

# %% [markdown]
# ### With formulas
#
# Automatic differentiation is right, but it takes its time: it runs
# `forward` again, and differentiates twice. You know the formulas, so
# state them. `first_derivative` gets $x$, and `second_derivative`
# gets $x$ and the first one, which often saves some work: here,
# $\varphi'' = -\varphi - x \varphi'$.


# %%
class FastBump(HBPBump):
    """z = exp(-x²/2), with formulas."""

    def first_derivative(self, x):
        """φ' = -x φ."""
        return -x * bump(x)

    def second_derivative(self, x, first):
        """φ'' = (x² - 1) φ."""
        return (x.square() - 1) * bump(x)


check_layer(FastBump(), samples)
for name in treatments:
    H_x = input_hessian(FastBump(), one_sample, name)
    assert torch.allclose(H_x, four[name], atol=1e-12)
print("The formulas agree.")

# %% [markdown]
# A formula is one more thing that can be wrong, and it should earn
# its place. So measure the time for both derivatives of a batch of
# 500 samples with 256 features.


# %% tags=["nbval-ignore-output"]
def seconds_of(layer, x):
    """For φ' and φ'', the quickest of ten calls."""
    times = []
    for _ in range(10):
        start = perf_counter()
        layer.second_derivative(x, layer.first_derivative(x))
        times.append(perf_counter() - start)
    return min(times)


values = torch.randn(500, 256)
by_autograd = seconds_of(HBPBump(), values)
by_formulas = seconds_of(FastBump(), values)
print(f"autograd: {1000 * by_autograd:.2f} ms")
print(f"formulas: {1000 * by_formulas:.2f} ms")

# %%
assert by_formulas < by_autograd
print("Formulas are faster than automatic differentiation.")

# %% [markdown]
# ## What a wrong rule looks like
#
# A wrong gradient often shows: the loss does not fall. A wrong
# Hessian is a quieter thing: steps still go downhill, only less well,
# and nobody ever asks why. So let us make mistakes on purpose, and
# see whether they are noticed.
#
# The first layer has a sign wrong, the second forgets that it bends,
# the third has lost the ½ of $x^2/2$ on the way.


# %%
class WrongSign(FastBump):
    def second_derivative(self, x, first):
        return (1 - x.square()) * bump(x)


class Straight(FastBump):
    def second_derivative(self, x, first):
        return None  # "It is 0 everywhere."


class WrongSlope(FastBump):
    def first_derivative(self, x):
        return -2 * x * bump(x)


# %% [markdown]
# `check_layer` raises an `AssertionError`. Each line of its message
# names a block, how it was computed, and by how much it is off. Here
# is how one message begins, and which treatments each of them names.


# %% tags=["nbval-ignore-output"]
def complaint(layer):
    """What check_layer has to say; nothing if all is well."""
    try:
        check_layer(layer, samples)
    except AssertionError as error:
        return str(error)
    return ""


said = {
    type(layer).__name__: complaint(layer)
    for layer in [FastBump(), WrongSign(), Straight(), WrongSlope()]
}
begin = said["WrongSign"].splitlines()[:2]
print("\n".join(begin).replace("; ", ";\n    "))


# %%
def spoilt(message):
    """The treatments that a message names."""
    return [name for name in treatments if repr(name) in message]


for name, message in said.items():
    print(f"{name:10}", *spoilt(message) or ["-"])

# %% [markdown]
# If all four are wrong, then it is $J$, which all share. If `"zero"`
# is right, $J$ is right too, and the fault is in the second-order
# term. And if `"abs"` is right as well, the term has the right size
# and the wrong sign.

# %%
assert said["FastBump"] == ""
assert spoilt(said["WrongSign"]) == ["none", "clip"]
assert spoilt(said["Straight"]) == ["none", "abs", "clip"]
assert spoilt(said["WrongSlope"]) == treatments
print("All three mistakes were noticed, and told apart.")

# %% [markdown]
# ## A layer with parameters
#
# Next, a linear layer whose weight is the product of two thin
# matrices. With $A$ of shape $[\text{out}, r]$ and $B$ of shape
# $[r, \text{in}]$,
#
# $$ z = A B x + b . $$
#
# For a small $r$ that is far fewer numbers than a full weight has.
# For a fixed $A$ the layer is linear in $B$, and for a fixed $B$ it
# is linear in $A$. Each parameter has a block of its own, so nothing
# bends, and there is no second-order term. `BilinearRule` is made for
# such layers. It finds all the Jacobians, and never writes them down.


# %%
class LowRank(nn.Module):
    def __init__(self, features_in, features_out, rank):
        super().__init__()
        A = torch.randn(features_out, rank) / math.sqrt(rank)
        B = torch.randn(rank, features_in) / math.sqrt(features_in)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.bias = nn.Parameter(torch.zeros(features_out))

    def forward(self, x):
        return F.linear(F.linear(x, self.B), self.A, self.bias)


class HBPLowRank(BilinearRule, LowRank):
    """z = ABx + b."""


set_seeds(0)
check_layer(HBPLowRank(3, 4, rank=2), samples)
own = [FastBump(), HBPLowRank(3, 3, rank=2), FastBump()]
check_layer(HBPSequential(*own), samples)
print("HBPLowRank agrees, alone and in a network.")

# %% [markdown]
# Each parameter now gets its block. Let us see them, for a loss right
# above the layer.

# %% alt="Three square matrices, the blocks of A, B and the bias. That of A falls into 3 by 3 tiles of 2 by 2, that of B into 2 by 2 tiles of 5 by 5. That of the bias is 3 by 3, positive on the diagonal and negative elsewhere." tags=["nbval-ignore-output"]
loss_func = nn.CrossEntropyLoss()


def leave_hessians(model, inputs, labels, treatment="none"):
    """Exact blocks on all parameters; returns the loss."""
    outputs = model(inputs)
    loss = loss_func(outputs, labels)
    model.zero_grad()
    H_z = per_sample_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(H_z, modify_2nd_order_terms=treatment)
    return loss.item()


low_rank = HBPLowRank(5, 3, rank=2).double()
inputs = torch.randn(7, 5, dtype=torch.float64)
labels = torch.arange(7) % 3
leave_hessians(low_rank, inputs, labels)
matrices(
    {
        f"{name} {list(p.shape)}": p.hessian.to_dense()
        for name, p in low_rank.named_parameters()
    }
)

# %% [markdown]
# There are more such base classes: `LinearRule` for linear layers
# without parameters, and `GeneralRule` for layers that mix the
# features of a sample. You can also [state the three rules
# yourself](../docs/layers.md#rules), as methods of an `HBPModule`.
#
# ## Put them to work
#
# Two spirals, one inside the other, 80 points each, made from a seed:
# which spiral does a point belong to? It is an old test for networks,
# and no line can answer it.


# %%
def spirals(count, seed):
    """Points [count, 2] and their spiral, 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(count, generator=generator).sqrt()
    which = torch.arange(count) % 2
    angle = 3 * math.pi * t + math.pi * which
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    noise = torch.randn(count, 2, generator=generator)
    return 3 * t.unsqueeze(1) * points + 0.08 * noise, which


points, which = spirals(160, seed=0)

assert points.mean(0).norm() < points.norm(dim=1).mean() / 4
print("The mean of all points lies near the origin.")

# %% [markdown]
# In the first tutorials the mean input took the place of the inputs.
# Here the mean is close to zero, and in the block of the first weight
# it occurs twice: next to nothing would be left of its curvature. So
# we don't average. Send one matrix per sample backward, as
# `leave_hessians` does, and products are
# [exact](../docs/exact.md#exact). Our layers can do that, too, and
# nobody had to tell them how. In the network, all but the first and
# the last are our own:

# %%
set_seeds(0)
model = HBPSequential(
    HBPLinear(2, 24),
    FastBump(),
    HBPLowRank(24, 24, rank=4),
    FastBump(),
    HBPLinear(24, 2),
)
cg = {"cg_atol": 0.0, "cg_tol": 0.1, "cg_maxiter": 10}
optimizer = CGNewton(model.parameters(), lr=0.3, alpha=0.005, **cg)
losses = []

for _ in range(40):
    losses.append(leave_hessians(model, points, which, "abs"))
    optimizer.step()

with torch.no_grad():
    outputs = model(points)
losses.append(loss_func(outputs, which).item())
right = (outputs.argmax(dim=1) == which).float().mean().item()

# %% tags=["nbval-ignore-output"]
print("loss, every ten steps:", *[f"{x:.3f}" for x in losses[::10]])

# %%
assert 0.6 < losses[0] < 1.2
assert losses[-1] < math.log(2) / 10
assert right > 0.95
print("After 40 steps, nearly every point is on its side.")

# %% [markdown]
# And this is what the network says about every place of the plane:
# the difference of its two probabilities, with the points of the two
# spirals on top, as circles and as triangles.


# %% alt="A large square map of the network's answer: a blue and an orange band wind around each other. White circles lie along the blue band, black triangles along the orange one." tags=["nbval-ignore-output"]
def draw_plane(size=121, reach=3.4):
    axis = torch.linspace(-reach, reach, size)
    plane = torch.cartesian_prod(-axis, axis)  # row by row, from top
    with torch.no_grad():
        answer = model(plane.flip(1)).softmax(dim=1)
    answer = (answer[:, 1] - answer[:, 0]).view(size, size)
    drawing = matrices({"": answer})
    drawing.figure.set_size_inches(7, 7)
    (axes,) = drawing.figure.axes
    looks = {"marker": "^", "color": "black"}, {"color": "white"}
    for spiral, look in enumerate(looks):
        x, y = points[which == spiral].T / reach
        places = (size - 1) / 2 * torch.stack([1 + x, 1 - y])
        axes.scatter(*places, 40, edgecolors="black", **look)
    return drawing


draw_plane()

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** The square plus, $z = (x + \sqrt{x^2 + 4})/2$, is a
# smooth relative of ReLU without an exponential. Write the layer,
# with formulas. Can you write them in terms of $z$ alone? If so, set
# `derivatives_from_output = True`, and the layer need not keep $x$.

# %% [markdown] tags=["solution"]
# $z$ solves $z^2 - xz - 1 = 0$, so $x = z - 1/z$, and the root is
# $\sqrt{x^2 + 4} = z + 1/z$. Differentiate $x = z - 1/z$ w.r.t. $z$
# and invert: $\varphi' = 1 / (1 + z^{-2}) = z^2 / (z^2 + 1)$. One
# more time: $\varphi'' = 2 / (z + 1/z)^3$.


# %% tags=["solution"]
class SquarePlus(nn.Module):
    def forward(self, x):
        return (x + (x.square() + 4).sqrt()) / 2


class HBPSquarePlus(ElementwiseRule, SquarePlus):
    """z = (x + √(x² + 4))/2."""

    derivatives_from_output = True

    def first_derivative(self, z):
        """φ' = z²/(z² + 1)."""
        return z.square() / (z.square() + 1)

    def second_derivative(self, z, first):
        """φ'' = 2/(z + 1/z)³."""
        return 2 / (z + 1 / z) ** 3


assert complaint(HBPSquarePlus()) == ""
print("The square plus agrees, in terms of z.")

# %% [markdown]
# **Exercise 2.** In a circulant layer all rows of the weight are the
# same, each shifted by one: $W_{oi} = w_{(o - i) \bmod n}$. It has
# $n$ parameters instead of $n^2$. Write it with `BilinearRule`. Its
# block is $n \times n$. How can you get it from the block of an
# `HBPLinear` with the same $W$?

# %% [markdown] tags=["solution"]
# Index $w$ by $(o - i) \bmod n$ to get $W$, and let PyTorch do the
# rest. Every entry of $W$ is a copy of an entry of $w$: as vectors,
# $W = P w$ with a matrix $P$ of zeros and ones. So
# $H_w = P^\top H_W P$: add up the entries of the large block that
# belong to copies of the same two parameters.


# %% tags=["solution"]
class Circulant(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n) / math.sqrt(n))

    def matrix(self):
        n = torch.arange(len(self.w))
        return self.w[(n.unsqueeze(1) - n) % len(n)]

    def forward(self, x):
        return F.linear(x, self.matrix())


class HBPCirculant(BilinearRule, Circulant):
    """z = Wx with W_oi = w_(o-i)."""


check_layer(HBPCirculant(3), samples)

circulant = HBPCirculant(3).double()
linear = HBPLinear(3, 3, bias=False).double()
with torch.no_grad():
    linear.weight.copy_(circulant.matrix())
for layer in [circulant, linear]:
    leave_hessians(layer, samples, labels[:2])

n = torch.arange(3)
copies = ((n.unsqueeze(1) - n) % 3).flatten()
P = F.one_hot(copies, 3).double()
H_w, H_W = circulant.w.hessian, linear.weight.hessian

assert torch.allclose(H_w.to_dense(), P.T @ H_W.to_dense() @ P)
print("The circulant's block is that of the linear layer, summed.")

# %% [markdown]
# **Exercise 3.** Flip the sign of $\varphi'$ in `FastBump`. Show that
# its $H_x$ does not change. So is the sign of no importance? Find a
# network in which it is.

# %% [markdown] tags=["solution"]
# $J$ occurs twice in $J^\top H_z J$, and the two signs cancel. Beside
# a shortcut they do not: there the Jacobian is $I + J$, and $I - J$
# is another matrix.


# %% tags=["solution"]
class Flipped(FastBump):
    def first_derivative(self, x):
        return bump(x) * x


flipped = input_hessian(Flipped(), one_sample, "none")
assert torch.allclose(flipped, four["none"], atol=1e-12)

assert complaint(HBPResidual(FastBump())) == ""
assert spoilt(complaint(HBPResidual(Flipped()))) == treatments
print("Beside a shortcut, the sign of J matters.")

assert spoilt(complaint(Flipped())) == []
assert "jacobian" in complaint(Flipped())
print("So check_layer compares J by itself, too.")

# %% [markdown]
# ## Read on
#
# - [Write a layer](../docs/layers.md) has every base class and every
#   rule on one page, and a table of the layers that are there.
# - [The mathematics](../docs/mathematics.md#treatments) derives the
#   equation of the beginning, and what the treatments mean.
# - [Convert](../docs/convert.md) takes a `torch.nn` model with your
#   layers in it.
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
#   The equation, and the treatments of its second term.
# - J. Barron.
#   [Squareplus: A Softplus-Like Algebraic
#   Rectifier](https://arxiv.org/abs/2112.11687), 2021. The function
#   of the first exercise.
