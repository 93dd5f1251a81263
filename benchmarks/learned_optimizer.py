"""Benchmark of a learned optimizer against SGD, momentum, RMSProp and Adam with tuned learning rates.

It repeats the experiments of Andrychowicz et al. 2016.

    python benchmarks/learned_optimizer.py [--problems quadratics digits] [--data DIR] [--json FILE]
                                           [--plot FILE]

`jm.learned_optimizer` is trained as published: each run of 100 steps is 5 unrolls of 20 steps, and the
optimizer's weights take an Adam step after each unroll while the run continues. Afterwards it is used as an
optax optimizer like the others.

- quadratics: ‖Wθ − y‖² of 10 variables, 32 problems at a time; then with twice as many steps.
- digits: the cross-entropy of an MLP of 20 sigmoid units on mini-batches of 128 digits, from the test part of
  MNIST in --data (8,000 images for training, 2,000 for testing), or else scikit-learn's digits. The same
  weights are then tested with twice as many steps, 40 units, two layers, and ReLU.

The learning rate of each hand-designed optimizer is tuned for each case on a grid of 21 values between 10⁻⁴
and 10, by the mean final loss over as many validation problems as there are test problems. All optimizers get
the same initial weights and mini-batches. The tables report the mean loss over 100 test problems (for digits,
20 initialisations with different mini-batches) at the end of the run and halfway.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from machine import cores, describe_machine

import jaxmeta as jm

STEPS, TRUNCATION = 100, 20
RATES = np.logspace(-4, 1, 21)
HAND_DESIGNED = {
    "SGD": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "NAG": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "RMSProp": optax.rmsprop,
    "Adam": optax.adam,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network to train and a number of steps, for testing an optimizer."""

    name: str
    network: object
    steps: int = STEPS


@dataclasses.dataclass(frozen=True)
class Problem:
    """A family of optimization problems, for training and testing optimizers.

    Attributes:
      tasks: `(split) -> TaskDistribution`.
      loss: loss of one mini-batch.
      cases: test cases; the first one is also the training case.
      batch_size: examples in a mini-batch; None for all examples.
      settings: settings of the learned optimizer.
      episodes: number of test problems, and of validation problems for tuning.
      at_once: training runs in parallel.
      runs: number of training runs.
      outer_lr: learning rate of meta-training.
    """

    tasks: Callable
    loss: Callable
    cases: tuple[Case, ...]
    batch_size: int | None
    settings: dict
    episodes: int
    at_once: int
    runs: int
    outer_lr: float

    def build(self, factory: Callable, case: Case):
        """Build `jm.learned_optimizer` or its unroll for a case."""
        return factory(
            case.network,
            inner_steps=STEPS,
            truncation=TRUNCATION,
            inner_batch=self.batch_size,
            loss=self.loss,
            **self.settings,
        )

    def optimizer(self, params):
        return jm.learned_optimizer_as_optax(params, **self.settings)


def sum_of_squares(outputs, targets, mask=None):
    del mask
    return jnp.square(outputs - targets).sum()


def mlp(hidden, activation=jax.nn.sigmoid):
    return jm.nn.MLP(
        out=10, hidden=hidden, activation=activation, kernel_init=jax.nn.initializers.normal(0.01)
    )


def read_digits(data: Path | None):
    """Return images `(n, d)` in [0, 1] and labels, in random order, and the name of their source."""
    folder = None if data is None else data / "mnist"
    if folder is not None and folder.is_dir():
        images, y = jm.tasks.mnist_images(folder)
        x, source = images.reshape(-1, 784) / 255, "test part of MNIST"
    else:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, source = x / 16, "scikit-learn's digits"
    order = np.random.default_rng(0).permutation(len(y))
    return jnp.asarray(x[order], jnp.float32), jnp.asarray(y[order], jnp.int32), source


def digits_tasks(x, y):
    """Return a distribution of a single task: four fifths of the examples as support, the rest as query."""
    count = len(y) * 4 // 5
    parts = [jm.Batch(x[part], y[part], ways=10) for part in (slice(None, count), slice(count, None))]
    sample = jax.tree_util.Partial(lambda task, key: task, jm.Task(*parts))
    return lambda split: jm.TaskDistribution(sample, jm.ProtocolCard("digits", split, ways=10))


def problems(args) -> dict[str, Problem]:
    x, y, source = read_digits(args.data)
    print(f"digits: {source}, {len(y):,} images")
    linear = jm.nn.MLP(out=1, hidden=(), use_bias=False)
    return {
        "quadratics": Problem(
            jm.tasks.quadratics,
            sum_of_squares,
            (Case("quadratics", linear), Case("quadratics, longer", linear, 2 * STEPS)),
            batch_size=None,
            settings={"preprocess": 10.0, "scale": 0.1},
            episodes=args.episodes,
            at_once=32,
            runs=args.runs or 2000,
            outer_lr=3e-3,
        ),
        "digits": Problem(
            digits_tasks(x, y),
            jm.losses.cross_entropy,
            (
                Case("digits, 20 units", mlp((20,))),
                Case("digits, longer", mlp((20,)), 2 * STEPS),
                Case("digits, 40 units", mlp((40,))),
                Case("digits, two layers", mlp((20, 20))),
                Case("digits, ReLU", mlp((20,), jax.nn.relu)),
            ),
            batch_size=128,
            settings={"preprocess": 10.0, "scale": 0.1},
            episodes=min(20, args.episodes),
            at_once=1,
            runs=args.runs or 200,
            outer_lr=1e-3,
        ),
    }


# --- Training ----------------------------------------------------------------------------------------


def train(problem: Problem, key, validate_every: int):
    """Train a learned optimizer.

    Returns:
      The weights with the lowest mean final loss over 20 validation runs, the history, and the seconds.
    """
    case = problem.cases[0]
    learner, next_unroll = (
        problem.build(factory, case) for factory in (jm.learned_optimizer, jm.learned_optimizer_unroll)
    )
    tasks = problem.tasks("train")
    init_key, key = jax.random.split(key)
    params = jax.jit(learner.init)(init_key, tasks.sample(init_key))
    schedule = optax.cosine_decay_schedule(problem.outer_lr, problem.runs * (STEPS // TRUNCATION))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def unroll(params, tasks, carries, keys):
        def mean(params):
            values, new_carries = jax.vmap(lambda *run: next_unroll(params, *run))(tasks, carries, keys)
            return values.mean(), new_carries

        return jax.value_and_grad(mean, has_aux=True)(params)

    def run(state, key, sample):
        keys = jax.random.split(key, problem.at_once)
        runs = jax.vmap(sample)(keys)

        def advance(carried, _):
            (params, opt_state), carries = carried
            (value, carries), grads = unroll(params, runs, carries, keys)
            updates, opt_state = adam.update(grads, opt_state, params)
            return ((optax.apply_updates(params, updates), opt_state), carries), value

        carried, first = advance((state, None), None)
        (state, _), values = jax.lax.scan(advance, carried, None, length=STEPS // TRUNCATION - 1)
        return state, first + values.sum()

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(state, keys, sample):
        return jax.lax.scan(lambda state, key: run(state, key, sample), state, keys)

    state, best, history, started = (params, adam.init(params)), None, [], time.perf_counter()
    for done in range(0, problem.runs, validate_every):
        key, chunk_key = jax.random.split(key)
        count = min(validate_every, problem.runs - done)
        state, values = train_chunk(state, jax.random.split(chunk_key, count), tasks.sample)
        final = mean_curve(problem, case, problem.optimizer(state[0]), 20, "validation")[0][-1]
        history.append((done + count, float(values.mean()), float(final)))
        print(
            f"  {done + count:5d} runs, {time.perf_counter() - started:6.0f} s: mean training loss "
            f"{values.mean() / STEPS:.4f}, final validation loss {final:.4f}",
            flush=True,
        )
        if best is None or final < best[0]:
            best = final, jax.tree.map(jnp.copy, state[0])
    return best[1], history, time.perf_counter() - started


# --- Testing -----------------------------------------------------------------------------------------


def runs_of(problem: Problem, case: Case, optimizer, episodes: int, split: str):
    """Return the loss of each run at its steps + 1 points, and the score on the query set."""
    model = jm.nn.as_model(case.network)
    tasks = problem.tasks(split)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(99), len(split)), episodes)

    def one(key, sample):
        task_key, start_key, order_key = jax.random.split(key, 3)
        task = sample(task_key)
        weights = model.init(start_key, task.support.x)

        def loss(weights, step):
            examples = task.support
            if problem.batch_size is not None:
                chosen = jax.random.randint(
                    jax.random.fold_in(order_key, step), (problem.batch_size,), 0, examples.y.shape[0]
                )
                examples = jax.tree.map(lambda leaf: leaf[chosen], examples)
            return problem.loss(model.apply(weights, examples.x), examples.y)

        def advance(carry, step):
            weights, state = carry
            value, grads = jax.value_and_grad(loss)(weights, step)
            updates, state = optimizer.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), value

        (weights, _), values = jax.lax.scan(
            advance, (weights, optimizer.init(weights)), jnp.arange(case.steps)
        )
        ((total, count),) = jm.losses.score(model.apply(weights, task.query.x), task.query).values()
        return jnp.append(values, loss(weights, case.steps)), total / count

    return jax.jit(lambda sample: jax.lax.map(lambda key: one(key, sample), keys))(tasks.sample)


def mean_curve(problem: Problem, case: Case, optimizer, episodes: int, split: str):
    losses, scores = runs_of(problem, case, optimizer, episodes, split)
    return np.asarray(losses, np.float64).mean(0), np.asarray(scores, np.float64)


def tuned_rate(problem: Problem, case: Case, make) -> float:
    """Return the learning rate of the grid with the lowest mean final loss over validation problems."""

    def final(rate):
        losses, _ = runs_of(problem, case, make(rate), problem.episodes, "validation")
        return losses[:, -1].mean()

    finals = np.asarray(jax.jit(lambda rates: jax.lax.map(final, rates))(jnp.asarray(RATES, jnp.float32)))
    return float(RATES[np.nanargmin(np.where(np.isfinite(finals), finals, np.inf))])


def test_all(problem: Problem, case: Case, params) -> dict:
    rows = {}
    for name, make in {"learned": None, **HAND_DESIGNED}.items():
        rate = None if make is None else tuned_rate(problem, case, make)
        optimizer = problem.optimizer(params) if make is None else make(rate)
        losses, scores = runs_of(problem, case, optimizer, problem.episodes, "test")
        losses, scores = np.asarray(losses, np.float64), np.asarray(scores, np.float64)
        final = jm.Evaluation.of(losses[:, -1])
        rows[name] = {
            "rate": rate,
            "final": final.mean,
            "final_ci95": final.ci95,
            "log10_final": float(np.log10(losses[:, -1]).mean()),
            "halfway": float(losses[:, case.steps // 2].mean()),
            "curve": losses.mean(0).tolist(),
            **({"accuracy": float(scores.mean())} if problem.batch_size is not None else {}),
        }
    return rows


def print_table(case: Case, rows: dict) -> None:
    print(f"\n{case.name}, {case.steps} steps")
    print(f"  {'':10}{'rate':>9}{'final loss':>12}{'± 95 %':>10}{'log10':>8}{'halfway':>10}{'accuracy':>10}")
    for name, row in rows.items():
        rate = "–" if row["rate"] is None else f"{row['rate']:.4g}"
        accuracy = f"{100 * row['accuracy']:.1f} %" if "accuracy" in row else ""
        print(
            f"  {name:10}{rate:>9}{row['final']:12.4f}{row['final_ci95']:10.4f}{row['log10_final']:8.2f}"
            f"{row['halfway']:10.4f}{accuracy:>10}",
            flush=True,
        )


def plot(path: Path, results: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(results), 4)
    rows = -(-len(results) // columns)
    figure, panels = plt.subplots(
        rows, columns, squeeze=False, figsize=(4 * columns, 3.6 * rows + 0.4), layout="constrained"
    )
    for axes, (case, result) in zip(panels.flat, results.items(), strict=False):
        for name, row in result["rows"].items():
            style = {"color": "k", "linewidth": 2} if name == "learned" else {"linewidth": 1.2}
            label = name if row["rate"] is None else f"{name}, tuned rate"
            axes.plot(row["curve"], label=label, **style)
        axes.set(title=case, xlabel="step", ylabel="mean loss", yscale="log")
        axes.grid(alpha=0.3)
    for axes in list(panels.flat)[len(results) :]:
        axes.axis("off")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--problems", nargs="+", choices=("quadratics", "digits"), default=["quadratics", "digits"])
    add("--runs", type=int, help="training runs (default: 2,000 batches of quadratics, 200 runs on digits)")
    add("--episodes", type=int, default=100, help="test problems, at most 20 for digits")
    add("--seed", type=int, default=0, help="seed of training")
    add("--data", type=Path, help="folder with mnist/, such as ../shared/data")
    add("--json", type=Path, help="also write the results to this file")
    add("--plot", type=Path, help="also draw the learning curves into this PNG file")
    args = parser.parse_args(argv)
    results = {}
    known = problems(args)
    for name in args.problems:
        problem = known[name]
        print(f"\ntraining on {name}: {problem.runs} runs of {STEPS} steps, {problem.at_once} at once")
        params, history, seconds = train(problem, jax.random.key(args.seed), max(1, problem.runs // 10))
        for case in problem.cases:
            rows = test_all(problem, case, params)
            print_table(case, rows)
            results[case.name] = {
                "steps": case.steps,
                "episodes": problem.episodes,
                "training_s": seconds,
                "history": history,
                "rows": rows,
            }
    if args.json:
        report = {
            "machine": {**describe_machine(jax.local_devices()[:1]), "cores": cores()},
            "jaxmeta": jm.__version__,
            "seed": args.seed,
            "cases": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(args.plot, results)


if __name__ == "__main__":
    main()
