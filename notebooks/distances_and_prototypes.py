# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Distances and prototypes
#
# Some methods do not adapt a network to a new task at all. They embed the few labelled examples, the
# *support set*, and compare each new example, a *query*, with them. What is learned is the embedding, once,
# over many tasks. This notebook
#
# 1. draws what such a comparison does in the plane, for three similarities and four ways to combine them,
# 2. shows why the *mean* represents a class, and for which distances it is the right choice,
# 3. trains an embedding on drawn characters and looks at it before and after,
# 4. adds classes later, without the examples of the old ones.
#
# It runs in about a minute on two CPU cores; the last cell prints the time it took.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxmeta as jm

started = time.perf_counter()
plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
KEY = jax.random.key(0)

# %% [markdown]
# ## 1. A label is a weighted mean of labels
#
# The support set $S$ holds examples $x_i$ with one-hot labels $y_i$. All methods of this section answer
#
# $$P(y \mid x, S) = \sum_i k(x, x_i)\, y_i, \qquad k \ge 0, \quad \sum_i k(x, x_i) = 1,$$
#
# the estimate of Nadaraya and Watson: examples vote, and similar ones have more of a say. The weights are
# $k(x, x_i) = \kappa_i / \sum_j \kappa_j$ with $\kappa_i = \exp\big(\text{scale} \cdot s(f(x), f(x_i))\big)$,
# where $f$ is the embedding and the similarity $s$ is one of
#
# | name | $s(a, b)$ |
# | --- | --- |
# | `cosine` | $a \cdot b \,/\, \lVert a \rVert \lVert b \rVert$ |
# | `dot` | $a \cdot b$ |
# | `euclidean` | $-\lVert a - b \rVert^2$ |
#
# and `reduce` says how a class combines its examples: the `sum` of their $\kappa_i$, their `mean`, the
# $\kappa_i$ of the `nearest` example, or $\kappa$ of their mean embedding, the `prototype`. (For more than
# one example per class the last is not of the form above, as the mean of embeddings is not the mean of
# kernels.)
#
# With points in the plane we need no network: $f$ is the identity. Any pair of functions `(init, apply)`
# is a model.

# %%
identity = jm.nn.as_model((lambda key, x: {}, lambda params, x: x.reshape(x.shape[0], -1)))


def log_probabilities(learner, support, points):
    params = learner.init(KEY, jm.Task(support, support))
    adapted = learner.adapt(params, support, KEY)
    return jax.nn.log_softmax(learner.predict(params, adapted, points))


def kernel(similarity, reduce, scale=1.0):
    return jm.kernel_classifier(identity, similarity=similarity, reduce=reduce, scale=scale)


def batch(points, labels):
    return jm.Batch(jnp.array(points), jnp.array(labels), ways=2)


# %% [markdown]
# ### Two answers by pencil and paper
#
# *Prototypes.* $v_1 = (0, 0)$, $v_2 = (2, 0)$ and a query at $(\tfrac12, 0)$: the squared distances are
# $\tfrac14$ and $\tfrac94$, so $P_1 = 1 / (1 + e^{-2}) = 0.8808$.
#
# *Counting.* $A$ at $(1, 0)$, $B$ at $(0, 1)$ and a query at $(3, 4)$: the cosines are $0.6$ and $0.8$, so
# $P_A = 1/(1 + e^{0.2}) = 0.4502$. Now put a *second copy* of $A$'s example into the support set. It adds no
# information about $A$, but it votes twice: $P_A = 2e^{0.6} / (2e^{0.6} + e^{0.8}) = 0.6208$, and the answer
# flips. A prototype does not change when it is averaged with itself.

# %%
pair = batch([[0.0, 0.0], [2.0, 0.0]], [0, 1])
near = jnp.exp(log_probabilities(jm.prototypical(identity), pair, jnp.array([[0.5, 0.0]])))[0, 0]
print(f"prototypes, query at (1/2, 0):        P = {near:.4f}")
np.testing.assert_allclose(near, 1 / (1 + np.exp(-2)), rtol=1e-6)

once, twice = batch([[1.0, 0.0], [0.0, 1.0]], [0, 1]), batch([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0, 0, 1])
counted = {}
for name, learner in {
    "sum of kernels (jm.matching)": jm.matching(identity),
    "mean of kernels": kernel("cosine", "mean"),
    "nearest": kernel("cosine", "nearest"),
    "prototype": kernel("cosine", "prototype"),
}.items():
    query = jnp.array([[3.0, 4.0]])
    counted[name] = [float(jnp.exp(log_probabilities(learner, s, query))[0, 0]) for s in (once, twice)]
    print(f"{name:30s} P(A) = {counted[name][0]:.4f},  with A's example twice {counted[name][1]:.4f}")

for name, (before, after) in counted.items():
    np.testing.assert_allclose(before, 0.450166, atol=1e-6)
    np.testing.assert_allclose(after, 0.620848 if "sum" in name else before, atol=1e-6)

# %% [markdown]
# ### One episode under every kernel
#
# Class $A$ has two examples and $B$ six, one of them a stray among $A$'s. The colour is $P(A)$, the line is
# where the two classes are equally likely, and the number is the share of the square that is assigned to $A$.

# %%
A, B = (
    [[-1.7, 0.5], [-0.5, 1.3]],
    [[1.3, 0.2], [1.9, -0.6], [0.7, -1.1], [1.5, 1.1], [0.1, -1.9], [-1.5, 1.9]],
)
support = batch(A + B, [0] * len(A) + [1] * len(B))
side = jnp.linspace(-2.6, 2.6, 120)
grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
SIMILARITIES, REDUCTIONS = ("cosine", "dot", "euclidean"), ("sum", "mean", "prototype", "nearest")
outputs = {(s, r): log_probabilities(kernel(s, r), support, grid) for s in SIMILARITIES for r in REDUCTIONS}

fig, panels = plt.subplots(3, 4, figsize=(10, 7.4), sharex=True, sharey=True, layout="constrained")
for row, similarity in zip(panels, SIMILARITIES, strict=True):
    for axes, reduce in zip(row, REDUCTIONS, strict=True):
        p = np.exp(outputs[similarity, reduce][:, 0]).reshape(len(side), -1)
        image = axes.pcolormesh(
            side, side, p, cmap="PuOr", vmin=0, vmax=1, shading="gouraud", rasterized=True
        )
        axes.contour(side, side, p, levels=[0.5], colors="k", linewidths=1.5)
        axes.plot(*zip(*A, strict=True), "^", color="#8073ac", mec="w", markersize=9, label="A, two examples")
        axes.plot(*zip(*B, strict=True), "o", color="#e08214", mec="w", markersize=8, label="B, six examples")
        axes.plot(0, 0, "k+", markersize=8, label="origin")
        share = f"A has {(p > 0.5).mean():.0%}"
        axes.text(0.04, 0.05, share, transform=axes.transAxes, bbox={"fc": "w", "ec": "none", "pad": 2})
        axes.set(aspect="equal", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
        axes.grid(False)
    row[0].set_ylabel(similarity, fontsize=12)
for axes, reduce in zip(panels[0], REDUCTIONS, strict=True):
    axes.set_title(reduce)
fig.colorbar(image, ax=panels, label="$P(A \\mid x, S)$", shrink=0.6)
_ = fig.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

# %% [markdown]
# What the maps show:
#
# - **Rows.** The cosine depends on directions only, so its maps are constant along rays from the origin. The
#   dot product rewards length: far out, the longest examples win, and an example need not be most similar to
#   itself. Only the Euclidean distance depends on *where* the examples are.
# - **`sum` and `mean`** differ by the class's count: by $\log \tfrac26$ in the log-odds, everywhere. Cosines
#   differ by 2 at most, so at scale 1 the count outweighs them: `sum` gives $A$ next to
#   nothing, and the other maps are pale. That is why implementations multiply cosines by 10 or more.
# - **`prototype`** with the Euclidean distance has a straight boundary. Indeed
#   $-\lVert z - v_c \rVert^2 = -\lVert z \rVert^2 + 2 v_c \cdot z - \lVert v_c \rVert^2$, whose first term is
#   the same for all classes: a *linear* classifier with weights $2 v_c$ and biases $-\lVert v_c \rVert^2$,
#   computed rather than trained. With the dot product the bias is missing, and the line goes through the
#   origin.
# - **The stray.** For `nearest` it owns a piece of the plane; the prototype takes it as one voice in six.
#
# The next cell checks each of these statements:

# %%
log_odds = {name: np.asarray(out[:, 0] - out[:, 1], np.float64) for name, out in outputs.items()}
affine = np.column_stack([grid, np.ones(len(grid))])


def bend(values):
    """Return the largest distance of the values from the best affine function of the plane."""
    return np.abs(values - affine @ np.linalg.lstsq(affine, values, rcond=None)[0]).max()


for similarity in SIMILARITIES:
    shift = log_odds[similarity, "sum"] - log_odds[similarity, "mean"]
    np.testing.assert_allclose(shift, np.log(len(A) / len(B)), atol=1e-4)
for reduce in REDUCTIONS:  # a ray: the cosine ignores the query's length
    far = log_probabilities(kernel("cosine", reduce), support, 3 * grid)
    np.testing.assert_allclose(jnp.exp(far), jnp.exp(outputs["cosine", reduce]), atol=1e-5)
bends = {name: bend(values) for name, values in log_odds.items()}
assert bends["euclidean", "prototype"] < 1e-4
assert bends["dot", "prototype"] < 1e-4
at_origin = log_probabilities(kernel("dot", "prototype"), support, jnp.zeros((1, 2)))[0]
np.testing.assert_allclose(at_origin[0], at_origin[1], atol=1e-6)
assert (log_odds["cosine", "sum"] > 0).mean() < 0.01
assert all(b > 0.1 for name, b in bends.items() if name[1] != "prototype" or name[0] == "cosine")

squared = ((grid[:, None] - support.x[None]) ** 2).sum(-1)
by_hand = support.y[squared.argmin(1)]
assert (outputs["euclidean", "nearest"].argmax(1) == by_hand).mean() > 0.999  # except for ties
for learner, name in (
    (jm.prototypical(identity), ("euclidean", "prototype")),
    (jm.matching(identity), ("cosine", "sum")),
):
    np.testing.assert_allclose(log_probabilities(learner, support, grid), outputs[name], atol=1e-4)

products = support.x @ support.x.T
outranked = int((products.argmax(1) != jnp.arange(len(support.y))).sum())
stray = (
    log_probabilities(kernel("euclidean", "nearest"), support, support.x[-1:]),
    log_probabilities(kernel("euclidean", "prototype"), support, support.x[-1:]),
)
print(f"examples that have a larger dot product with another example than with themselves: {outranked} of 8")
print(
    "P(A) at the stray example of B: nearest {:.2f}, prototype {:.4f}".format(
        *(jnp.exp(s[0, 0]) for s in stray)
    )
)
assert outranked > 0
assert stray[0][0, 1] > stray[0][0, 0]
assert stray[1][0, 0] > stray[1][0, 1]

# %% [markdown]
# ### Scale: from counting to the nearest neighbour
#
# The scale is an inverse temperature. Towards 0 all weights are equal, and the answer is the classes' shares
# of the support set, here $\tfrac28$, whatever the query. Towards infinity only the nearest example has a
# say. In between lies a smooth answer.

# %%
line = jnp.stack([side, jnp.full_like(side, 1.0)], -1)
fig, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
cut = {}
for scale, color in ((1e-3, "0.65"), (0.3, "#56B4E9"), (1.0, "#0072B2"), (5.0, "#D55E00"), (1e3, "k")):
    cut[scale] = np.exp(log_probabilities(kernel("euclidean", "sum", scale), support, line)[:, 0])
    style = "--" if scale in (1e-3, 1e3) else "-"
    axes.plot(side, cut[scale], style, color=color, linewidth=2, label=f"{scale:g}")
axes.set(
    xlabel="$x_1$, along the line $x_2 = 1$", ylabel="$P(A)$", title="Euclidean, sum: one cut, five scales"
)
axes.legend(title="scale", loc="upper right")
np.testing.assert_allclose(cut[1e-3], len(A) / len(support.y), atol=0.02)
one_nearest = support.y[((line[:, None] - support.x[None]) ** 2).sum(-1).argmin(1)] == 0
assert (np.abs(cut[1e3] - one_nearest) < 0.5).all()

# %% [markdown]
# ## 2. Why the mean?
#
# A prototype should be the point nearest to the examples it represents: the $v$ that minimises
# $\sum_i d(z_i, v)$. For the *squared* Euclidean distance that is the mean, a well-known result. It is one
# of a family. For a strictly convex $\varphi$, the **Bregman divergence**
#
# $$d_\varphi(z, v) = \varphi(z) - \varphi(v) - (z - v) \cdot \nabla\varphi(v)$$
#
# is how far the tangent at $v$ lies below $\varphi$ at $z$. Its gradient in $v$ is short, because the terms
# with $\nabla\varphi(v)$ cancel:
#
# $$\nabla_v \sum_i d_\varphi(z_i, v) = -\nabla^2\varphi(v) \sum_i (z_i - v).$$
#
# $\nabla^2\varphi$ is positive definite where $\varphi$ curves, so this vanishes if and only if
# $\sum_i (z_i - v) = 0$: at the mean, **whatever $\varphi$ is**. The converse holds too: a (smooth) distance
# whose best representative is always the mean is a Bregman divergence (Banerjee et al., 2005).
#
# We let gradient descent find the minimiser, for three generators $\varphi$ and for three distances that are
# not of the family.

# %%
z = jnp.array([[0.5, 1.2], [0.9, 0.6], [0.8, 1.7], [1.9, 1.8], [1.4, 0.9], [4.1, 0.6]])
mean = np.asarray(z.mean(0), np.float64)


def bregman(phi):
    return lambda z, v: phi(z) - phi(v) - (z - v) @ jax.grad(phi)(v)


def square(z):
    return (z**2).sum()


def negative_entropy(z):
    return (z * jnp.log(z)).sum()


def burg(z):
    return -jnp.log(z).sum()


def cosine_distance(z, v):
    return 1 - z @ v / (jnp.linalg.norm(z) * jnp.linalg.norm(v))


kl = bregman(negative_entropy)
distances = {
    "squared Euclidean": bregman(square),
    "Kullback-Leibler": kl,
    "Itakura-Saito": bregman(burg),
    "Euclidean, not squared": lambda z, v: jnp.linalg.norm(z - v),
    "cosine": cosine_distance,
    "Kullback-Leibler, swapped": lambda z, v: kl(v, z),
}
FAMILY = list(distances)[:3]


def total(distance, v, z=z):
    return jax.vmap(lambda one: distance(one, v))(z).sum()


def minimiser(distance, z=z, steps=3000):
    """Return the minimiser, by Adam over log v, so that v stays positive as some distances require."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def step(carry, _):
        u, state = carry
        updates, state = optimizer.update(jax.grad(lambda u: total(distance, jnp.exp(u), z))(u), state)
        return (u + updates, state), None

    start = jnp.zeros(z.shape[1], z.dtype)
    return jnp.exp(jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)[0][0])


minimisers, excess = {}, {}
with jax.enable_x64(True):
    points = jnp.asarray(z, jnp.float64)
    print(f"{'distance':27s}  minimiser          total there   at the mean {mean.round(3)}")
    for name, distance in distances.items():
        minimisers[name] = np.asarray(minimiser(distance, points))
        least, there = (float(total(distance, v, points)) for v in (minimisers[name], mean))
        excess[name] = there / least - 1
        print(
            f"{name:27s} ({minimisers[name][0]:.4f}, {minimisers[name][1]:.4f}) {least:12.4f} {there:12.4f}"
        )

# %%
side_v = jnp.linspace(0.25, 4.4, 90), jnp.linspace(0.25, 2.2, 60)
plane = jnp.stack(jnp.meshgrid(*side_v), -1).reshape(-1, 2)
fig, panels = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True, sharey=True, layout="constrained")
for axes, (name, distance) in zip(panels.flat, distances.items(), strict=True):
    heights = jax.vmap(lambda v, distance=distance: total(distance, v))(plane).reshape(60, 90)
    levels = np.quantile(heights, [0, 0.02, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    axes.contourf(*side_v, heights, levels=levels, cmap="Blues_r", alpha=0.6)
    axes.plot(*z.T, "o", color="0.25", mec="w", markersize=6, label="points $z_i$")
    axes.plot(*mean, "*", color="#E69F00", mec="k", markersize=17, label="mean")
    axes.plot(
        *minimisers[name],
        "x",
        color="#CC0033",
        mew=2.5,
        markersize=9,
        label="minimiser of $\\sum_i d(z_i, v)$",
    )
    if name == "cosine":
        axes.plot(
            [0, 4.4], [0, 4.4 * minimisers[name][1] / minimisers[name][0]], "--", color="#CC0033", linewidth=1
        )
    axes.set(title=f"Bregman: {name}" if name in FAMILY else name, xlim=(0.25, 4.4), ylim=(0.25, 2.2))
    axes.grid(False)
for axes in panels[:, 0]:
    axes.set_ylabel("$v_2$")
for axes in panels[-1]:
    axes.set_xlabel("$v_1$")
_ = fig.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

# %% [markdown]
# Top row: three different landscapes (darker is lower), one minimiser, the mean. Bottom row:
#
# - Without the square the minimiser is the *median* of the points, which one far point hardly moves.
# - The cosine distance has no single minimiser but a ray of them, along the mean of the points' *unit*
#   vectors. The mean lies off the ray, pulled aside by the long vector.
# - Even for a Bregman divergence the side matters: as *first* argument the best point is not the mean. For
#   Kullback-Leibler it is the geometric mean.
#
# So a prototypical network with squared Euclidean distances is consistent with itself, and with cosines it is
# not. The paper found that this matters: on mini-ImageNet (5 ways, 5 shots, trained with 20 ways) 68.20 %
# against 51.48 %. `jm.prototypical` takes any $\varphi$ as its `divergence`.

# %%
for name in FAMILY:
    np.testing.assert_allclose(minimisers[name], mean, atol=1e-3)
    assert excess[name] < 1e-6
for name in set(distances) - set(FAMILY):
    assert np.linalg.norm(minimisers[name] - mean) > 0.1, name
    assert excess[name] > 0.01, name
units = np.asarray(z / jnp.linalg.norm(z, axis=1, keepdims=True)).sum(0)
np.testing.assert_allclose(minimisers["cosine"][1] / minimisers["cosine"][0], units[1] / units[0], rtol=1e-3)
np.testing.assert_allclose(minimisers["Kullback-Leibler, swapped"], np.exp(np.log(z).mean(0)), rtol=1e-3)
median = minimisers["Euclidean, not squared"]  # the unit vectors from it to the points balance
pulls = (np.asarray(z) - median) / np.linalg.norm(np.asarray(z) - median, axis=1, keepdims=True)
np.testing.assert_allclose(pulls.sum(0), 0, atol=1e-3)
with jax.enable_x64(True):  # the far point goes twice as far
    moved = jnp.asarray(z, jnp.float64).at[-1, 0].mul(2)
    median_shift = np.linalg.norm(minimiser(distances["Euclidean, not squared"], moved) - median)
    mean_shift = np.linalg.norm(moved.mean(0) - mean)
print(f"far point twice as far: the mean moves by {mean_shift:.2f}, the median by {median_shift:.2f}")
assert median_shift < 0.1 * mean_shift

# The library uses the same distances: with one example per class, outputs are -d(z, v_c).
prototypes = batch([[0.5, 1.0], [2.0, 0.7]], [0, 1])
for phi in (square, negative_entropy, burg):
    learner = jm.prototypical(identity, divergence=phi)
    adapted = learner.adapt({"model": {}}, prototypes, KEY)
    expected = [[-bregman(phi)(one, v) for v in prototypes.x] for one in z]
    np.testing.assert_allclose(learner.predict({"model": {}}, adapted, z), expected, atol=1e-4)

# %% [markdown]
# ## 3. An embedding, before and after
#
# Now $f$ is a network, and the tasks are drawn characters: `jm.tasks.glyphs` invents classes of two or three
# strokes and draws every example with another hand. Training and test classes are disjoint. One test episode
# has 5 classes with 5 support images and 15 queries each:

# %%
test_tasks = {shots: jm.tasks.glyphs("test", ways=5, shots=shots, queries=15) for shots in (1, 5)}
episode = jax.jit(test_tasks[5].sample)(jax.random.key(3))
COLORS, MARKERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#4D4D4D", "#D55E00"), "os^DvP"

fig, axes = plt.subplots(figsize=(7.2, 3.3), layout="constrained")
tiles = [part.x[..., 0].reshape(5, -1, 28, 28)[:, :5] for part in episode]
tiles = jnp.pad(jnp.concatenate(tiles, 1), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.4)
strip = np.asarray(tiles.transpose(0, 2, 1, 3).reshape(5 * 30, 10 * 30))
axes.imshow(1 - strip, cmap="gray", vmin=0, vmax=1)
axes.axvline(149.5, color="k", linewidth=3)
axes.set_xticks([75, 225], ["support set", "some of the queries"])
axes.set_yticks(15 + 30 * np.arange(5), [f"class {c + 1}" for c in range(5)])
for label, color in zip(axes.get_yticklabels(), COLORS, strict=False):
    label.set_color(color)
axes.tick_params(length=0)
axes.grid(False)

# %% [markdown]
# The embedding is the usual stack of four convolutions, with 16 channels in place of 64; it maps an image to
# 16 numbers. We train a prototypical network on tasks of 20 classes, which is harder than the test: more ways
# in training give better embeddings (Snell et al. use 60).
#
# Batch normalisation needs care. While training, an episode is normalised by its own statistics. At test
# that would let a query's answer depend on the other queries, so we fill *population* statistics over
# training tasks with `jm.calibrate` and use those (`norm="population"`). It changes no parameter.

# %%
STEPS = 250
train_tasks = jm.tasks.glyphs("train", ways=20, shots=1, queries=5)
model = jm.nn.as_model(jm.nn.Conv4(filters=16))
trainer, tester = jm.prototypical(model), jm.prototypical(model, norm="population")

optimizer = optax.adam(3e-3)
untrained = jm.init_state(trainer, optimizer, train_tasks, KEY).params  # where training starts

progress = []
clock = time.perf_counter()
state = jm.train(
    trainer,
    train_tasks,
    optimizer,
    steps=STEPS,
    key=KEY,
    meta_batch=1,
    report=lambda event: progress.append(event) if isinstance(event, jm.training.Progress) else None,
)
print(f"{STEPS} steps in {time.perf_counter() - clock:.1f} s, with {progress[0].compile_s:.1f} s to compile")
for event in progress:
    print(f"step {event.step:4d}   20-way accuracy in training {event.metrics['accuracy']:.2f}")

params = {
    name: jm.calibrate(trainer, variables, train_tasks, jax.random.key(1), episodes=50)
    for name, variables in (("untrained network", untrained), ("trained network", state.params))
}

# %% [markdown]
# The next cell measures the accuracy on classes never trained on, over 200 episodes. The baseline looks at
# pixels: the nearest support image, which is `jm.kernel_classifier` on the identity.

# %%
pixels = jm.kernel_classifier(identity, similarity="euclidean", reduce="nearest")
contestants = {"pixels, nearest": (pixels, {"model": {}}), **{n: (tester, p) for n, p in params.items()}}
accuracy = {
    name: {
        shots: jm.evaluate(learner, variables, tasks, episodes=200, key=jax.random.key(2))
        for shots, tasks in test_tasks.items()
    }
    for name, (learner, variables) in contestants.items()
}
print("accuracy in %         5 ways, 1 shot   5 ways, 5 shots      (chance: 20)")
for name, row in accuracy.items():
    print(f"{name:20s}" + "".join(f"{100 * e.mean:12.1f} ± {100 * e.ci95:.1f}" for e in row.values()))

for shots in test_tasks:
    mean_of = {name: row[shots].mean for name, row in accuracy.items()}
    assert mean_of["trained network"] > mean_of["pixels, nearest"] + 0.1
    assert mean_of["untrained network"] < mean_of["pixels, nearest"]
    assert mean_of["untrained network"] > 0.3
assert accuracy["trained network"][1].mean > 0.75
assert accuracy["trained network"][1].mean > accuracy["pixels, nearest"][5].mean

# %% [markdown]
# An untrained network is *worse* than pixels: random filters and pooling discard what distinguishes
# characters. Trained, it does better from one example than pixels from five.
#
# ### The episode, drawn
#
# We project the embeddings of the queries onto their two directions of largest variance (by the singular
# value decomposition), and the prototypes with them. A hollow mark is a misclassified query. The
# decision is taken in all dimensions, not in the two that can be drawn. For comparison we do the same with
# pixels, whose prototypes are mean images.


# %%
def embedded(learner, embedding, variables, task):
    """Return queries, prototypes, and the predicted class of each query."""

    def run(variables, task):
        adapted = learner.adapt(variables, task.support, KEY)
        chosen = learner.predict(variables, adapted, task.query.x).argmax(1)
        if embedding.apply_norm is None:
            queries = embedding.apply(variables["model"], task.query.x)
        else:
            queries, _ = embedding.apply_norm(variables["model"], task.query.x, stats=adapted["stats"])
        return queries, adapted["fitted"]["prototypes"], chosen

    return tuple(map(np.asarray, jax.jit(run)(variables, task)))


def project(points, *others):
    centre = points.mean(0)
    _, values, directions = np.linalg.svd(points - centre, full_matrices=False)
    explained = (values[:2] ** 2).sum() / (values**2).sum()
    return explained, *((each - centre) @ directions[:2].T for each in (points, *others))


def scatter(axes, queries, prototypes, wrong, labels):
    for c in range(labels.max() + 1):
        for hollow in (False, True):
            chosen = (labels == c) & (wrong == hollow)
            face = "none" if hollow else COLORS[c]
            axes.plot(*queries[chosen].T, MARKERS[c], mec=COLORS[c], mfc=face, markersize=5.5, alpha=0.85)
    for c, point in enumerate(prototypes):
        axes.plot(*point, "*", color=COLORS[c], mec="k", markersize=19, zorder=3)
    axes.set(xticks=[], yticks=[])


views = {
    "pixels": embedded(jm.prototypical(identity), identity, {"model": {}}, episode),
    **{name: embedded(tester, model, trained, episode) for name, trained in params.items()},
}
labels = np.asarray(episode.query.y)
fig, panels = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
ratio, right = {}, {}
for axes, (name, (queries, prototypes, chosen)) in zip(panels, views.items(), strict=True):
    explained, flat, stars = project(queries, prototypes)
    scatter(axes, flat, stars, chosen != labels, labels)
    right[name] = (chosen == labels).mean()
    axes.set_title(f"{name}: {right[name]:.0%} of these right")
    axes.set_xlabel(f"2 of {queries.shape[1]} dimensions, {explained:.0%} of the variance")
    d = ((queries[:, None] - prototypes[None]) ** 2).sum(-1)
    to_class = d[np.arange(len(d)), labels]
    to_other = np.where(np.eye(5, dtype=bool)[labels], np.inf, d).min(1)
    ratio[name] = np.median(to_class / to_other)
handles = [
    plt.Line2D([], [], linestyle="", marker=m, color=c, label=f"class {i + 1}")
    for i, (m, c) in enumerate(zip(MARKERS[:5], COLORS[:5], strict=True))
]
handles += [
    plt.Line2D([], [], linestyle="", marker="o", mec="k", mfc="none", label="wrong"),
    plt.Line2D([], [], linestyle="", marker="*", mec="k", color="w", markersize=15, label="prototype"),
]
_ = fig.legend(handles=handles, loc="outside lower center", ncols=7)

print("squared distance to the prototype of the class / to the nearest other one, median over the queries:")
for name, value in ratio.items():
    print(f"  {name:20s}{value:.2f}")
assert ratio["trained network"] < 0.6 * min(ratio["pixels"], ratio["untrained network"])
assert right["trained network"] > max(right["pixels"], right["untrained network"])

# %% [markdown]
# Training never saw these classes, and nothing was trained on this episode. What was learned is which
# differences between drawings matter: those between characters, and not those between hands.
#
# ## 4. Classes that come later
#
# A prototypical classifier is a list of class means. A new class is one more row, and the old examples are
# not needed: they may be gone. `jm.add_class` embeds the new class's examples and appends their mean. The
# learner gets 5 classes first, then 15 more, one after another, in 40 test episodes, and we compare it with a
# learner that gets all 20 at once.

# %%
FIRST, ALL, SHOTS = 5, 20, 5
many = jm.tasks.glyphs("test", ways=ALL, shots=SHOTS, queries=5)
episodes = jax.jit(jax.vmap(many.sample))(jax.random.split(jax.random.key(4), 40))
trained = params["trained network"]
images = episodes.support.x.reshape(40, ALL, SHOTS, 28, 28, 1)
first_labels = jnp.repeat(jnp.arange(FIRST), SHOTS)


@jax.jit
@jax.vmap
def adapt_first(images):
    support = jm.Batch(images[:FIRST].reshape(-1, 28, 28, 1), first_labels, ways=FIRST)
    return tester.adapt(trained, support, KEY)


adapted = adapt_first(images)
first_adapted = adapted
for new in range(FIRST, ALL):
    adapted = jax.vmap(lambda old, x: jm.add_class(model, trained, old, x))(adapted, images[:, new])
at_once = jax.jit(jax.vmap(lambda support: tester.adapt(trained, support, KEY)))(episodes.support)

stored = [np.asarray(fitted["fitted"]["prototypes"]) for fitted in (first_adapted, adapted, at_once)]
np.testing.assert_array_equal(stored[1][:, :FIRST], stored[0])  # what is known of a class never changes
np.testing.assert_allclose(stored[1], stored[2], atol=1e-4)

# %% [markdown]
# Each class has one column of the outputs, and it depends on that class's prototype alone. So the answer
# among the first $n$ classes can be read off the first $n$ columns.

# %%
predict = jax.jit(jax.vmap(lambda adapted, x: tester.predict(trained, adapted, x)))
outputs = {
    name: np.asarray(predict(fitted, episodes.query.x))
    for name, fitted in (("one by one", adapted), ("at once", at_once))
}
truth = np.asarray(episodes.query.y)


def accuracy_among(outputs, ways, queried):
    """Return the accuracy on queries of the first `queried` classes, with `ways` known classes."""
    return (outputs[..., :ways].argmax(-1) == truth)[truth < queried].mean()


ways = np.arange(FIRST, ALL + 1)
grown, whole = (
    np.array([accuracy_among(outputs[name], n, n) for n in ways]) for name in ("one by one", "at once")
)
oldest = np.array([accuracy_among(outputs["one by one"], n, FIRST) for n in ways])
fig, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.plot(ways, whole, "o", mfc="none", mec="#E69F00", mew=2, markersize=10, label="all at once")
axes.plot(ways, grown, ".-", color="#0072B2", label="added one by one")
axes.plot(ways, oldest, "^:", color="#CC79A7", markersize=5, label="queries of the first five classes only")
axes.plot(ways, 1 / ways, "--", color="0.4", label="chance")
axes.set(xlabel="classes known", ylabel="accuracy", ylim=(0, 1), title="Classes added later")
axes.set_xticks(range(FIRST, ALL + 1, 3))
axes.legend(loc="center right", bbox_to_anchor=(1, 0.42))
print(f"accuracy with {FIRST} classes {grown[0]:.3f}")
print(f"accuracy with {ALL} classes: one by one {grown[-1]:.3f}, at once {whole[-1]:.3f}")
print(f"kept per episode: {ALL} x {stored[1].shape[-1]} numbers, in place of {ALL * SHOTS} images of 784")
assert np.abs(grown - whole).max() < 0.002
assert grown[-1] > 0.6
assert np.abs(oldest - grown).max() < 0.04

# %% [markdown]
# Whether classes are added one by one or all at once, the classifier is the same. Accuracy falls slowly,
# because there are more classes to confuse, and for the first five classes no more than for the rest: nothing
# is *forgotten*. A network that is fine-tuned on each new class has no such guarantee.
#
# This needs statistics that do not depend on the other images: `norm="population"` (or `"support"`, which
# keeps those of the first support set). With `norm="batch"` there is no prototype to keep, since the next
# queries change them all.
#
# ### To try
#
# - Give $A$ in section 1 the stray example of $B$ twice more. Which of the twelve maps change?
# - Write $\varphi(z) = z^\top M z$ with a positive definite $M$. Which distance is it? Check that the mean
#   minimises it, and pass it to `jm.prototypical` as `divergence`.
# - By hand: where is the minimiser of $\sum_i d_\varphi(v, z_i)$, in the *first* argument? (Set its gradient
#   to zero; a mean of the $\nabla\varphi(z_i)$ appears.) Check it on the Itakura-Saito divergence.
# - Train with `ways=5` in place of 20, with all else the same. How much is lost, and is the comparison fair
#   when a step sees fewer images?
# - Train `jm.matching(model, scale=1.0)` and with `scale=10.0`, and compare. With scale 1 and 5 classes no
#   answer can be surer than 0.6488: why?
# - Evaluate the trained parameters with `norm="batch"`. Does the accuracy differ, and what does that learner
#   get to see of an episode that this one does not?

# %%
print(f"running time: {time.perf_counter() - started:.0f} s")
