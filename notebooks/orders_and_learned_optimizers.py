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
# # What each order costs and buys, and a learned optimizer
#
# `second_order_maml.py` shows what the second-order term of MAML is. This notebook measures it: what
# second-order, first-order and implicit meta-gradients take in time and memory, what they give in accuracy,
# and how far apart they are while a learner trains. Then it goes one step further: if the *start* of
# gradient descent can be learned, so can the descent itself.
#
# It runs in about three minutes on two CPU cores; the last cell prints the time it took.

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
COLORS = {"second": "C0", "second, recompute": "C3", "first": "C1", "implicit": "C2"}

# %% [markdown]
# ## 1. What each order costs
#
# The meta-gradient of a task needs the inner loop run backwards. What has to be kept for that differs:
#
# - **second order, `memory="store"`**: every intermediate value of every inner step;
# - **second order, `memory="recompute"`**: the parameters after each step. The step is run again on the way
#   back, and the gradient is the same to rounding;
# - **first order**: nothing at all, since the inner gradients are constants;
# - **implicit**: the point where the loop ended. The gradient is $(I + H/\lambda)^{-1}\nabla L^Q$ there,
#   computed by a few steps of conjugate gradients, whatever path led there.
#
# The compiler states how much temporary memory a compiled program takes. We compile the meta-gradient of a
# small network for 1, 4 and 16 inner steps.

# %%
train_tasks = jm.tasks.glyphs("train", ways=5, shots=1, queries=3)
test_tasks = jm.tasks.glyphs("test", ways=5, shots=1, queries=5)
network = jm.nn.StridedConv4(ways=5, filters=16)
task = train_tasks.sample(jax.random.key(0))

ORDERS = {
    "second": {"order": "second", "memory": "store"},
    "second, recompute": {"order": "second", "memory": "recompute"},
    "first": {"order": "first"},
    "implicit": {"order": "implicit", "proximal": 1.0, "damping": 1.0},
}

params = jm.maml(network).init(jax.random.key(1), task)


def measure(settings, steps):
    """Return the temporary memory of one meta-gradient in MB, and its time in milliseconds."""
    learner = jm.maml(network, inner_lr=0.1, inner_steps=steps, **settings)
    gradient = jax.jit(jax.grad(lambda params, key: learner.loss(params, task, key)[0]))
    compiled = gradient.lower(params, jax.random.key(2)).compile()
    times = []
    for _ in range(15):
        clock = time.perf_counter()
        jax.block_until_ready(compiled(params, jax.random.key(2)))
        times.append(time.perf_counter() - clock)
    return compiled.memory_analysis().temp_size_in_bytes / 1e6, 1e3 * np.median(times)


counts = (1, 4, 16)
cost = {name: [measure(settings, steps) for steps in counts] for name, settings in ORDERS.items()}
print(f"{'':20}" + "".join(f"{steps:>10d} inner step{'s' * (steps > 1)}" for steps in counts))
for name, row in cost.items():
    print(f"{name:20}" + "".join(f"{memory:10.2f} MB {ms:6.1f} ms" for memory, ms in row))

fig, panels = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for which, (axes, title) in enumerate(zip(panels, ("temporary memory, MB", "time, ms"), strict=True)):
    for name, row in cost.items():
        axes.plot(counts, [values[which] for values in row], "o-", color=COLORS[name], label=name)
    axes.set(xlabel="inner steps", title=title, xscale="log", yscale="log", xticks=counts)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
_ = panels[0].legend()
growth = {name: row[-1][0] / row[0][0] for name, row in cost.items()}
assert growth["second"] > 4, "stored values grow with the steps"
assert growth["implicit"] < 1.1, "implicit memory does not"

# %% [markdown]
# Stored values grow in proportion to the steps, implicit memory not at all. For a single step there is
# nothing to choose: the conjugate gradients are then what costs time. `benchmarks/memory.py` measures a
# network of published size at up to 100 steps.
#
# ## 2. What each order buys
#
# Characters drawn by the program, 5 ways and 1 shot; each learner trains for the same number of meta-steps on
# the same tasks, and is tested on 400 tasks of characters it has not seen. Each has one short training with
# one seed: enough to see the size of the differences, not to rank methods.

# %%
META_STEPS = 60
learners = {
    "second": jm.maml(network, inner_lr=0.4, inner_steps=2),
    "first": jm.maml(network, inner_lr=0.4, inner_steps=2, order="first"),
    "implicit": jm.imaml(network, inner_lr=0.1, proximal=1.0, damping=1.0, inner_steps=8, cg_steps=3),
}
states, results = {}, {}
for name, learner in learners.items():
    clock = time.perf_counter()
    states[name] = jm.train(
        learner, train_tasks, optax.adam(3e-3), steps=META_STEPS, meta_batch=4, key=jax.random.key(0)
    )
    seconds = time.perf_counter() - clock
    results[name] = jm.evaluate(learner, states[name].params, test_tasks, episodes=400, key=jax.random.key(1))
    print(
        f"{name:9s} {100 * results[name].mean:5.1f} ± {100 * results[name].ci95:.1f} %   "
        f"{seconds:5.1f} s with compiling"
    )
assert min(result.mean for result in results.values()) > 0.3, "chance is 0.2"

# %% [markdown]
# ## 3. How far apart they are, while training
#
# `jm.train` reports the cosine and the ratio of norms between the meta-gradient and that of another learner
# with the same parameters, if there is one: here the first-order version. The comparison costs a second
# gradient in each meta-step. (On the command line: `jaxmeta train --diagnose`.)

# %%
STEP_SIZES = (0.1, 0.4)
curves = {}
for rate in STEP_SIZES:
    settings = {"inner_lr": rate, "inner_steps": 2}
    progress = []
    jm.train(
        jm.maml(network, **settings),
        train_tasks,
        optax.adam(3e-3),
        steps=META_STEPS,
        meta_batch=4,
        key=jax.random.key(0),
        compared_to=jm.fomaml(network, **settings),
        log_every=10,
        report=progress.append,
    )
    curves[rate] = progress

fig, panels = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for axes, name, title in zip(
    panels,
    ("cosine", "norm_ratio"),
    ("cosine of $g_{MAML}$ and $g_{FOMAML}$", "$\\|g_{MAML}\\| / \\|g_{FOMAML}\\|$"),
    strict=True,
):
    for rate, progress in curves.items():
        axes.plot(
            [p.step for p in progress], [p.metrics[name] for p in progress], label=f"$\\alpha$ = {rate}"
        )
    axes.axhline(1, color="0.4", linewidth=1)
    axes.set(xlabel="meta-step", title=title)
_ = panels[0].legend()
means = {
    rate: np.mean([p.metrics["cosine"] for p in progress[len(progress) // 2 :]])
    for rate, progress in curves.items()
}
print({rate: f"mean cosine in the second half {mean:.2f}" for rate, mean in means.items()})
assert means[0.1] > means[0.4], "the larger the inner steps, the more their derivative matters"

# %% [markdown]
# The factors of the meta-gradient are $I - \alpha H_j$: the larger the inner step, the further from the
# identity, and the further first order is off. A ratio that grows without bound would be a sign of
# an $\alpha$ that is too large.
#
# ### From first order to second, step by step
#
# Between the two lies truncation: `truncation=K` takes the last $K$ factors of the product and leaves out
# those before. Below, an inner loop of 4 steps at the parameters just trained.

# %%
params = states["second"].params
settings = {"inner_lr": 0.2, "inner_steps": 4}
full = jm.maml(network, **settings)
approximations = {
    "first order": jm.fomaml(network, **settings),
    "K = 1": jm.maml(network, truncation=1, **settings),
    "K = 3": jm.maml(network, truncation=3, **settings),
}
cosines = {
    name: jm.meta_gradient_alignment(
        full, other, params, train_tasks, episodes=30, key=jax.random.key(3)
    ).cosine
    for name, other in approximations.items()
}
print("cosine with the full meta-gradient of 4 steps:", {k: round(v, 3) for k, v in cosines.items()})
assert cosines["K = 3"] > cosines["first order"]

# %% [markdown]
# ## 4. Learning the descent
#
# MAML learns where gradient descent starts. *Learning to learn by gradient descent by gradient descent*
# (Andrychowicz et al., 2016) learns the descent: an LSTM, one for all coordinates with a state for each,
# sees a coordinate's gradient and returns its update. Its meta-loss is the loss along a whole run,
# $\sum_t f(\theta_t)$, and it is trained through unrolls of that run, between which the gradient is cut.
#
# We train it on functions of two variables, so that its path can be drawn: $f(\theta) = \|W\theta - y\|^2$
# with random $W$ and $y$, most of them long narrow valleys (in the figure, the darker the lower).
# `jm.learned_optimizer_unroll` gives the next part of a run and its loss; after each, the optimizer's weights
# take a step of Adam, and the run continues.

# %%
STEPS, TRUNCATION, RUNS, AT_ONCE = 40, 10, 400, 32
surfaces = jm.tasks.quadratics("train", dim=2)


def start(key, x):
    return {"theta": 2 * jax.random.normal(key, (2,))}


def apply(params, x):
    return (x * params["theta"][None, :]).sum(1, keepdims=True)


def squares(outputs, targets, mask=None):
    return jnp.square(outputs - targets).sum()


settings = {"inner_steps": STEPS, "truncation": TRUNCATION, "scale": 0.1, "loss": squares}
learner = jm.learned_optimizer((start, apply), **settings)
unroll = jm.learned_optimizer_unroll((start, apply), **settings)
outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, RUNS * 4)))


@jax.jit
def train_optimizer(params, key):
    def run(state, key):
        keys = jax.random.split(key, AT_ONCE)
        tasks, carries = jax.vmap(surfaces.sample)(keys), None
        for _ in range(STEPS // TRUNCATION):

            def mean_loss(params, carries=carries):
                values, after = jax.vmap(lambda *run: unroll(params, *run))(tasks, carries, keys)
                return values.mean(), after

            params, opt_state = state
            (loss, carries), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
            updates, opt_state = outer.update(grads, opt_state)
            state = optax.apply_updates(params, updates), opt_state
        return state, loss

    return jax.lax.scan(run, (params, outer.init(params)), jax.random.split(key, RUNS))


clock = time.perf_counter()
params = learner.init(jax.random.key(0), surfaces.sample(jax.random.key(0)))
(trained, _), losses = train_optimizer(params, jax.random.key(1))
print(f"trained in {time.perf_counter() - clock:.0f} s")
print(f"loss of a run's last unroll: {losses[0]:.2f} at first, {losses[-20:].mean():.3f} at the end")

# %% [markdown]
# `jm.learned_optimizer_as_optax` turns it into an optax optimizer like any other. We compare it with SGD,
# momentum and Adam, each with the best of 25 rates for the mean final loss on 100 other functions.

# %%
unseen = jm.tasks.quadratics("test", dim=2)


def descend(optimizer, theta, task):
    """Return θ_0 … θ_n and their losses."""

    def f(theta):
        return squares(apply({"theta": theta}, task.support.x), task.support.y)

    def step(carry, _):
        theta, state = carry
        updates, state = optimizer.update(jax.grad(f)(theta), state, theta)
        return (optax.apply_updates(theta, updates), state), theta

    (last, _), way = jax.lax.scan(step, (theta, optimizer.init(theta)), None, length=STEPS)
    way = jnp.concatenate([way, last[None]])
    return way, jax.vmap(f)(way)


def runs(optimizer, tasks, key):
    keys = jax.random.split(key, 100)
    thetas = 2 * jax.random.normal(key, (100, 2))
    return jax.vmap(lambda theta, key: descend(optimizer, theta, tasks.sample(key)))(thetas, keys)


makers = {
    "SGD": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "Adam": optax.adam,
}
rates = jnp.logspace(-3, 1, 25)
optimizers = {"learned": jm.learned_optimizer_as_optax(trained, scale=0.1)}
for name, make in makers.items():

    def final_loss(rate, make=make):
        return runs(make(rate), surfaces, jax.random.key(7))[1][:, -1].mean()

    finals = jax.jit(lambda rates, final_loss=final_loss: jax.lax.map(final_loss, rates))(rates)
    best = float(rates[np.nanargmin(np.where(np.isfinite(finals), finals, np.inf))])
    optimizers[name] = make(best)
    print(f"{name:9s} rate {best:.3g}")

tried = {name: runs(optimizer, unseen, jax.random.key(8)) for name, optimizer in optimizers.items()}
for name, (_, values) in tried.items():
    halfway, end = values[:, STEPS // 2].mean(), values[:, -1].mean()
    print(f"{name:9s} mean loss after {STEPS} steps {end:.4f}, halfway {halfway:.4f}")

# %%
fig, panels = plt.subplots(1, 4, figsize=(15, 3.9), layout="constrained")
colors = {"learned": "k", "SGD": "C0", "momentum": "C1", "Adam": "C2"}
for axes, place in zip(panels[:3], (0, 3, 6), strict=True):
    drawn = unseen.sample(jax.random.split(jax.random.key(8), 100)[place])
    ways = np.stack([way[place] for way, _ in tried.values()])
    low, high = ways.min((0, 1)) - 0.5, ways.max((0, 1)) + 0.5
    grid = np.stack(np.meshgrid(*(np.linspace(*ends, 80) for ends in zip(low, high, strict=True))), -1)
    heights = np.square(grid @ np.asarray(drawn.support.x).T - np.asarray(drawn.support.y)[:, 0]).sum(-1)
    axes.contourf(*np.moveaxis(grid, -1, 0), np.log10(heights + 1e-3), levels=25, cmap="Greys_r", alpha=0.6)
    for name, way in zip(tried, ways, strict=True):
        axes.plot(*way.T, ".-", color=colors[name], linewidth=1, markersize=3, label=name)
    axes.plot(*ways[0, 0], "ws", markeredgecolor="k")
    axes.set(xlabel="$\\theta_1$", ylabel="$\\theta_2$", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
for name, (_, values) in tried.items():
    panels[3].plot(values.mean(0), color=colors[name])
panels[3].set(xlabel="step", title="mean loss over 100 unseen functions", yscale="log")
_ = fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
assert tried["learned"][1][:, -1].mean() < tried["SGD"][1][:, -1].mean()

# %% [markdown]
# The learned optimizer is fitted to the family it was trained on. `benchmarks/learned_optimizer.py` trains
# one on an MLP with real digits and tests it with more steps, with wider and deeper networks, and with
# another activation function.
#
# ### To try
#
# - Set `preprocess=None` in `jm.learned_optimizer`: gradients of all sizes then enter as they are.
# - Train on `dim=10` and draw the loss curves; does the optimizer of `dim=2` do as well there?
# - Pass `order="second"` in `settings`: gradients along the run are then differentiated, too.

# %%
print(f"running time: {time.perf_counter() - started:.0f} s")
