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
# # What HBP sees
#
# A network's Hessian is a large matrix, and nobody looks at it. Here
# you do. The network is so small that the whole matrix fits into a
# picture, and next to it you put what `hbp` computes. So you see
#
# - what the block diagonal keeps, and what it drops,
# - what averaging over a batch costs, and why,
# - where the Hessian bends downward, what that does to a Newton step,
#   and how three other curvature matrices mend it.
#
# You need [the MNIST tutorial](01_single_layer_mnist.ipynb), or at
# least its idea: curvature is sent backward, like a gradient.

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
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from hbp import (
    CGNewton,
    HBPLinear,
    HBPReLU,
    HBPSequential,
    HBPSigmoid,
    batch_summed_hessian,
    cg,
    compare_curvature,
    inspect_curvature,
    negative_mass,
    per_sample_hessian,
    set_seeds,
)
from hbp.operators import DenseOperator
from hbp.reference import hessian_blocks
from hbp.tutorial.plotting import Panel, curves, matrices

set_seeds(0)

# %% [markdown]
# ## A network to look into
#
# Everything is made from a seed: three clouds of points in eight
# dimensions, one for each class. We use float64, to tell round-off
# from a real difference.

# %%
centers = 2 * torch.rand(3, 8).double()
labels = torch.randint(3, (256,))
inputs = centers[labels] + torch.randn(256, 8).double()

# %% [markdown]
# Three linear layers, two sigmoids. The weights start twice as large
# as usual, so that the sigmoids are driven beyond the middle, where
# they are nearly straight. We call parameters by their names in
# PyTorch: `0.weight` is the first weight, `4.bias` the last bias.

# %%
loss_func = nn.CrossEntropyLoss()


def network(activation):
    return HBPSequential(
        HBPLinear(8, 6),
        activation(),
        HBPLinear(6, 5),
        activation(),
        HBPLinear(5, 3),
    ).double()


model = network(HBPSigmoid)
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
# of the loss is a matrix of 107 × 107 numbers, which PyTorch can
# compute by brute force: differentiate, and differentiate again.
#
# We do it for each of the 256 samples. For a mean loss, the Hessian
# of a batch is the average of those of its samples.


# %%
def hessian_of_samples(model, loss_func):
    """The whole Hessian of every sample, by brute force."""
    names = list(sizes)
    vector = nn.utils.parameters_to_vector(model.parameters())

    def sample_loss(theta, x, y):
        pairs = zip(
            theta.split(list(sizes.values())),
            model.parameters(),
            strict=True,
        )
        shaped = [part.view_as(p) for part, p in pairs]
        values = dict(zip(names, shaped, strict=True))
        outputs = functional_call(model, values, (x[None],))
        return loss_func(outputs, y[None])

    every = vmap(jacrev(jacrev(sample_loss)), (None, 0, 0))
    return every(vector.detach(), inputs, labels)


sample_hessians = hessian_of_samples(model, loss_func)
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
# Look at it. The parameters come in the order in which they were
# printed above: the first weight and its bias at the upper left, the
# last ones at the lower right. Blue is positive, orange negative. The
# colour shows the square root of an entry's size, so that small
# entries can be seen, too.


# %% alt="Left, the whole Hessian of 107 rows, in all shades: entries are everywhere, the largest at the lower right, with the last layer. Right, the same picture with everything outside six squares on the diagonal blanked out." tags=["nbval-ignore-output"]
def shade(matrix):
    return matrix.sign() * matrix.abs().sqrt()


def large_matrices(tiles):
    """Matrices side by side on one scale, larger than usual."""
    drawing = matrices(tiles, same_scale=True)
    drawing.figure.set_size_inches(8, 8.8 / len(tiles))
    return drawing


def with_borders(drawing):
    for axes in drawing.figure.axes:
        for edge in edges:
            axes.axhline(edge - 0.5, color="#6b717c", lw=0.6)
            axes.axvline(edge - 0.5, color="#6b717c", lw=0.6)
    return drawing


with_borders(
    large_matrices(
        {
            "the whole Hessian": shade(whole),
            "its diagonal blocks": shade(block_diagonal),
        }
    )
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
# Keep that in mind. The block diagonal is not a close approximation
# of the Hessian. It is what each parameter sees while the others stay
# in place, and it answers the question of a Newton step for each of
# them alone. In return, a step solves six small systems instead of a
# large one. (Exercise 3 finds out where much of the rest is.) From
# here on, the squares on the right are the truth, and we ask how well
# `hbp` gets them.
#
# The library has a judge for that, `hbp.reference`, which also works
# by plain differentiation. The two agree:

# %%
judge = hessian_blocks(model, loss_func, x, y)

for name in sizes:
    difference = judge[name] - block_of(whole, name)
    assert difference.abs().max() < 1e-12
print("Two ways of brute force, the same blocks.")

# %% [markdown]
# ## One sample
#
# Now Hessian backpropagation. This function does what you have seen
# in the other tutorials, for a choice of batch schemes and of
# treatments. We will use it until the end.


# %%
def curvature(
    x, y, scheme, treatment="none", model=model, loss_func=loss_func
):
    """Every parameter's block by hbp, as an operator."""
    model.zero_grad()
    outputs = model(x)
    loss = loss_func(outputs, y)
    if scheme == "exact":
        output_hessian = per_sample_hessian(loss, outputs)
    else:
        output_hessian = batch_summed_hessian(loss, outputs)
        average = scheme == "averaged Jacobian"
        model.set_hbp_approximation(average, average)
    loss.backward()
    model.backward_hessian(
        output_hessian, modify_2nd_order_terms=treatment
    )
    return {name: p.hessian for name, p in model.named_parameters()}


# %% [markdown]
# Try it on a single sample, where no average is taken, so that
# nothing should be lost.

# %%
schemes = ["averaged Jacobian", "averaged product"]
for scheme in [*schemes, "exact"]:
    found = curvature(x[:1], y[:1], scheme)
    for name in sizes:
        truth = block_of(sample_hessians[0], name)
        difference = found[name].to_dense() - truth
        assert difference.abs().max() < 1e-12
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

for name in sizes:
    difference = exact[name].to_dense() - block_of(whole, name)
    assert difference.abs().max() < 1e-12
print("The exact scheme gives the true blocks of the batch.")

# %% [markdown]
# Here is the block of the first *bias*, with one scale for all three
# pictures.


# %% alt="Three tiles of 6 by 6 entries, for the first bias: averaged Jacobian, averaged product, exact. They show the same pattern, and differ in the shades of a few entries." tags=["nbval-ignore-output"]
def side_by_side(name):
    return large_matrices(
        {
            "averaged Jacobian": jacobian[name].to_dense(),
            "averaged product": product[name].to_dense(),
            "exact": exact[name].to_dense(),
        }
    )


side_by_side("0.bias")

# %% [markdown]
# The pattern is the same, and a few entries are off. And the first
# *weight*? Its block has 6 × 6 squares, one for each pair of outputs,
# and in each are 8 × 8 numbers, one for each pair of inputs.

# %% alt="Three tiles of 48 by 48 entries, for the first weight. The two averaged ones resemble each other: every square of 8 by 8 entries has the same pattern, stronger or weaker. In the exact tile every square has a pattern of its own." tags=["nbval-ignore-output"]
side_by_side("0.weight")

# %% [markdown]
# This is another matter. On the left, all squares have one and the
# same pattern, because that is what a Kronecker product is:
# $\bar H \otimes \bar x \bar x^\top$, or
# $\bar H \otimes \operatorname{E}[x x^\top]$. On the right, each
# square has a pattern of its own.
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
for k in (0, 2, 4):
    assert distance[f"{k}.bias"][0] < distance[f"{k}.weight"][0]
    assert distance[f"{k}.bias"][1] < distance[f"{k}.weight"][1]
print("In every layer, the bias comes out better.")

assert max(distance["2.bias"]) < min(distance["0.bias"])
print("The second bias comes out better than the first.")

assert max(distance["4.bias"]) < 1e-12
print("The last bias is exact.")

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
# both, and see whether they are what `hbp` misses. The treatment
# `"zero"` keeps just the first term.

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
    curvature(x, y, scheme, "zero")["2.bias"].to_dense()
    for scheme in [*schemes, "exact"]
)
missing = second - first - covariance * G.sum(0)
assert missing.abs().max() < 1e-12
missing = truth - second - jointly
assert missing.abs().max() < 1e-12
print("What the averages miss is the two covariances.")

# %% [markdown]
# Averaged products put the first covariance back, and know nothing of
# the second. For the first weight, that is not enough: samples of
# different classes, for instance, have different inputs, and
# different curvature, too.

# %%
one, two = distance["0.weight"]
assert two > one / 2
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


def mean_errors(count, draws=20):
    """The mean relative error, by scheme and parameter."""
    errors = torch.zeros(len(schemes), len(watched))
    for _ in range(draws):
        batch = torch.randperm(len(inputs))[:count]
        true_hessian = sample_hessians[batch].mean(0)
        for i, scheme in enumerate(schemes):
            found = curvature(inputs[batch], labels[batch], scheme)
            for j, name in enumerate(watched):
                truth = block_of(true_hessian, name)
                gap = found[name].to_dense() - truth
                errors[i, j] += gap.norm() / truth.norm() / draws
    return errors


errors = torch.stack([mean_errors(count) for count in batch_sizes])
print(tuple(errors.shape))


# %% alt="Two panels with the relative error against the batch size, on a logarithmic axis from 1 to 128, left for the averaged Jacobian and right for the averaged product. All four curves start at zero, rise steeply up to 4 samples, and stay level from there. From top to bottom: first weight, second weight, first bias, second bias." tags=["nbval-ignore-output"]
def with_log_axis(drawing):
    for axes in drawing.figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(batch_sizes, [str(n) for n in batch_sizes])
    return drawing


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
with_log_axis(curves(panels))

# %% [markdown]
# The error grows fast, and not for long: with four samples most of it
# is there, with a hundred it is about the same. It has to be so,
# since a covariance over a batch tends to that of the whole data set.
# Hence a larger batch makes the curvature less noisy, but the
# *averaging* gets neither better nor much worse.

# %%
at = dict(zip(batch_sizes, errors, strict=True))
first_weight = watched.index("0.weight")

assert at[1].max() < 1e-12
print("For one sample there is no error.")

assert (at[4] > at[128] / 2)[:, first_weight].all()
print("With four samples, more than half of the error is there.")

assert (at[128] < 1.5 * at[8])[:, first_weight].all()
print("From eight to 128 samples, it hardly grows.")

# %% [markdown]
# ## Where curvature is negative
#
# So far the treatment was `"none"`, and the blocks were those of the
# Hessian. Is it a bowl? `inspect_curvature` tells, for the exact
# blocks of our batch. Look at the smallest eigenvalue, and at the
# share of the negative ones in the sum of all sizes.

# %% tags=["nbval-ignore-output"]
hessian = curvature(x, y, "exact", "none")
print(inspect_curvature(model, alpha=0.01))

# %%
for name in ["0.weight", "2.weight"]:
    assert negative_mass(hessian[name]).mass > 0
for name in ["4.weight", "4.bias"]:
    assert negative_mass(hessian[name]).mass < 1e-12
print("Negative curvature lives below the sigmoids only.")

# %% [markdown]
# At the output the loss is a bowl, and a linear layer keeps it one.
# But a sigmoid has a curvature of its own, $\varphi''$, which is
# positive on its lower half and negative on the upper. It enters with
# the slope of the loss, which has either sign:
#
# $$
# H_x = J^\top H_z J
# + \operatorname{diag} \Big( \sum_n \varphi''_n \odot \delta_n
# \Big) .
# $$
#
# The [four treatments](../docs/mathematics.md#treatments) differ in
# what they do to the second term: keep it (`"none"`), drop it
# (`"zero"`), take its size (`"abs"`) or its positive part
# (`"clip"`). These are the Hessian, the generalized Gauss-Newton
# matrix (GGN), and two positive-curvature Hessians (PCH).
#
# Here are all eigenvalues of the first weight's block.

# %% alt="The 48 eigenvalues of the first weight's block, in ascending order, in two panels. Left, the Hessian starts well below zero and ends above it, while the GGN is never below zero. Right, on a larger scale, both PCHs are never below zero, and abs is the larger one." tags=["nbval-ignore-output"]
treatments = {
    "Hessian": "none",
    "GGN": "zero",
    "PCH, abs": "abs",
    "PCH, clip": "clip",
}
weight_block = {
    title: curvature(x, y, "exact", treatment)["0.weight"].to_dense()
    for title, treatment in treatments.items()
}
spectra = {
    title: torch.linalg.eigvalsh(block).tolist()
    for title, block in weight_block.items()
}
numbers = range(1, 49)
panels = [
    Panel(
        "number of the eigenvalue",
        "eigenvalue",
        {title: (numbers, spectra[title]) for title in pair},
        levels={"": 0.0},
    )
    for pair in [("Hessian", "GGN"), ("PCH, abs", "PCH, clip")]
]
curves(panels)

# %%
assert spectra["Hessian"][0] < -1e-3
for title in ["GGN", "PCH, abs", "PCH, clip"]:
    assert spectra[title][0] > -1e-12
print("The Hessian is indefinite. The other three are not.")

# %% [markdown]
# ## Newton goes uphill
#
# Take the Newton step for the first weight,
# $[(1-\alpha) H + \alpha I]\, d = -g$, with a little damping. In the
# basis of the eigenvectors it is easy to read. Along eigenvector $k$,
# with the damped eigenvalue $\mu_k$, the step is
#
# $$ d_k = - \frac{g_k}{\mu_k} . $$
#
# Where $\mu_k$ is positive, that is downhill. Where it is negative,
# the step goes *up*: Newton's method looks for the point where the
# slope is zero, and in these directions that is a maximum.
#
# Let us split the step into these two parts.

# %%
alpha = 0.01
curvature(x, y, "exact", "none")
weight = model[0].weight
g = weight.grad.flatten()
newton = weight.hessian.solve(-g, alpha)

damped = (1 - alpha) * weight_block["Hessian"]
damped += alpha * torch.eye(len(g))
mu, vectors = torch.linalg.eigh(damped)
bent_down = vectors[:, mu < 0]
uphill = bent_down @ (bent_down.T @ newton)
downhill = newton - uphill

assert g @ uphill > 0
assert g @ downhill < 0
print("One part of the step climbs, and one descends.")

# %% [markdown]
# Does the loss agree? Go along each part, from where we are (0) to
# the end of the step (1). And next to it, the whole step, with each
# of the four matrices.


# %% alt="Two panels with the loss against the fraction of the step. Left, the part of the Hessian's Newton step along negative curvature: the loss rises. The rest of the step: it falls. Right, the whole steps. With GGN, abs and clip the loss falls steadily. With the Hessian it does not." tags=["nbval-ignore-output"]
fractions = torch.linspace(0, 1, 21).tolist()


@torch.no_grad()
def losses_along(step):
    losses = []
    for t in fractions:
        moved = {"0.weight": weight + t * step.view_as(weight)}
        outputs = functional_call(model, moved, (x,))
        losses.append(loss_func(outputs, y).item())
    return losses


steps = {}
for title, treatment in treatments.items():
    curvature(x, y, "exact", treatment)
    steps[title] = weight.hessian.solve(-g, alpha)

up, down = losses_along(uphill), losses_along(downhill)
whole_steps = {k: losses_along(step) for k, step in steps.items()}
parts = {"negative part": up, "the rest": down}
panels = [
    Panel(
        f"fraction of {what}",
        "loss",
        {k: (fractions, v) for k, v in lines.items()},
    )
    for what, lines in [
        ("the Newton step", parts),
        ("the step", whole_steps),
    ]
]
curves(panels)

# %% [markdown]
# The left panel is where the Hessian fails. The two parts work
# against each other, and which one wins is a matter of luck. The
# other three matrices have no such part.

# %%
assert up[2] > up[0] > down[2]
print("Along negative curvature, the Newton step climbs.")

for title in ["GGN", "PCH, abs", "PCH, clip"]:
    assert g @ steps[title] < 0
    assert whole_steps[title][10] < whole_steps[title][0]
print("GGN and both PCHs lead downhill.")

# %% [markdown]
# ## Conjugate gradients stop
#
# With conjugate gradients (CG), you would notice. They minimise the
# quadratic model $\tfrac12 d^\top A d + g^\top d$, direction by
# direction. If $A$ bends down along one, there is no minimum, and
# nothing to go on to. `hbp` ends there, returns what it has, and says
# so.
#
# `CGNewton` keeps that in `last_step`. A learning rate of zero lets
# us see what it would do, and leaves the model alone.

# %% tags=["nbval-ignore-output"]
optimizer = CGNewton(
    model.parameters(),
    lr=0.0,
    alpha=alpha,
    cg_atol=0.0,
    cg_tol=1e-3,
    cg_maxiter=None,
)
report = {}
for title, treatment in treatments.items():
    curvature(x, y, "exact", treatment)
    optimizer.step()
    report[title] = info = optimizer.last_step[weight]
    print(
        f"{title:9} {info.iterations:3} iterations,",
        f"converged: {info.converged!s:5}",
        f"negative curvature: {info.negative_curvature}",
    )

# %%
assert report["Hessian"].negative_curvature
assert not report["Hessian"].converged
print("On the Hessian, CG meets negative curvature and stops.")

for title in ["GGN", "PCH, abs", "PCH, clip"]:
    assert report[title].converged
    assert not report[title].negative_curvature
print("On the GGN and both PCHs, it converges.")

# %% [markdown]
# What CG had found by then does no harm, since it stops in time, but
# it is little, and often nothing. (There is another way out, which
# goes along that direction [to the
# boundary](../docs/damping.md#trust-radius) of a trust region.)
#
# ## What the repairs change
#
# None of the three is the Hessian any more. How far off are they?

# %% tags=["nbval-ignore-output"]
truth = DenseOperator(weight_block["Hessian"])
print("0.weight   distance  cosine   trace")
for title, block in weight_block.items():
    compared = compare_curvature(DenseOperator(block), truth)
    print(
        f"{title:10} {compared.distance:8.2f} {compared.cosine:7.2f}",
        f"{block.trace():7.3f}",
    )

# %% [markdown]
# A lot. So far from the output, the second-order terms are most of
# what there is. The GGN forgets them, and sees little curvature, so
# its steps are long. The PCHs keep their size, as caution: theirs are
# shorter, those of `"abs"` the shortest. And since
# $\max(r, 0) = \tfrac12 (r + |r|)$, `"clip"` is just the midpoint
# between the Hessian and `"abs"`.

# %%
gap = weight_block["GGN"] - weight_block["Hessian"]
assert gap.norm() > weight_block["Hessian"].norm() / 2
print("Without second-order terms, more than half is missing.")

middle = (weight_block["Hessian"] + weight_block["PCH, abs"]) / 2
assert (weight_block["PCH, clip"] - middle).abs().max() < 1e-12
print("Clip is halfway from the Hessian to abs.")

lengths = {title: step.norm() for title, step in steps.items()}
assert lengths["PCH, abs"] < lengths["PCH, clip"] < lengths["GGN"]
print("From short to long: abs, clip, GGN.")

# %% [markdown]
# ## Two matrices of the same name
#
# The shortest steps were those of `"abs"`. That has a reason, and it
# is a trap: *when* is the absolute value taken? With exact products,
# sample by sample; with the batch schemes, after the sum over the
# batch:
#
# $$
# \Big| \sum_n \varphi''_n \odot \delta_n \Big|
# \;\le\; \sum_n \big| \varphi''_n \odot \delta_n \big| .
# $$
#
# On the left, samples of opposite sign cancel. To see it alone,
# consider the second bias again, and subtract the first term, which
# is the GGN.


# %% alt="Two tiles of 5 by 5 entries that differ from zero on the diagonal only. Left, absolute value of the sum: pale. Right, sum of the absolute values: darker in every entry." tags=["nbval-ignore-output"]
def second_term(scheme):
    pch = curvature(x, y, scheme, "abs")["2.bias"].to_dense()
    ggn = curvature(x, y, scheme, "zero")["2.bias"].to_dense()
    return pch - ggn


abs_of_sum = second_term("averaged Jacobian")
sum_of_abs = second_term("exact")
large_matrices(
    {"abs of the sum": abs_of_sum, "sum of the abs": sum_of_abs}
)

# %% [markdown]
# By hand, from $\varphi'' = \varphi' (1 - 2 \varphi)$ and the
# gradient that arrives from the last layer:

# %%
delta = (p - nn.functional.one_hot(y, 3)) @ W.detach() / len(x)
terms = slopes * (1 - 2 * features) * delta

by_hand = torch.diag(terms.sum(0).abs())
assert (abs_of_sum - by_hand).abs().max() < 1e-12
by_hand = torch.diag(terms.abs().sum(0))
assert (sum_of_abs - by_hand).abs().max() < 1e-12
print("Both are what their names say.")

assert (abs_of_sum.diag() <= sum_of_abs.diag()).all()
assert abs_of_sum.trace() < 0.95 * sum_of_abs.trace()
print("The absolute value of the sum is the smaller one.")

# %% [markdown]
# Both are positive-curvature Hessians, and neither is wrong. But a
# damping or a learning rate that suits one need not suit the other.

# %% [markdown]
# ## Exercises
#
# Try them before you unfold the solutions.

# %% [markdown]
# **Exercise 1.** Damping is a repair, too: with enough of it, every
# matrix is positive definite. From which $\alpha$ on does CG solve
# the system of the first weight with the Hessian itself? Compute it
# from the eigenvalues, and try it on both sides. Is that much damping
# a good idea?

# %% [markdown] tags=["solution"]
# The smallest eigenvalue becomes $(1-\alpha) \lambda + \alpha$. That
# is positive from $\alpha = -\lambda / (1 - \lambda)$ on.

# %% tags=["solution"]
smallest = spectra["Hessian"][0]
threshold = -smallest / (1 - smallest)


def solved_with(alpha):
    damped = (1 - alpha) * weight_block["Hessian"]
    damped += alpha * torch.eye(len(damped))
    return cg(damped, -g, tol=1e-6)


assert solved_with(0.5 * threshold).negative_curvature
assert not solved_with(0.5 * threshold).converged
assert solved_with(1.5 * threshold).converged
assert not solved_with(1.5 * threshold).negative_curvature
print("Half the threshold is too little, 1.5 times is enough.")

# %% [markdown] tags=["solution"]
# It is a blunt tool. Damping of that size changes the curvature in
# *all* directions by as much as the largest negative eigenvalue, and
# most of them did nothing wrong. And each layer has its own
# threshold, which changes as the network learns.

# %% [markdown]
# **Exercise 2.** Replace the sigmoids by `HBPReLU`. Do the four
# treatments differ? Are the blocks positive semi-definite? And is the
# *whole* Hessian?

# %% [markdown] tags=["solution"]
# A ReLU consists of two straight lines, $\varphi'' = 0$, so there is
# no second-order term to treat.

# %% tags=["solution"]
relu_model = network(HBPReLU)
relu_model.load_state_dict(model.state_dict())
relu_whole = hessian_of_samples(relu_model, loss_func)[:128].mean(0)

for treatment in treatments.values():
    found = curvature(x, y, "exact", treatment, model=relu_model)
    for name in sizes:
        dense = found[name].to_dense()
        difference = dense - block_of(relu_whole, name)
        assert difference.abs().max() < 1e-12
        assert torch.linalg.eigvalsh(dense).min() > -1e-12
print("Four treatments, one matrix, no negative eigenvalue.")

assert torch.linalg.eigvalsh(relu_whole).min() < -1e-3
print("But the whole Hessian is indefinite.")

# %% [markdown] tags=["solution"]
# So the negative curvature of a ReLU network is all *between* layers,
# where the block diagonal does not look.

# %% [markdown]
# **Exercise 3.** The method `set_hbp_blocks` decides
# [what makes a block](../docs/exact.md#split). Split the block of the
# first weight in two, with `sub_blocks=2`. Which entries are gone?
# And the other way round: how much more of the whole Hessian do you
# keep if weight and bias of a layer share one block?

# %% tags=["solution"]
model[0].set_hbp_blocks(sub_blocks=2)
split = curvature(x, y, "exact", "abs")["0.weight"].to_dense()
model[0].set_hbp_blocks()

full = weight_block["PCH, abs"]
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
# **Exercise 4.** For regression, take `nn.MSELoss` and the unit
# vector of the label as the target. The averaged product then gives
# the block of the second bias *exactly*, for any batch. Check it, and
# explain it by the two covariances.


# %% tags=["solution"]
def squared_error(outputs, labels):
    targets = torch.eye(3, dtype=outputs.dtype)[labels]
    return nn.functional.mse_loss(outputs, targets)


mse_whole = hessian_of_samples(model, squared_error)[:128].mean(0)
truth = block_of(mse_whole, "2.bias")
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
# ## What you should see
#
# **One sample is exact, a batch is not.** The error of averaging is
# there with a handful of samples, and does not grow from there.

# %%
assert errors[0].max() < 1e-12
assert (errors[-1] < 1.5 * errors[3])[:, first_weight].all()
print("Zero for one sample, and then soon as large as it gets.")

# %% [markdown]
# **Averaging harms the layers near the input most.** At the output it
# does nothing.

# %%
assert max(distance["4.bias"]) < 1e-12
assert min(distance["0.weight"]) > 2 * max(distance["2.bias"])
print("Last bias, second bias, first weight: ever further off.")

# %% [markdown]
# **Below a sigmoid, the Hessian is indefinite.** CG cannot solve its
# system, and a direct solve goes uphill where it bends down.

# %%
assert spectra["Hessian"][0] < 0 < spectra["Hessian"][-1]
assert report["Hessian"].negative_curvature
print("The Hessian bends both ways, and CG says so.")

# %% [markdown]
# **GGN and PCH repair it.** CG finds a solution, and the step lowers
# the loss.

# %%
for title in ["GGN", "PCH, abs", "PCH, clip"]:
    assert report[title].converged
    assert min(whole_steps[title]) < whole_steps[title][0]
print("Three repairs, three ways down.")

# %% [markdown]
# **There are two PCHs of each kind.** The absolute value of a sum is
# not the sum of the absolute values.

# %%
assert (sum_of_abs - abs_of_sum).norm() > 0.05 * sum_of_abs.norm()
print("Mind which one you have.")

# %% [markdown]
# ## Read on
#
# - [A deep network on CIFAR-10](02_sequential_cifar10.ipynb) shows
#   the averaged `"abs"` at work.
# - [The mathematics](../docs/mathematics.md) derives the rules, with
#   [the two PCHs](../docs/mathematics.md#two-pchs).
# - [Look at the curvature](../docs/inspection.md) does for large
#   networks what we did here for a small one.
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
# - A. Botev, H. Ritter, D. Barber.
#   [Practical Gauss-Newton Optimisation for Deep
#   Learning](https://arxiv.org/abs/1706.03662). ICML 2017. The
#   averaged product is theirs.
