"""A minimal user-defined learner, and tasks whose results have closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxmeta as jm

X = np.array([[1.0], [2.0], [-2.0]], np.float32)
# Mean square of the query inputs.
SQUARE = 3.0


@functools.cache
def lines():
    """Return tasks of lines through the origin, y = slope · x, with a random slope for each task."""

    def draw(x, key):
        y = jax.random.uniform(key, (), minval=1.0, maxval=3.0) * x
        return jm.Task(jm.Batch(x, y), jm.Batch(x, y))

    return jm.TaskDistribution(
        jax.tree_util.Partial(draw, jnp.asarray(X)), jm.ProtocolCard("lines", "train", kind="regression")
    )


@functools.cache
def slope():
    """Return a learner y = w · x without adaptation, mask or step, and with a metric without a count."""

    def init(key, task):
        return {"w": jnp.zeros(())}

    def adapt(params, support, key):
        return {}

    def predict(params, adapted, x):
        return params["w"] * x

    def loss(params, task, key):
        distance = params["w"] - task.query.y[0, 0] / task.query.x[0, 0]
        return distance**2, {"slope_error": jnp.abs(distance)}

    return jm.Learner(init, adapt, predict, loss)


def slope_of(tasks, key, step, index):
    """Return the slope of episode `index` of a meta-step, or of an evaluation where `step` is None."""
    key = key if step is None else jax.random.fold_in(key, step)
    task = tasks.sample(jax.random.split(jax.random.fold_in(key, index))[0])
    return float(task.query.y[0, 0] / task.query.x[0, 0])
