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
# # Negative curvature
#
# A Newton step goes to the lowest point of a bowl. But the Hessian of
# a network need not be a bowl: in some directions it bends down. In a
# network that is small enough to compute everything, this lesson
# shows
#
# - where that happens,
# - what it does to a Newton step, and to conjugate gradients,
# - three other curvature matrices that repair it, and what they
#   change.
#
# Network and data are those of
# [What averaging costs](03a_what_averaging_costs.ipynb). Here we take
# the exact blocks, so that averages play no role until the end.

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
from torch.func import functional_call

from hbp import (
    CGNewton,
    HBPLinear,
    HBPReLU,
    HBPSequential,
    HBPSigmoid,
    backward,
    cg,
    compare_curvature,
    inspect_curvature,
    negative_mass,
    set_seeds,
)
from hbp.operators import DenseOperator
from hbp.reference import hessian, hessian_blocks
from hbp.tutorial.plotting import Panel, curves

set_seeds(0)

# %% [markdown]
# ## The network, and its blocks
#
# There are three clouds of points in eight dimensions, and three
# linear layers with a sigmoid between each two. The weights start
# twice as large as usual, so that the sigmoids are driven beyond the
# middle, where they are nearly straight.

# %%
centers = 2 * torch.rand(3, 8).double()
labels = torch.randint(3, (256,))
inputs = centers[labels] + torch.randn(256, 8).double()
x, y = inputs[:128], labels[:128]


def network(activation):
    return HBPSequential(
        HBPLinear(8, 6),
        activation(),
        HBPLinear(6, 5),
        activation(),
        HBPLinear(5, 3),
    ).double()


loss_func = nn.CrossEntropyLoss()
model = network(HBPSigmoid)
for layer in model[::2]:
    nn.init.xavier_normal_(layer.weight, gain=2)
    nn.init.zeros_(layer.bias)

# %% [markdown]
# This function sends the curvature of the loss backward, by default
# with exact blocks, and for a choice of *treatments*, which you will
# meet below. The treatment `"hessian"` gives the blocks of the
# Hessian. To be sure, we compare them with those of `hbp.reference`,
# which differentiates twice, by brute force.


# %%
def curvature(treatment, exact=True, model=model, count=128):
    """Every parameter's block, as an operator."""
    outputs = model(x[:count])
    loss = loss_func(outputs, y[:count])
    model.zero_grad()
    backward(model, outputs, loss, treatment, exact)
    return {name: p.hessian for name, p in model.named_parameters()}


blocks = curvature("hessian")
reference = hessian_blocks(model, loss_func, x, y)

gaps = [blocks[name].to_dense() - reference[name] for name in blocks]
assert all(gap.abs().max() < 1e-12 for gap in gaps)
print("The blocks of hbp are those of the Hessian.")

# %% [markdown]
# ## Where curvature is negative
#
# Are these blocks bowls? `inspect_curvature` tells. Look at the
# smallest eigenvalue, which is negative where a block bends down, and
# at the last column, the share of the negative eigenvalues in the sum
# of the sizes of all.

# %% tags=["nbval-ignore-output"]
print(inspect_curvature(model, alpha=0.01))

# %%
masses = [negative_mass(block).mass for block in blocks.values()]
assert min(masses[:4]) > 0
assert max(masses[4:]) < 1e-12
print("Only the blocks below a sigmoid bend down.")

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
# (A ReLU consists of two straight lines, and has no such term. What
# follows from that is Exercise 2.)
#
# The [four treatments](../docs/mathematics.md#treatments) differ in
# what they do to the second term. The Hessian (`"hessian"`) keeps it,
# the generalized Gauss-Newton matrix (GGN, `"ggn"`) drops it, and two
# positive-curvature Hessians (PCH) take its size (`"abs"`) or its
# positive part (`"clip"`). Without negative terms, a sum of bowls
# stays a bowl.
#
# Here are all eigenvalues of the first weight's block, for each.

# %% alt="The 48 eigenvalues of the first weight's block, in ascending order, in two panels. Left, the Hessian starts well below zero and ends above it, while the GGN is never below zero. Right, on a larger scale, both PCHs are never below zero, and abs is the larger one." tags=["nbval-ignore-output"]
treatments = {
    "Hessian": "hessian",
    "GGN": "ggn",
    "PCH, abs": "abs",
    "PCH, clip": "clip",
}
repairs = ["GGN", "PCH, abs", "PCH, clip"]
weight_block = {
    title: curvature(treatment)["0.weight"].to_dense()
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
assert spectra["Hessian"][0] < -1e-3 < spectra["Hessian"][-1]
assert all(spectra[title][0] > -1e-12 for title in repairs)
print("The Hessian bends both ways, the other three only up.")

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
curvature("hessian")
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
    curvature(treatment)
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

assert all(g @ steps[title] < 0 for title in repairs)
assert all(whole_steps[k][10] < whole_steps[k][0] for k in repairs)
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
    curvature(treatment)
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

assert all(report[title].converged for title in repairs)
assert not any(report[k].negative_curvature for k in repairs)
print("On the GGN and both PCHs, it converges.")

# %% [markdown]
# What CG had found by then does no harm, since it stops in time, but
# it is little, and often nothing. (There is another way out, which
# goes along that direction [to the
# boundary](../docs/treatments.md#trust-radius) of a trust region.)
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
# They are far off, because at the first layer the second-order terms
# are most of what there is. The GGN forgets them, and sees little
# curvature, so its steps are long. The PCHs keep their size, as
# caution: their steps are shorter, those of `"abs"` the shortest. And
# since
# $\max(r, 0) = \tfrac12 (r + |r|)$, `"clip"` is just the midpoint
# between the Hessian and `"abs"`.

# %%
gap = weight_block["GGN"] - weight_block["Hessian"]
middle = (weight_block["Hessian"] + weight_block["PCH, abs"]) / 2
lengths = {title: step.norm() for title, step in steps.items()}

assert gap.norm() > weight_block["Hessian"].norm() / 2
print("Without second-order terms, more than half is missing.")

assert (weight_block["PCH, clip"] - middle).abs().max() < 1e-12
print("Clip is halfway from the Hessian to abs.")

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
# On the left, samples of opposite sign cancel. To see this alone,
# consider the second bias, and subtract the first term, which is the
# GGN. What is left is a diagonal matrix. These are its five entries.


# %% tags=["nbval-ignore-output"]
def second_term(treatment, exact, count=128):
    pch = curvature(treatment, exact, count=count)["2.bias"]
    ggn = curvature("ggn", exact, count=count)["2.bias"]
    return pch.to_dense() - ggn.to_dense()


abs_of_sum = second_term("abs", exact=False)
sum_of_abs = second_term("abs", exact=True)
for title, term in [
    ("abs of the sum", abs_of_sum),
    ("sum of the abs", sum_of_abs),
]:
    print(title, *(f"{entry:8.5f}" for entry in term.diag()))

# %% [markdown]
# Compute both by hand, from
# $\varphi'' = \varphi' (1 - 2 \varphi)$ and the gradient $\delta$
# that arrives from the last layer:

# %%
with torch.no_grad():
    features = model[:4](x)
    p = model[4](features).softmax(1)
    delta = (p - nn.functional.one_hot(y, 3)) @ model[4].weight
bend = features * (1 - features) * (1 - 2 * features)
terms = bend * delta / len(x)
gaps = [
    abs_of_sum - terms.sum(0).abs().diag(),
    sum_of_abs - terms.abs().sum(0).diag(),
]
assert all(gap.abs().max() < 1e-12 for gap in gaps)
print("By hand the two terms are the same.")

assert (abs_of_sum.diag() <= sum_of_abs.diag()).all()
assert abs_of_sum.trace() < 0.95 * sum_of_abs.trace()
assert (sum_of_abs - abs_of_sum).norm() > 0.05 * sum_of_abs.norm()
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
# With $\varphi'' = 0$ there is no second-order term to treat.

# %% tags=["solution"]
relu_model = network(HBPReLU)
relu_model.load_state_dict(model.state_dict())
reference = hessian_blocks(relu_model, loss_func, x, y)

for treatment in treatments.values():
    for name, p in curvature(treatment, model=relu_model).items():
        block = p.to_dense()
        assert (block - reference[name]).abs().max() < 1e-12
        assert torch.linalg.eigvalsh(block).min() > -1e-12
print("All give the Hessian's blocks, and none bends down.")

# %% [markdown] tags=["solution"]
# For the whole Hessian, put all parameters into one vector, and
# differentiate twice.


# %% tags=["solution"]
def relu_loss(theta):
    named = dict(relu_model.named_parameters())
    parts = theta.split([p.numel() for p in named.values()])
    pairs = zip(named.items(), parts, strict=True)
    values = {name: part.view_as(p) for (name, p), part in pairs}
    return loss_func(functional_call(relu_model, values, (x,)), y)


theta = nn.utils.parameters_to_vector(relu_model.parameters())
whole = hessian(relu_loss)(theta.detach())
assert torch.linalg.eigvalsh(whole).min() < -1e-3
print("The whole Hessian bends down.")

# %% [markdown] tags=["solution"]
# So the negative curvature of a ReLU network is all *between* layers,
# where the block diagonal does not look.

# %% [markdown]
# **Exercise 3.** What was said of `"abs"` holds for `"clip"` as well:
# which of its two matrices is the smaller one? And for which batch
# are they the same?

# %% tags=["solution"]
clip_of_sum = second_term("clip", exact=False).diag()
sum_of_clips = second_term("clip", exact=True).diag()
assert (clip_of_sum <= sum_of_clips + 1e-12).all()
assert clip_of_sum.sum() < 0.95 * sum_of_clips.sum()
print("Clipping the sum gives the smaller one.")

for treatment in ["abs", "clip"]:
    summed_first = second_term(treatment, exact=False, count=1)
    summed_last = second_term(treatment, exact=True, count=1)
    assert (summed_first - summed_last).abs().max() < 1e-12
print("For one sample there is no difference.")

# %% [markdown] tags=["solution"]
# On the right of
# $\max\big(\sum_n r_n, 0\big) \le \sum_n \max(r_n, 0)$ negative
# samples count as zero, and on the left they still reduce the sum.

# %% [markdown]
# ## Read on
#
# - [A convolutional network](05_convolutional_network.ipynb) is
#   trained with exact products.
# - [The mathematics](../docs/mathematics.md#two-pchs) derives the
#   treatments, and the two PCHs of each kind.
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
