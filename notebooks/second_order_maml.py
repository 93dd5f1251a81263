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
# # The second-order term of MAML
#
# MAML (Finn, Abbeel & Levine, 2017) learns an initialisation $\theta$ from which a few gradient steps
# on a handful of examples are enough. Training it means differentiating *through* those gradient
# steps, and there a second derivative appears. This notebook
#
# 1. computes that term by hand where it fits on a line: a quadratic in one dimension,
# 2. shows why leaving it out (first-order MAML, FOMAML) moves the answer,
# 3. shows in two dimensions that the order of a matrix product matters,
# 4. trains MAML and FOMAML on sine waves and measures how far their meta-gradients are apart.
#
# It runs in about a minute on two CPU cores; the last cell prints the time it took.

# %%
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import jaxmeta as jm

started = time.perf_counter()
plt.rcParams.update({"figure.dpi": 110, "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
MAML, FOMAML = "C0", "C1"

# %% [markdown]
# ## 1. Two losses, one gradient
#
# A task has a *support* set to learn from and a *query* set for evaluation, with losses $L^S$ and
# $L^Q$. The **inner loop** takes $n$ gradient steps on the support loss, starting from $\theta$:
#
# $$\theta_0 = \theta, \qquad
#   \theta_j = \theta_{j-1} - \alpha\,\nabla L^S(\theta_{j-1}), \qquad j = 1 \dots n .$$
#
# The **outer loop** asks how to move the *start* $\theta$ so that the *end* $\theta_n$ has a small query
# loss. By the chain rule, with $H_j = \nabla^2 L^S(\theta_j)$,
#
# $$g_\text{MAML} = \nabla_\theta L^Q(\theta_n)
#   = \underbrace{(I-\alpha H_0)(I-\alpha H_1)\cdots(I-\alpha H_{n-1})}
#     _{\text{how the end moves with the start}} \;\nabla L^Q(\theta_n).$$
#
# FOMAML pretends that the inner gradients do not depend on $\theta$. Every $H_j$ drops out, the
# product becomes the identity, and what remains is
#
# $$g_\text{FOMAML} = \nabla L^Q(\theta_n).$$
#
# **A word on the name.** MAML is *not* a second-order optimiser. Newton's method divides by the
# curvature to take a better step; MAML's inner and outer updates are both plain first-order updates
# (SGD inside, Adam outside). Only its *meta-gradient* contains second derivatives, because it is the
# gradient of something that contains a gradient. And no Hessian is ever formed: a Hessian times a
# vector costs no more than a few gradients.

# %% [markdown]
# ### By hand, on a line
#
# Take $L^S(\theta) = \tfrac12 a(\theta - s)^2$ and $L^Q(\theta) = \tfrac12 b(\theta - q)^2$. The curvature is
# the constant $a$, so every factor is $1-\alpha a$:
#
# $$\theta_n = s + (1-\alpha a)^n (\theta - s), \qquad
#   g_\text{FOMAML} = b\,(\theta_n - q), \qquad
#   g_\text{MAML} = (1-\alpha a)^n\, g_\text{FOMAML}.$$
#
# `jm.inner_loop` builds the inner loop for any loss and any optax optimizer; it is the engine under
# `jm.maml`. We differentiate through it and compare with the formulas.

# %%
a, s, b, q, alpha, theta = 2.0, 1.0, 1.0, 3.0, 0.1, 0.0


def support_loss(theta, batch):
    return 0.5 * a * (theta - batch["s"]) ** 2


def query_loss(theta):
    return 0.5 * b * (theta - q) ** 2


def meta_gradient(theta, steps, order):
    adapt = jm.inner_loop(support_loss, optax.sgd(alpha), steps, order=order)
    return jax.grad(lambda start: query_loss(adapt(start, {"s": s})[0]))(theta)


pencil_and_paper = {  # n: theta_n, g_FOMAML, g_MAML
    1: (0.2, -2.8, -2.24),
    2: (0.36, -2.64, -1.6896),
    3: (0.488, -2.512, -1.286144),
    5: (0.67232, -2.32768, -0.7627341824),
}

print(" n   theta_n    factor    g_FOMAML     g_MAML   g_MAML / g_FOMAML")
with jax.enable_x64(True):
    for n, expected in pencil_and_paper.items():
        theta_n, _ = jm.inner_loop(support_loss, optax.sgd(alpha), n)(jnp.float64(theta), {"s": s})
        first = meta_gradient(jnp.float64(theta), n, "first")
        second = meta_gradient(jnp.float64(theta), n, "second")
        factor = (1 - alpha * a) ** n
        np.testing.assert_allclose([theta_n, first, second], expected, rtol=1e-10)
        np.testing.assert_allclose(second, factor * first, rtol=1e-10)
        print(f"{n:2d}{theta_n:10.5f}{factor:10.5f}{first:12.5f}{second:11.5f}{second / first:20.5f}")

# %% [markdown]
# Both gradients point the same way here, and differ by the factor $(1-\alpha a)^n$. Its meaning: after
# $n$ steps the end $\theta_n$ remembers only that fraction of where it started. MAML takes into account that
# moving the start is of little use once adaptation has forgotten it; FOMAML does not.
#
# ### Does a positive factor matter? With two tasks, yes
#
# On *one* task both gradients vanish at the same $\theta$. Now let two tasks have different curvatures $a_i$
# and let support and query loss have the same minimum ($q_i = s_i$, $b = 1$). With $r_i = (1-\alpha a_i)^n$,
#
# $$g_\text{MAML} = \sum_i r_i^2\,(\theta - s_i), \qquad g_\text{FOMAML} = \sum_i r_i\,(\theta - s_i),$$
#
# so MAML comes to rest at $\theta^\star = \sum r_i^2 s_i / \sum r_i^2$, FOMAML at
# $\sum r_i s_i / \sum r_i$. A steep task ($a = 8$, small $r$) can be learned from anywhere, so
# the start should serve the flat one ($a = 1$). FOMAML sees only half of that argument.

# %%
curvature, centre, steps = jnp.array([1.0, 8.0]), jnp.array([-1.0, 1.0]), 1


def two_task_loss(theta, order):
    def one(a, s):
        def loss(theta, s):
            return 0.5 * a * (theta - s) ** 2

        adapted, _ = jm.inner_loop(loss, optax.sgd(alpha), steps, order=order)(theta, s)
        return 0.5 * (adapted - s) ** 2

    return jax.vmap(one)(curvature, centre).mean()


r = (1 - alpha * curvature) ** steps
rest = {
    "second": float((r**2 * centre).sum() / (r**2).sum()),
    "first": float((r * centre).sum() / r.sum()),
}
for order, point in rest.items():
    assert abs(jax.grad(two_task_loss)(point, order)) < 1e-6

thetas = jnp.linspace(-1.5, -0.2, 200)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
ns = np.arange(0, 9)
left.plot(ns, b * (s + (1 - alpha * a) ** ns * (theta - s) - q), "o-", color=FOMAML, label="FOMAML")
left.plot(
    ns,
    (1 - alpha * a) ** ns * b * (s + (1 - alpha * a) ** ns * (theta - s) - q),
    "o-",
    color=MAML,
    label="MAML",
)
left.set(
    xlabel="inner steps $n$", ylabel="meta-gradient at $\\theta = 0$", title="One task: same sign, other size"
)
left.legend()
right.plot(thetas, jax.vmap(lambda t: two_task_loss(t, "second"))(thetas), color="0.3", label="meta-loss")
for order, color, name in (("second", MAML, "MAML"), ("first", FOMAML, "FOMAML")):
    right.plot(
        rest[order],
        two_task_loss(rest[order], "second"),
        "o",
        markersize=9,
        color=color,
        label=f"{name} rests at $\\theta$ = {rest[order]:.3f}",
    )
right.set(
    xlabel="$\\theta$", ylabel="mean query loss after 1 step", title="Two tasks: FOMAML misses the minimum"
)
_ = right.legend()

# %% [markdown]
# ## 2. In two dimensions: the order of the product
#
# In one dimension factors commute. Matrices do not, and a hand-written implementation can get the
# product backwards and still look healthy. Take $L^S(x, y) = x^2 y$, $L^Q(x, y) = x + 2y$, start at
# $(1, 2)$ with $\alpha = 0.1$ and two steps. The curvature changes on the way:
#
# $$\nabla L^S = \begin{pmatrix} 2xy \\ x^2 \end{pmatrix}, \qquad
#   H = \begin{pmatrix} 2y & 2x \\ 2x & 0 \end{pmatrix}, \qquad
#   g_\text{MAML} = (I - \alpha H_0)(I - \alpha H_1) \begin{pmatrix} 1 \\ 2 \end{pmatrix}.$$
#
# The factor of the **first** step is leftmost: reverse-mode differentiation starts at the query loss and
# passes the last step first and the first step last.

# %%
with jax.enable_x64(True):
    start = jnp.array([1.0, 2.0])

    def surface(theta, batch):
        del batch
        return theta[0] ** 2 * theta[1]

    def jacobian_factor(theta):
        return jnp.eye(2) - 0.1 * jax.hessian(surface)(theta, None)

    adapt = jm.inner_loop(surface, optax.sgd(0.1), steps=2)
    end, _ = adapt(start, None)
    middle = start - 0.1 * jax.grad(surface)(start, None)
    first_order = jnp.array([1.0, 2.0])  # the gradient of x + 2y, wherever we end
    through = jax.grad(lambda theta: jnp.dot(adapt(theta, None)[0], first_order))(start)
    by_hand = jacobian_factor(start) @ jacobian_factor(middle) @ first_order
    backwards = jacobian_factor(middle) @ jacobian_factor(start) @ first_order

    print("theta_2                ", end)
    print("autodiff through 2 steps", through)
    print("(I-aH0)(I-aH1) g        ", by_hand)
    print("(I-aH1)(I-aH0) g        ", backwards, " <- the wrong order")
    print("FOMAML: g alone         ", first_order)
    np.testing.assert_allclose(end, [0.372, 1.864], rtol=1e-10)
    np.testing.assert_allclose(through, [-0.148, 1.804], rtol=1e-10)
    np.testing.assert_allclose(by_hand, through, rtol=1e-10)
    np.testing.assert_allclose(backwards, [-0.092, 1.776], rtol=1e-10)

# %% [markdown]
# Note the sign: $x$ should go *up* by MAML's gradient and *down* by FOMAML's. With strong curvature the
# two can disagree about the direction itself.
#
# ## 3. On sine waves
#
# The regression benchmark of the paper: each task is a wave $y = A\sin(x - \varphi)$ with
# $A \sim U[0.1, 5]$ and $\varphi \sim U[0, \pi]$; the learner sees $K = 10$ points and must find the whole
# curve. The network is an MLP with two hidden layers of 40 ReLU units, the inner loop one step of SGD with
# $\alpha = 0.01$, the meta-batch 25 tasks. The paper trains for 70,000 meta-steps; some thousands are enough
# to see what we are after.
#
# Two numbers to keep in mind: always answering 0 has a mean squared error of 4.25, and the best answer
# that does not look at the $K$ points has 3.01. Everything below that was *learned from the points*.

# %%
META_STEPS, EVERY = 6000, 500
train_tasks = jm.tasks.sinusoid("train", shots=10, queries=10)
test_tasks = jm.tasks.sinusoid("test", shots=10, queries=100)


def build(factory, eval_steps=1):
    return factory(
        jm.nn.MLP(out=1),
        inner_lr=0.01,
        inner_steps=1,
        eval_steps=eval_steps,
        loss=jm.losses.mse,
    )


learners = {"MAML": build(jm.maml), "FOMAML": build(jm.fomaml)}
colors = {"MAML": MAML, "FOMAML": FOMAML}

# %% [markdown]
# `jm.train` passes events to its `report` function: `Progress` whenever it logs the loss, `Saved` after each
# checkpoint. We keep the loss for the learning curve and the parameters for later.

# %%
curves, snapshots, states = {}, {}, {}
for name, learner in learners.items():
    progress, kept = [], {}
    with tempfile.TemporaryDirectory() as run_dir:

        def report(event, progress=progress, kept=kept, run_dir=run_dir):
            if isinstance(event, jm.training.Progress):
                progress.append(event)
            if isinstance(event, jm.training.Saved):
                kept[event.step] = jm.training.load_params(run_dir)

        clock = time.perf_counter()
        states[name] = jm.train(
            learner,
            train_tasks,
            optax.adam(1e-3),
            steps=META_STEPS,
            key=jax.random.key(0),  # both learners start alike and see the same tasks
            meta_batch=25,
            strategy="vmap",
            run_dir=run_dir,
            checkpoint_every=EVERY,
            report=report,
        )
    curves[name], snapshots[name] = progress, kept
    rate = np.median([event.steps_per_second for event in progress])
    print(
        f"{name:7s} {META_STEPS} meta-steps in {time.perf_counter() - clock:.1f} s, of which "
        f"{progress[0].compile_s:.1f} s compiling; {rate:.0f} meta-steps/s"
    )

# %%
fig, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, progress in curves.items():
    axes.plot(
        [p.step for p in progress], [p.metrics["mse"] for p in progress], color=colors[name], label=name
    )
axes.axhline(3.00567, color="0.4", linestyle="--", linewidth=1)
axes.annotate("best without looking at the points", (META_STEPS, 3.05), ha="right", va="bottom", color="0.4")
axes.set(xlabel="meta-step", ylabel="query MSE after 1 step", yscale="log", title="Meta-training")
axes.set_yticks([0.6, 0.8, 1, 2, 3, 4])
axes.set_yticks([], minor=True)
axes.yaxis.set_major_formatter("{x:g}")
_ = axes.legend()

# %% [markdown]
# For the first thousand or so meta-steps nothing seems to happen: the weights start near zero (standard
# deviation 0.01), and first the network finds the best *fixed* answer. Then it discovers that it can
# arrange its weights so that one gradient step bends the curve onto the points.
#
# ### Adaptation, drawn
#
# One tall test wave. The start (dotted) is not a good fit to anything; it is a good place to leave from.
# `eval_steps` may differ from the number of steps in training.

# %%
task = test_tasks.sample(jax.random.key(8))
x = jnp.linspace(-5, 5, 200)[:, None]
fig, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
order = jnp.argsort(task.query.x[:, 0])
for axes, (name, state) in zip(panels, states.items(), strict=True):
    axes.plot(task.query.x[order], task.query.y[order], color="0.75", linewidth=5, label="the wave")
    for eval_steps, style, color in ((0, ":", "0.3"), (1, "--", "C2"), (5, "-.", "C4"), (10, "-", "C3")):
        learner = build(jm.maml, eval_steps)  # adaptation itself does not depend on the order
        adapted = learner.adapt(state.params, task.support, jax.random.key(0))
        label = "before" if eval_steps == 0 else f"{eval_steps} step" + "s" * (eval_steps > 1)
        axes.plot(x, learner.predict(state.params, adapted, x), style, color=color, label=label)
    axes.plot(task.support.x, task.support.y, "k^", markersize=7, label="the K = 10 points")
    axes.set(xlabel="$x$", title=name)
panels[0].set_ylabel("$y$")
_ = fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)

# %% [markdown]
# ### Error by number of steps
#
# We take the mean over 600 test tasks, with its 95 % confidence interval. Both learners get the same tasks.

# %%
by_steps = {name: {} for name in learners}
for eval_steps in (0, 1, 5, 10):
    learner = build(jm.maml, eval_steps)
    for name, state in states.items():
        by_steps[name][eval_steps] = jm.evaluate(
            learner, state.params, test_tasks, episodes=600, key=jax.random.key(2)
        )

print("test MSE     " + "".join(f"{n:>7d} " + ("step  " if n == 1 else "steps ") for n in by_steps["MAML"]))
for name, row in by_steps.items():
    print(f"{name:10s}" + "".join(f"{e.mean:9.2f} ±{e.ci95:.2f}" for e in row.values()))

fig, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, row in by_steps.items():
    axes.errorbar(
        list(row),
        [e.mean for e in row.values()],
        [e.ci95 for e in row.values()],
        marker="o",
        capsize=4,
        color=colors[name],
        label=name,
    )
axes.axhline(3.00567, color="0.4", linestyle="--", linewidth=1)
axes.annotate("best without looking at the points", (10, 3.1), ha="right", va="bottom", color="0.4")
axes.set(
    xlabel="inner steps at test",
    ylabel="test MSE",
    ylim=(0, None),
    title="Trained for 1 step, tested with 0 to 10",
)
_ = axes.legend()
for row in by_steps.values():
    assert row[1].mean < 0.5 * 3.00567, "one step must learn from the points"
    assert row[10].mean < row[1].mean, "ten steps must be better than one"

# %% [markdown]
# ### How far apart are the two meta-gradients?
#
# At each saved $\theta$ we compute both meta-gradients over the same 2,000 tasks. `loss` of a learner is one
# task's meta-loss and its plain gradient *is* the meta-gradient, so this is one call of `jax.grad` each. We
# compare direction (the cosine) and size (the ratio of norms), along the path of MAML and along the path of
# FOMAML.


# %%
@jax.jit
def compare(params):
    keys = jax.random.split(jax.random.key(3), 2000)
    tasks = jax.vmap(train_tasks.sample)(keys)

    def gradient(learner):
        def mean_loss(params):
            return jax.vmap(lambda task, key: learner.loss(params, task, key)[0])(tasks, keys).mean()

        return ravel_pytree(jax.grad(mean_loss)(params))[0]

    true, first = gradient(learners["MAML"]), gradient(learners["FOMAML"])
    norms = jnp.linalg.norm(true), jnp.linalg.norm(first)
    return jnp.dot(true, first) / (norms[0] * norms[1]), norms[1] / norms[0]


fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, kept in snapshots.items():
    values = np.array([compare(params) for params in kept.values()])
    left.plot(list(kept), values[:, 0], "o-", color=colors[name], label=f"along {name}'s training")
    right.plot(list(kept), values[:, 1], "o-", color=colors[name], label=f"along {name}'s training")
    print(f"{name:7s} cosine", " ".join(f"{value:6.2f}" for value in values[:, 0]))
left.axhline(0, color="0.4", linewidth=1)
left.set(xlabel="meta-step", ylim=(-0.35, 1.05), title="cosine of true and first-order meta-gradient")
right.axhline(1, color="0.4", linewidth=1)
right.set(xlabel="meta-step", yscale="log", title="size: first-order / true")
right.set_yticks([0.1, 0.2, 0.5, 1, 2])
right.set_yticks([], minor=True)
right.yaxis.set_major_formatter("{x:g}")
for axes in (left, right):
    axes.legend()

# %% [markdown]
# Early in training the two nearly agree: with weights near zero the curvature is small, and $I - \alpha H$ is
# close to the identity. That is why FOMAML works at all. Once the network learns to adapt, one step of
# $\alpha = 0.01$ has to change its outputs a lot, which takes a large curvature, and the directions part.
#
# Now look at the sizes along FOMAML's path: the first-order meta-gradient dies away while the true one does
# not. This is the two-task example of section 1 again. FOMAML walks to the point where *its own* mean
# gradient vanishes, and comes to rest although the true meta-gradient still points downhill. The
# meta-loss left behind is the gap between the two learning curves.
#
# That gap depends on the problem. On Omniglot the published numbers of the two methods lie close together,
# 98.7 against 98.3 % at 5 ways and 1 shot, and first order needs no backward pass through the inner gradient.
#
# ### To try
#
# - Set `inner_steps=5` in `build`: the product has five factors. How does the cosine change?
# - Halve $\alpha$: by the formula, what should happen to the gap, and does it?
# - Replace `inner_lr=0.01` by `inner_optimizer=optax.sgd(0.01, momentum=0.9)` and use 5 steps: which matrix
#   takes the place of $I - \alpha H$ now?

# %%
print(f"running time: {time.perf_counter() - started:.0f} s")
