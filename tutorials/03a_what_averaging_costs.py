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
# # What averaging costs
#
# The Hessian of a network is a large matrix, and nobody looks at it.
# Here you do. The network is so small that its whole Hessian fits
# into a picture, and next to it you put what `hbp` computes. The
# lesson shows
#
# - what the diagonal blocks keep of the Hessian, and what they drop,
# - that averaging over a batch costs accuracy, and where,
# - which two covariances the averages miss,
# - how the error grows with the batch.
#
# You need [the MNIST tutorial](01_single_layer_mnist.ipynb), or at
# least its idea: curvature is sent backward, like a gradient.

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
import torch
from torch import nn
from torch.func import functional_call, vmap

from hbp import (
    HBPLinear,
    HBPSequential,
    HBPSigmoid,
    backward,
    compare_curvature,
    set_seeds,
)
from hbp.operators import DenseOperator
from hbp.reference import hessian, hessian_blocks
from hbp.tutorial.plotting import Drawing, Panel, curves, matrices

set_seeds(0)


# %%
def large_matrices(tiles, lines=(), names=()):
    """Matrices side by side, on one clipped scale."""
    entries = torch.cat([m.abs().flatten() for m in tiles.values()])
    limit = entries[entries > 0].quantile(0.9)
    shades = {
        title: m.sign() * m.abs().clamp(max=limit).sqrt()
        for title, m in tiles.items()
    }
    figure = matrices(shades, same_scale=True).figure
    figure.set_size_inches(7.2, 7.9 / len(tiles))
    for axes in figure.axes:
        for line in lines:
            axes.axhline(line - 0.5, color="#6b717c", lw=0.6)
            axes.axvline(line - 0.5, color="#6b717c", lw=0.6)
        if names:
            name_the_axes(axes, lines, names)
    figure.set_layout_engine("constrained")
    return Drawing(figure)


def name_the_axes(axes, lines, names):
    """Write a name between each two lines."""
    ends = torch.tensor(lines)
    middles = (ends[:-1] + ends[1:] - 1) / 2
    axes.set_axis_on()
    axes.spines[:].set_visible(False)
    axes.set_xticks(middles, names, rotation=90)
    axes.set_yticks(middles, names)
    axes.tick_params(colors="#6b717c", length=0, labelsize=9)


def with_log_axis(drawing, ticks):
    """The same, with powers of two to the right."""
    for axes in drawing.figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
    return drawing


# %% [markdown]
# ## A network to look into
#
# Everything is made from a seed: three clouds of points in eight
# dimensions, one for each class. We use float64, to tell round-off
# from a real difference between matrices.

# %%
centers = 2 * torch.rand(3, 8).double()
labels = torch.randint(3, (256,))
inputs = centers[labels] + torch.randn(256, 8).double()

# %% [markdown]
# The network has three linear layers and two sigmoids. The weights
# start twice as large as usual, so that the sigmoids are driven
# beyond the middle, where they are nearly straight. We call
# parameters by their names in PyTorch: `0.weight` is the first
# weight, `4.bias` the last bias.

# %%
loss_func = nn.CrossEntropyLoss()
model = HBPSequential(
    HBPLinear(8, 6),
    HBPSigmoid(),
    HBPLinear(6, 5),
    HBPSigmoid(),
    HBPLinear(5, 3),
).double()
for layer in model[::2]:
    nn.init.xavier_normal_(layer.weight, gain=2)
    nn.init.zeros_(layer.bias)

sizes = {name: p.numel() for name, p in model.named_parameters()}
for name, size in sizes.items():
    print(f"{name:9} {size:3}")
print(f"together  {sum(sizes.values()):3}")

# %% [markdown]
# ## The whole Hessian
#
# Put all parameters into one long vector $\theta$. Then the Hessian
# of the loss is a matrix of 107 × 107 numbers. The module
# `hbp.reference`, which shares no code with the rest of `hbp`,
# computes it by brute force: differentiate, and differentiate again.
#
# We do that for each of the 256 samples. For a mean loss, the Hessian
# of a batch is the average of those of its samples.


# %%
def sample_loss(theta, x, y):
    """The loss of one sample as a function of all parameters."""
    parts = theta.split(list(sizes.values()))
    pairs = zip(model.named_parameters(), parts, strict=True)
    values = {name: part.view_as(p) for (name, p), part in pairs}
    outputs = functional_call(model, values, (x[None],))
    return loss_func(outputs, y[None])


theta = nn.utils.parameters_to_vector(model.parameters()).detach()
of_every_sample = vmap(hessian(sample_loss), (None, 0, 0))
sample_hessians = of_every_sample(theta, inputs, labels)
print(tuple(sample_hessians.shape))

# %% [markdown]
# For now, our batch is the first half of the samples.

# %%
x, y = inputs[:128], labels[:128]
whole = sample_hessians[:128].mean(0)
edges = [0, *torch.tensor(list(sizes.values())).cumsum(0).tolist()]


def block_of(matrix, name):
    """The diagonal block of one parameter."""
    k = list(sizes).index(name)
    part = slice(edges[k], edges[k + 1])
    return matrix[part, part]


blocks = [block_of(whole, name) for name in sizes]
block_diagonal = torch.block_diag(*blocks)

# %% [markdown]
# Look at it. Blue is positive, orange negative. Entries differ in
# size by orders of magnitude, so the colour shows the square root of
# an entry's size, and it is clipped: the largest tenth of the entries
# all have the strongest colour. So compare patterns and signs in
# these pictures, and leave sizes to the numbers below them.


# %% alt="Left, the whole Hessian of 107 rows, with lines between the parameters, whose names stand at its edges. Entries are everywhere, the strongest at the lower right, with the last layer, and in the rows and columns that it shares with the others. Right, the same picture with everything outside six squares on the diagonal blanked out." tags=["nbval-ignore-output"]
large_matrices(
    {
        "the whole Hessian": whole,
        "its diagonal blocks": block_diagonal,
    },
    lines=edges,
    names=list(sizes),
)

# %% [markdown]
# On the left there is something everywhere: a change of one parameter
# changes the slope of all others. `hbp` computes the squares on the
# right, one for each parameter. How much of the matrix is that?

# %% tags=["nbval-ignore-output"]
area = sum(n**2 for n in sizes.values()) / len(whole) ** 2
kept = block_diagonal.square().sum() / whole.square().sum()
print(f"share of the entries:      {area:.0%}")
print(f"share of the squared norm: {kept:.0%}")

# %%
assert 0.1 < kept < 0.7
print("The blocks hold a good part, but far from all of it.")

# %% [markdown]
# So the block diagonal is not a close approximation of the Hessian.
# It is what each parameter sees while the others stay in place, and
# it answers the question of a Newton step for each of them alone. In
# return, a step solves six small systems instead of a large one.
# (Exercise 1 finds out where much of the rest is.) From here on, the
# squares on the right are the truth, and we ask how well `hbp` gets
# them.
#
# For these blocks alone there is a shorter way, which does without
# the whole Hessian:

# %%
reference = hessian_blocks(model, loss_func, x, y)

gaps = [reference[name] - block_of(whole, name) for name in sizes]
assert all(gap.abs().max() < 1e-12 for gap in gaps)
print("hessian_blocks gives the same blocks.")

# %% [markdown]
# ## One sample
#
# Now Hessian backpropagation. The function below sends the curvature
# of a loss backward, for a choice of *schemes*, as we call the ways
# to treat a batch. The next section says what they are.


# %%
def curvature(x, y, scheme, treatment="hessian", loss_func=loss_func):
    """Every parameter's block by hbp, as an operator."""
    average = scheme == "averaged Jacobian"
    model.set_hbp_approximation(average, average)
    outputs = model(x)
    loss = loss_func(outputs, y)
    exact = scheme == "exact"
    model.zero_grad()
    backward(model, outputs, loss, treatment, exact=exact)
    return {name: p.hessian for name, p in model.named_parameters()}


# %% [markdown]
# Try it on a single sample, where there is nothing to average, so
# that nothing should be lost.

# %%
schemes = ["averaged Jacobian", "averaged product"]
gaps = []
for scheme in [*schemes, "exact"]:
    for name, block in curvature(x[:1], y[:1], scheme).items():
        truth = block_of(sample_hessians[0], name)
        gaps.append(block.to_dense() - truth)

assert all(gap.abs().max() < 1e-12 for gap in gaps)
print("For one sample, all blocks are exact, in every scheme.")

# %% [markdown]
# ## A batch
#
# The curvature of a batch is a sum over samples. At a layer with
# Jacobians $J_n$, and with $H_n$ the curvature that arrives from
# above for sample $n$, it takes
#
# $$ \sum_n J_n^\top H_n J_n . $$
#
# To send back *one* matrix, and not one for each sample, `hbp`
# replaces the sum. With $\bar H = \sum_n H_n$ and $\operatorname{E}$
# the mean over the batch, the choice is between
#
# - the averaged Jacobian,
#   $\operatorname{E}[J]^\top \bar H \operatorname{E}[J]$,
# - the averaged product,
#   $\operatorname{E}[J^\top \bar H J]$,
#
# and there is a third way, products with the exact block, that never
# averages, and costs more. Take all three, on the batch of 128.

# %%
jacobian = curvature(x, y, "averaged Jacobian")
product = curvature(x, y, "averaged product")
exact = curvature(x, y, "exact")

gaps = [exact[name].to_dense() - reference[name] for name in sizes]
assert all(gap.abs().max() < 1e-12 for gap in gaps)
print("The exact scheme gives the true blocks of the batch.")

# %% [markdown]
# Here is the block of the first *bias*, with one scale for all three
# pictures, and colours as above.


# %% alt="Three tiles of 6 by 6 entries, for the first bias: averaged Jacobian, averaged product, exact. Their patterns are similar. Some entries differ in shade, and a few in sign." tags=["nbval-ignore-output"]
def side_by_side(name, lines=()):
    tiles = {
        "averaged Jacobian": jacobian[name].to_dense(),
        "averaged product": product[name].to_dense(),
        "exact": exact[name].to_dense(),
    }
    return large_matrices(tiles, lines)


side_by_side("0.bias")

# %% [markdown]
# The patterns are similar, but some entries are off, and a few even
# have the other sign. And the first *weight*? Its block has 6 × 6
# squares, one for each pair of outputs, and in each are 8 × 8
# numbers, one for each pair of inputs.

# %% alt="Three tiles of 48 by 48 entries, for the first weight, with lines between its 6 by 6 squares. The two averaged ones resemble each other: every square of 8 by 8 entries has the same pattern, stronger or weaker, with either sign. In the exact tile every square has a pattern of its own." tags=["nbval-ignore-output"]
side_by_side("0.weight", lines=range(0, 49, 8))

# %% [markdown]
# This is another matter. In each of the averaged tiles all squares
# have one and the same pattern, because that is what a Kronecker
# product is: $\bar H \otimes \bar x \bar x^\top$, or
# $\bar H \otimes \operatorname{E}[x x^\top]$. In the exact tile,
# each square has a pattern of its own.
#
# In numbers, with $A$ the approximation and $B$ the truth: the
# relative distance $\lVert A - B \rVert / \lVert B \rVert$, and the
# cosine, which is 1 if only the size is wrong.

# %% tags=["nbval-ignore-output"]
print("           averaged Jacobian   averaged product")
print("           distance  cosine    distance  cosine")
distance = {}
for name in sizes:
    truth = DenseOperator(block_of(whole, name))
    one = compare_curvature(jacobian[name], truth)
    two = compare_curvature(product[name], truth)
    distance[name] = one.distance, two.distance
    print(
        f"{name:10} {one.distance:8.3f} {one.cosine:7.3f}",
        f"  {two.distance:9.3f} {two.cosine:7.3f}",
    )

# %%
assert all(
    distance[f"{k}.bias"][i] < distance[f"{k}.weight"][i]
    for k in (0, 2, 4)
    for i in (0, 1)
)
print("In every layer, the bias comes out better.")

assert max(distance["4.bias"]) < 1e-12
assert max(distance["2.bias"]) < min(distance["0.bias"])
assert 2 * max(distance["2.bias"]) < min(distance["0.weight"])
print("From the last bias back to the first, the error grows.")

# %% [markdown]
# So the error is made on the way: at the output there is none, and
# each layer that the curvature passes adds to it. A weight is worse
# off than its bias, because it has one more product in it to be
# averaged, that of curvature and inputs.
#
# ## Where the error comes from
#
# One step is simple enough to follow. Consider the second bias, right
# below the last sigmoid, and the first term of its curvature. With
# $\varphi'_n$ the slopes of the sigmoid and
# $G_n = W^\top H_n W$, which arrives from the last layer,
#
# $$
# \begin{aligned}
# \text{exact} &= \textstyle\sum_n
#   \varphi'_n \varphi_n'^\top \odot G_n , \\
# \text{averaged product} &=
#   \operatorname{E}[\varphi' \varphi'^\top] \odot \bar G , \\
# \text{averaged Jacobian} &=
#   \operatorname{E}[\varphi'] \operatorname{E}[\varphi']^\top
#   \odot \bar G .
# \end{aligned}
# $$
#
# The average of a product is not the product of the averages. What is
# missing is a covariance, each time:
#
# $$
# \begin{aligned}
# \text{product} - \text{Jacobian}
#   &= \operatorname{Cov}(\varphi') \odot \bar G , \\
# \text{exact} - \text{product}
#   &= \textstyle\sum_n \big( \varphi'_n \varphi_n'^\top
#   - \operatorname{E}[\varphi' \varphi'^\top] \big) \odot G_n .
# \end{aligned}
# $$
#
# The first says how much the slopes vary over the batch. The second
# says whether slopes and curvature vary *together*. Let us compute
# both, and see whether they are what `hbp` misses. The argument
# `"ggn"` keeps just the first term, which is called the generalized
# Gauss-Newton matrix.

# %%
with torch.no_grad():
    features = model[:4](x)
    slopes = features * (1 - features)
    p = model[4](features).softmax(1)
    W = model[4].weight
    H = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(x)
    G = W.T @ H @ W
    pairs = slopes[:, :, None] * slopes[:, None]

covariance = torch.cov(slopes.T, correction=0)
jointly = ((pairs - pairs.mean(0)) * G).sum(0)

first, second, truth = (
    curvature(x, y, scheme, "ggn")["2.bias"].to_dense()
    for scheme in [*schemes, "exact"]
)
unexplained = [
    second - first - covariance * G.sum(0),
    truth - second - jointly,
]
assert all(rest.abs().max() < 1e-12 for rest in unexplained)
print("What the averages miss is the two covariances.")

# %% [markdown]
# Averaged products put the first covariance back, and know nothing of
# the second. For the first weight, that is not enough: samples of
# different classes, for instance, have different inputs, and
# different curvature, too.

# %%
assert distance["0.weight"][1] > distance["0.weight"][0] / 2
print("On the first weight, more than half of the error is left.")

# %% [markdown]
# ## How the error grows with the batch
#
# A single sample has no covariance. So the error starts at zero, and
# then? We draw batches of each size, twenty times, and take the mean
# error. The truth is cheap now, an average of what we have.

# %%
batch_sizes = [1, 2, 4, 8, 16, 32, 64, 128]
watched = ["0.weight", "0.bias", "2.weight", "2.bias"]


def errors_on(batch):
    """The relative errors, by scheme and parameter."""
    errors = torch.zeros(len(schemes), len(watched))
    true_hessian = sample_hessians[batch].mean(0)
    for i, scheme in enumerate(schemes):
        found = curvature(inputs[batch], labels[batch], scheme)
        for j, name in enumerate(watched):
            truth = block_of(true_hessian, name)
            gap = found[name].to_dense() - truth
            errors[i, j] = gap.norm() / truth.norm()
    return errors


def mean_errors(count, draws=20):
    """Their means over batches that are drawn at random."""
    order = [torch.randperm(len(inputs)) for _ in range(draws)]
    drawn = [errors_on(samples[:count]) for samples in order]
    return torch.stack(drawn).mean(0)


errors = torch.stack([mean_errors(count) for count in batch_sizes])
print(tuple(errors.shape))


# %% alt="Two panels with the relative error against the batch size, on a logarithmic axis from 1 to 128, left for the averaged Jacobian and right for the averaged product. All four curves start at zero. The one of the first weight is the highest, rises steeply up to 8 samples, and stays nearly level from there. Below it those of the second weight and of the first bias rise as steeply, and fall a little later on. The one of the second bias stays close to zero." tags=["nbval-ignore-output"]
panels = [
    Panel(
        f"batch size ({scheme})",
        "relative error",
        {
            name: (batch_sizes, errors[:, i, j].tolist())
            for j, name in enumerate(watched)
        },
    )
    for i, scheme in enumerate(schemes)
]
with_log_axis(curves(panels), batch_sizes)

# %% [markdown]
# The error grows fast, and not for long. On the first weight, most of
# it is there with four samples, and with a hundred it is about the
# same. That is because a covariance over a batch tends to that of the
# whole data set. On the second weight and the first bias the relative
# error falls again, without vanishing. So a larger batch makes the
# curvature less noisy, but it doesn't make averages exact.

# %%
at = dict(zip(batch_sizes, errors, strict=True))
first_weight = watched.index("0.weight")
others = [watched.index(name) for name in ["2.weight", "0.bias"]]

assert at[1].max() < 1e-12
print("For one sample there is no error.")

assert (at[4] > at[128] / 2)[:, first_weight].all()
print("With four samples, more than half of the error is there.")

assert (at[128] < 1.5 * at[8])[:, first_weight].all()
print("From eight to 128 samples, it hardly grows.")

assert (at[128] < at[8])[:, others].all()
assert (at[128] > at[8] / 3)[:, others].all()
print("On the other two it falls, with more than a third left.")

# %% [markdown]
# ## Exercises
#
# Try them before you unfold the solutions.

# %% [markdown]
# **Exercise 1.** The method `set_hbp_blocks` decides
# [what makes a block](../docs/exact.md#split). Split the block of the
# first weight in two, with `sub_blocks=2`. Which entries are gone?
# And the other way round: how much more of the whole Hessian do you
# keep if weight and bias of a layer share one block?

# %% tags=["solution"]
model[0].set_hbp_blocks(sub_blocks=2)
split = curvature(x, y, "exact")["0.weight"].to_dense()
model[0].set_hbp_blocks()

full = exact["0.weight"].to_dense()
halves = torch.block_diag(full[:24, :24], full[24:, 24:])
assert (split - halves).abs().max() < 1e-12
print("What couples the first three outputs to the rest is gone.")

# %% tags=["solution", "nbval-ignore-output"]
parts = [slice(edges[k], edges[k + 2]) for k in (0, 2, 4)]
joint = torch.block_diag(*(whole[part, part] for part in parts))
kept_jointly = joint.square().sum() / whole.square().sum()

assert 1.2 * kept < kept_jointly < 1
print(f"separate {kept:.0%}, joint {kept_jointly:.0%}")

# %% [markdown] tags=["solution"]
# Much of what separate blocks drop is between a weight and the bias
# of its own layer. `hbp` drops it as well: a block belongs to one
# parameter.

# %% [markdown]
# **Exercise 2.** For regression, take `nn.MSELoss` and the unit
# vector of the label as the target. The averaged product then gives
# the block of the second bias *exactly*, for any batch. Check it, and
# explain it by the two covariances.


# %% tags=["solution"]
def squared_error(outputs, labels):
    targets = torch.eye(3, dtype=outputs.dtype)[labels]
    return nn.functional.mse_loss(outputs, targets)


truth = hessian_blocks(model, squared_error, x, y)["2.bias"]
one, two = (
    curvature(x, y, scheme, loss_func=squared_error)["2.bias"]
    for scheme in schemes
)
assert (two.to_dense() - truth).abs().max() < 1e-12
assert (one.to_dense() - truth).abs().max() > 1e-4
print("The averaged product is exact, the averaged Jacobian not.")

# %% [markdown] tags=["solution"]
# The Hessian of a squared error is the same for all samples. So is
# $G_n = W^\top H_n W$, and what does not vary has no covariance with
# the slopes. The second-order term is a plain sum in all schemes. One
# layer further down, curvature does vary, and the argument ends.

# %% [markdown]
# **Exercise 3.** We said that samples of different classes have
# different inputs and different curvature. Is the error on the first
# weight smaller within a class? Take the first 64 samples of each
# class, and for comparison the first 64 of all.

# %% tags=["solution", "nbval-ignore-output"]
batches = [(labels == k).nonzero()[:64, 0] for k in range(3)]
of_class = torch.stack([errors_on(batch) for batch in batches])
mixed = errors_on(torch.arange(64))

print(
    "                   ", *(f"class {k}" for k in range(3)), "mixed"
)
for i, scheme in enumerate(schemes):
    row = [*of_class[:, i, first_weight], mixed[i, first_weight]]
    print(f"{scheme:18}", *(f"{error:7.2f}" for error in row))

# %% tags=["solution"]
within = of_class[..., first_weight]
assert (within < mixed[:, first_weight]).all()
assert (within > mixed[:, first_weight] / 3).all()
print("Within a class the error is smaller, but still large.")

# %% [markdown] tags=["solution"]
# So the differences between classes are part of the covariance, but
# not all of it. Within a class, inputs and curvature vary, too.

# %% [markdown]
# ## Read on
#
# - [Negative curvature](03b_negative_curvature.ipynb) stays with this
#   network, and asks where its Hessian bends down.
# - [The mathematics](../docs/mathematics.md#batches) derives the
#   averages and the exact products.
# - A. Botev, H. Ritter, D. Barber.
#   [Practical Gauss-Newton Optimisation for Deep
#   Learning](https://arxiv.org/abs/1706.03662). ICML 2017. The
#   averaged product is theirs.
