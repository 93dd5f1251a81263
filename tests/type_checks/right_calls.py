"""A user's script without type errors, which `test_typing.py` checks and does not run."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmeta as jm

# Tasks, from the library and from arrays.
tasks = jm.tasks.glyphs("train", ways=5, shots=1, queries=3)
assert_type(tasks, jm.TaskDistribution)
assert tasks.card is not None  # only tasks of your own may have no card
assert_type(tasks.card.rotations == "none", bool)
images, labels = np.zeros((60, 28, 28, 1), np.float32), np.repeat(np.arange(6), 10)
own_tasks = jm.tasks.from_arrays(images, labels, ways=3, shots=1, rotations="classes")
assert_type(own_tasks, jm.TaskDistribution)
task = tasks.sample(jax.random.key(0))
assert_type(task.support, jm.Batch)
assert_type(task.support.x, jax.Array)

# Learners: a factory, and factories that forward settings to it.
network = jm.nn.StridedConv4(ways=5)
learner = jm.maml(network, inner_lr=0.4, inner_steps=2, order="first", norm="batch")
assert_type(learner, jm.Learner)
assert_type(jm.anil(network, head="head", inner_steps=3, proximal=None), jm.Learner)
assert_type(jm.imaml(network, proximal=0.5, adapts=("head",)), jm.Learner)
assert_type(jm.meta_sgd(network, truncation=2, metric=jm.losses.cross_entropy), jm.Learner)
assert_type(jm.prototypical(jm.nn.Conv4(), divergence="cosine"), jm.Learner)

# Training, evaluation, adaptation, prediction.
state = jm.train(learner, tasks, optax.adam(1e-3), steps=10, key=jax.random.key(0), strategy="vmap")
assert_type(state, jm.TrainState)
assert_type(state.step, jax.Array)
test_tasks = jm.tasks.glyphs("test", ways=5)
result = jm.evaluate(learner, state.params, test_tasks, episodes=50, key=jax.random.key(1))
assert_type(result, jm.Evaluation)
assert_type(result.mean, float)
scores = jm.evaluate_episodes(learner, state.params, test_tasks, key=jax.random.key(1))
assert_type(scores.size, int)
support = jm.Batch(jnp.zeros((5, 28, 28, 1)), jnp.arange(5), mask=jnp.ones(5, bool), ways=5)
adapted = learner.adapt(state.params, support, jax.random.key(2))
outputs = learner.predict(state.params, adapted, task.query.x)
assert_type(outputs, jax.Array)
value, metrics = learner.loss(state.params, task, jax.random.key(3))
assert_type(metrics, dict[str, tuple[jax.Array, jax.Array]])


# A user-defined learner.
@jm.learner(kinds=("regression",), rows={"inductive": "none"})
def mean_target(*, scale: float = 1.0) -> jm.Learner:
    """Predict the support set's mean."""

    def adapt(params: dict[str, jax.Array], support: jm.Batch, key: jax.Array) -> jax.Array:
        return scale * support.y.mean(0) + params["bias"]

    def predict(params: dict[str, jax.Array], adapted: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(adapted, (len(x), 1))

    def loss(
        params: dict[str, jax.Array], task: jm.Task, key: jax.Array
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        error = predict(params, adapt(params, task.support, key), task.query.x) - task.query.y
        return jnp.square(error).mean(), {}

    def init(key: jax.Array, task: jm.Task) -> dict[str, jax.Array]:
        return {"bias": jnp.zeros(1)}

    return jm.Learner(init, adapt, predict, loss)


assert_type(mean_target(scale=2.0), jm.Learner)
step = jm.meta_step(mean_target(), optax.sgd(0.1), 4)
new, report = step(state, tasks.sample)
assert_type(new, jm.TrainState)

# Transfer.
model = jm.transfer.classifier(jm.nn.ResNet(depths=(1,), channels=(8,)), 5)
variables = model.init(jax.random.key(0), support.x)
fitted = jm.transfer.fine_tune(
    model, variables, support, optimizer=optax.adam(1e-3), steps=10, key=jax.random.key(1)
)
assert_type(fitted, jm.transfer.Fitted)
assert_type(fitted.losses, jax.Array)
probed = jm.transfer.linear_probe_then_fine_tune(
    model, variables, support, optimizer=optax.adam(1e-3), steps=10, key=jax.random.key(1), batch_size=8
)
assert_type(probed, jm.transfer.Fitted)
assert_type(jm.transfer.accuracy(model, fitted.variables, support), float)
run_learner, params = jm.load_run("runs/first")
assert_type(run_learner, jm.Learner)
