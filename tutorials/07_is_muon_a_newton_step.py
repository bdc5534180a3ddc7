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
# values the size 1. That looks at no curvature, yet it
# [has been read](https://arxiv.org/abs/2604.01472) as a Newton step
# that forgets something: how large the layer's inputs are, and in
# which directions.
#
# That can be measured. In a small language model we take, for each
# weight, its exact block of the generalized Gauss-Newton matrix
# (GGN), which is the curvature without what could turn negative, and
# solve for the step that it asks for. Then we hold six cheaper steps
# against it, Muon's among them, let them race, and take away from
# Newton's step what Muon is said to forget.

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
from statistics import mean

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu
from torch.nn.functional import scaled_dot_product_attention as attend

import hbp
from hbp.operators import DiagonalOperator
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
length, width, heads = 32, 48, 4
batch_size = 16 if quick() else 64


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
# The model is a transformer of two blocks, written plainly. What Muon
# moves are its *hidden weights*, six in each block: those that make
# queries, keys and values, the one that mixes what attention has
# found, and the two that lead up into a wider layer and down again.


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
        found = attend(query, key, value, is_causal=True)
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
    hbp.set_seeds(0)
    return GPT().to(device)


def hidden(model):
    """The layers whose weights we look at, by name."""
    return {
        name.removeprefix("blocks.").replace("attention.", ""): layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not model.head
    }


# %% [markdown]
# ## The exact block
#
# Let $z$ be all that the model puts out for a batch, and $J$ its
# Jacobian with respect to *one* weight. Then the weight's block is
# $G = J^\top H J$, where $H$ is the curvature of the loss in $z$,
# one small matrix for each position. A block has 48² × 48² entries or
# more, but `hbp` only multiplies by it, which costs about as much as
# a few gradients. HBP's usual block is cheaper: at each position, it
# takes the mean of a layer's inputs over the batch for all of them.


# %%
def curvature(model, batch):
    """By layer, the exact blocks, and the averaged ones."""
    twin = hbp.convert(model)  # It has the same weights.
    z = twin(batch[0]).flatten(0, 1)
    loss = cross_entropy(z, batch[1].flatten())
    each = hbp.per_sample_hessian(loss, z)  # One for each position.
    summed = each.unflatten(0, (-1, length)).sum(0)
    twin.zero_grad()
    loss.backward()
    found = []
    for output in [each, torch.block_diag(*summed)]:
        twin.backward_hessian(output, modify_2nd_order_terms="ggn")
        found.append(
            {k: m.weight.hessian for k, m in hidden(model).items()}
        )
    return found


def mean_eigenvalue(G, products=12):
    return hbp.estimate_trace(G, products).value / G.shape[0]


def damp(G, size):
    """G + λI."""
    values = torch.full((G.shape[0],), size, device=device)
    return G + DiagonalOperator(values)


# %% [markdown]
# The block may be singular, so we add a damping $\lambda I$, with the
# mean of the block's eigenvalues as $\lambda$. The step that a weight
# is asked to take then minimises the quadratic model
#
# $$ q(d) = g^\top d + \tfrac12 \, d^\top (G + \lambda I) \, d , $$
#
# and conjugate gradients find it: $(G + \lambda I) \, d = -g$.
#
# ## Six steps
#
# If the inputs $x$ of a layer and the gradients $\delta$ at its
# outputs had nothing to do with each other, the block would be
# $B \otimes A$, with $A = \operatorname{E}[x x^\top]$ and
# $B = \operatorname{E}[\delta \delta^\top]$, and Newton's step
# $-B^{-1} g A^{-1}$, where $g$ is a matrix like the weight. That is
# K-FAC. Now forget $A$, and in the place of $B$ take
# $(g g^\top)^{1/2}$: then
#
# $$ -(g g^\top)^{-1/2} \, g $$
#
# has the singular vectors of $g$, and all singular values 1, which is
# Muon's step. Shampoo divides by a root of $g g^\top$ on the left and
# of $g^\top g$ on the right, both averaged over past steps. HBP
# solves with its averaged block, damped like the exact one.
#
# All methods get the same gradient, and what else they need as
# averages over the steps so far. For K-FAC, $\delta$ is the gradient
# of $-\log p(y)$ with a $y$ that is drawn from the model's own
# probabilities $p$.


# %%
def observe(model, batch, memory, keep=0.95):
    """The loss; and to memory, averages of what methods need."""
    layers, passed = hidden(model), {}

    def note(layer, inputs, output):
        passed[layer] = inputs[0].detach().flatten(0, 1), output

    hooks = [m.register_forward_hook(note) for m in layers.values()]
    z = model(batch[0]).flatten(0, 1)
    for handle in hooks:
        handle.remove()
    drawn = torch.multinomial(z.detach().softmax(-1), 1).flatten()
    of_drawn = cross_entropy(z, drawn, reduction="sum")
    outputs = [passed[layer][1] for layer in layers.values()]
    deltas = torch.autograd.grad(of_drawn, outputs, retain_graph=True)
    loss = cross_entropy(z, batch[1].flatten())
    model.zero_grad()
    loss.backward()
    for name, delta in zip(layers, deltas, strict=True):
        g = layers[name].weight.grad
        x, delta = passed[layers[name]][0], delta.flatten(0, 1)
        now = {
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


def inverse_root(matrix):
    """The inverse of the fourth root."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=1e-6 * values.max())
    return vectors * values**-0.25 @ vectors.T


def damped_inverse(matrix, share=0.3):
    """Add a share of the mean eigenvalue, and invert."""
    eye = torch.eye(len(matrix), device=matrix.device)
    damping = share * matrix.trace() / len(matrix)
    return torch.linalg.inv(matrix + damping * eye)


steps = {
    "K-FAC": lambda g, m: (
        damped_inverse(m["B"]) @ g @ damped_inverse(m["A"])
    ),
    "Muon": lambda g, m: orthogonal(g),
    "Shampoo": lambda g, m: (
        inverse_root(m["ggᵀ"]) @ g @ inverse_root(m["gᵀg"])
    ),
    "Adam": lambda g, m: g / (m["g²"].sqrt() + 1e-8),
    "gradient": lambda g, m: g,
}

# %% [markdown]
# Two numbers say how near a step $s$ comes to the exact $d$. One is
# the cosine of the angle between them. The other asks what the step
# is good for: how far does $q$ fall along it, at its best length, as
# a share of how far it falls at all? That is
# $(g^\top s)^2 / \big( s^\top (G + \lambda I) s \cdot
# g^\top (G + \lambda I)^{-1} g \big)$, a squared cosine too, but
# measured by the curvature.


# %%
def compare(model, batch, memory, only="", strength=1.0):
    """By method, cosines and shares; by weight, eigenvalues."""
    found = {name: ([], []) for name in ["HBP", *steps]}
    sizes = {}
    exact, averaged = curvature(model, batch)
    for name, layer in hidden(model).items():
        if not name.startswith(only):
            continue
        G, mine = exact[name], averaged[name]
        size = mean_eigenvalue(G)
        top = hbp.extremal_eigenvalues(G, tolerance=0.01).largest
        sizes[name] = top.item(), size
        G = damp(G, strength * size)
        mine = damp(mine, strength * mean_eigenvalue(mine))
        g = layer.weight.grad
        taken = {k: f(g, memory[name]) for k, f in steps.items()}
        g = g.flatten()
        taken["HBP"] = hbp.cg(mine, g, tol=0.01).x
        d = hbp.cg(G, g, tol=0.01).x
        assert (G @ d - g).norm() < 0.02 * g.norm()
        for method in found:
            s = taken[method].flatten()
            cosine = s @ d / (s.norm() * d.norm())
            share = (g @ s).square() / (s @ (G @ s)) / (g @ d)
            found[method][0].append(cosine.item())
            found[method][1].append(share.item())
    return found, sizes


# %% [markdown]
# ## A race in which all go equally far
#
# Where do we look? At the start, and in the middle of a training. For
# this, and for the race, we need a loop that is the same for all:
# every method moves each weight by the same length, whatever its
# step, so that only the directions differ. The length is that of
# Muon, `rate` times the root of the number of singular values, and
# falls to zero. Each method gets the same momentum, but for the exact
# step, which solves for the gradient of the batch whose curvature it
# knows. All other parameters are moved by AdamW, for all alike.


# %%
def train(step, count, rate=0.05, rest=0.01, beta=0.9):
    """The model, its losses, and the averages that were kept."""
    model, memory, losses = fresh(), {}, []
    layers, momenta = hidden(model), {}
    weights = {id(layer.weight) for layer in layers.values()}
    others = [p for p in model.parameters() if id(p) not in weights]
    adamw = torch.optim.AdamW(others, rest, betas=(0.9, 0.95))
    shuffle = torch.Generator().manual_seed(0)
    for k in range(count):
        left = 1 - k / count
        batch = draw(codes[:cut], shuffle)
        losses.append(observe(model, batch, memory))
        if step is exact:
            for name, G in curvature(model, batch)[0].items():
                memory[name]["G"] = G
        moves = []
        for name, layer in layers.items():
            g = layer.weight.grad
            momentum = momenta.setdefault(name, torch.zeros_like(g))
            momentum.lerp_(g, 1 - beta)
            s = step(g if step is exact else momentum, memory[name])
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


def exact(g, m):
    G = damp(m["G"], mean_eigenvalue(m["G"], 6))
    return hbp.cg(G, g.flatten(), tol=0.1, maxiter=40).x.view_as(g)


# %% [markdown]
# **Predict.** Which steps come nearest to the exact one, and does
# Muon's come nearer than Adam's?

# %% tags=["nbval-ignore-output"]
batch = draw(codes[:cut], torch.Generator().manual_seed(1))
trained, _, kept = train(steps["Muon"], 30 if quick() else 120)
visits = {"at the start": (fresh(), {})}
visits["in training"] = trained, kept
places, spectra = {}, {}
for place, (model, memory) in visits.items():
    loss = observe(model, batch, memory)
    places[place], spectra[place] = compare(
        model, batch, memory, only="1" if quick() else ""
    )
    print(f"{place}, at a loss of {loss:.2f}:   cosine  share")
    for method, both in places[place].items():
        print(f"  {method:10}", *(f"{mean(v):.2f}" for v in both))

# %% alt="Two panels, at the start and in training: the share of the fall against the weights, 1 to 12, for six methods. K-FAC is highest for nearly all weights, mostly between 0.5 and 0.75. Muon and Shampoo run close together below it, between 0.3 and 0.6. HBP is on both sides of them at the start, and mostly under them in training. Adam and the gradient are lowest, and go down to 0.15." tags=["nbval-ignore-output"]
curves(
    [
        Panel(
            f"weight, {place}",
            "share of the fall",
            {
                method: (range(1, len(shares) + 1), shares)
                for method, (_, shares) in found.items()
            },
        )
        for place, found in places.items()
    ]
)


# %%
for found in places.values():
    fall = {name: mean(shares) for name, (_, shares) in found.items()}
    assert fall["K-FAC"] == max(fall.values()) < 0.8
    assert fall["Muon"] < (0.55 if quick() else 0.5)
    assert abs(fall["Muon"] - fall["Shampoo"]) < 0.1
    for method in ("Adam", "gradient"):
        assert fall["Muon"] > fall[method] + 0.05
print("Along K-FAC's step the model falls furthest.")
print("Muon's and Shampoo's go before Adam's and the gradient.")

# %% tags=["nbval-ignore-output"]
if not quick():
    start, later = (
        {name: tuple(map(mean, both)) for name, both in found.items()}
        for found in places.values()
    )
    assert abs(start["HBP"][1] - start["Muon"][1]) < 0.1
    assert later["HBP"][1] < later["Muon"][1] - 0.02
    assert later["gradient"][0] > later["Muon"][0] - 0.05
    print("At the start HBP's goes as far as Muon's, later not;")
    print("and the gradient's cosine is hardly less than Muon's.")

# %% [markdown]
# So Muon's step is no Newton step: along it the model falls not half
# as far as it could. But of the steps that look at nothing but
# gradients it is the best, together with Shampoo's. HBP's, which
# knows mean inputs only, is as good at the start, and then falls
# behind them. The cosines tell less, and in training the gradient has
# one nearly as high as Muon's. The eigenvalues of the exact blocks
# say why.

# %% tags=["nbval-ignore-output"]
for place, sizes in spectra.items():
    print(f"{place}: largest, mean")
    for name, both in sizes.items():
        print(f"  {name:8}", *(f"{value:9.1e}" for value in both))

# %%
pairs = [v for sizes in spectra.values() for v in sizes.values()]
assert min(top / size for top, size in pairs) > 15
print("The largest is far above the mean, in every block.")

# %% [markdown]
# Each block has a few steep directions, and is nearly flat in all
# others. There the damping decides, and the exact step is much like
# the gradient, while how far the model falls depends on the steep
# ones as well.
#
# ### The race
#
# Solving for HBP's step every time would be slow, so it is left out
# of the race. In its place runs *centred*, the step of
# [tutorial 06](06_when_curvature_pays.ipynb) in which no weight moves
# along its layer's mean input.
#
# **Predict, then train.** If the direction is what counts, in which
# order will the losses end?


# %% tags=["nbval-ignore-output"]
def hold_back(g, m):
    x = m["x̄"]
    return g - torch.outer(g @ x, x) / (x @ x)


count = 30 if quick() else 160
held_out = draw(codes[cut:], torch.Generator().manual_seed(2), 256)


def end(name, step, count):
    """Train, print and return the last loss, and all on the way."""
    model, losses, _ = train(step, count)
    with torch.no_grad():
        z = model(held_out[0]).flatten(0, 1)
    last = cross_entropy(z, held_out[1].flatten()).item()
    print(f"{name:11} {last:.2f} on what was held out")
    return last, losses


races = {
    name: end(name, step, count)
    for name, step in {"centred": hold_back, **steps}.items()
}

# %% alt="The loss against the step, for six methods, which all fall from above 3. K-FAC is lowest and ends at 1.7, Muon and Shampoo follow close to each other at 1.8 and 1.9, then centred at 2.2, and at some distance Adam at 2.4 and the gradient at 2.5." tags=["nbval-ignore-output"]
tens = range(10, count + 1, 10)
curves(
    [
        Panel(
            "step",
            "loss, mean of ten",
            {
                name: (tens, [mean(losses[k - 10 : k]) for k in tens])
                for name, (_, losses) in races.items()
            },
        )
    ]
)

# %% tags=["nbval-ignore-output"]
ends = {name: last for name, (last, _) in races.items()}
assert ends["K-FAC"] + 0.02 < ends["Muon"] < ends["Adam"] - 0.05
assert ends["Adam"] < ends["gradient"] - 0.03
print("K-FAC, Muon, Adam, gradient: in this order they end.")
if not quick():
    assert ends["Muon"] + 0.1 < ends["centred"] < ends["Adam"] - 0.1
    print("Centred ends between Muon and Adam.")

# %% [markdown]
# That is nearly the order of the shares in training. With one seed,
# one rate, and lengths that are not their own, this says which
# directions are good, and not which optimizer is.
#
# ## So what does Muon forget?
#
# If Muon were Newton's step without $A$, then K-FAC without $A$
# should end where Muon does. **Predict.** Which half of K-FAC is
# nearer to Muon, $B^{-1} g$ or $g A^{-1}$? And does it help to put
# $A^{-1}$ back, by orthogonalising $g A^{-1}$ in the place of $g$?
# That is Newton-Muon, of those who have read Muon so.

# %% tags=["nbval-ignore-output"]
parts = {
    "B alone": lambda g, m: damped_inverse(m["B"]) @ g,
    "A alone": lambda g, m: g @ damped_inverse(m["A"]),
    "Newton-Muon": lambda g, m: orthogonal(
        g @ damped_inverse(m["A"], 0.1)
    ),
}
part = {k: end(k, step, count)[0] for k, step in parts.items()}

# %%
assert part["B alone"] > max(ends["Muon"], part["A alone"]) + 0.15
assert abs(part["A alone"] - ends["Muon"]) < 0.1
assert part["Newton-Muon"] < ends["Muon"] + 0.05
print("A alone ends about where Muon does, B alone far behind.")

# %% [markdown]
# It is the other way round: Muon ends where K-FAC does without $B$,
# and what it lacks least is $A$. For the same step can be written
# with its root on either side,
#
# $$ (g g^\top)^{-1/2} \, g = g \, (g^\top g)^{-1/2} , $$
#
# and on the right it holds back those inputs along which the gradient
# is large. Those are mostly the ones that $A^{-1}$ holds back, too.
# Newton-Muon, which does both, does not end far from Muon.
#
# ## And the exact step?
#
# It costs seconds, and gets only a few. **Predict.** Will it be ahead
# of K-FAC, which comes nearest to it?

# %% tags=["nbval-ignore-output"]
few = 1 if quick() else 12
entrants = {"exact": exact, "K-FAC": steps["K-FAC"]}
entrants |= {name: steps[name] for name in ("Muon", "Adam")}
short = {k: end(k, step, few)[0] for k, step in entrants.items()}

if not quick():
    assert short["exact"] < short["K-FAC"] < short["Muon"]
    assert short["Muon"] < short["Adam"]
    print("The exact step is ahead, step by step.")

# %% [markdown]
# It is, step by step, and each step takes many times as long as one
# of the others. What it shows is how much there is to be had from a
# better direction, not that anybody should take this one.
#
# ## Try it yourself
#
# **Exercise 1.** All shares depend on the damping. Take a tenth of
# it, in the second block, in training. Who loses most of its share?

# %% tags=["solution", "nbval-ignore-output"]
observe(trained, batch, kept)
only = "1.down" if quick() else "1"
light, _ = compare(trained, batch, kept, only, strength=0.1)
before = places["in training"]
for name in light:
    shares = light[name][1]
    old = mean(before[name][1][-len(shares) :])
    print(f"{name:9} {old:.2f} {mean(shares):.2f}")
    # More directions count now, of which K-FAC knows most.
    assert mean(shares) < old

# %% [markdown]
# **Exercise 2.** At the start, Shampoo's step is Muon's. Why are
# their numbers not quite the same?

# %% tags=["solution"]
g = fresh().blocks[0].up.weight.detach()
U, _, V = torch.linalg.svd(g, full_matrices=False)
assert torch.allclose(
    inverse_root(g @ g.T) @ g @ inverse_root(g.T @ g), U @ V, atol=0.1
)
sizes = torch.linalg.svdvals(orthogonal(g))
assert 0.5 < sizes.min() < sizes.max() < 1.3
print("Five iterations bring singular values only close to 1.")

# %% [markdown]
# **Exercise 3.** How many directions does a gradient have? Look at
# the singular values of that of `1.up`, at the start and in training.

# %% tags=["solution", "nbval-ignore-output"]
second = []
for model, _ in visits.values():
    observe(model, batch, {})
    values = torch.linalg.svdvals(hidden(model)["1.up"].weight.grad)
    print(" ".join(f"{v / values[0]:.3f}" for v in values[:6]))
    second.append((values[1] / values[0]).item())

# At the start it is nearly of rank one: there Muon's step and the
# gradient differ most.
assert 3 * second[0] < second[1]

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
