"""Wrong calls: type checkers report exactly the lines that end in `# wrong`."""

import jax
import jax.numpy as jnp
import optax

import jaxmeta as jm

key = jax.random.key(0)
network = jm.nn.StridedConv4(ways=5)
tasks = jm.tasks.glyphs("train", ways=5)
learner = jm.maml(network)
batch = jm.Batch(jnp.zeros((2, 1)), jnp.arange(2))
model = jm.transfer.classifier(network, 5)

# Misspelt settings, also of factories that forward them.
jm.maml(network, inner_stpes=3)  # wrong
jm.anil(network, inner_stpes=3)  # wrong
jm.boil(network, adapts=("head",))  # wrong
jm.fomaml(network, order="first")  # wrong
jm.imaml(network, inner_batch=3)  # wrong
jm.cavia(network, inner_btach=3)  # wrong
jm.meta_sgd(network, hyper=0.1)  # wrong
jm.lstm_meta_learner(network, inner_lr=0.1)  # wrong
jm.learned_optimizer_unroll(network, trunc=3)  # wrong
jm.learner(kind=("regression",))  # wrong
jm.transfer.mmd(estimaotr="biased")  # wrong

# Values of another type, and strings that are not among the choices.
jm.anil(network, inner_steps="3")  # wrong
jm.maml(network, order="third")  # wrong
jm.maml(network, inner_optimizer=0.1)  # wrong
jm.maml(network, loss="mse")  # wrong
jm.anil(network, norm="layer")  # wrong
jm.meta_sgd(network, order="implicit")  # wrong
jm.prototypical(network, norm="episode")  # wrong
jm.learner(kinds=("clustering",))  # wrong
jm.tasks.glyphs("validate")  # wrong
jm.tasks.omniglot(rotations="all")  # wrong
jm.transfer.coral(variant="deep")  # wrong
jm.transfer.rank_sources({}, (None, jnp.arange(2)), score="logme")  # wrong
jm.train(learner, tasks, optax.adam(1e-3), steps=1, key=key, strategy="pmap")  # wrong
jm.train(learner, tasks, optax.adam(1e-3), steps=1, key=key, non_finite="ignore")  # wrong

# Arguments in another order, of another kind, or missing.
jm.train(tasks, learner, optax.adam(1e-3), steps=1, key=key)  # wrong
jm.train(learner, tasks, 1e-3, steps=1, key=key)  # wrong
jm.train(learner, tasks, optax.adam(1e-3), 1, key=key)  # wrong
jm.train(learner, tasks, optax.adam(1e-3), steps=1)  # wrong
jm.evaluate(learner, {}, network, key=key)  # wrong
jm.meta_step(learner, 1e-3, 4)  # wrong
learner.adapt({}, jnp.zeros((2, 1)), key)  # wrong
jm.Batch(jnp.zeros((2, 1)), jnp.arange(2), jnp.ones(2, bool))  # wrong
jm.transfer.fine_tune(model, {}, batch, optimizer=1e-3, steps=1, key=key)  # wrong
jm.transfer.linear_probe_then_fine_tune(model, {}, batch, optimizer=1e-3, steps=1, key=key)  # wrong
jm.transfer.linear_probe_then_fine_tune(model, {}, batch, steps=1, key=key)  # wrong
jm.transfer.feature_extraction(model, {}, batch, head="svm")  # wrong
