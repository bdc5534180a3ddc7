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
# You will write three layers: a bump, a linear layer of low rank, and
# a normalisation. Then you put them into one network, and train it
# with Newton steps. Each takes two lines beyond what PyTorch wants
# anyway. The point is to know *why* two lines are enough, and how to
# notice when they are wrong.
#
# [Write a layer](../docs/layers.md) is the short page on the same
# subject, for when you know the story. No data set is needed, and no
# GPU.

# %% [markdown]
# ## Setup
#
# The first cell installs the library where it is missing, for
# instance on Colab. Otherwise it does nothing.

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
import math
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian

from hbp import (
    BilinearRule,
    CGNewton,
    ElementwiseRule,
    GeneralRule,
    HBPLinear,
    HBPModule,
    HBPResidual,
    HBPSequential,
    convert,
    per_sample_hessian,
    set_seeds,
)
from hbp.core.jacobians import Bias, Chain, Matrix, Weight
from hbp.reference import hessian_blocks
from hbp.testing import check_layer
from hbp.tutorial.plotting import Panel, curves, matrices

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
x = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)


def bump(x):
    return torch.exp(-x.square() / 2)


def loss_above(z):
    return (z.sum(-1) - 4).square().sum() / 2


# %% [markdown]
# Here is what comes from above. The loss sees only the sum of $z$, so
# all entries of $\delta$ are the same, and those of $H_z$ are 1.

# %%
z = bump(x)
delta = (z.sum() - 4) * torch.ones(11).double()
H_z = torch.ones(11, 11).double()

# %% [markdown]
# And here is what the layer knows. Entry $k$ of $z$ depends on entry
# $k$ of $x$ alone, so $J$ is a diagonal matrix, and so is the
# second-order term:
#
# $$
# H_x = \operatorname{diag}(\varphi') \, H_z
# \operatorname{diag}(\varphi')
# + \operatorname{diag}(\varphi'' \odot \delta) .
# $$

# %%
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


print(HBPBump())

# %% [markdown]
# The order matters. `ElementwiseRule` comes first, calls the
# `forward` of `Bump`, and remembers what went through.
#
# Is it right? `check_layer` puts a network and a loss on top and
# compares the layer's curvature with automatic differentiation: for
# every treatment of the second-order term, for every way of treating
# a batch. It returns nothing if all agree.

# %%
samples = torch.randn(2, 3, dtype=torch.float64)

check_layer(HBPBump(), samples)
print("HBPBump agrees with automatic differentiation.")

# %% [markdown]
# ### The four treatments
#
# This is our function, with its two derivatives.

# %% alt="Three curves against x from minus 4 to 4. The bump is 1 at zero and falls to 0 on both sides. Its slope is positive on the left and negative on the right. Its second derivative is minus 1 at zero, crosses zero at minus 1 and 1, and is positive outside." tags=["nbval-ignore-output"]
t = torch.linspace(-4, 4, 161)
places, heights = t.tolist(), bump(t)
curves(
    [
        Panel(
            "x",
            "",
            {
                "value φ": (places, heights.tolist()),
                "slope φ′": (places, (-t * heights).tolist()),
                "bending φ″": (
                    places,
                    ((t.square() - 1) * heights).tolist(),
                ),
            },
        )
    ]
)

# %% [markdown]
# The bump bends downward for $|x| < 1$ and upward outside. So its
# second-order term has both signs, and the four treatments differ.
# Send curvature back through the layer, for the very $x$ and the very
# loss of the beginning.


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
# gets
# $x$ and the first one, which often saves some work: here,
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
def median_times(layers, values, rounds=15):
    """Seconds for φ' and φ'', by layer, taken in turns."""
    times = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            start = perf_counter()
            first = layer.first_derivative(values)
            layer.second_derivative(values, first)
            times[name].append(perf_counter() - start)
    return {name: median(t) for name, t in times.items()}


times = median_times(
    {"autograd": HBPBump(), "formulas": FastBump()},
    torch.randn(500, 256),
)
ratio = times["autograd"] / times["formulas"]
for name, seconds in times.items():
    print(f"{name}: {1000 * seconds:.2f} ms")
print(f"The formulas are {ratio:.1f} times faster.")

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
# `check_layer` raises an `AssertionError`. This is how its message
# begins. Each line names a block, how it was computed, and by how
# much it is off.


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
print("\n".join(said["WrongSign"].splitlines()[:3]))

# %% [markdown]
# Which treatments does it name?


# %%
def spoilt(message):
    """The treatments that a message names."""
    return [name for name in treatments if repr(name) in message]


for name, message in said.items():
    print(f"{name:10}", *spoilt(message) or ["-"])

# %% [markdown]
# Read it like a doctor. If all four are wrong, then it is $J$, which
# all share. If `"zero"` is right, $J$ is right too, and the fault is
# in the second-order term. And if `"abs"` is right as well, the term
# has the right size and the wrong sign.

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
# bends: there is no second-order term. `BilinearRule` is made for
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
print("HBPLowRank agrees with automatic differentiation.")

# %% [markdown]
# Put it between a bump and a loss. Every parameter gets its block,
# those of our layer like those of the others.


# %%
def leave_hessians(model, loss_func, inputs, labels):
    """Exact blocks on all parameters; returns the loss."""
    outputs = model(inputs)
    loss = loss_func(outputs, labels)
    model.zero_grad()
    H_z = per_sample_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(H_z, modify_2nd_order_terms="none")
    return loss


loss_func = nn.CrossEntropyLoss()
small = HBPSequential(
    HBPLinear(2, 5), FastBump(), HBPLowRank(5, 3, rank=2)
).double()
inputs = torch.randn(7, 2, dtype=torch.float64)
labels = torch.arange(7) % 3

leave_hessians(small, loss_func, inputs, labels)
for name, p in small.named_parameters():
    print(f"{name:8} {list(p.shape)}  {list(p.hessian.shape)}")

# %% alt="Three square matrices, the blocks of A, B and the bias. That of A falls into 3 by 3 tiles of 2 by 2, that of B into 2 by 2 tiles of 5 by 5. That of the bias is 3 by 3, positive on the diagonal and negative elsewhere." tags=["nbval-ignore-output"]
matrices(
    {
        name: p.hessian.to_dense()
        for name, p in small[2].named_parameters()
    }
)

# %% [markdown]
# We sent one matrix per sample backward, so nothing was averaged, and
# these are the blocks of the true Hessian. `hbp.reference`
# differentiates the loss twice and knows nothing of our rules. Ask
# it:

# %%
exact = hessian_blocks(small, loss_func, inputs, labels)

for name, p in small.named_parameters():
    error = (p.hessian.to_dense() - exact[name]).abs().max()
    assert error < 1e-12
print("Every block is the Hessian's, by autograd.")

# %% [markdown]
# `0.weight` lies below the bump and our new layer. Its block is right
# only because both sent the right curvature down.
#
# ## The rules in your own words
#
# `BilinearRule` asks autograd for every product. If you state the
# rules yourself, there is nothing to ask, and the mathematics stands
# on the page. Each rule is a method: `jacobian`, `second_order` and
# `parameter_jacobians`. Ours can do without the second, because
# nothing bends. Besides, `forward` has to end in `self.record(...)`,
# to remember what the rules will want to know: here, $x$.
#
# Jacobians are not matrices but *maps*, objects that multiply by $J$
# and by $J^\top$. `hbp.core.jacobians` has the usual ones, and
# `Chain` puts them in a row. With $h = Bx$ our layer is $z = Ah + b$,
# so
#
# $$
# \frac{\partial z}{\partial x} = A B, \qquad
# \frac{\partial z}{\partial B} = A \,
# \frac{\partial h}{\partial B}, \qquad
# \frac{\partial z}{\partial A} \text{ and }
# \frac{\partial z}{\partial b} \text{ as in a linear layer.}
# $$


# %%
class LowRankByMaps(HBPModule, LowRank):
    """z = ABx + b, rule by rule."""

    schemes = ("average_parameter_jacobian",)

    def forward(self, x):
        return self.record(x, super().forward(x), keep=x)

    def jacobian(self):
        """∂z/∂x = AB."""
        n = len(self.last_record.kept)
        return Chain([Matrix(self.B, n), Matrix(self.A, n)])

    def parameter_jacobians(self):
        """∂z/∂A, ∂z/∂B and ∂z/∂b."""
        x = self.last_record.kept
        rank, out, n = len(self.B), len(self.A), len(x)

        yield self.A, Weight(x @ self.B.T, out)
        yield self.B, Chain([Weight(x, rank), Matrix(self.A, n)])
        yield self.bias, Bias(self.bias.shape, self.bias.shape, n)


# %% [markdown]
# Every rule speaks of all samples: `x` is the whole batch, and each
# map either holds what differs between samples, as `Weight` holds
# their $x$, or is told their number. How the batch is read is not the
# layer's concern. Exact curvature uses the maps as they are. Averaged
# curvature uses the same maps once more, with the mean of what they
# hold, for a single virtual sample. So a rule is written once, for
# both.
#
# The attribute `schemes` names which of the two choices of
# `set_hbp_approximation` matter here. The other one does, too, in a
# layer whose $\partial z / \partial x$ differs between samples.

# %%
set_seeds(0)
check_layer(LowRankByMaps(3, 4, rank=2), samples)
print("So do the rules in our own words.")

# %% [markdown]
# And they are the very same blocks. Swap the layer, keep its
# parameters, and compare:

# %%
twin = LowRankByMaps(5, 3, rank=2).double()
twin.load_state_dict(small[2].state_dict())
swapped = HBPSequential(small[0], small[1], twin)

leave_hessians(swapped, loss_func, inputs, labels)
for name, p in swapped.named_parameters():
    error = (p.hessian.to_dense() - exact[name]).abs().max()
    assert error < 1e-12
print("By maps or by autograd, the blocks are equal.")

# %% [markdown]
# What if you forget a parameter? Then it has no curvature, and the
# check says so, by name.


# %%
class Forgetful(LowRankByMaps):
    def parameter_jacobians(self):
        for p, jacobian in super().parameter_jacobians():
            if p is not self.bias:
                yield p, jacobian


message = complaint(Forgetful(3, 4, rank=2))
lines = [line.strip() for line in message.splitlines()[1:]]

assert lines
assert all(line.startswith("bias, ") for line in lines)
print("bias:", lines[0].split(": ")[1])

# %% [markdown]
# ## When features mix
#
# Our third layer divides a sample by its size, the root of its mean
# square:
#
# $$ z = \frac{x}{\sqrt{\operatorname{mean}(x^2)}} . $$
#
# Every output now depends on every input. $J$ is a full matrix,
# another one for each sample, and so is the second-order term. Hence
# `mod` has to act on eigenvalues. `GeneralRule` does all of that, and
# for you it is two lines again.


# %%
class RMS(nn.Module):
    def forward(self, x):
        return x / x.square().mean(1, keepdim=True).sqrt()


class HBPRMS(GeneralRule, RMS):
    """z = x / rms(x), within each sample."""


check_layer(HBPRMS(), samples)
print("HBPRMS agrees with automatic differentiation.")

# %% [markdown]
# One can understand this layer without computing anything. Stretch
# $x$, and $z$ stays as it is, so $J x = 0$, and the generalized
# Gauss-Newton matrix $J^\top H_z J$ has no curvature along $x$. The
# Hessian does have some: the gradient $g$ shrinks like one over the
# length of $x$, and the derivative of that along $x$ is
#
# $$ H_x \, x = -g . $$
#
# The layer was told nothing of this. Does it know?

# %%
x = torch.randn(1, 6, dtype=torch.float64)
loss = loss_above(HBPRMS()(x.requires_grad_()))
(g,) = torch.autograd.grad(loss, x)
x, g = x.detach().flatten(), g.flatten()

ggn = input_hessian(HBPRMS(), x.unsqueeze(0), "zero")
full = input_hessian(HBPRMS(), x.unsqueeze(0), "none")

assert (ggn @ x).abs().max() < 1e-10
assert torch.allclose(full @ x, -g, atol=1e-10)
print("Along x, the GGN is flat, and the Hessian is -g.")

# %% [markdown]
# Two lines, but at a price. For $N$ samples of $F$ features, the rule
# forms $J$ as $N$ matrices of $F \times F$ numbers, and the
# second-order term as $N$ more, whose eigenvalues it may have to
# find. An elementwise layer needs $N$ times $F$ numbers for each. For
# a batch of 500 in float32 that is


# %%
for features in [10, 100, 1000]:
    elementwise = 500 * features * 4 / 1e6
    general = elementwise * features
    print(
        f"{features:5} features: {elementwise:g} MB elementwise, "
        f"{general:g} MB general"
    )

# %% [markdown]
# So `GeneralRule` is for layers of some ten or hundred features. If
# yours has more, look for structure: often a layer is a chain of
# linear maps and elementwise functions, and an `HBPSequential` of
# those is much cheaper.
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
# The network is made of our own layers, but for the first and the
# last.

# %%
set_seeds(0)
model = HBPSequential(
    HBPLinear(2, 24),
    FastBump(),
    HBPLowRank(24, 24, rank=4),
    HBPRMS(),
    FastBump(),
    HBPLinear(24, 2),
)
print(model)

# %% [markdown]
# In the first tutorials we averaged: the mean input took the place of
# the inputs. Here that would be a bad idea. The mean of the points is
# close to zero, and in the block of the first weight it occurs twice:
# next to nothing would be left of its curvature.
#
# We need not average. Send one matrix per sample backward
# (`per_sample_hessian`), and products are
# [exact](../docs/exact.md#exact). Our layers can do that, too, and
# nobody had to tell them how.

# %%
optimizer = CGNewton(
    model.parameters(),
    lr=0.3,
    alpha=0.005,
    cg_atol=0.0,
    cg_tol=0.1,
    cg_maxiter=10,
)
losses = []

for _ in range(40):
    outputs = model(points)
    loss = loss_func(outputs, which)
    losses.append(loss.item())

    optimizer.zero_grad()
    H_z = per_sample_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(H_z, modify_2nd_order_terms="abs")
    optimizer.step()

with torch.no_grad():
    outputs = model(points)
losses.append(loss_func(outputs, which).item())
right = (outputs.argmax(dim=1) == which).float().mean().item()

# %% alt="The loss against the number of Newton steps. It starts near 0.7, the dotted level of guessing, and falls close to zero within 40 steps." tags=["nbval-ignore-output"]
curves(
    [
        Panel(
            "Newton steps",
            "loss",
            {"own layers": (range(41), losses)},
            levels={"guessing": math.log(2)},
        )
    ]
)

# %% tags=["nbval-ignore-output"]
print(f"loss after 40 steps:  {losses[-1]:.3f}")
print(f"points on their side: {right:.0%}")

# %%
assert losses[-1] < math.log(2) / 10
print("The loss is below a tenth of that of guessing.")

# %% [markdown]
# Draw the points, and what the network says about every place of the
# plane: the difference of its two probabilities.

# %% alt="Left, the points of two spirals, one blue, one orange. Right, a map of the network's answer on the whole plane: a blue and an orange band wind around each other along the points." tags=["nbval-ignore-output"]
size, reach = 49, 3.4
axis = torch.linspace(-reach, reach, size)
rows, columns = torch.meshgrid(axis.flip(0), axis, indexing="ij")
plane = torch.stack([columns.flatten(), rows.flatten()], dim=1)
with torch.no_grad():
    answer = model(plane).softmax(dim=1)

picture = torch.zeros(size, size)
pixels = ((points + reach) / (2 * reach) * (size - 1)).round().long()
picture[size - 1 - pixels[:, 1], pixels[:, 0]] = 2.0 * which - 1
difference = (answer[:, 1] - answer[:, 0]).view(size, size)
matrices({"the points": picture, "the answer": difference})

# %% [markdown]
# ## Inside a PyTorch model
#
# You need not build an `HBPSequential`. Put your layer into an
# ordinary `torch.nn` model, with a `forward` of its own, and
# `convert` it. Layers that PyTorch knows get their HBP twin, and HBP
# layers, yours among them, are taken over as they are.


# %%
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 5)
        self.bump = FastBump()
        self.last = HBPLowRank(5, 3, rank=2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.bump(x))


net = Net().double()
converted = convert(net)

assert converted.bump is net.bump
assert converted.last is net.last
assert converted.first is not net.first
assert converted.first.weight is net.first.weight
print("The layers are ours, and all parameters are shared.")

# %% [markdown]
# Our bump sits beside a shortcut now, where its curvature has to be
# mixed with that of the other path. Check it:

# %%
leave_hessians(converted, loss_func, inputs, labels)
exact = hessian_blocks(net, loss_func, inputs, labels)

for name, p in net.named_parameters():
    error = (p.hessian.to_dense() - exact[name]).abs().max()
    assert error < 1e-12
print("The blocks are right, also past the shortcut.")

# %% [markdown]
# And the layer without the rule? `convert` looks inside, finds a
# function that it has no rule for, and says so, which is better than
# to guess.

# %%
try:
    convert(nn.Sequential(nn.Linear(2, 5), Bump()))
except TypeError as error:
    print(str(error).splitlines()[0])

# %% [markdown]
# ## Exercises
#
# Try them first. A solution is folded away below each.

# %% [markdown]
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
    leave_hessians(layer, loss_func, samples, labels[:2])

n = torch.arange(3)
copies = ((n.unsqueeze(1) - n) % 3).flatten()
P = F.one_hot(copies, 3).double()
H_w, H_W = circulant.w.hessian, linear.weight.hessian

assert torch.allclose(H_w.to_dense(), P.T @ H_W.to_dense() @ P)
print("The circulant's block is that of the linear layer, summed.")

# %% [markdown]
# **Exercise 3.** The hat, $z = \max(0, 1 - |x|)$, is a bump made of
# straight lines. Make a layer of it. Show that all four treatments
# give the same $H_x$. Why?

# %% [markdown] tags=["solution"]
# Wherever $\varphi$ has a second derivative, it is zero. So there is
# nothing that a treatment could change. As far as such layers are
# concerned, the Hessian *is* the generalized Gauss-Newton matrix.


# %% tags=["solution"]
class Hat(nn.Module):
    def forward(self, x):
        return (1 - x.abs()).relu()


class HBPHat(ElementwiseRule, Hat):
    """z = max(0, 1 - |x|)."""


check_layer(HBPHat(), samples)

many = torch.linspace(-1.5, 1.4, 12).double().unsqueeze(0)
hats = [input_hessian(HBPHat(), many, name) for name in treatments]
bumps = [input_hessian(HBPBump(), many, name) for name in treatments]

assert hats[0].abs().max() > 0.5
for hat, smooth in zip(hats[1:], bumps[1:], strict=True):
    assert torch.equal(hat, hats[0])
    assert not torch.allclose(smooth, bumps[0])
print("For the hat, all four treatments are the same.")


# %% [markdown]
# The fourth exercise is about a layer by a colleague, who says that
# the formulas are right, and indeed they are.


# %%
class Arctan(nn.Module):
    def forward(self, x):
        return torch.atan(x)


class HBPArctan(ElementwiseRule, Arctan):
    """z = arctan x."""

    derivatives_from_output = True

    def first_derivative(self, x):
        """φ' = 1/(1 + x²)."""
        return 1 / (1 + x.square())

    def second_derivative(self, x, first):
        """φ'' = -2x φ'²."""
        return -2 * x * first.square()


# %% [markdown]
# **Exercise 4.** Still, the layer is wrong. Which treatments does the
# check name? What does that tell you? Find the bug.

# %% [markdown] tags=["solution"]
# All four are wrong, so it is $J$. The formulas are in terms of $x$,
# but `derivatives_from_output` promises formulas in terms of $z$. So
# what is called `x` is $\arctan x$. Either drop the promise, or keep
# it: $x = \tan z$ gives $\varphi' = \cos^2 z$ and
# $\varphi'' = -\sin(2z) \cos^2 z$.


# %% tags=["solution"]
class FromInput(HBPArctan):
    derivatives_from_output = False


class FromOutput(HBPArctan):
    def first_derivative(self, z):
        return z.cos().square()

    def second_derivative(self, z, first):
        return -(2 * z).sin() * first


assert spoilt(complaint(HBPArctan())) == treatments
assert complaint(FromInput()) == ""
assert complaint(FromOutput()) == ""
print("Both ways of mending it are right.")

# %% [markdown]
# **Exercise 5.** Flip the sign of $\varphi'$ in `FastBump`. Show that
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
# ## What you should see
#
# **Three rules are enough.** With them, each of our layers agrees
# with automatic differentiation, in all four treatments, averaged
# and exact. So does a whole network made of them.

# %%
set_seeds(0)
own_network = HBPSequential(
    FastBump(), HBPLowRank(3, 3, rank=2), HBPRMS()
)

check_layer(own_network, samples)
print("A network of our own layers agrees with autograd.")

# %% [markdown]
# **A wrong rule does not stay hidden.** Each mistake was noticed, and
# the treatments that it spoils tell where it is.

# %%
marks = {tuple(spoilt(message)) for message in said.values()}

assert len(marks) == len(said) == 4
print("Three mistakes and no mistake leave four different marks.")

# %% [markdown]
# **Formulas are worth the trouble.** They change nothing but the
# time.

# %%
assert ratio > 1
print("Formulas are faster than automatic differentiation.")

# %% [markdown]
# **Own layers train like all others.** After 40 Newton steps, nearly
# every point is on its side.

# %%
assert 0.6 < losses[0] < 1.2
assert losses[-1] < math.log(2) / 10
assert right > 0.95
print("The network tells the spirals apart.")

# %% [markdown]
# ## Read on
#
# - [Write a layer](../docs/layers.md) has every base class and every
#   rule on one page, and a table of the layers that are there.
# - [The mathematics](../docs/mathematics.md#treatments) derives the
#   equation of the beginning, and what the treatments mean.
# - [Convert](../docs/convert.md) says which models can be converted.
#
# Two papers are behind it.
#
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
#   The equation, and the treatments of its second term.
# - J. Barron.
#   [Squareplus: A Softplus-Like Algebraic
#   Rectifier](https://arxiv.org/abs/2112.11687), 2021. The function
#   of the first exercise.
