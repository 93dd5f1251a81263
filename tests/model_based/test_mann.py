"""Memory-augmented networks against a plain loop over the steps of an episode."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax import lax

import jaxmeta as jm

KEY = jax.random.key(0)
DIM, WAYS, STEPS = 4, 3, 6


def batch(x, y, mask=None, ways=WAYS):
    return jm.Batch(
        jnp.asarray(x), jnp.asarray(y, jnp.int32), mask=None if mask is None else jnp.asarray(mask), ways=ways
    )


def of_float64(params, scale=1.0):
    return jax.tree.map(lambda leaf: scale * leaf.astype(jnp.float64), params)


def network(out=WAYS, **settings):
    return jm.nn.MemoryNetwork(out=out, memory=jm.nn.LRUA(rows=9, width=3, heads=2), hidden=5, **settings)


def episode(steps=STEPS, queries=2, ways=WAYS, seed=0):
    """Build an episode of 2×2 images of random classes, with labels in random order."""
    rng = np.random.default_rng(seed)
    return jm.Task(
        batch(rng.normal(size=(steps, 2, 2)), rng.integers(ways, size=steps), ways=ways),
        batch(rng.normal(size=(queries, 2, 2)), rng.integers(ways, size=queries), ways=ways),
    )


@cache
def weights(controller):
    """Draw weights large enough for the outputs to depend on all inputs."""
    learner = jm.mann(network(controller=controller))
    return of_float64(jax.jit(learner.init)(KEY, episode()), 2)


class CompiledLearner:
    """A learner with its parameters and compiled functions."""

    def __init__(self, model, params, **settings):
        self.model, self.params, self.strings = model, params, settings.get("strings")
        self.learner = jm.mann(model, **{"shuffle": False} | settings)
        self.adapt, self.predict = jax.jit(self.learner.adapt), jax.jit(self.learner.predict)
        self.loss = jax.jit(self.learner.loss)
        self.gradients = jax.jit(jax.value_and_grad(self.learner.loss, has_aux=True))
        self.next_step = jax.jit(self._next_step)

    def outputs(self, params, support, query, key=KEY):
        return self.predict(params, self.adapt(params, support, key), query.x)

    def code(self, label):
        """Encode a label as the network's input: a one-hot vector for each character."""
        letters, characters = self.strings or (self.model.out, 1)
        return np.concatenate([np.eye(letters)[label // letters**i % letters] for i in range(characters)])

    def _next_step(self, state, label, x):
        call = partial(self.model.apply, {"params": self.params["network"]})
        projected = call(jnp.concatenate([x.reshape(-1), label]), method="project")
        state, features = call(state, projected, method="step")
        return state, call(features, method="outputs")

    def by_hand(self, support, query):
        """Return raw outputs at the real steps and for each query, by a loop over the network's methods."""
        kept = range(len(support.y)) if support.mask is None else np.flatnonzero(support.mask)
        state, label, outputs = self.model.initial(), np.zeros(self.model.out), []
        for t in kept:
            state, output = self.next_step(state, label, support.x[t])
            label = self.code(int(support.y[t]))
            outputs.append(output)
        query_outputs = [self.next_step(state, label, x)[1] for x in query.x]
        return np.stack(outputs), np.stack(query_outputs)

    def cross_entropy(self, output, label):
        """Return the cross-entropy, summed over characters."""
        characters = 1 if self.strings is None else self.strings[1]
        logits = np.asarray(output).reshape(characters, -1)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -(logs.reshape(-1) * self.code(int(label))).sum()


@cache
def compiled_learner(controller="lstm", **settings):
    model = network(controller=controller)
    return CompiledLearner(model, weights(controller), **settings)


@cache
def string_learner(letters, characters):
    model, ways = network(letters * characters), letters**characters
    strings = (letters, characters)
    params = jax.jit(jm.mann(model, strings=strings).init)(KEY, episode(ways=ways))
    return CompiledLearner(model, of_float64(params, 2), strings=strings)


def masked_out(query):
    return batch(query.x, query.y, np.zeros(len(query.y), bool))


# The loss.


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("controller", ["lstm", "feed_forward"])
def test_loss_and_outputs_match_a_plain_loop(controller, x64):
    model, (support, query) = compiled_learner(controller), episode()
    outputs, query_outputs = model.by_hand(support, query)
    expected = sum(map(model.cross_entropy, outputs, support.y)) + sum(
        map(model.cross_entropy, query_outputs, query.y)
    )
    value, metrics = model.loss(model.params, jm.Task(support, query), KEY)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], expected, rtol=1e-6)
    actual = model.outputs(model.params, support, query)
    np.testing.assert_allclose(actual, query_outputs, rtol=1e-9)
    right = (query_outputs.argmax(1) == np.asarray(query.y)).sum()
    assert [float(v) for v in metrics["accuracy"]] == [right, 2]
    assert len({tuple(row) for row in query_outputs.tolist()}) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("strings", [None, (3, 2)])
def test_a_head_of_zeros_has_the_loss_of_uniform_probabilities(strings, x64):
    ways, out = (WAYS, WAYS) if strings is None else (9, 6)
    learner, task = jm.mann(network(out), shuffle=False, strings=strings), episode(ways=ways)
    params = of_float64(learner.init(KEY, task))
    params["network"]["head"] = jax.tree.map(jnp.zeros_like, params["network"]["head"])
    value, _ = jax.jit(learner.loss)(params, task, KEY)
    np.testing.assert_allclose(value, (STEPS + 2) * np.log(ways), rtol=1e-12)


def test_loss_at_initialisation_is_near_that_of_uniform_probabilities(x64):
    model, task = compiled_learner(), episode()
    value, _ = model.loss(jax.tree.map(lambda leaf: leaf / 2, model.params), task, KEY)
    assert abs(value / (STEPS + 2) - np.log(WAYS)) < 0.4


# Causality.


@cache
def costs_and_answers():
    """Return functions of a sequence: the cost of each possible label at a step, and the outputs there."""
    learner, params, steps = compiled_learner().learner, compiled_learner().params, jnp.arange(STEPS)

    def loss(support, end, query):
        task = jm.Task(batch(support.x, support.y, steps < end), query)
        return learner.loss(params, task, KEY)[0]

    def cost(support, query, t, label):
        """Return the cost of step t with label `label`: the loss with this step minus the loss without it."""
        support = batch(support.x, jnp.where(steps == t, label, support.y))
        return loss(support, t + 1, query) - loss(support, t, query)

    def answer(support, t):
        """Return the outputs at step t after the earlier steps only."""
        adapted = learner.adapt(params, batch(support.x, support.y, steps < t), KEY)
        return learner.predict(params, adapted, lax.dynamic_slice_in_dim(support.x, t, 1))[0]

    by_label = jax.vmap(cost, (None, None, None, 0))
    costs = jax.vmap(by_label, (None, None, 0, None))
    return (
        jax.jit(lambda support, query: costs(support, query, steps, jnp.arange(WAYS))),
        jax.jit(lambda support: jax.vmap(answer, (None, 0))(support, steps)),
    )


def test_an_output_does_not_depend_on_the_label_of_its_own_step(x64):
    model, (support, query) = compiled_learner(), episode()
    cost, answer = costs_and_answers()
    costs, answers = cost(support, masked_out(query)), answer(support)
    np.testing.assert_allclose(costs, -jax.nn.log_softmax(answers), atol=1e-10)
    total, _ = model.loss(model.params, jm.Task(support, masked_out(query)), KEY)
    np.testing.assert_allclose(np.asarray(costs)[range(STEPS), support.y].sum(), total, rtol=1e-10)


def test_a_label_changes_all_outputs_after_its_step_and_no_others(x64):
    model, (support, query) = compiled_learner(), episode()
    _, answer = costs_and_answers()
    before = np.asarray(answer(support))
    for t in range(STEPS):
        other = batch(support.x, support.y.at[t].set((support.y[t] + 1) % WAYS))
        after = np.asarray(answer(other))
        np.testing.assert_array_equal(after[: t + 1], before[: t + 1])
        assert (np.abs(after - before)[t + 1 :].max(1, initial=0) > 1e-8).all()
        # These outputs are the ones that the training loss uses.
        value, _ = model.loss(model.params, jm.Task(other, masked_out(query)), KEY)
        np.testing.assert_allclose(value, sum(map(model.cross_entropy, after, other.y)), rtol=1e-10)


class Echo(jm.nn.MemoryNetwork):
    """A network that outputs the label it receives."""

    def setup(self):
        self.volume = self.param("volume", linen.initializers.ones, ())

    def project(self, x):
        return x

    def step(self, state, projected):
        return state, projected

    def outputs(self, features):
        return 1000 * self.volume * features[..., -self.out :]


@pytest.mark.parametrize("masked", [False, True])
def test_the_network_receives_the_label_of_the_previous_step(masked, x64):
    learner = jm.mann(Echo(out=WAYS), shuffle=False, instances=STEPS)
    labels, kept = [2, 2, 0, 1, 1, 1], [True, True, False, True, True, True]
    support = batch(np.ones((STEPS, 2, 2)), labels, kept if masked else None)
    query = batch(np.ones((2, 2, 2)), [1, 0])
    params = learner.init(KEY, jm.Task(support, query))
    _, metrics = jax.jit(learner.loss)(params, jm.Task(support, query), KEY)
    # Steps that repeat the previous label are correct: 1, 4 and 5, and the query of class 1. The first step
    # receives no label, and its prediction is class 0.
    expected = [(0, 2 if masked else 3), (2, 2), (1, 1), (0, 0), (0, 0), (0, 0)]
    actual = [[float(v) for v in metrics[f"instance_{i + 1}"]] for i in range(STEPS)]
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal([float(v) for v in metrics["accuracy"]], [1, 2])
    # 1000 for each mistake after the first step.
    wrong = 1000 * (1 if masked else 2) + 1000
    np.testing.assert_allclose(metrics["loss"][0], wrong + np.log(3), rtol=1e-6)
    outputs = learner.predict(params, learner.adapt(params, support, KEY), query.x)
    np.testing.assert_array_equal(outputs, 1000 * np.eye(3)[[1, 1]])


@pytest.mark.nightly
def test_queries_are_next_steps_that_do_not_change_the_memory(x64):
    model, (support, query) = compiled_learner(), episode(queries=3)
    adapted = model.adapt(model.params, support, KEY)
    actual = np.asarray(model.predict(model.params, adapted, query.x))
    for i in range(3):
        alone = model.predict(model.params, adapted, query.x[i : i + 1])
        np.testing.assert_allclose(alone[0], actual[i], rtol=1e-10)
    np.testing.assert_allclose(model.predict(model.params, adapted, query.x[::-1]), actual[::-1], rtol=1e-10)
    before, _ = model.loss(model.params, jm.Task(support, masked_out(query)), KEY)
    together, _ = model.loss(model.params, jm.Task(support, query), KEY)
    total = before
    for i in range(3):
        x, y = (np.concatenate([a, b[i : i + 1]]) for a, b in ((support.x, query.x), (support.y, query.y)))
        value, _ = model.loss(model.params, jm.Task(batch(x, y), masked_out(query)), KEY)
        np.testing.assert_allclose(value - before, model.cross_entropy(actual[i], query.y[i]), rtol=1e-8)
        total += value - before
    np.testing.assert_allclose(together, total, rtol=1e-10)


# Symmetries.


@pytest.mark.nightly
@pytest.mark.parametrize("strings", [None, (3, 2)])
def test_tasks_without_queries_are_allowed(strings, x64):
    ways = WAYS if strings is None else 9
    model = network(out=WAYS if strings is None else 6)
    task = episode(ways=ways)
    alone = task._replace(query=batch(np.zeros((0, 2, 2)), np.zeros(0), ways=ways))
    learner = jm.mann(model, strings=strings, shuffle=False)
    params = of_float64(jax.jit(learner.init)(KEY, task), 2)
    loss, metrics = jax.jit(learner.loss)(params, alone, KEY)
    outputs = jax.jit(learner.predict)(params, learner.adapt(params, task.support, KEY), task.query.x)
    query_loss = jm.losses.cross_entropy(outputs, task.query.y) * 2
    # The cross-entropy of joint logits is the sum over characters.
    np.testing.assert_allclose(loss + query_loss, jax.jit(learner.loss)(params, task, KEY)[0], rtol=1e-9)
    assert metrics["accuracy"][1] == 0
    assert learner.predict(params, learner.adapt(params, task.support, KEY), alone.query.x).shape == (0, ways)


@pytest.mark.nightly
def test_episodes_are_independent(x64):
    model = compiled_learner()
    tasks = [episode(seed=seed) for seed in range(3)]
    keys = jax.random.split(KEY, 3)

    def evaluate(task, key):
        adapted = model.learner.adapt(model.params, task.support, key)
        return model.learner.loss(model.params, task, key), model.learner.predict(
            model.params, adapted, task.query.x
        )

    together = jax.jit(jax.vmap(evaluate))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks), keys)
    alone = jax.jit(evaluate)
    for i in (2, 0, 1, 0):  # in any order
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-9),
            together,
            alone(tasks[i], keys[i]),
        )
    assert len({float(value) for value in together[0][0]}) == 3


def test_an_empty_sequence_leaves_the_memory_unchanged(x64):
    model, (support, _) = compiled_learner(), episode()
    empty = batch(support.x, support.y, [False] * STEPS)
    actual = model.outputs(model.params, empty, support)[:1]
    np.testing.assert_allclose(actual, model.by_hand(support, support)[0][:1], rtol=1e-10)


@pytest.mark.nightly
def test_permuted_labels_permute_the_outputs(x64):
    model, (support, query) = compiled_learner(), episode()
    actual = model.outputs(model.params, support, query)
    value, metrics = model.loss(model.params, jm.Task(support, query), KEY)
    for permutation in itertools.permutations(range(WAYS)):
        to = jnp.array(permutation)
        own = model.params["network"]
        kernel = own["inputs"]["kernel"]
        params = {
            "network": {
                **own,
                "inputs": {**own["inputs"], "kernel": kernel.at[DIM + to].set(kernel[DIM:])},
                "head": jax.tree.map(lambda leaf, to=to: leaf.at[..., to].set(leaf), own["head"]),
            }
        }
        renamed = jm.Task(batch(support.x, to[support.y]), batch(query.x, to[query.y]))
        outputs = model.outputs(params, renamed.support, query)
        np.testing.assert_allclose(outputs[:, to], actual, rtol=1e-9)
        new_value, new_metrics = model.loss(params, renamed, KEY)
        np.testing.assert_allclose(new_value, value, rtol=1e-10)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), new_metrics, metrics)


# Order and padding.


def with_padding(part, at):
    """Insert padding, with NaN and wrong labels, before the examples `at`."""
    x, y = np.asarray(part.x), np.asarray(part.y)
    return batch(
        np.insert(x, at, np.nan, axis=0), np.insert(y, at, 1), np.insert(np.ones(len(y), bool), at, False)
    )


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("at", [[STEPS] * 3, [0, 0, STEPS], [2, 4, 4]], ids=["end", "ends", "middle"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_padding_changes_nothing(shuffle, at, x64):
    model, (support, query) = compiled_learner(shuffle=shuffle), episode()
    padded = jm.Task(with_padding(support, at), with_padding(query, [1]))
    for key in jax.random.split(KEY, 2):
        (value, metrics), gradients = model.gradients(model.params, jm.Task(support, query), key)
        (new_value, new_metrics), new_gradients = model.gradients(model.params, padded, key)
        np.testing.assert_allclose(new_value, value, rtol=1e-10)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), new_metrics, metrics)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-10), new_gradients, gradients)
        outputs = [model.outputs(model.params, part, query, key) for part in (support, padded.support)]
        np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-9)


@pytest.mark.nightly
def test_few_shot_tasks_are_shuffled(x64):
    model, plain, (support, query) = compiled_learner(shuffle=True), compiled_learner(), episode(steps=3)
    orders = [list(order) for order in itertools.permutations(range(3))]
    known = [
        plain.loss(plain.params, jm.Task(batch(support.x[o], support.y[o]), query), KEY)[0]
        for o in map(jnp.array, orders)
    ]
    values = jax.jit(jax.vmap(lambda key: model.learner.loss(model.params, jm.Task(support, query), key)[0]))(
        jax.random.split(KEY, 600)
    )
    near = np.abs(np.asarray(values)[:, None] - np.asarray(known)[None]) < 1e-9
    assert (near.sum(1) == 1).all()
    # The 6 orders are equally likely: within 4 standard errors of 100.
    assert (np.abs(near.sum(0) - 100) < 4 * np.sqrt(600 * 5 / 36)).all()


def test_training_and_adaptation_use_the_same_order_for_the_same_key(x64):
    model, (support, query) = compiled_learner(shuffle=True), episode()
    for key in jax.random.split(KEY, 3):
        value, _ = model.loss(model.params, jm.Task(support, query), key)
        rest, _ = model.loss(model.params, jm.Task(support, masked_out(query)), key)
        outputs = model.outputs(model.params, support, query, key)
        expected = sum(map(model.cross_entropy, outputs, query.y))
        np.testing.assert_allclose(value - rest, expected, rtol=1e-8)


def brighter(key, x):
    """Double the brightness, plus a small random amount."""
    return 2 * x + jax.random.uniform(key, (x.shape[0], 1, 1))


@pytest.mark.nightly
def test_images_are_augmented_only_in_training(x64):
    plain, (support, query) = compiled_learner(), episode()
    model = compiled_learner(augment=brighter)
    jax.tree.map(
        np.testing.assert_array_equal,
        model.adapt(model.params, support, KEY),
        plain.adapt(model.params, support, KEY),
    )
    values = [model.loss(model.params, jm.Task(support, query), key)[0] for key in jax.random.split(KEY)]
    assert values[0] != values[1]
    # Both the images of the support set and those of the queries are augmented.
    flat = compiled_learner(augment=lambda key, x: jnp.zeros_like(x))
    dark = jm.Task(*(batch(0 * part.x, part.y) for part in (support, query)))
    np.testing.assert_allclose(
        flat.loss(model.params, jm.Task(support, query), KEY)[0],
        plain.loss(model.params, dark, KEY)[0],
        rtol=1e-12,
    )


# Strings.


@pytest.mark.nightly
def test_logits_of_strings_are_sums_over_their_characters(x64):
    model, (support, query) = string_learner(5, 2), episode(ways=25, queries=8)
    outputs, query_outputs = model.by_hand(support, query)
    joint = model.outputs(model.params, support, query)
    assert joint.shape == (8, 25)
    for m, first, second in itertools.product(range(8), range(5), range(5)):
        np.testing.assert_allclose(
            joint[m, first + 5 * second], query_outputs[m, first] + query_outputs[m, 5 + second], atol=1e-10
        )
    best = query_outputs.reshape(8, 2, 5).argmax(2)
    np.testing.assert_array_equal(joint.argmax(1), best[:, 0] + 5 * best[:, 1])
    # The joint softmax is the product of the characters' softmaxes.
    expected = sum(map(model.cross_entropy, outputs, support.y)) + sum(
        map(model.cross_entropy, query_outputs, query.y)
    )
    value, _ = model.loss(model.params, jm.Task(support, query), KEY)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(
        8 * jm.losses.cross_entropy(joint, query.y),
        sum(map(model.cross_entropy, query_outputs, query.y)),
        rtol=1e-10,
    )


def test_a_string_is_correct_only_if_all_its_characters_are(x64):
    model, (support, query) = string_learner(2, 2), episode(steps=12, queries=9, ways=4, seed=3)
    outputs, query_outputs = model.by_hand(support, query)

    def right(output, label):
        return all(output.reshape(2, 2).argmax(1) == [label % 2, label // 2])

    _, metrics = model.loss(model.params, jm.Task(support, query), KEY)
    assert float(metrics["accuracy"][0]) == sum(map(right, query_outputs, query.y.tolist())) > 0
    total = sum(float(metrics[f"instance_{i}"][0]) for i in range(1, 11))
    assert total == sum(map(right, outputs, support.y.tolist())) > 0


@pytest.mark.nightly
def test_the_first_character_of_a_string_varies_fastest(x64):
    learner = jm.mann(Echo(out=6), shuffle=False, strings=(2, 3))
    labels = jnp.array([[6], [3], [1]])
    for y in labels:
        support = batch(np.ones((1, 2, 2)), y, ways=8)
        params = learner.init(KEY, jm.Task(support, support))
        joint = learner.predict(params, learner.adapt(params, support, KEY), support.x)
        same = [sum((s >> i & 1) == (int(y[0]) >> i & 1) for i in range(3)) for s in range(8)]
        np.testing.assert_allclose(joint[0], 1000 * np.array(same), rtol=1e-6)


# Metrics.


@pytest.mark.parametrize("masked", [False, True])
def test_accuracies_are_counted_for_each_presentation(masked, x64):
    model = compiled_learner(instances=3)
    rng = np.random.default_rng(4)
    y = np.array([0, 1, 0, 0, 2, 0, 0, 1, 0, 1])
    kept = rng.uniform(size=10) > 0.3 if masked else np.ones(10, bool)
    support, query = batch(rng.normal(size=(10, 2, 2)), y, kept if masked else None), episode().query
    outputs, _ = model.by_hand(support, query)
    expected, seen = {i: [0, 0] for i in (1, 2, 3)}, dict.fromkeys(range(WAYS), 0)
    for output, label in zip(outputs, y[kept].tolist(), strict=True):
        seen[label] += 1
        if seen[label] in expected:
            expected[seen[label]][0] += output.argmax() == label
            expected[seen[label]][1] += 1
    _, metrics = model.loss(model.params, jm.Task(support, query), KEY)
    assert {name for name in metrics if "instance" in name} == {f"instance_{i}" for i in (1, 2, 3)}
    for i, counted in expected.items():
        assert [float(v) for v in metrics[f"instance_{i}"]] == counted
    assert 0 < sum(right for right, _ in expected.values()) < sum(count for _, count in expected.values())


def test_metrics_of_instances_beyond_the_length_have_a_count_of_zero(x64):
    model, (support, query) = compiled_learner(), episode(steps=3)
    _, metrics = model.loss(model.params, jm.Task(support, query), KEY)
    for i in range(4, 11):
        assert [float(v) for v in metrics[f"instance_{i}"]] == [0, 0]
    assert sum(float(metrics[f"instance_{i}"][1]) for i in (1, 2, 3)) == 3


def test_outputs_that_are_nan_count_as_wrong(x64):
    model = compiled_learner()
    _, metrics = model.loss(jax.tree.map(lambda leaf: leaf * jnp.nan, model.params), episode(), KEY)
    assert float(metrics["accuracy"][0]) == 0
    assert all(float(metrics[f"instance_{i}"][0]) == 0 for i in range(1, 11))


# Bad input.


def test_a_network_of_another_output_width_is_refused():
    with pytest.raises(ValueError, match="network: got out=4; the labels of these tasks need out=3"):
        jm.mann(network(4)).init(KEY, episode())
    with pytest.raises(ValueError, match=r"network: got out=25; .* need out=10"):
        jm.mann(network(25), strings=(5, 2)).init(KEY, episode(ways=25))


def test_strings_that_do_not_match_the_tasks_are_refused():
    with pytest.raises(ValueError, match=r"strings: got \(5, 2\), 25 strings, .* 3 labels"):
        jm.mann(network(10), strings=(5, 2)).init(KEY, episode())


# Training.


@pytest.mark.nightly
def test_second_presentations_are_learned_and_first_ones_stay_at_chance():
    ways, shots = 3, 4
    rng = np.random.default_rng(0)
    means = np.repeat(rng.normal(size=(24, 2, 2)), 6, axis=0)
    x = (means + 0.02 * rng.normal(size=means.shape)).astype(np.float32)
    few = jm.tasks.from_arrays(x, np.repeat(np.arange(24), 6), ways=ways, shots=shots, queries=1)
    tasks = jm.tasks.sequences(few)
    model = jm.nn.MemoryNetwork(out=ways, memory=jm.nn.LRUA(rows=16, width=8, heads=1), hidden=32)
    learner, optimizer = jm.mann(model, shuffle=False), optax.adam(1e-2)

    def losses(params, sample, key, count):
        def episode_loss(key):
            task_key, loss_key = jax.random.split(key)
            return learner.loss(params, sample(task_key), loss_key)

        return jax.vmap(episode_loss)(jax.random.split(key, count))

    @jax.jit
    def trained(params, sample, key):
        def step(carry, key):
            params, state = carry
            grads = jax.grad(lambda params: losses(params, sample, key, 16)[0].mean())(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, 250)
        return lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    params = trained(learner.init(KEY, tasks.sample(KEY)), tasks.sample, jax.random.key(1))
    _, metrics = jax.jit(partial(losses, count=600))(params, tasks.sample, jax.random.key(2))
    right, count = ({i: metrics[f"instance_{i}"][part].sum() for i in (1, 2, 3)} for part in (0, 1))
    accuracy = {i: float(right[i] / count[i]) for i in right}
    bound = sum(1 / j for j in range(1, ways + 1)) / ways
    assert accuracy[1] < bound + 4 * np.sqrt(bound * (1 - bound) / count[1])
    assert accuracy[2] > 0.6
    assert metrics["accuracy"][0].sum() / metrics["accuracy"][1].sum() > 0.5
