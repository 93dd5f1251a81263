"""Training runs whose results must not depend on the number of processes."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toys

import jaxmeta as jm
from jaxmeta.core import TaskStream, episode_keys
from jaxmeta.training import validation_key

KEY = jax.random.key(0)
BATCH, STEPS = 8, 6
# The share of a single process: (index, number of processes).
SINGLE_PROCESS = (0, 1)


def images() -> jm.TaskDistribution:
    x = np.random.default_rng(0).integers(0, 256, (60, 9, 9, 1), np.uint8)
    return jm.tasks.from_arrays(x, np.arange(60) % 12, ways=3, shots=1, queries=2, rotations="random")


def streamed(key, share, for_evaluation=False) -> TaskStream:
    """Return the tasks of `images` as a stream: a process's share of training, or a whole evaluation."""
    tasks = images()
    index, count = SINGLE_PROCESS if for_evaluation else share
    per_process = BATCH // count
    draw = jax.jit(jax.vmap(tasks.sample))

    def at(step):
        first = step * BATCH if for_evaluation else 0
        numbers = jnp.arange(first + index * per_process, first + (index + 1) * per_process)
        step_key = key if for_evaluation else jax.random.fold_in(key, step)
        return jax.tree.map(np.asarray, draw(episode_keys(step_key, numbers)[:, 0]))

    return TaskStream(at, tasks.card, key=key, for_evaluation=for_evaluation)


def trained(folder: Path | None, steps: int = STEPS, resume: bool = False, width: int = 64, devices=None):
    """Return the parameters of a run with checkpoints and validation."""
    state = jm.train(
        toys.maml(width=width),
        toys.sinusoid(),
        toys.adam(),
        steps=steps,
        key=KEY,
        meta_batch=BATCH,
        validation=toys.sinusoid(),
        validation_episodes=11,
        validate_every=3,
        run_dir=folder,
        resume=resume,
        devices=devices,
    )
    return state.params


def trained_with_split_params(folder: Path | None):
    """Return the parameters of a run whose parameters are split between the processes."""
    devices = jm.make_mesh(params=jax.process_count(), devices=jax.devices()[: jax.process_count()])
    return trained(folder, width=1024, devices=devices)


def trained_from_a_stream(share):
    """Return the parameters of a run in which each process reads its share of a stream."""
    learner = jm.prototypical(jm.nn.MLP(out=8, hidden=(16,)))
    state = jm.train(
        learner,
        streamed(KEY, share),
        optax.sgd(0.1),
        steps=STEPS,
        key=KEY,
        meta_batch=BATCH,
        validation=streamed(validation_key(KEY), share, for_evaluation=True),
        validation_episodes=11,
        validate_every=3,
    )
    return state.params


def trained_in_float64():
    """Return the parameters after one meta-step in float64."""
    with jax.enable_x64(True):
        single = toys.sinusoid()

        def double(tree):
            return jax.tree.map(
                lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
                tree,
            )

        tasks = single._replace(
            sample=jax.tree_util.Partial(lambda sample, key: double(sample(key)), single.sample)
        )
        plain = toys.maml(width=64)
        learner = plain._replace(init=lambda key, task: double(plain.init(key, task)))
        state = jm.train(learner, tasks, optax.sgd(0.1), steps=1, key=KEY, meta_batch=BATCH)
        return state.params


# Runs by name, as functions `(folder, share) -> parameters`.
RUNS: dict[str, Callable] = {
    "checkpointed": lambda folder, share: trained(folder),
    "split": lambda folder, share: trained_with_split_params(folder),
    "streamed": lambda folder, share: trained_from_a_stream(share),
    "float64": lambda folder, share: trained_in_float64(),
}
