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
# layer, with Newton steps. First you see it work, in a loop of a
# dozen lines; then we take the step apart, until it is clear what
# each line does, and why the step is so much better than the
# gradient. On the way you meet the one idea behind this library:
#
# > Curvature can be sent backward through a network, like a
# > gradient.
#
# You need the chain rule, some linear algebra and some PyTorch.
# Whatever the text claims, a cell below it checks, so feel free to
# change things: if a claim stops being true, an `assert` will say so.

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

# @markdown Half a minute, or with `quick_run` somewhat less.
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
import torch
from torch.nn.functional import avg_pool2d, cross_entropy, linear
from torch.utils.data import DataLoader

from hbp import CGNewton, HBPLinear, batch_summed_hessian, set_seeds
from hbp.reference import hessian_blocks
from hbp.tutorial.datasets import mnist, quick
from hbp.tutorial.plotting import Panel, curves, matrices

set_seeds(0)
use_gpu = torch.cuda.is_available()
device = torch.device("cuda" if use_gpu else "cpu")

# %% [markdown]
# There is one setting. With `quick_run` in the first cell, or with
# `HBP_TUTORIAL=quick` in the environment, a small data set takes the
# place of MNIST, and is passed more often, so that there are enough
# steps.

# %%
num_epochs = 40 if quick() else 2

# %% [markdown]
# ## The data
#
# MNIST is downloaded the first time you ask for it. If you have it
# already, let the environment variable `HBP_DATA` name its folder. An
# image is 28 × 28 numbers from 0 (black) to 1 (white), and its label
# is the digit that it shows.

# %% tags=["nbval-ignore-output"]
train_set = mnist(train=True)
test_set = mnist(train=False)
print(len(train_set), "training and", len(test_set), "test images")

# %%
all_images, all_labels = train_set.tensors
print(tuple(all_images[0].shape), all_images.dtype)
print("labels:", all_labels.unique().tolist())

assert all_images.min() == 0
assert all_images.max() == 1

# %% [markdown]
# We work on batches of 500 images, in random order, and to our layer
# an image is a plain vector of 784 numbers.

# %%
shuffle = torch.Generator()
loader = DataLoader(
    train_set, batch_size=500, shuffle=True, generator=shuffle
)

# %% [markdown]
# ## A training
#
# The model takes an image $x$ to ten numbers, one for each digit:
#
# $$ z = W x + b . $$
#
# Softmax turns them into probabilities,
# $p_c = e^{z_c} / \sum_{c'} e^{z_{c'}}$, and the loss is the mean of
# $-\log p_\text{label}$ over the batch. `HBPLinear` is
# `torch.nn.Linear` with one more ability, which we use in the loop.

# %%
loss_func = torch.nn.CrossEntropyLoss()
model = HBPLinear(784, 10).to(device)
optimizer = CGNewton(
    model.parameters(),
    lr=0.1,
    alpha=0.02,
    cg_atol=0.0,
    cg_tol=0.1,
    cg_maxiter=50,
)

# %% [markdown]
# Two lines of the loop are new, compared with any other: one before
# `loss.backward()`, one after.

# %%
losses, cg_iterations = [], []
shuffle.manual_seed(0)
for _ in range(num_epochs):
    for images, labels in loader:
        outputs = model(images.flatten(1).to(device))
        loss = loss_func(outputs, labels.to(device))
        optimizer.zero_grad()
        output_hessian = batch_summed_hessian(loss, outputs)
        loss.backward()
        model.backward_hessian(
            output_hessian, modify_2nd_order_terms="zero"
        )
        optimizer.step()
        losses.append(loss.item())
        info = optimizer.last_step[model.weight]
        cg_iterations.append(info.iterations)

# %% [markdown]
# To see whether the result is good, take gradient descent at three
# learning rates, from the same weights, on the same batches.


# %%
def gradient_descent(lr):
    """The batch losses of a training with the gradient alone."""
    set_seeds(0)
    model = torch.nn.Linear(784, 10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    shuffle.manual_seed(0)
    losses = []
    for _ in range(num_epochs):
        for images, labels in loader:
            outputs = model(images.flatten(1).to(device))
            loss = loss_func(outputs, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


runs = {"HBP": losses}
for lr in [0.1, 1.0, 5.0]:
    runs[f"gradient, {lr:g}"] = gradient_descent(lr)

# %% alt="Four lines of the logarithm of the batch loss against the iteration, in the first forty. HBP falls from the second iteration on and stays lowest. Gradient descent at 0.1 falls slowly. At 1 it rises at first, and at 5 it rises to more than ten times the loss of guessing, before either comes down." tags=["nbval-ignore-output"]
first = range(1, 41)
curves(
    [
        Panel(
            "iteration",
            "log10 of the batch loss",
            {
                name: (first, torch.tensor(values[:40]).log10())
                for name, values in runs.items()
            },
        )
    ]
)

# %%
guessing = torch.tensor(10.0).log()
assert losses[1] < guessing / 2
assert max(losses[1:40]) < guessing / 2
print("One step halves the loss, and it stays there.")

sums = {name: sum(values[:40]) for name, values in runs.items()}
assert min(sums, key=sums.get) == "HBP"
print("In the first forty steps, HBP is ahead of all three.")

assert max(runs["gradient, 5"]) > 5 * guessing
print("At a rate of 5, the gradient makes things far worse.")

# %% [markdown]
# One step, and the loss is below half of that of guessing,
# $\ln 10 \approx 2.3$. A small learning rate is slow, and a large
# one first makes things much worse. Remember the 5. It will come back
# at the end, when we see what the step of HBP is made of.
#
# And did the model learn anything? The weight has one row per digit,
# and a row has the shape of an image. Blue pixels speak for the
# digit, orange ones against it.

# %% alt="Ten tiles, one per digit: the rows of the weight as images. Several resemble the digit they stand for, in blue, with orange where its ink must not be." tags=["nbval-ignore-output"]
rows = model.weight.view(10, 28, 28)
matrices({f"digit {k}": rows[k] for k in range(10)})

# %% tags=["nbval-ignore-output"]
test_images, test_labels = test_set.tensors
with torch.no_grad():
    answers = model(test_images.flatten(1).to(device))
hits = answers.argmax(dim=1).cpu() == test_labels
test_accuracy = hits.float().mean().item()
last_loss = sum(losses[-20:]) / 20

print(f"mean loss of the last 20 batches: {last_loss:.3f}")
print(f"test accuracy:                    {test_accuracy:.3f}")
print(f"most CG iterations in a step:     {max(cg_iterations)}")

# %%
assert last_loss < guessing / 4
assert test_accuracy > 0.85
print("Digits that it has never seen are mostly right.")

assert max(cg_iterations) < 25
print("Each step took fewer than 25 products (of 50 allowed).")

# %% [markdown]
# Now for the lines of that loop, one after the other. We start from
# fresh weights, and look at one batch closely.

# %%
set_seeds(0)
model = HBPLinear(784, 10).to(device)
shuffle.manual_seed(0)
images, labels = next(iter(loader))
images, labels = images.to(device), labels.to(device)
inputs = images.flatten(1)

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
# This is what a Kronecker product looks like. Each of the 10 × 10
# squares on the right is the same 49 × 49 pattern, $x x^\top$,
# multiplied by one entry of $H$. The colour shows the square root of
# an entry's size, so that small entries can be seen, too.

# %% alt="Three tiles. Left, the 10 by 10 output Hessian of one image. In the middle, the 49 by 49 products of its pixels: a pattern of bright rows and columns where there is ink. Right, their product with 490 rows: 10 by 10 squares, each with that pattern, in the sign and strength of the entry on the left." tags=["nbval-ignore-output"]
p = small(tiny[:1]).detach().softmax(dim=1)
H = torch.diag(p.flatten()) - p.T @ p
xx = torch.outer(tiny[0], tiny[0])

assert torch.allclose(weight_block(1), torch.kron(H, xx), atol=1e-12)


def large(tiles):
    """Matrices side by side, larger; small entries made visible."""
    roots = {k: m.sign() * m.abs().sqrt() for k, m in tiles.items()}
    drawing = matrices(roots, columns=3)
    drawing.figure.set_size_inches(7.2, 2.7)
    return drawing


large({"H": H, "x xᵀ": xx, "H ⊗ x xᵀ": torch.kron(H, xx)})

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
# ## Why it works
#
# Our curvature knows a single input direction, that of the mean image
# $\bar x$. Split the gradient of the weight, row by row, into its
# part along $\bar x$ and the rest. On the rest $H$ is zero, and
# the equation says $\alpha d = -g$, which is gradient descent with
# the learning rate $\mathrm{lr}/\alpha = 5$. Along $\bar x$ the
# step is held back. Solve the equation exactly, and look:

# %%
u = x_mean / x_mean.norm()


def split(matrix):
    """The part along the mean image, and the rest."""
    along = torch.outer(matrix @ u, u)
    return along, matrix - along


g = model.weight.grad
d = curvature[0].solve(-g.flatten(), alpha=0.02).view_as(g)
g_along, g_rest = split(g)
d_along, d_rest = split(d)

assert torch.allclose(d_rest, -g_rest / 0.02, atol=1e-4)
assert d_along.norm() < g_along.norm() / 0.02 / 5
print("Newton along the mean image, gradient descent elsewhere.")

# %% [markdown]
# But a learning rate of 5 was a disaster before. Is it the whole
# gradient that cannot bear it, or one of the two parts?
#
# **Predict.** Move the fresh weights by either part alone, and raise
# the learning rate from 0 to 8. Which part makes the loss explode?

# %%
fresh = before[0]
rates = torch.linspace(0, 8, 33).tolist()


@torch.no_grad()
def losses_along(part):
    """The loss after a step along one part, for every rate."""
    return [
        cross_entropy(
            linear(inputs, fresh - rate * part, before[1]), labels
        ).item()
        for rate in rates
    ]


loss_along, loss_rest = losses_along(g_along), losses_along(g_rest)

# %% alt="The loss of the batch after one step, against the learning rate, with two lines. Along the mean image the loss dips a little, and from a rate of one half on it climbs in a nearly straight line. In all other directions it falls to about a third until a rate of about 4, and stays low." tags=["nbval-ignore-output"]
curves(
    [
        Panel(
            "learning rate",
            "loss after the step",
            {
                "along x̄": (rates, loss_along),
                "the rest": (rates, loss_rest),
            },
            levels={"before": loss_along[0]},
        )
    ]
)

# %%
best = rates[loss_along.index(min(loss_along))]
at_five = rates.index(5.0)

assert best <= 0.5
assert loss_along[at_five] > 2 * loss_along[0]
print("Along the mean image, a rate of 5 is far too large.")

assert loss_rest[at_five] < loss_rest[0] / 2
print("In all other directions, it more than halves the loss.")

# %% [markdown]
# So there is one steep direction in the loss. Images are all bright
# in the middle, hence a step along the mean image changes the outputs
# of *all* images at once, in the same way. A common learning rate has
# to be small because of it, and then everything else crawls. The
# curvature finds that direction and holds the step back there, and so
# all others may run.
#
# That is also what went wrong with the prediction above. In the other
# directions our curvature takes the loss for a straight slope that
# never ends, so the *promise* can be larger than the whole loss;
# the step is a good one all the same.
#
# You could guess a cheaper way to the same end: subtract the mean
# from the images. [What curvature does](06_when_curvature_pays.ipynb)
# follows this up in larger networks, where each layer has a mean
# input of its own, and asks what curvature can do beyond it.
#
# ## Try it yourself
#
# Try them before you unfold the solutions.

# %% [markdown]
# **Exercise 1.** Subtract the mean from the images, and give the
# gradient a learning rate of 5. Does it work now?


# %% tags=["solution"]
def after(steps, inputs, lr):
    """The loss after some steps of gradient descent on one batch."""
    W, b = (p.clone().requires_grad_() for p in before)
    for _ in range(steps):
        loss = cross_entropy(linear(inputs, W, b), labels)
        grads = torch.autograd.grad(loss, [W, b])
        with torch.no_grad():
            W -= lr * grads[0]
            b -= min(lr, 0.5) * grads[1]
    return cross_entropy(linear(inputs, W, b), labels).item()


assert after(5, inputs - x_mean, lr=5.0) < 0.6
assert after(5, inputs, lr=5.0) > guessing
print("With centred images, the gradient can bear a rate of 5.")

# %% [markdown] tags=["solution"]
# The bias keeps a smaller rate. Its input is the number 1, whose mean
# nobody subtracted.

# %% [markdown]
# **Exercise 2.** Set $\alpha = 1$. What is left of the method?

# %% tags=["solution"]
d = curvature[0].solve(-g.flatten(), alpha=1.0).view_as(g)

assert torch.allclose(d, -g)
print("It is gradient descent.")

# %% [markdown]
# **Exercise 3.** Let `CGNewton` solve its equation to a tolerance of
# `cg_tol=1e-5`, not 0.1. How many more iterations does that take, and
# is the step any better?

# %% tags=["solution"]
steps = {}
for tolerance in [0.1, 1e-5]:
    with torch.no_grad():
        model.weight.copy_(before[0])
        model.bias.copy_(before[1])
    optimizer = CGNewton(
        model.parameters(),
        lr=0.1,
        alpha=0.02,
        cg_atol=0.0,
        cg_tol=tolerance,
    )
    outputs = model(inputs)
    loss = loss_func(outputs, labels)
    optimizer.zero_grad()
    output_hessian = batch_summed_hessian(loss, outputs)
    loss.backward()
    model.backward_hessian(output_hessian)
    optimizer.step()
    count = optimizer.last_step[model.weight].iterations
    with torch.no_grad():
        steps[count] = loss_func(model(inputs), labels).item()

few, many = sorted(steps)
assert few < many
assert abs(steps[few] - steps[many]) < 0.1 * loss
print("More iterations, and hardly a different loss.")

# %% [markdown]
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
