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
# # Is Muon a Newton step?
#
# Muon trains language models in fewer steps than Adam. It takes the
# gradient of a weight as a matrix, and gives all of its singular
# values the size 1. That looks at no curvature. Yet it
# [has been read](https://arxiv.org/abs/2604.01472) as a Newton step
# that forgets something: how large the layer's inputs are, and in
# which directions.
#
# That can be measured. In a small language model we take, for each
# weight, its exact block of the generalized Gauss-Newton matrix
# (GGN), the curvature that does not turn negative, and solve for the
# step that it asks for. Then we hold six cheaper steps against it,
# Muon's among them, and let them race.

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

# @markdown Five minutes, or with `quick_run` half a minute.
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
import math
from statistics import mean

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu

from hbp import cg, set_seeds
from hbp.tutorial.datasets import alice, quick
from hbp.tutorial.plotting import Panel, curves

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# %% [markdown]
# ## A text, and a model of it
#
# Four chapters of *Alice's Adventures in Wonderland*. The model sees
# up to 32 characters, and says at each of them which comes next. The
# last tenth of the text is held out.

# %%
text = alice()
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(letter) for letter in text])
cut = len(codes) * 9 // 10
length, width, heads, batch_size = 32, 48, 4, 64


def draw(codes, generator, count=batch_size):
    """Stretches of the text, and the same one character later."""
    starts = torch.randint(
        len(codes) - length, (count, 1), generator=generator
    )
    at = starts + torch.arange(length)
    return codes[at].to(device), codes[at + 1].to(device)


print(len(text), "characters,", len(alphabet), "different ones")
print(text[56:119])

# %% [markdown]
# A transformer of two blocks, written plainly. Its *hidden weights*,
# six in each block, are what Muon moves: those that make queries,
# keys and values, that mix what attention has found, and that lead
# up into a wider layer and down again.


# %%
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        query, key, value = [
            y.unflatten(-1, (heads, -1)).transpose(1, 2)
            for y in (self.query(x), self.key(x), self.value(x))
        ]
        scores = query @ key.mT / math.sqrt(width // heads)
        later = torch.ones_like(scores[0, 0], dtype=bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
        found = scores.softmax(-1) @ value
        return self.out(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention()
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters = nn.Embedding(len(alphabet), width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        nn.init.normal_(self.letters.weight, std=0.1)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(alphabet))

    def forward(self, codes):
        x = self.letters(codes) + self.places
        return self.head(self.norm(self.blocks(x)))


def fresh():
    set_seeds(0)
    return GPT().to(device)


def hidden(model):
    """The layers whose weights we look at, by name."""
    return {
        name.removeprefix("blocks.").replace("attention.", ""): layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not model.head
    }


def loss_of(model, batch):
    codes, next_codes = batch
    return cross_entropy(model(codes).mT, next_codes)


# %% [markdown]
# ## The exact block
#
# Let $z$ be all that the model puts out for a batch, and $J$ its
# Jacobian with respect to *one* weight. Then the weight's block is
# $G = J^\top H J$, where $H$ is the curvature of the loss in $z$. Of
# one position it is $\operatorname{diag}(p) - p p^\top$, with the
# probabilities $p$ that the model gives to the characters. A block
# has 48² × 48² entries or more, but a product with it costs about as
# much as two gradients.


# %%
# STAND-IN for p.hessian after convert(GPT()), per_sample_hessian and
# backward_hessian(..., modify_2nd_order_terms="ggn"). Give it back.
class Block2:
    def __init__(self, model, batch, weight):
        frozen = {k: p.detach() for k, p in model.named_parameters()}
        (name,) = [
            k for k, p in model.named_parameters() if p is weight
        ]
        self.weight = weight.detach().clone().requires_grad_()
        self.z = functional_call(
            model, {**frozen, name: self.weight}, batch[0]
        )
        self.u = torch.zeros_like(self.z, requires_grad=True)
        (self.pulled,) = torch.autograd.grad(
            self.z, self.weight, self.u, create_graph=True
        )
        self.p = self.z.detach().softmax(-1)
        self.shape = (weight.numel(), weight.numel())
        self.dtype, self.device = weight.dtype, weight.device

    def __matmul__(self, v):
        (u,) = torch.autograd.grad(
            self.pulled, self.u, v.view_as(self.weight), True
        )
        u = self.p * (u - (self.p * u).sum(-1, keepdim=True))
        u = u / self.p[..., 0].numel()
        (out,) = torch.autograd.grad(self.z, self.weight, u, True)
        return out.reshape(v.shape)


def ggn_block(model, batch, weight):
    return Block2(model, batch, weight)


class Damped:
    """G + λI, with the mean eigenvalue of G as λ."""

    def __init__(self, G, count=4):
        self.G, self.shape = G, G.shape
        self.dtype, self.device = G.dtype, G.device
        signs = torch.randint(0, 2, (count, len(self)))
        signs = (2.0 * signs - 1).to(G.device)
        traces = [(v @ (G @ v)).item() for v in signs]
        self.damping = mean(traces) / len(self)

    def __len__(self):
        return self.shape[0]

    def __matmul__(self, v):
        return self.G @ v + self.damping * v


# %% [markdown]
# The block may be singular, so we add a damping $\lambda I$, with the
# mean of its own eigenvalues as $\lambda$. The step that a weight is
# asked to take then minimises the quadratic model
#
# $$ q(d) = g^\top d + \tfrac12 \, d^\top (G + \lambda I) \, d . $$
#
# Conjugate gradients find it: $(G + \lambda I) \, d = -g$.
#
# ## Six steps
#
# If the inputs $x$ of a layer and the gradients $\delta$ at its
# outputs had nothing to do with each other, the block would be
# $B \otimes A$, with $A = \operatorname{E}[x x^\top]$ and
# $B = \operatorname{E}[\delta \delta^\top]$, and Newton's step
# $-B^{-1} g A^{-1}$, where $g$ is a matrix like the weight. That is
# K-FAC. Now forget $A$, and in the place of $B$ take
# $(g g^\top)^{1/2}$:
#
# $$ -(g g^\top)^{-1/2} \, g $$
#
# has the singular vectors of $g$, and all singular values 1. It is
# Muon's step. And Shampoo divides by a root of $g g^\top$ on the
# left, and of $g^\top g$ on the right, both averaged over past steps.
# For the first one, which has no past, it is Muon's as well.
#
# Each method here gets the same gradient, and what it needs of
# averages over the steps so far. For K-FAC, $\delta$ is the gradient
# of $-\log p(y)$ with a $y$ that is drawn from $p$ itself.


# %%
def observe(model, batch, memory, keep=0.95):
    """The loss and, by layer, averages of what methods want to know."""
    layers, inputs, outputs = hidden(model), {}, {}

    def hook(name):
        def note(layer, args, output):
            inputs[name] = args[0].detach().flatten(0, 1)
            outputs[name] = output

        return layers[name].register_forward_hook(note)

    hooks = [hook(name) for name in layers]
    z = model(batch[0]).flatten(0, 1)
    for handle in hooks:
        handle.remove()
    drawn = torch.multinomial(z.detach().softmax(-1), 1).flatten()
    deltas = torch.autograd.grad(
        cross_entropy(z, drawn, reduction="sum"),
        list(outputs.values()),
        retain_graph=True,
    )
    loss = cross_entropy(z, batch[1].flatten())
    model.zero_grad()
    loss.backward()
    for (name, layer), delta in zip(
        layers.items(), deltas, strict=True
    ):
        g, x, delta = (
            layer.weight.grad,
            inputs[name],
            delta.flatten(0, 1),
        )
        now = {
            "g": g.clone(),
            "g²": g.square(),
            "ggᵀ": g @ g.T,
            "gᵀg": g.T @ g,
            "x̄": x.mean(0),
            "A": x.T @ x / len(x),
            "B": delta.T @ delta / len(x),
        }
        seen = memory.setdefault(name, {"count": 0})
        seen["count"] += 1
        # A plain mean at first, an exponential one later.
        share = max(1 - keep, 1 / seen["count"])
        for key, value in now.items():
            seen[key] = torch.lerp(seen.get(key, value), value, share)
    return loss.item()


def orthogonal(g):
    """A matrix like g, all of its singular values close to 1."""
    x = (g if len(g) <= g.shape[1] else g.T) / g.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
    return x if len(g) <= g.shape[1] else x.T


def fourth_root(matrix):
    """The inverse of it."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=1e-6 * values.max())
    return vectors * values**-0.25 @ vectors.T


def damped_inverse(matrix, share=0.3):
    """Add a share of the mean eigenvalue, and invert."""
    eye = torch.eye(len(matrix), device=matrix.device)
    damping = share * matrix.trace() / len(matrix)
    return torch.linalg.inv(matrix + damping * eye)


def hold_back(g, x):
    # SLOT: HBP's averaged block. This is its limit, see tutorial 06.
    return g - torch.outer(g @ x, x) / (x @ x)


steps = {
    "K-FAC": lambda g, m: (
        damped_inverse(m["B"]) @ g @ damped_inverse(m["A"])
    ),
    "Muon": lambda g, m: orthogonal(g),
    "Shampoo": lambda g, m: (
        fourth_root(m["ggᵀ"]) @ g @ fourth_root(m["gᵀg"])
    ),
    "HBP": lambda g, m: hold_back(g, m["x̄"]),
    "Adam": lambda g, m: g / (m["g²"].sqrt() + 1e-8),
    "gradient": lambda g, m: g,
}

# %% [markdown]
# Two numbers say how near a step $s$ comes to the exact $d$. One is
# the cosine of the angle between them. The other asks what the step
# is good for: how far does $q$ fall along it, at its best length, as
# a share of how far it falls at all? That is
# $(g^\top s)^2 / \big( s^\top (G + \lambda I) s \cdot
# g^\top (G + \lambda I)^{-1} g \big)$, and it is a squared cosine
# too, measured by the curvature.


# %%
def compare(model, batch, memory):
    """By method, the cosines and the shares of all weights."""
    found = {name: ([], []) for name in steps}
    facts = {"residual": [], "mean eigenvalue": []}
    for name, layer in hidden(model).items():
        if quick() and name.startswith("0"):
            continue
        g = layer.weight.grad.clone()
        G = Damped(ggn_block(model, batch, layer.weight))
        d = cg(G, g.flatten(), tol=0.01).x
        residual = (G @ d - g.flatten()).norm() / g.norm()
        facts["residual"].append(residual.item())
        facts["mean eigenvalue"].append(G.damping)
        for method, step in steps.items():
            s = step(g, memory[name]).flatten()
            fall = (g.flatten() @ s).square() / (s @ (G @ s))
            cosine = s @ d / (s.norm() * d.norm())
            found[method][0].append(cosine.item())
            found[method][1].append((fall / (g.flatten() @ d)).item())
    return found, facts


# %% [markdown]
# ## A race in which all go equally far
#
# Every method moves each weight by the same length, whatever its
# step: only the directions differ. The length is that of Muon, which
# is `rate` times the root of the number of singular values, and falls
# to zero. Each gets the same momentum, but for the exact step, which
# solves for the gradient of the batch whose curvature it knows. All
# other parameters are moved by AdamW, for all alike.


# %%
def train(step, count, rate=0.05, rest=0.01, beta=0.9):
    """The model, its losses, and the averages that were kept."""
    model, memory, losses = fresh(), {}, []
    layers, momenta = hidden(model), {}
    weights = [layer.weight for layer in layers.values()]
    others = [
        p
        for p in model.parameters()
        if not any(p is weight for weight in weights)
    ]
    adamw = torch.optim.AdamW(others, rest, betas=(0.9, 0.95))
    shuffle = torch.Generator().manual_seed(0)
    for k in range(count):
        left = 1 - k / count
        batch = draw(codes[:cut], shuffle)
        losses.append(observe(model, batch, memory))
        moves = []
        for name, layer in layers.items():
            g = layer.weight.grad.clone()
            momentum = momenta.setdefault(name, torch.zeros_like(g))
            momentum.lerp_(g, 1 - beta)
            if step is exact:
                s = exact(g, model, batch, layer.weight)
            else:
                s = step(momentum, memory[name])
            rows, columns = g.shape
            far = rate * left * max(1, rows / columns) ** 0.5
            far *= min(rows, columns) ** 0.5
            moves.append((layer.weight, s * (far / s.norm())))
        adamw.param_groups[0]["lr"] = rest * left
        adamw.step()
        with torch.no_grad():
            for weight, move in moves:
                weight -= move
    return model, losses, memory


def exact(g, model, batch, weight):
    G = Damped(ggn_block(model, batch, weight), 1)
    return cg(G, g.flatten(), tol=0.1, maxiter=40).x.view_as(g)


# %% [markdown]
# Where do we look? At the start, and in the middle of a training,
# here of Muon's. **Predict.** Which steps come nearest to the exact
# one, and does Muon's come nearer than Adam's?

# %% tags=["nbval-ignore-output"]
batch = draw(codes[:cut], torch.Generator().manual_seed(1))
places = {}
middle = 30 if quick() else 120
trained, _, kept = train(steps["Muon"], middle)
for place, model, memory in [
    ("at the start", fresh(), {}),
    ("in training", trained, kept),
]:
    loss = observe(model, batch, memory)
    places[place], facts = compare(model, batch, memory)
    print(f"{place}, at a loss of {loss:.2f}")
    assert max(facts["residual"]) < 0.02
    for method, (cosines, shares) in places[place].items():
        print(
            f"  {method:9} cosine {mean(cosines):.2f}",
            f" share {mean(shares):.2f}",
        )

# %% alt="TO BE DESCRIBED: four panels against the weights; cosines above, shares of the model's decrease below, at the start on the left and in training on the right." tags=["nbval-ignore-output"]
curves(
    [
        Panel(
            f"weight, {place}",
            what,
            {
                method: (range(1, len(both[row]) + 1), both[row])
                for method, both in found.items()
            },
        )
        for row, what in enumerate(["cosine", "share of the fall"])
        for place, found in places.items()
    ]
)


# %%
def average(place, row):
    return {k: mean(v[row]) for k, v in places[place].items()}


for place in places:
    fall = average(place, 1)
    assert fall["K-FAC"] == max(fall.values())
    assert fall["K-FAC"] < 0.8
    assert abs(fall["Muon"] - fall["Shampoo"]) < 0.1
    for method in ("HBP", "Adam", "gradient"):
        assert fall["Muon"] > fall[method] + 0.05
print("Along K-FAC's step the model falls furthest.")
print("Muon's and Shampoo's come next, then all others.")

# %% [markdown]
# So Muon's step is no Newton step, but of those that look at nothing
# but the gradient, it is the nearest, if the curvature measures. The
# plain angle tells less: most directions of a block are flat, and
# there all steps are much the same.
#
# **Predict, then train.** If the direction is what counts, in which
# order will the losses end?

# %% tags=["nbval-ignore-output"]
count = 30 if quick() else 160
held_out = draw(codes[cut:], torch.Generator().manual_seed(2), 256)
races, ends = {}, {}
for method, step in steps.items():
    model, losses, _ = train(step, count)
    races[method] = losses
    with torch.no_grad():
        ends[method] = loss_of(model, held_out).item()
    print(f"{method:9} {ends[method]:.2f} on what was held out")

# %% alt="TO BE DESCRIBED: the loss against the step, for six methods." tags=["nbval-ignore-output"]
curves(
    [
        Panel(
            "step",
            "loss, mean of ten",
            {
                method: (
                    range(10, count + 1, 10),
                    [
                        mean(losses[k - 10 : k])
                        for k in range(10, count + 1, 10)
                    ],
                )
                for method, losses in races.items()
            },
        )
    ]
)

# %%
assert ends["K-FAC"] < ends["Muon"] < ends["HBP"] < ends["Adam"]
assert ends["Adam"] < ends["gradient"]
print("K-FAC, Muon, HBP, Adam, gradient: so they end.")

# %% [markdown]
# ## And the exact step?
#
# It costs seconds, and gets only a few. **Predict.** Will it be ahead
# of K-FAC, which comes nearest to it?

# %% tags=["nbval-ignore-output"]
few = 1 if quick() else 20
short = {}
for method in ["exact", "K-FAC", "Muon", "Adam"]:
    step = exact if method == "exact" else steps[method]
    model, losses, _ = train(step, few)
    with torch.no_grad():
        short[method] = loss_of(model, held_out).item()
    print(f"{method:9} {short[method]:.2f} after {few} steps")

if not quick():
    assert short["exact"] < short["K-FAC"] < short["Muon"]
    assert short["Muon"] < short["Adam"]
    print("The exact step is ahead, step by step.")

# %% [markdown]
# ## Try it yourself
#
# **Exercise 1.** Put back what Muon forgets: orthogonalise
# $g A^{-1}$ in place of $g$, as Newton-Muon does. Does it end nearer
# to K-FAC?

# %% tags=["solution", "nbval-ignore-output"]
model, _, _ = train(
    lambda g, m: orthogonal(g @ damped_inverse(m["A"], 0.1)), count
)
with torch.no_grad():
    newton_muon = loss_of(model, held_out).item()
print(f"{newton_muon:.2f}")

assert newton_muon < ends["Muon"]

# %% [markdown]
# **Exercise 2.** Muon has been read as a Newton step that forgets
# $A$. Let K-FAC forget it, and keep $B$ alone: does that end where
# Muon does? Or forget $B$, and keep $A$?

# %% tags=["solution", "nbval-ignore-output"]
halves = {
    "B alone": lambda g, m: damped_inverse(m["B"]) @ g,
    "A alone": lambda g, m: g @ damped_inverse(m["A"]),
}
half = {}
for name, step in halves.items():
    model, _, _ = train(step, count)
    with torch.no_grad():
        half[name] = loss_of(model, held_out).item()
    print(f"{name} {half[name]:.2f}")

# Orthogonalising divides by a root on either side: it is as well
# g (gᵀg)^(-1/2), and so holds back inputs that K-FAC's A would.
assert half["B alone"] > ends["Muon"] + 0.1

# %% [markdown]
# **Exercise 3.** At the start, Shampoo's step is Muon's. Why are
# their numbers in the first picture not quite the same?

# %% tags=["solution"]
g = fresh().blocks[0].up.weight.detach()
U, _, V = torch.linalg.svd(g, full_matrices=False)
assert torch.allclose(
    fourth_root(g @ g.T) @ g @ fourth_root(g.T @ g), U @ V, atol=0.1
)
sizes = torch.linalg.svdvals(orthogonal(g))
assert 0.5 < sizes.min() < sizes.max() < 1.3
print("Five iterations bring singular values only close to 1.")

# %% [markdown]
# ## References
#
# - Z. Du, W. Su. [The Newton-Muon
#   Optimizer](https://arxiv.org/abs/2604.01472). 2026.
# - N. Abreu et al. [The Potential of Second-Order Optimization for
#   LLMs: A Study with Full
#   Gauss-Newton](https://arxiv.org/abs/2510.09378). 2025.
# - V. Gupta, T. Koren, Y. Singer. Shampoo: Preconditioned stochastic
#   tensor optimization. ICML 2018.
# - K. Jordan et al. Muon: An optimizer for hidden layers in neural
#   networks. 2024.
# - J. Martens, R. Grosse. Optimizing neural networks with
#   Kronecker-factored approximate curvature. ICML 2015.
