"""A learner as a researcher writes it first, and tasks whose results one has by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxmeta as jm

X = np.array([[1.0], [2.0], [-2.0]], np.float32)
# The mean square of the queries.
SQUARE = 3.0


@functools.cache
def lines():
    """Lines through the origin, y = slope · x, of a slope drawn for each task."""

    def draw(x, key):
        y = jax.random.uniform(key, (), minval=1.0, maxval=3.0) * x
        return jm.Task(jm.Batch(x, y), jm.Batch(x, y))

    return jm.TaskDistribution(
        jax.tree_util.Partial(draw, jnp.asarray(X)), jm.ProtocolCard("lines", "train", kind="regression")
    )


@functools.cache
def slope():
    """y = w · x without any adaptation; no mask, no step, and a metric without a count."""

    def init(key, task):
        return {"w": jnp.zeros(())}

    def adapt(params, support, key):
        return {}

    def predict(params, adapted, x):
        return params["w"] * x

    def loss(params, task, key):
        distance = params["w"] - task.query.y[0, 0] / task.query.x[0, 0]
        return distance**2, {"apart": jnp.abs(distance)}

    return jm.Learner(init, adapt, predict, loss)


def slope_of(tasks, key, step, index):
    """Return the slope of episode `index` of a meta-step, or of an evaluation where `step` is None."""
    key = key if step is None else jax.random.fold_in(key, step)
    task = tasks.sample(jax.random.split(jax.random.fold_in(key, index))[0])
    return float(task.query.y[0, 0] / task.query.x[0, 0])
