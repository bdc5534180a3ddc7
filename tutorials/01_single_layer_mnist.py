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
# # One layer on MNIST
#
# Here you train the smallest network there is, a single linear
# layer, with Newton steps. On the way you meet the one idea behind
# this library:
#
# > Curvature can be sent backward through a network, like a
# > gradient.
#
# You need the chain rule, some linear algebra and some PyTorch.
#
# Whatever the text claims, a cell below it checks, so feel free to
# change things: if a claim stops being true, an `assert` will say so.

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

import torch
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader

from hbp import CGNewton, HBPLinear, batch_summed_hessian, set_seeds
from hbp.reference import hessian_blocks
from hbp.tutorial.datasets import mnist, quick
from hbp.tutorial.plotting import Panel, curves, matrices

set_seeds(0)
use_gpu = torch.cuda.is_available()
device = torch.device("cuda" if use_gpu else "cpu")

# %% [markdown]
# There is one setting. With `HBP_TUTORIAL=quick` in the environment,
# a small data set takes the place of MNIST, and is passed more often,
# so that there are enough steps.

# %%
num_epochs = 40 if quick() else 2

# %% [markdown]
# ## The data
#
# MNIST is downloaded the first time you ask for it. If you have it
# already, let the environment variable `HBP_DATA` name its folder.

# %% tags=["nbval-ignore-output"]
train_set = mnist(train=True)
test_set = mnist(train=False)
print(len(train_set), "training and", len(test_set), "test images")

# %% [markdown]
# An image is 28 × 28 numbers from 0 (black) to 1 (white), and its
# label is the digit that it shows.

# %%
all_images, all_labels = train_set.tensors
print(tuple(all_images[0].shape), all_images.dtype)
print("labels:", all_labels.unique().tolist())

assert all_images.min() == 0
assert all_images.max() == 1

# %% [markdown]
# We work on batches of 500 images, in random order, and to our layer
# an image is a plain vector of 784 numbers. Let us pick one batch to
# look at closely.

# %%
loader = DataLoader(train_set, batch_size=500, shuffle=True)

images, labels = next(iter(loader))
images, labels = images.to(device), labels.to(device)
inputs = images.flatten(1)
print(tuple(inputs.shape))

# %% [markdown]
# ## The model
#
# The model takes an image $x$ to ten numbers, one for each digit:
#
# $$ z = W x + b . $$
#
# Softmax turns them into probabilities,
# $p_c = e^{z_c} / \sum_{c'} e^{z_{c'}}$. The loss is the mean of
# $-\log p_\text{label}$ over the batch.

# %%
model = HBPLinear(784, 10).to(device)
loss_func = torch.nn.CrossEntropyLoss()
print(model)

# %% [markdown]
# `HBPLinear` is `torch.nn.Linear` with one more ability. All the rest
# is untouched: even the initial weights are the same, if the seed is.

# %%
set_seeds(1)
ours = HBPLinear(784, 10)
set_seeds(1)
theirs = torch.nn.Linear(784, 10)

assert torch.equal(ours.weight, theirs.weight)
assert torch.equal(
    ours(all_images[:9].flatten(1)), theirs(all_images[:9].flatten(1))
)
print("HBPLinear is nn.Linear, until you ask for more.")

# %% [markdown]
# ## What the gradient leaves out
#
# Nudge the model's output from $z$ to $z + \Delta$. How does the loss
# change? Near $z$ it does almost what its Taylor expansion does:
#
# $$
# \ell(z + \Delta) \approx \ell(z) + \delta^\top \Delta
# + \tfrac{1}{2} \Delta^\top H \Delta .
# $$
#
# The gradient $\delta$ is the slope, and says which way is down. The
# Hessian $H$ is the curvature, and says how fast the slope changes,
# and so how far you can trust it.
#
# For one sample of softmax cross-entropy, both are short formulas.
# With $y$ the label's unit vector,
#
# $$
# \delta = p - y, \qquad
# H = \operatorname{diag}(p) - p p^\top .
# $$
#
# Try them: does the curvature improve the prediction?

# %%
z = model(inputs[:1]).detach().double()
y = torch.nn.functional.one_hot(labels[:1], 10).double()
p = z.softmax(dim=1)

delta = (p - y).flatten()
H = torch.diag(p.flatten()) - p.T @ p

nudge = 0.1 * torch.randn_like(z)
change = loss_func(z + nudge, y) - loss_func(z, y)
v = nudge.flatten()
slope_only = delta @ v
slope_and_curvature = delta @ v + 0.5 * v @ H @ v

error = (slope_only - change).abs()
smaller_error = (slope_and_curvature - change).abs()
assert smaller_error < error / 5
print("With curvature, the prediction is far more precise.")

# %% [markdown]
# ## Step 1: curvature at the output
#
# A batch has one such $H$ per sample. We add up their contributions
# to the loss:
#
# $$
# \bar H = \sum_n \frac{\partial^2 \, \text{loss}}
# {\partial z_n \, \partial z_n^\top} .
# $$
#
# Our loss is a *mean*, so every term has a factor $1/N$ inside, and
# $\bar H$ is the average of the samples' Hessians. The same factor
# is in every gradient that PyTorch computes, so that we will not need
# to think of it again.
#
# One call computes $\bar H$, for any loss that is a sum or a mean
# over samples:

# %%
outputs = model(inputs)
loss = loss_func(outputs, labels)
output_hessian = batch_summed_hessian(loss, outputs)
print(tuple(output_hessian.shape))

# %% [markdown]
# Ten outputs, hence 10 × 10 numbers. Check them against the formula:

# %%
p = outputs.detach().softmax(dim=1)
by_hand = torch.diag(p.mean(0)) - p.T @ p / len(p)

assert torch.allclose(output_hessian, by_hand, atol=1e-6)
print("The output Hessian is the mean of diag(p) - p pᵀ.")

# %% [markdown]
# Two facts about it are worth knowing.
#
# - Its rows sum to zero. If all ten outputs grow by the same amount,
#   the probabilities stay the same, and so does the loss.
# - It has no negative eigenvalue. Seen from the output, the loss is a
#   bowl.

# %%
eigenvalues = torch.linalg.eigvalsh(output_hessian)

assert output_hessian.sum(dim=1).abs().max() < 1e-6
assert eigenvalues.min() > -1e-6
print("Its rows sum to zero, and it has no negative eigenvalue.")

# %% [markdown]
# ## Step 2: one layer back
#
# `loss.backward()` turns the gradient at a layer's output into the
# gradients of its weight and bias. We want the same for curvature.
# The chain rule, applied twice, gives it:
#
# $$
# \frac{\partial^2 \ell}{\partial \theta \, \partial \theta^\top}
# = J^\top H J
# + \sum_k \frac{\partial^2 z_k}
# {\partial \theta \, \partial \theta^\top} \, \delta_k ,
# \qquad J = \frac{\partial z}{\partial \theta} .
# $$
#
# The first term carries the curvature of what comes *after* the
# layer. The second is the curvature of the layer itself. Ours is
# linear in $W$ and in $b$, so the second term is zero.
#
# Output $o$ depends on the weight $W_{oi}$ by the factor $x_i$, and
# on $b_o$ by the factor 1. Put that into $J$, and you have
#
# $$
# [H_W]_{oi,\,o'i'} = H_{oo'} \, x_i x_{i'} ,
# \qquad H_b = H .
# $$
#
# This is a Kronecker product, $H_W = H \otimes x x^\top$. For a
# batch, `hbp` uses two averages instead of one sample:
# $\bar H \otimes \bar x \bar x^\top$, with $\bar x$ the mean input.
#
# In code, it is one line after `loss.backward()`. The option `"zero"`
# says to drop the second term. Here that changes nothing, but you
# will meet layers for which it does.

# %%
loss.backward()
model.backward_hessian(output_hessian, modify_2nd_order_terms="zero")

print("weight", tuple(model.weight.hessian.shape))
print("bias  ", tuple(model.bias.hessian.shape))

# %% [markdown]
# Every parameter now has a `.hessian` next to its `.grad`. That of
# the weight has 7840 × 7840 entries, but nobody has written them
# down: these two little pictures are all that is stored.

# %% alt="Left, the 10 by 10 output Hessian: positive on the diagonal, slightly negative elsewhere. Right, the mean image of a batch: a blurred bright blob." tags=["nbval-ignore-output"]
x_mean = inputs.mean(0)
matrices(
    {
        "output Hessian": output_hessian,
        "mean image": x_mean.view(28, 28),
    },
)

# %% [markdown]
# They are enough to multiply a vector by the matrix. Write the vector
# as $V$, in the shape of the weight. Then the product is
#
# $$ V \;\mapsto\; \bar H \, (V \bar x) \, \bar x^\top . $$

# %%
V = torch.randn_like(model.weight)
product = model.weight.hessian @ V.flatten()
by_hand = torch.outer(output_hessian @ (V @ x_mean), x_mean)

assert torch.allclose(product, by_hand.flatten(), atol=1e-4)
print("A product needs only the two factors.")

# %% [markdown]
# ## Is that really the Hessian?
#
# Don't take our word for it. `hbp.reference` knows none of these
# rules: it differentiates the loss twice, by PyTorch's autograd, and
# writes the whole matrix down. That takes a small example, images of
# 7 × 7 pixels, and float64, to see more digits.

# %%
tiny = avg_pool2d(images, 4).flatten(1).double()
small = HBPLinear(49, 10).double().to(device)


def weight_block(count):
    """The weight's block for the first images, by hbp."""
    outputs = small(tiny[:count])
    loss = loss_func(outputs, labels[:count])
    small.zero_grad()
    output_hessian = batch_summed_hessian(loss, outputs)
    loss.backward()
    small.backward_hessian(output_hessian)
    return small.weight.hessian.to_dense()


def exact_weight_block(count):
    """The same, by autograd."""
    x, y = tiny[:count], labels[:count]
    return hessian_blocks(small, loss_func, x, y)["weight"]


# %% [markdown]
# First, one single image:

# %%
difference = weight_block(1) - exact_weight_block(1)

assert difference.abs().max() < 1e-12
print("For one image, the block is the exact Hessian.")

# %% [markdown]
# Then, a hundred of them. Now the two averages matter: the true block
# is the average of $H_n \otimes x_n x_n^\top$, and the average of a
# product is not the product of the averages.
#
# The library offers two ways to average. The default keeps the mean
# input only, $\bar H \otimes \bar x \bar x^\top$. The other one,
# $\bar H \otimes \operatorname{E}[x x^\top]$, keeps more, and costs
# more. How far is each from the truth?

# %% tags=["nbval-ignore-output"]
exact = exact_weight_block(100)

small.set_hbp_approximation(average_parameter_jacobian=True)
gap_jacobian = (weight_block(100) - exact).norm() / exact.norm()

small.set_hbp_approximation(average_parameter_jacobian=False)
gap_product = (weight_block(100) - exact).norm() / exact.norm()

print(f"averaged Jacobian: off by {gap_jacobian:.0%}")
print(f"averaged product:  off by {gap_product:.0%}")

# %%
assert gap_product < gap_jacobian < 1
print("Both are approximations. Averaged products are closer.")

# %% [markdown]
# For training we take the cheap one. It turns out to be good enough,
# and its single vector $\bar x$ makes the next step easy.

# %% [markdown]
# ## Step 3: a Newton step
#
# If the loss were exactly a quadratic bowl with gradient $g$ and
# curvature $H$, the step $d$ to its bottom would solve $H d = -g$.
# Two changes make this fit for a network:
#
# $$
# \big[ (1 - \alpha) H + \alpha I \big] \, d = -g ,
# \qquad \theta \leftarrow \theta + \mathrm{lr} \cdot d .
# $$
#
# The *damping* $\alpha$ adds a bit of the identity matrix. Our $H$
# is flat in most directions, and without damping the steps there
# would have no bound. At $\alpha = 0$ you have Newton's method, at
# $\alpha = 1$ gradient descent. The *learning rate* lr shortens the
# step, since the bowl is only an approximation, from one batch.
#
# `CGNewton` does this for every parameter.

# %%
optimizer = CGNewton(
    model.parameters(),
    lr=0.1,
    alpha=0.02,
    cg_atol=0.0,
    cg_tol=0.1,
    cg_maxiter=50,
)

# %% [markdown]
# CG stands for *conjugate gradients*. It solves the equation with
# nothing but matrix-vector products, one per iteration. It stops when
# what is left, $r = [(1-\alpha) H + \alpha I] d + g$, is at most 0.1
# times as long as $g$ (`cg_tol`), or after 50 iterations.
#
# Take one step, and put it into the equation. A step uses the
# curvature up, because it belongs to the old weights; so keep it
# first:

# %%
parameters = list(model.parameters())
before = [p.detach().clone() for p in parameters]
curvature = [p.hessian for p in parameters]
optimizer.step()

for old, p, H in zip(before, parameters, curvature, strict=True):
    d = (p.detach() - old).flatten() / 0.1
    g = p.grad.flatten()
    r = 0.98 * (H @ d) + 0.02 * d + g
    assert r.norm() < 0.11 * g.norm()
print("The steps solve the equation, to the tolerance.")

# %% [markdown]
# The optimizer remembers how it went:

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    new_loss = loss_func(model(inputs), labels)
actual = (loss - new_loss).item()

info = optimizer.last_step[model.weight]
print(f"iterations of CG:   {info.iterations}")
print(f"residual:           {info.residual_norm:.3f}")
print(f"length of d:        {info.step_norm:.3f}")
print(f"predicted decrease: {info.predicted_decrease:.3f}")
print(f"actual decrease:    {actual:.3f}")

# %%
assert optimizer.last_step[model.weight].converged
print("CG reached its tolerance.")

assert 0 < actual < info.predicted_decrease
print("The loss falls, though by less than was predicted.")

# %% [markdown]
# Why less, and what kind of step is it? Our curvature knows one
# input direction only, that of $\bar x$. Elsewhere it takes the loss
# for a straight slope, and that is too optimistic: a promise can even
# be larger than the whole loss.
#
# Split each row of the step into its part along $\bar x$ and the
# rest. On the rest $H$ is zero, and the equation says
# $\alpha d = -g$, which is gradient descent with the learning rate
# $\mathrm{lr}/\alpha = 5$. Along $\bar x$, where the loss is steep,
# curvature holds the step back.
#
# Solve the equation exactly, and look:

# %%
g = model.weight.grad
d = curvature[0].solve(-g.flatten(), alpha=0.02)
d = d.view_as(g)

u = x_mean / x_mean.norm()
d_along, d_rest = d @ u, d - torch.outer(d @ u, u)
g_along, g_rest = g @ u, g - torch.outer(g @ u, u)

assert torch.allclose(d_rest, -g_rest / 0.02, atol=1e-4)
assert d_along.norm() < g_along.norm() / 0.02 / 5
print("Newton along the mean image, gradient descent elsewhere.")

# %% [markdown]
# ## Training
#
# Now all of it together. Two lines are new, compared with any other
# training loop: one before `loss.backward()`, one after.

# %%
set_seeds(0)
model = HBPLinear(784, 10).to(device)
optimizer = CGNewton(
    model.parameters(),
    lr=0.1,
    alpha=0.02,
    cg_atol=0.0,
    cg_tol=0.1,
    cg_maxiter=50,
)
losses, accuracies, cg_iterations = [], [], []

# %% tags=["nbval-ignore-output"]
for epoch in range(num_epochs):
    for images, labels in loader:
        inputs = images.flatten(1).to(device)
        labels = labels.to(device)

        outputs = model(inputs)
        loss = loss_func(outputs, labels)

        optimizer.zero_grad()
        output_hessian = batch_summed_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(
            output_hessian, modify_2nd_order_terms="zero"
        )
        optimizer.step()

        hits = outputs.argmax(dim=1) == labels
        losses.append(loss.item())
        accuracies.append(hits.float().mean().item())
        info = optimizer.last_step[model.weight]
        cg_iterations.append(info.iterations)

        if len(losses) % 20 == 1:
            print(
                f"Epoch [{epoch + 1}/{num_epochs}], "
                f"Iter. [{len(losses)}], "
                f"Loss: {losses[-1]:.4f}, "
                f"Acc.: {accuracies[-1]:.4f}"
            )

# %% [markdown]
# Mind the order. The output Hessian comes *before* `loss.backward()`,
# which frees the graph that it needs, and `backward_hessian` comes
# *after* it, because in general its rules use the gradients.
# `zero_grad()` clears both gradients and curvature.

# %% alt="Two curves against the iteration. The batch loss falls steeply at first and then slowly. The batch accuracy rises and then levels off." tags=["nbval-ignore-output"]
iterations = range(1, len(losses) + 1)
curves(
    [
        Panel(
            "iteration",
            "batch loss",
            {"HBP": (iterations, losses)},
        ),
        Panel(
            "iteration",
            "batch accuracy",
            {"HBP": (iterations, accuracies)},
        ),
    ]
)

# %% [markdown]
# The weight has one row per digit, and a row has the shape of an
# image. Blue pixels speak for the digit, orange ones against it.

# %% alt="Ten tiles, one per digit: the rows of the weight as images. Several resemble the digit they stand for, in blue, with orange where its ink must not be." tags=["nbval-ignore-output"]
rows = model.weight.view(10, 28, 28)
matrices({f"digit {k}": rows[k] for k in range(10)})

# %% [markdown]
# ## What you should see

# %% tags=["nbval-ignore-output"]
test_images, test_labels = test_set.tensors
with torch.no_grad():
    answers = model(test_images.flatten(1).to(device))
hits = answers.argmax(dim=1).cpu() == test_labels
test_accuracy = hits.float().mean().item()
last_loss = sum(losses[-20:]) / 20
last_accuracy = sum(accuracies[-20:]) / 20

print(f"mean loss of the last 20 batches:     {last_loss:.3f}")
print(f"mean accuracy of the last 20 batches: {last_accuracy:.3f}")
print(f"test accuracy:                        {test_accuracy:.3f}")
print(f"most CG iterations in a step:         {max(cg_iterations)}")

# %% [markdown]
# **The loss falls.** A model that guesses has a loss of
# $\ln 10 \approx 2.3$. Ours ends far below.

# %%
assert last_loss < math.log(10) / 4
print("The loss ends below a quarter of that of guessing.")

# %% [markdown]
# **A single layer goes a long way.**

# %%
assert last_accuracy > 0.9
print("In the last batches, nine in ten digits are right.")

# %% [markdown]
# **It has learned, not memorised.** The test images were never seen.

# %%
assert test_accuracy > last_accuracy - 0.1
print("The test images are classified nearly as well.")

# %% [markdown]
# **A loose solve is enough.** With a tolerance of 0.1, conjugate
# gradients need only a few products per step.

# %%
assert max(cg_iterations) < 25
print("CG never used half of the iterations it was allowed.")

# %% [markdown]
# ## Try it yourself
#
# - Set `alpha=1`. What is left of the method? Which learning rate
#   does it want now?
# - Set `solver="direct"`, for an exact solution of every equation.
#   Does exactness pay?
# - Set `model.average_parameter_jacobian = False` before training.
#   The blocks are closer to the truth. Are the steps better?
# - Set `cg_tol=1e-5`, and watch `cg_iterations`.
#
# ## Read on
#
# With one layer, curvature travels a single step. In
# [the next tutorial](02_sequential_cifar10.ipynb) it travels through
# nine of them, and through sigmoids, which have a curvature of their
# own. [The mathematics](../docs/mathematics.md) derives all rules.
#
# - F. Dangel, S. Harmeling, P. Hennig.
#   [Modular Block-diagonal Curvature Approximations for Feedforward
#   Architectures](https://arxiv.org/abs/1902.01813). AISTATS 2020.
# - S.-W. Chen, C.-N. Chou, E. Y. Chang.
#   [EA-CG: An Approximate Second-Order Method for Training
#   Fully-Connected Neural
#   Networks](https://arxiv.org/abs/1802.06502), 2018. The averaged
#   Jacobian is theirs.
