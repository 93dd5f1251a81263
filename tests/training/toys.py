"""Small hand-written learners and tasks, so that these tests need no learner of the library.

They are cached, because JAX compiles the functions of every new learner anew. Each draws its random numbers
in a single call, because random number generation dominates the compile time of such small programs.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax

from jaxmeta.core import Batch, Learner, ProtocolCard, Task, TaskDistribution
from jaxmeta.losses import cross_entropy, masked_sum, mse

WAYS = 3


@cache
def sinusoid(shots=5, queries=7, split="train"):
    """Return tasks y = amplitude · sin(x + phase)."""

    def draw(ranges, key):
        drawn = jax.random.uniform(key, (2 + shots + queries, 1))
        amplitude = ranges[0] + (ranges[1] - ranges[0]) * drawn[0, 0]
        x = 10.0 * drawn[2:] - 5.0
        y = amplitude * jnp.sin(x + jnp.pi * drawn[1, 0])
        return Task(Batch(x[:shots], y[:shots]), Batch(x[shots:], y[shots:]))

    sample = jax.tree_util.Partial(draw, jnp.array([0.1, 5.0]))
    return TaskDistribution(sample, ProtocolCard("toy sinusoid", split, kind="regression"))


@cache
def clusters(dim=4, queries=2, noise=0.5):
    """Return tasks of Gaussian clusters, whose last query is padding with NaN as its input."""

    def draw(scale, key):
        drawn = jax.random.normal(key, (WAYS, 2 + queries, dim))
        x = drawn[:, :1] + scale * drawn[:, 1:]
        y = jnp.arange(WAYS)
        query_x = x[:, 1:].reshape(-1, dim).at[-1].set(jnp.nan)
        query = Batch(
            query_x, jnp.repeat(y, queries), mask=jnp.arange(WAYS * queries) < WAYS * queries - 1, ways=WAYS
        )
        return Task(Batch(x[:, 0], y, ways=WAYS), query)

    return TaskDistribution(
        jax.tree_util.Partial(draw, jnp.float32(noise)), ProtocolCard("clusters", "train")
    )


def network(params, x):
    return jnp.tanh(x @ params["hidden"] + params["bias"][None, :]) @ params["out"]


@cache
def maml(width=8, step_size=0.05, poison=None, on_trace=None, order="second"):
    """Return one-step MAML of a small network; `poison(step)` is added to the loss."""

    def init(key, task):
        inputs, outputs = task.support.x.shape[-1], task.support.y.shape[-1]
        drawn = jax.random.uniform(key, ((inputs + outputs) * width,), minval=-1.7, maxval=1.7)
        return {
            "hidden": drawn[: inputs * width].reshape(inputs, width),
            "bias": jnp.zeros(width),
            "out": 0.1 * drawn[inputs * width :].reshape(width, outputs),
        }

    def adapt(params, support, key):
        grads = jax.grad(lambda p: mse(network(p, support.x), support.y))(params)
        if order == "first":
            grads = jax.lax.stop_gradient(grads)
        return jax.tree.map(lambda p, g: p - step_size * g, params, grads)

    def predict(params, adapted, x, mask=None):
        return network(adapted, x)

    def loss(params, task, key, step=None):
        if on_trace is not None:
            on_trace()
        outputs = network(adapt(params, task.support, key), task.query.x)
        errors = jnp.square(outputs - task.query.y).mean(-1)
        bad = 0.0 if poison is None else poison(step)
        return mse(outputs, task.query.y) + bad, {"mse": masked_sum(errors)}

    return Learner(init, adapt, predict, loss)


@cache
def nearest_mean():
    """Return a nearest-mean classifier on scaled features; the support set has one example per class."""

    def init(key, task):
        return {"scale": jnp.ones(task.support.x.shape[-1])}

    def adapt(params, support, key):
        return params["scale"][None, :] * support.x

    def predict(params, adapted, x, mask=None):
        x = params["scale"][None, :] * (x if mask is None else jnp.where(mask[:, None], x, 0.0))
        return -jnp.square(x[:, None, :] - adapted[None, :, :]).sum(-1)

    def loss(params, task, key, step=None):
        logits = predict(params, adapt(params, task.support, key), task.query.x, task.query.mask)
        right = (logits.argmax(-1) == task.query.y).astype(jnp.float32)
        return cross_entropy(logits, task.query.y, task.query.mask), {
            "accuracy": masked_sum(right, task.query.mask)
        }

    return Learner(init, adapt, predict, loss)


@cache
def worsening():
    """Return a nearest-mean classifier that training makes worse: its loss is the sum of `scale`."""
    learner = nearest_mean()

    def predict(params, adapted, x, mask=None):
        # A negative sum of `scale` reverses the sign of the distances, so that the farthest class is chosen.
        return jnp.sign(params["scale"].sum()) * learner.predict(params, adapted, x, mask)

    def loss(params, task, key, step=None):
        return params["scale"].sum(), {}

    return learner._replace(predict=predict, loss=loss)


adam = partial(optax.adam, 1e-2)
