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
# # Memories and fast weights
#
# A network may learn a new task without any gradient step at all: it is *shown* the examples, and they change
# what it does next. Where does it keep them? This notebook looks at two answers,
#
# 1. an external **memory**: rows that are written and read (memory-augmented networks, Santoro et al. 2016),
#    first by hand, then with a network that has learned to use it,
# 2. **fast weights**: weights made for one task, and others for one query, next to those that were trained
#    (Meta Networks, Munkhdalai & Yu 2017).
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
from jaxmeta.model_based.metanet import attend

started = time.perf_counter()
plt.rcParams.update({"figure.dpi": 110, "font.size": 10})
KEY = jax.random.key(0)
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"]

# %% [markdown]
# ## 1. A memory by hand
#
# The memory $M$ is a matrix of rows. At each step the controller sends a key $k$, what it wants to add $a$
# and a gate $g$, and *least recently used access* does
#
# $$w^w = g\, w^r + (1 - g)\, w^{lu}, \qquad M \leftarrow M + w^w a^\top, \qquad
# w^r = \mathrm{softmax}_i\ \beta \cos(k, M_i), \qquad w^u \leftarrow \gamma w^u + w^r + w^w.$$
#
# It reads the row whose direction is nearest to the key. With $g = 0$ it writes to the row of the smallest
# *usage* $w^u$: a new fact goes where nothing is missed. With $g = 1$ it writes where it read last: what is
# known is improved. And at every step the least used row is emptied before the writing.
#
# `jm.nn.LRUA` is that memory, and its `access` takes keys, gates and additions, so we can play the controller
# ourselves. A capital letter *tells* a fact, $g = 0$, $a = k$; a small one *asks* for it, $g = 1$, $a = 0$.
# All keys are orthogonal. There are five rows and six facts, so one must go.

# %%
STORY = "ABCDaEaFab"
memory = jm.nn.LRUA(rows=5, width=6, heads=1, decay=0.99)
SHARP = jnp.array([20.0])


def play(story, ring=False):
    """Return writes, reads, usage and rows of each step; with `ring`, rows are written in turn instead."""
    state, log = memory.initial(), {"write": [], "read": [], "usage": [], "memory": []}
    facts_written = 0
    for letter in story:
        is_fact = letter.isupper()
        key = jax.nn.one_hot("abcdef".index(letter.lower()), 6)[None]
        used = state["usage"]
        if ring:
            used = (jnp.arange(5) - facts_written) % 5 + 0.0
            facts_written += is_fact
        addition = key if is_fact else jnp.zeros_like(key)
        gate = jnp.array([0.0 if is_fact else 1.0])
        state = memory.access({**state, "usage": used}, key, gate, addition, SHARP)
        log["write"].append(state["usage"] - memory.decay * used - state["read_weights"][0])
        log["read"].append(state["read_weights"][0])
        log["usage"].append(used)
        log["memory"].append(state["memory"])
    return {name: np.stack(values) for name, values in log.items()}


log = play(STORY)
fig, panels = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained", width_ratios=(3, 3, 3, 2))
pictures = {
    "usage before the step": log["usage"].T,
    "written": (log["write"] * [[letter.isupper()] for letter in STORY]).T,
    "read": log["read"].T,
}
for axes, (title, picture) in zip(panels, pictures.items(), strict=False):
    image = axes.imshow(picture, cmap="Blues", vmin=0, vmax=None if "usage" in title else 1, aspect="auto")
    axes.set(title=title, xticks=range(len(STORY)), yticks=range(5), xlabel="step")
    axes.set_xticklabels(list(STORY))
panels[0].set_ylabel("row of the memory")
panels[3].imshow(log["memory"][-1], cmap="Blues", vmin=0, vmax=1, aspect="auto")
_ = panels[3].set(title="memory at the end", xticks=range(6), yticks=range(5), xlabel="fact")
_ = panels[3].set_xticklabels(list("ABCDEF"))

# %% [markdown]
# A to E fill the rows. When F comes, it overwrites the row that has been idle longest, B's. A is older,
# but it was asked for in between, and being read counts as use. So the last two questions find A and no
# longer B: for B's key no row is better than any other, and the reading is spread over all of them.
#
# A ring buffer, which takes its rows in turn, would have thrown A away. And why is C gone at the end? *Every*
# step empties the least used row, a question too. A memory must have more rows than there are facts.

# %%
ring = play(STORY, ring=True)
step_of_f = STORY.index("F")
held = {}
for name, record in (("least recently used", log), ("ring buffer", ring)):
    best = record["memory"][step_of_f].max(0)
    held[name] = "".join(letter for letter, value in zip("ABCDEF", best, strict=True) if value > 0.5)
    print(f"{name:20s} holds {held[name]} when F has come")
assert held == {"least recently used": "ACDEF", "ring buffer": "BCDEF"}
assert log["read"][-2].max() > 0.99
assert log["read"][-1].max() < 0.5
assert log["memory"][-1].max(0).tolist() == [1, 0, 0, 1, 1, 1]

# %% [markdown]
# ## 2. Labels that come one step late
#
# Who sends keys and gates? A network, which learns it over many episodes. An episode is a sequence of
# examples of a few new classes, and at step $t$ the network gets $x_t$ and the label of the step *before*,
# $y_{t-1}$. To be right it must keep $x_{t-1}$ until its label comes, bind the two, and find the pair again
# when the class comes back. Labels are shuffled from one episode to the next, so that weights cannot know
# them: only the memory of this episode can hold them.
#
# The first time a class comes one can only guess. The best guess takes one of the $j$ labels not seen yet, so
# the first presentations of $N$ classes are right with probability $\frac1N \sum_{j=1}^N \frac1j$ at
# best: 61 % for three. From the second on all can be right.
#
# Our examples are points: a class is a direction in 12 dimensions, an example is a noisy copy of it.

# %%
WAYS, STEPS, DIM = 3, 15, 12


def points(seed, classes):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(classes, 1, DIM)) + 0.15 * rng.normal(size=(classes, 8, DIM))
    x = (x / np.sqrt(DIM)).astype(np.float32).reshape(-1, DIM)
    tasks = jm.tasks.from_arrays(x, np.repeat(np.arange(classes), 8), ways=WAYS, shots=5, queries=1)
    return jm.tasks.sequences(tasks, length=STEPS)


train, test = points(seed=0, classes=1000), points(seed=1, classes=300)
support = test.sample(jax.random.key(8)).support
print("classes of one episode:", "".join("ABC"[y] for y in support.y))

# %% [markdown]
# We train two networks. The controller of one is an LSTM, which has a state of its own and could do without a
# memory. The controller of the other is feed-forward: it sees only the present step and what it reads.
# For comparison, the LSTM also trains with no memory at all.

# %%
LRUA = {"rows": 12, "width": 16, "heads": 1, "key_strength": True}


def network(memory, controller):
    return jm.nn.MemoryNetwork(out=WAYS, memory=memory, hidden=40, controller=controller)


def by_presentation(network, params):
    learner = jm.mann(network, shuffle=False, instances=5)
    metrics = jm.evaluate_metrics(learner, params, test, episodes=1000, key=KEY)
    return np.array([metrics[f"instance_{i}"] for i in range(1, 6)])


networks = {
    "LSTM, memory": network(jm.nn.LRUA(**LRUA), "lstm"),
    "LSTM alone": network(None, "lstm"),
    "feed-forward, memory": network(jm.nn.LRUA(**LRUA), "feed_forward"),
}
params, accuracy = {}, {}
for name, net in networks.items():
    begun = time.perf_counter()
    state = jm.train(
        jm.mann(net, shuffle=False),
        train,
        optax.adam(3e-3),
        steps=2000,
        key=KEY,
        meta_batch=32,
        strategy="vmap",
    )
    params[name], accuracy[name] = state.params, by_presentation(net, state.params)
    print(f"{name:21s} {time.perf_counter() - begun:4.0f} s  ", " ".join(f"{p:.0%}" for p in accuracy[name]))

# %% [markdown]
# ### What breaks without it
#
# Does a network *use* its memory? We take parts away from a trained one, leaving all weights as they are:
#
# - *nothing written*: additions are zero;
# - *always the same row*: a write to the least used row finds the first one, whatever the usage;
# - *never a new row*: gates are 1, and it writes only where it has just read.

# %%


class NothingWritten(jm.nn.LRUA):
    def access(self, state, keys, gates, additions, strengths=None):
        return super().access(state, keys, gates, jnp.zeros_like(additions), strengths)


class SameRow(jm.nn.LRUA):
    def access(self, state, keys, gates, additions, strengths=None):
        state = {**state, "usage": jnp.arange(self.rows) + 0.0}
        return super().access(state, keys, gates, additions, strengths)


class NeverANewRow(jm.nn.LRUA):
    def access(self, state, keys, gates, additions, strengths=None):
        return super().access(state, keys, jnp.ones_like(gates), additions, strengths)


KINDS = {
    "whole": jm.nn.LRUA,
    "never a new row": NeverANewRow,
    "always the same row": SameRow,
    "nothing written": NothingWritten,
}
broken = {
    controller: {
        kind: by_presentation(network(memory(**LRUA), controller), params[name])
        for kind, memory in KINDS.items()
    }
    for controller, name in (("lstm", "LSTM, memory"), ("feed_forward", "feed-forward, memory"))
}
fig, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True, layout="constrained")
for axes, (controller, accuracies) in zip(panels, broken.items(), strict=True):
    for (kind, values), color in zip(accuracies.items(), ["k", *COLORS], strict=False):
        axes.plot(range(1, 6), 100 * values, "o-", color=color, label=kind, linewidth=2)
    axes.axhline(100 / WAYS, color="0.6", linestyle=":")
    axes.set(title=f"controller: {controller.replace('_', '-')}", xticks=range(1, 6), ylim=(20, 102))
    axes.set_xlabel("presentation of the class")
    axes.grid(alpha=0.3)
panels[0].plot(range(1, 6), 100 * accuracy["LSTM alone"], "s--", color="0.5", label="trained without one")
panels[0].set_ylabel("accuracy, %")
_ = panels[0].legend(loc="lower right", title="memory")

# %% [markdown]
# The feed-forward network depends entirely on its memory. With nothing written it is at chance (dotted); with
# one row for everything, or none but those it has just read, each new fact damages an old one, and accuracy
# hardly rises with more presentations. The LSTM has shared the work between its state and its memory: it
# falls too, but not to chance. Yet an LSTM *trained* without a memory comes close to the whole network, as
# three classes fit into its state. Taking a part away shows what a network relies on, not what it needs: for
# that it must be trained without. `benchmarks/README.md` has both for Omniglot, with five classes in fifty
# images.

# %%
whole, others = broken["feed_forward"]["whole"], broken["feed_forward"]
assert whole[4] > 0.8
assert whole[0] < 0.63  # the educated guess
assert abs(others["nothing written"][1:].mean() - 1 / WAYS) < 0.05
for kind in ("never a new row", "always the same row"):
    assert others[kind][4] < whole[4] - 0.15, kind
assert broken["lstm"]["nothing written"][4] > others["nothing written"][4] + 0.1
assert accuracy["LSTM alone"][4] > broken["lstm"]["nothing written"][4] + 0.1

# %% [markdown]
# ### Watching it
#
# One test episode of the feed-forward network. Each column is a step, and its letter the class that is shown;
# the label of a class is known one step later.

# %%
net, weights = networks["feed-forward, memory"], {"params": params["feed-forward, memory"]["network"]}


@jax.jit
def watch(support):
    labels = jax.nn.one_hot(support.y, WAYS)
    before = jnp.concatenate([jnp.zeros((1, WAYS)), labels[:-1]])
    projected = net.apply(weights, jnp.concatenate([support.x, before], 1), method="project")

    def step(state, now):
        after, features = net.apply(weights, state, now, method="step")
        used, kept = after["memory"]["usage"], net.memory.decay * state["memory"]["usage"]
        written = used - kept - after["memory"]["read_weights"].sum(0)
        return after, (after["memory"], written, features)

    _, (memories, written, features) = jax.lax.scan(step, net.initial(), projected)
    return memories, written, net.apply(weights, features, method="outputs")


memories, written, outputs = watch(support)
right = outputs.argmax(1) == support.y
fig, panels = plt.subplots(3, 1, figsize=(8.5, 7.2), sharex=True, layout="constrained")
for axes, title, picture in (
    (panels[0], "written to", written.T),
    (panels[1], "read from", memories["read_weights"][:, 0].T),
    (panels[2], "usage afterwards", memories["usage"].T),
):
    image = axes.imshow(picture, cmap="Blues", vmin=0, aspect="auto")
    axes.set(title=title, ylabel="row", yticks=range(0, LRUA["rows"], 3))
    fig.colorbar(image, ax=axes, pad=0.01)
panels[2].set_xticks(range(STEPS))
panels[2].set_xticklabels(
    [f"{'ABC'[y]}\n{'✓' if good else '✗'}" for y, good in zip(support.y, right, strict=True)]
)
for label, y in zip(panels[2].get_xticklabels(), support.y, strict=True):
    label.set_color(COLORS[int(y)])

fig, axes = plt.subplots(1, 4, figsize=(10, 2.8), sharey=True, layout="constrained")
for panel, t in zip(axes, (1, 4, 8, STEPS - 1), strict=True):
    image = panel.imshow(memories["memory"][t], cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto")
    panel.set(title=f"memory after step {t + 1}", xlabel="entry of a row")
axes[0].set_ylabel("row")
_ = fig.colorbar(image, ax=axes)

# %% [markdown]
# New classes go to rows of their own, one after the other; when a class comes back the reading returns to
# rows where it was written, and what is written there again makes them longer. How much of the reading goes
# to what was written with the class that is shown? Each row counts by the share of that class in it; the
# means are over many episodes:

# %%
many = jax.vmap(lambda key: test.sample(key).support)(jax.random.split(KEY, 500))
logs, wrote, _ = jax.vmap(watch)(many)
# For each row, what has been written with each class until the step before.
of_class = jnp.cumsum(wrote[..., None] * jax.nn.one_hot(many.y, WAYS)[:, :, None], 1)
of_class = jnp.concatenate([jnp.zeros_like(of_class[:, :1]), of_class[:, :-1]], 1)
shares = of_class / jnp.maximum(of_class.sum(-1, keepdims=True), 1e-6)
share_of_shown = jnp.take_along_axis(shares, many.y[:, :, None, None], -1)[..., 0]
reading = logs["read_weights"][:, :, 0]
mass = (reading * share_of_shown).sum(-1)
times = jnp.tril(many.y[:, :, None] == many.y[:, None, :], -1).sum(-1)
by_time = [float(mass[times == i].mean()) for i in range(5)]
print(
    "share of the reading on rows of the class shown, 1st to 5th time:", " ".join(f"{m:.0%}" for m in by_time)
)
assert by_time[0] < 0.05
assert by_time[4] > 0.4

# %% [markdown]
# ## 3. Fast weights
#
# Meta Networks remember in another place: in weights. Two networks have slow weights that are trained, an
# embedding $u$ and a base learner $b$. From the gradients of the support set at these slow weights, two small
# generators make *fast* weights, coordinate by coordinate: $Q^*$ of the task, for the embedding, and one set
# $W^*_i$ of every example, for the base learner. A query mixes the latter by attention,
# $W^* = \sum_i \mathrm{softmax}_i \cos(r_i, r)\, W^*_i$, and every layer adds two activations,
#
# $$z = \mathrm{ReLU}(W h) + \mathrm{ReLU}(W^* h).$$
#
# A small one, on drawn characters, five classes with one example each:

# %%
CLASSES = 5
embedding, base = (jm.nn.AugmentedCNN(ways, filters=8, blocks=3, features=32) for ways in (None, CLASSES))
learner = jm.metanet(embedding, base, embedding_loss="xent")
slow_keys = jm.metanet(embedding, base, embedding_loss="xent", task_weights="none")
train_glyphs, test_glyphs = (
    jm.tasks.glyphs(part, ways=CLASSES, queries=5, size=14) for part in ("train", "test")
)
begun = time.perf_counter()
state = jm.train(learner, train_glyphs, optax.adam(3e-3), steps=150, key=KEY, meta_batch=4)
meta = state.params
print(f"trained for {time.perf_counter() - begun:.0f} s")


def without(adapted, *parts):
    """Return the adapted state of a task with the fast weights set to zero."""
    return {**adapted, **{part: jax.tree.map(jnp.zeros_like, adapted[part]) for part in parts}}


@jax.jit
def answers(key):
    support, query = test_glyphs.sample(key)
    both, task_less = (each.adapt(meta, support, key) for each in (learner, slow_keys))
    outputs = {
        "slow and fast": learner.predict(meta, both, query.x),
        "no fast weights of the task": slow_keys.predict(meta, task_less, query.x),
        "no fast weights of examples": learner.predict(meta, without(both, "values"), query.x),
        "slow alone": slow_keys.predict(meta, without(task_less, "values"), query.x),
    }
    return outputs, query.y


logits, truth = jax.lax.map(answers, jax.random.split(KEY, 200))
right = {name: float((out.argmax(-1) == truth).mean()) for name, out in logits.items()}
for name, value in right.items():
    print(f"{name:28s} {value:5.1%}")
assert right["slow and fast"] > 0.7
assert abs(right["slow alone"] - 1 / CLASSES) < 0.05
assert abs(right["no fast weights of examples"] - 1 / CLASSES) < 0.05

# %% [markdown]
# Labels mean nothing outside their task, so the slow base learner alone can be no better than chance: all its
# information about *this* task is in $W^*$. Taking $Q^*$ from the embedding costs next to nothing: an
# embedding serves many tasks as it is. In the paper, training without it costs half a point (98.4 % in place
# of 98.95 %).
#
# Where does a task live? For each layer of the base learner, we compare the size of the slow weights with the
# distance of the queries' fast weights from their mean over 100 tasks, as roots of mean squares:

# %%


@jax.jit
def fast_weights(key):
    """Return the fast weights for the first query of each class of a task."""
    support, query = test_glyphs.sample(key)
    adapted = learner.adapt(meta, support, key)
    first = query.x[::5]
    r = embedding.apply({"params": meta["embedding"]}, first, adapted["embedding"])
    attention = attend(adapted["keys"], adapted["mask"], r)
    return jax.tree.map(lambda values: jnp.tensordot(attention, values, 1), adapted["values"])


fast = jax.lax.map(fast_weights, jax.random.split(KEY, 100))
spread = {}
print(f"{'layer':8s} {'slow':>8s} {'fast':>8s} {'fast, from their mean':>22s}")
for name in sorted(meta["base"]):
    slow, generated = meta["base"][name]["kernel"], fast[name]["kernel"]
    deviations = generated - generated.mean((0, 1))
    sizes = [float(jnp.sqrt(jnp.square(x).mean())) for x in (slow, generated, deviations)]
    spread[name] = sizes[2]
    print(f"{name:8s} {sizes[0]:8.4f} {sizes[1]:8.4f} {sizes[2]:22.4f}")
assert max(spread[f"conv_{i}"] for i in range(3)) < 0.1 * min(spread["fc"], spread["head"])

fig, panels = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True, layout="constrained")
pictures = {
    "slow": meta["base"]["head"]["kernel"],
    "fast, task 1, a query of class 0": fast["head"]["kernel"][0, 0],
    "task 1, of class 3": fast["head"]["kernel"][0, 3],
    "task 2, of class 0": fast["head"]["kernel"][1, 0],
}
for axes, (name, kernel) in zip(panels, pictures.items(), strict=True):
    bound = float(jnp.abs(pictures["slow" if name == "slow" else "task 1, of class 3"]).max())
    image = axes.imshow(kernel.T, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", interpolation="none")
    axes.set_title(name, fontsize=9)
    axes.set_xlabel("feature")
    fig.colorbar(image, ax=axes)
_ = panels[0].set(ylabel="class", yticks=range(CLASSES))

# %% [markdown]
# It lives in the linear layers: fast convolutions are nearly the same in every task, a change of all filters
# by one number. (For mini-ImageNet the authors give fast weights to the last layers only.) In the head the
# fast weights even outweigh the slow ones. They differ from task to task, as a task's labels demand, and less
# from query to query: attention without a temperature mixes all examples nearly evenly.
#
# The figure shows the probabilities of the 25 queries of one task, five of each class, without fast weights
# and with them.

# %%
fig, panels = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
for axes, name in zip(panels, ("slow alone", "slow and fast"), strict=True):
    image = axes.imshow(jax.nn.softmax(logits[name][1]).T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(title=name, xlabel="query", yticks=range(CLASSES))
    axes.set_xticks(np.arange(2, 25, 5), [f"class {c}" for c in range(CLASSES)])
panels[0].set_ylabel("answer")
_ = fig.colorbar(image, ax=panels)

# %%
print(f"running time: {time.perf_counter() - started:.0f} s")
