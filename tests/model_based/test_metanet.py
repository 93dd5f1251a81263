"""Meta Networks: the algorithm against torch, memory use, constant gradients, sampling and training."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxmeta as jm
from jaxmeta.model_based.metanet import attend, chunks, metanet, pair_loss, random_pairs
from jaxmeta.nn.augmented import AugmentedCNN, ExampleGenerator, TaskGenerator

WAYS, SHOTS, QUERIES, HIDDEN = 3, 2, 2, 4
INPUTS = {0: (6,), 1: (5, 5, 1), 2: (5, 5, 1)}  # by the number of convolutions
KEY = jax.random.key(5)

pytestmark = pytest.mark.usefixtures("x64")


def nets(blocks=1, ways=WAYS):
    return (
        AugmentedCNN(filters=3, blocks=blocks, features=4),
        AugmentedCNN(ways=ways, filters=2, blocks=blocks, features=5),
    )


@functools.cache
def make(blocks=0, ways=WAYS, **settings):
    """Build a learner, cached; without convolutions its functions compile twice as fast."""
    learner = metanet(*nets(blocks, ways), hidden=HIDDEN, **settings)
    return learner._replace(
        adapt=jax.jit(learner.adapt), predict=jax.jit(learner.predict), loss=jax.jit(learner.loss)
    )


def task_of(seed=0, blocks=0, shots=SHOTS, ways=WAYS):
    rng = np.random.default_rng(seed)
    shape = INPUTS[blocks]

    def part(per_class):
        labels = np.repeat(np.arange(ways), per_class)
        x = rng.normal(size=(labels.size, *shape)) + 0.5 * labels.reshape(-1, *(1,) * len(shape))
        return jm.Batch(jnp.asarray(x), jnp.asarray(labels, jnp.int32), ways=ways)

    return jm.Task(part(shots), part(QUERIES))


def params_of(learner, task, seed=1):
    """Return random parameters of the right shapes, without compiling `init`, which takes a second."""
    shapes = jax.eval_shape(learner.init, jax.random.key(0), task)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), shapes)


def assert_equal(a, b, tolerance=1e-10):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def results(learner, params, task, key=KEY):
    (value, metrics), gradient = jax.value_and_grad(learner.loss, has_aux=True)(params, task, key)
    adapted = learner.adapt(params, task.support, key)
    return value, metrics, gradient, learner.predict(params, adapted, task.query.x)


@functools.cache
def compiled(**settings):
    return jax.jit(functools.partial(results, make(**settings)))


# --- Against torch ------------------------------------------------------------------------------------


class Torch:
    """The paper's algorithm with loops over samples, support items and queries, and autograd's gradients."""

    def __init__(self, torch, params, draws, embedding_loss="xent", task_weights="embedding"):
        self.torch, self.draws = torch, draws
        self.embedding_loss, self.task_weights = embedding_loss, task_weights
        self.params = jax.tree.map(
            lambda leaf: torch.tensor(np.asarray(leaf), dtype=torch.float64, requires_grad=True), params
        )

    def net(self, slow, fasts, x, last):
        """Apply a network to x (n, h, w, c); `last` is the layer without an activation."""
        torch, h = self.torch, x.permute(0, 3, 1, 2)
        for name in sorted(slow):
            if name == "fc":
                h = h.permute(0, 2, 3, 1).reshape(h.shape[0], -1)
            parts = []
            for weights in (slow, *fasts):
                w = weights[name]["kernel"]
                conv = name.startswith("conv")
                z = torch.nn.functional.conv2d(h, w.permute(3, 2, 0, 1), padding=1) if conv else h @ w
                parts.append(z if name == last else torch.relu(z))
            h = sum(parts)
            if name.startswith("conv"):
                h = torch.nn.functional.max_pool2d(h, 2, ceil_mode=True)
        return h

    def embed(self, x, fasts=()):
        return self.net(self.params["embedding"], fasts, x, "fc")

    def base(self, x, fasts=()):
        return self.net(self.params["base"], fasts, x, "head")

    def pre(self, g):
        torch = self.torch
        eps = 1e-300
        log = torch.clamp(torch.log(g.abs() + eps) / 7, min=-1)
        return torch.stack([log, torch.clamp(g * np.exp(7), -1, 1)], -1)

    def gradient(self, loss, slow):
        names = list(slow)
        gradients = self.torch.autograd.grad(loss, [slow[name]["kernel"] for name in names])
        return {name: g.detach() for name, g in zip(names, gradients, strict=True)}

    def task_fast(self, generators, gradients):
        torch, out = self.torch, {}
        for name in gradients[0]:
            generator = generators["conv" if name.startswith("conv") else "dense"]
            h = c = torch.zeros(gradients[0][name].numel(), HIDDEN, dtype=torch.float64)
            for g in gradients:
                z = (
                    torch.cat([self.pre(g[name].reshape(-1)), h], 1) @ generator["lstm"]["kernel"]
                    + generator["lstm"]["bias"]
                )
                enter, candidate, forget, leave = z.chunk(4, 1)
                c = torch.sigmoid(forget + 1) * c + torch.sigmoid(enter) * torch.tanh(candidate)
                h = torch.sigmoid(leave) * torch.tanh(c)
            out[name] = {
                "kernel": (h @ generator["output_kernel"] + generator["output_bias"]).reshape(
                    gradients[0][name].shape
                )
            }
        return out

    def example_fast(self, gradient):
        torch, out = self.torch, {}
        for name, g in gradient.items():
            generator = self.params["example_generator"]["conv" if name.startswith("conv") else "dense"]
            h = self.pre(g.reshape(-1))
            for i in range(2):
                h = torch.relu(h @ generator[f"hidden_{i}_kernel"] + generator[f"hidden_{i}_bias"])
            out[name] = {
                "kernel": (h @ generator["output_kernel"] + generator["output_bias"]).reshape(g.shape)
            }
        return out

    def sample_loss(self, sample, x, y):
        torch, functional = self.torch, self.torch.nn.functional
        r = self.embed(x[sample])
        head = self.params.get("embedding_head")
        if self.embedding_loss == "xent":
            return functional.cross_entropy(torch.relu(r) @ head["kernel"], y[sample])
        same = float(y[sample[0]] == y[sample[1]])
        if self.embedding_loss == "verification":
            p = torch.sigmoid(((r[0] - r[1]).abs() * head["weights"]).sum() + head["bias"])
            return -(same * torch.log(p) + (1 - same) * torch.log(1 - p))
        d = torch.linalg.vector_norm(r[0] - r[1])
        return same * d**2 + (1 - same) * torch.clamp(1.0 - d, min=0) ** 2

    def loss(self, task):
        torch, functional = self.torch, self.torch.nn.functional
        xs, xq = (torch.tensor(np.array(part.x)) for part in task)
        ys, yq = (torch.tensor(np.array(part.y), dtype=torch.int64) for part in task)
        slow = self.params["embedding"], self.params["base"]
        samples = [self.gradient(self.sample_loss(s, xs, ys), slow[0]) for s in self.draws["samples"]]
        fast = self.task_fast(self.params["task_generator"], samples)
        gradients = [
            self.gradient(functional.cross_entropy(self.base(xs[i : i + 1]), ys[i : i + 1]), slow[1])
            for i in range(len(ys))
        ]
        extra = []
        if self.task_weights == "both":
            means = [
                {name: sum(gradients[i][name] for i in chunk) / len(chunk) for name in gradients[0]}
                for chunk in self.draws["chunks"]
            ]
            extra = [self.task_fast(self.params["base_task_generator"], means)]
        values = [self.example_fast(g) for g in gradients]
        keys = self.embed(xs, [fast])
        total = 0.0
        for i in range(len(yq)):
            r = self.embed(xq[i : i + 1], [fast])
            attention = torch.softmax(functional.cosine_similarity(keys, r, dim=1), 0)
            read = {
                name: {"kernel": sum(a * v[name]["kernel"] for a, v in zip(attention, values, strict=True))}
                for name in values[0]
            }
            total = total + functional.cross_entropy(self.base(xq[i : i + 1], [*extra, read]), yq[i : i + 1])
        return total / len(yq)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("embedding_loss", "task_weights"),
    [
        ("xent", "embedding"),
        ("verification", "embedding"),
        ("contrastive", "embedding"),
        ("xent", "both"),
    ],
)
def test_loss_and_meta_gradient_match_torch(embedding_loss, task_weights):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    task = task_of(1, blocks=2)
    learner = make(blocks=2, embedding_loss=embedding_loss, task_weights=task_weights, samples=4)
    params = params_of(learner, task)
    mask = jnp.ones(WAYS * SHOTS, bool)

    def both_kinds(key):
        pairs = np.array(random_pairs(jax.random.split(jax.random.split(key)[1])[0], mask, 4)[0])
        labels = np.asarray(task.support.y)[pairs]
        return np.unique(labels[:, 0] == labels[:, 1]).size == 2

    # Pairs of the same and of different classes occur, so that both terms of a pair loss are tested.
    key = next(filter(both_kinds, jax.random.split(KEY, 50)))
    for_embedding, for_base = jax.random.split(jax.random.split(key)[1])

    def lists(key):
        which, real = chunks(key, mask, 4)
        return [[int(i) for i in w[r]] for w, r in zip(np.array(which), np.array(real), strict=True)]

    draws = {"samples": lists(for_embedding), "chunks": lists(for_base)}
    if embedding_loss != "xent":
        draws["samples"] = np.array(random_pairs(for_embedding, mask, 4)[0]).tolist()
    reference = Torch(torch, params, draws, embedding_loss, task_weights)
    expected = reference.loss(task)
    expected.backward()
    value, gradient = jax.jit(jax.value_and_grad(lambda p: learner.loss(p, task, key)[0]))(params)
    np.testing.assert_allclose(float(value), expected.item(), rtol=1e-11)
    expected = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy(), reference.params
    )
    assert_equal(gradient, expected, 1e-10)
    for name, part in gradient.items():
        if name != "embedding_head":
            assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(part)) > 1e-6, name


# --- Properties from the paper ------------------------------------------------------------------------


def without_output(generators):
    """Set the last layer of the generators to zero."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "output" in jax.tree_util.keystr(path) else leaf,
        generators,
    )


def test_generators_of_zero_give_the_outputs_of_the_slow_networks():
    task = task_of(blocks=1)
    learner = make(blocks=1, task_weights="both")
    params = params_of(learner, task)
    params |= {name: without_output(params[name]) for name in params if name.endswith("generator")}
    adapted = learner.adapt(params, task.support, KEY)
    embedding, base = nets(blocks=1)
    keys = jax.jit(embedding.apply)({"params": params["embedding"]}, task.support.x)
    np.testing.assert_array_equal(adapted["keys"], keys)
    outputs = jax.jit(jax.vmap(lambda x: base.apply({"params": params["base"]}, x[None])[0]))(task.query.x)
    np.testing.assert_array_equal(learner.predict(params, adapted, task.query.x), outputs)


def test_equal_keys_give_the_mean_of_all_values():
    task = task_of(blocks=1)
    same = dataclasses.replace(task.support, x=jnp.broadcast_to(task.support.x[:1], task.support.x.shape))
    learner = make(blocks=1, embedding_loss="xent")
    params = params_of(learner, task)
    adapted = learner.adapt(params, same, KEY)
    np.testing.assert_allclose(attend(adapted["keys"], adapted["mask"], adapted["keys"]), 1 / 6, rtol=1e-12)
    # Labels differ, so gradients differ too.
    assert np.ptp(adapted["values"]["head"]["kernel"], axis=0).max() > 1e-3
    mean = jax.tree.map(lambda leaf: jnp.asarray(np.mean(leaf, 0)), adapted["values"])
    expected = nets(blocks=1)[1].apply({"params": params["base"]}, task.query.x, mean)
    np.testing.assert_allclose(learner.predict(params, adapted, task.query.x), expected, atol=1e-12)


@pytest.mark.nightly
def test_a_single_support_example_has_all_attention_for_any_key():
    task = task_of(blocks=1, shots=1, ways=1)
    learner = make(blocks=1, ways=1, embedding_loss="xent")
    params = params_of(learner, task)
    adapted = learner.adapt(params, task.support, KEY)
    alone = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[0]), adapted["values"])
    expected = nets(blocks=1, ways=1)[1].apply({"params": params["base"]}, task.query.x, alone)
    read = np.asarray(adapted["keys"])
    for keys in (read, -read, np.zeros_like(read)):
        actual = learner.predict(params, adapted | {"keys": keys}, task.query.x)
        np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.nightly
def test_order_of_the_support_changes_only_the_weights_of_the_task():
    task = task_of()
    order = np.array([3, 0, 5, 1, 4, 2])

    def in_order(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf)[order], tree)

    moved = in_order(task.support)
    params = params_of(make(task_weights="none"), task)
    without = compiled(task_weights="none")
    assert_equal(without(params, task._replace(support=moved)), without(params, task), 1e-10)

    learner = make(embedding_loss="xent")
    params = params_of(learner, task)
    adapted = learner.adapt(params, task.support, KEY)
    memory = {name: adapted[name] for name in ("keys", "values", "mask")}
    permuted = adapted | in_order(memory)
    assert_equal(
        learner.predict(params, permuted, task.query.x), learner.predict(params, adapted, task.query.x)
    )
    other = learner.adapt(params, moved, KEY)
    assert np.abs(other["embedding"]["fc"]["kernel"] - adapted["embedding"]["fc"]["kernel"]).max() > 1e-6
    assert_equal(other["values"], in_order(adapted["values"]))


def test_gradients_that_generate_fast_weights_are_constants():
    """The gradient of the loss equals that of the same computation with these gradients as plain numbers."""
    task = task_of()
    learner = make(embedding_loss="contrastive", samples=3)
    params = params_of(learner, task)
    embedding, base = nets(blocks=0)
    support, query = task
    pairs, _ = random_pairs(jax.random.split(jax.random.split(KEY)[1])[0], jnp.ones(6, bool), 3)

    def pair(slow, which):
        r = embedding.apply({"params": slow}, support.x[which])
        return pair_loss("contrastive", None, r[0], r[1], support.y[which[0]] == support.y[which[1]])

    def example_loss(slow, x, y):
        logits = base.apply({"params": slow}, x[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    of_pairs, of_examples = (
        jax.tree.map(np.array, jax.jit(jax.vmap(jax.grad(loss), in_axes))(params[name], *inputs))
        for loss, in_axes, name, inputs in (
            (pair, (None, 0), "embedding", (pairs,)),
            (example_loss, (None, 0, 0), "base", (support.x, support.y)),
        )
    )

    def from_constants(params):
        def task_fast(g):
            flat = g.reshape(g.shape[0], -1)
            generator = {"params": params["task_generator"]["dense"]}
            return TaskGenerator(HIDDEN).apply(generator, jnp.asarray(flat)).reshape(g.shape[1:])

        def example_fast(g):
            generator = {"params": params["example_generator"]["dense"]}
            return ExampleGenerator(HIDDEN).apply(generator, jnp.asarray(g.reshape(-1))).reshape(g.shape)

        fast = jax.tree.map(task_fast, of_pairs)
        values = jax.tree.map(example_fast, of_examples)
        keys, r = (embedding.apply({"params": params["embedding"]}, part.x, fast) for part in task)
        attention = attend(keys, jnp.ones(6, bool), r)
        outputs = [
            base.apply(
                {"params": params["base"]},
                query.x[i : i + 1],
                jax.tree.map(lambda v, i=i: jnp.tensordot(attention[i], v, 1), values),
            )
            for i in range(6)
        ]
        return jm.losses.cross_entropy(jnp.concatenate(outputs), query.y)

    actual = jax.jit(jax.value_and_grad(lambda p: learner.loss(p, task, KEY)[0]))(params)
    assert_equal(actual, jax.jit(jax.value_and_grad(from_constants))(params), 1e-10)


@pytest.mark.nightly
def test_variants_have_the_parameters_they_use():
    task = task_of(blocks=1)
    always = {"embedding", "base", "example_generator"}
    for settings, more in (
        ({}, {"task_generator", "embedding_head"}),
        ({"embedding_loss": "xent"}, {"task_generator", "embedding_head"}),
        ({"embedding_loss": "contrastive"}, {"task_generator"}),
        ({"task_weights": "none"}, set()),
        ({"task_weights": "both"}, {"task_generator", "embedding_head", "base_task_generator"}),
    ):
        learner = metanet(*nets(), hidden=HIDDEN, **settings)
        params = jax.eval_shape(learner.init, jax.random.key(0), task)
        assert set(params) == always | more
        assert set(params["example_generator"]) == {"conv", "dense"}
        adapted = jax.eval_shape(learner.adapt, params, task.support, KEY)
        assert ("embedding" in adapted, "base" in adapted) == (
            settings.get("task_weights") != "none",
            settings.get("task_weights") == "both",
        )
    dense = jax.jit(make().init)(jax.random.key(0), task_of())
    assert set(dense["example_generator"]) == set(dense["task_generator"]) == {"dense"}
    # The head of "verification" has the initial values of a similarity.
    np.testing.assert_array_equal(dense["embedding_head"]["weights"], -np.ones(4))
    np.testing.assert_array_equal(dense["embedding_head"]["bias"], 1)


@pytest.mark.nightly
def test_adapted_state_of_the_published_network_has_the_expected_size():
    learner = metanet(AugmentedCNN(), AugmentedCNN(ways=5), embedding_loss="xent")
    part = jm.Batch(jnp.zeros((5, 28, 28, 1)), jnp.arange(5, dtype=jnp.int32), ways=5)
    params = jax.eval_shape(learner.init, jax.random.key(0), jm.Task(part, part))
    adapted = jax.eval_shape(learner.adapt, params, part, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapted["values"])) == 5 * 152_448
    assert adapted["keys"].shape == (5, 64)
    assert jax.eval_shape(learner.predict, params, adapted, part.x).shape == (5, 5)


def test_only_chosen_layers_have_fast_weights():
    task = task_of(blocks=2)
    learner = make(blocks=2, fast_layers=("conv_1", "fc", "head"))
    params = params_of(learner, task)
    adapted = learner.adapt(params, task.support, KEY)
    assert set(adapted["values"]) == {"conv_1", "fc", "head"}
    assert set(adapted["embedding"]) == {"conv_1", "fc"}
    # Each coordinate is generated separately, so other layers have no influence.
    full = make(blocks=2).adapt(params, task.support, KEY)
    assert_equal(adapted["values"], {name: full["values"][name] for name in adapted["values"]})
    assert np.isfinite(learner.predict(params, adapted, task.query.x)).all()


def test_parameters_for_other_fast_layers_are_refused():
    """With only `conv_0` fast, the embedding has no generator for dense weights."""
    task = task_of(blocks=1)
    learner = make(blocks=1, fast_layers=("conv_0", "head"))
    params = params_of(learner, task)
    assert set(learner.adapt(params, task.support, KEY)["embedding"]) == {"conv_0"}
    with pytest.raises(ValueError, match="got dense layers, for which the parameters hold no generator"):
        make(blocks=1).adapt(params, task.support, KEY)


# --- Properties of every learner ----------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("embedding_loss", "blocks"),
    [
        ("verification", 0),
        ("xent", 0),
        ("contrastive", 0),
        ("xent", 1),
    ],
)
def test_padding_changes_nothing_at_any_place(embedding_loss, blocks):
    task = task_of(blocks=blocks)
    settings = {"blocks": blocks, "embedding_loss": embedding_loss, "task_weights": "both"}
    params = params_of(make(**settings), task)
    value, metrics, gradient, outputs = compiled(**settings)(params, task, KEY)
    positions = np.array([1, 2, 4, 5, 6, 8])  # of ten

    def padded(part, garbage):
        mask = np.zeros(10, bool)
        mask[positions] = True
        x = np.full((10, *part.x.shape[1:]), garbage)
        x[positions] = part.x
        y = np.full(10, 1, np.int32)
        y[positions] = part.y
        return jm.Batch(jnp.asarray(x), jnp.asarray(y), mask=jnp.asarray(mask), ways=part.ways)

    for garbage in (np.nan, np.inf, 1e30):
        actual = compiled(**settings)(params, jm.Task(*(padded(part, garbage) for part in task)), KEY)
        assert_equal(actual[:3], (value, metrics, gradient), 1e-9)
        assert_equal(np.asarray(actual[3])[positions], outputs, 1e-9)


@pytest.mark.nightly_rows(after=1)
@pytest.mark.parametrize("embedding_loss", ["verification", "xent", "contrastive"])
def test_padding_changes_nothing_with_fewer_examples_than_samples(embedding_loss):
    task = task_of(shots=1)
    spread = np.array([0, 3, 4])
    x, y, mask = np.full((6, 6), np.nan), np.zeros(6, np.int32), np.zeros(6, bool)
    x[spread], y[spread], mask[spread] = task.support.x, task.support.y, True
    support = jm.Batch(jnp.asarray(x), jnp.asarray(y), mask=jnp.asarray(mask), ways=WAYS)
    learner = make(embedding_loss=embedding_loss)
    params = params_of(learner, task)
    assert_equal(learner.loss(params, task._replace(support=support), KEY), learner.loss(params, task, KEY))


def test_a_support_set_of_only_padding_gives_the_slow_base_learner():
    task = task_of()
    learner = make()
    params = params_of(learner, task)
    adapted = learner.adapt(params, dataclasses.replace(task.support, mask=np.zeros(6, bool)), KEY)
    np.testing.assert_allclose(
        learner.predict(params, adapted, task.query.x),
        nets(blocks=0)[1].apply({"params": params["base"]}, task.query.x),
        atol=1e-12,
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("embedding_loss", "blocks"),
    [
        ("verification", 0),
        ("xent", 1),
        ("contrastive", 0),
    ],
)
def test_vmap_over_tasks_matches_a_loop(embedding_loss, blocks):
    tasks = [task_of(seed, blocks) for seed in range(2)]
    settings = {"blocks": blocks, "embedding_loss": embedding_loss, "task_weights": "both"}
    learner = make(**settings)
    params = params_of(learner, tasks[0])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *tasks)
    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(functools.partial(results, learner), (None, 0, 0)))(params, stacked, keys)
    for i, task in enumerate(tasks):
        actual = jax.tree.map(lambda leaf: np.asarray(leaf)[i], together)  # noqa: B023
        assert_equal(actual, compiled(**settings)(params, task, keys[i]))


def test_loss_matches_adapt_and_predict_with_the_same_key():
    task = task_of()
    settings = {"blocks": 0, "embedding_loss": "verification", "task_weights": "both"}
    value, metrics, gradient, outputs = compiled(**settings)(params_of(make(**settings), task), task, KEY)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(value, jm.losses.cross_entropy(outputs, task.query.y), rtol=1e-12)
    assert_equal(metrics, {"loss": (value, np.ones(())), **jm.losses.score(outputs, task.query)})


def test_adaptation_is_determined_by_the_key():
    task = task_of()
    learner = make()
    params = params_of(learner, task)
    first, again, other = (
        learner.adapt(params, task.support, key)["embedding"] for key in (KEY, KEY, jax.random.key(6))
    )
    assert_equal(first, again, 0)
    assert np.abs(first["fc"]["kernel"] - other["fc"]["kernel"]).max() > 1e-6


@pytest.mark.nightly
@pytest.mark.parametrize("at_once", [4, 1, 6, 100])
def test_queries_in_parts_match_queries_at_once(at_once):
    task = task_of()
    params = params_of(make(task_weights="none"), task)
    expected = compiled(task_weights="none")(params, task)
    assert_equal(compiled(task_weights="none", queries_at_once=at_once)(params, task), expected)


@pytest.mark.nightly
def test_weights_beyond_one_block_are_generated_in_blocks(monkeypatch):
    task = task_of()
    settings = {"blocks": 0, "embedding_loss": "verification", "task_weights": "both"}
    params = params_of(make(**settings), task)
    expected = compiled(**settings)(params, task, KEY)
    # By sys.modules, because the package's attribute of this name is the function.
    for name in ("CPU_BLOCK", "BLOCK"):
        monkeypatch.setattr(sys.modules[metanet.__module__], name, 7)
    blocked = metanet(*nets(blocks=0), hidden=HIDDEN, task_weights="both")
    assert_equal(jax.jit(functools.partial(results, blocked))(params, task, KEY), expected)


@pytest.mark.nightly
def test_images_are_augmented_only_in_training():
    task = task_of()
    doubled = make(augment=lambda key, x: 2 * x)
    params = params_of(doubled, task)
    twice = jm.Task(*(dataclasses.replace(part, x=2 * np.asarray(part.x)) for part in task))
    assert_equal(doubled.loss(params, task, KEY), make().loss(params, twice, KEY))
    assert_equal(doubled.adapt(params, task.support, KEY), make().adapt(params, task.support, KEY))


# --- Sampling, attention, pair losses -----------------------------------------------------------------


chunks_of = jax.jit(chunks, static_argnums=2)


@pytest.mark.parametrize(("real", "count"), [(6, 3), (7, 3), (5, 5), (9, 4), (2, 3), (1, 2)])
def test_chunks_are_a_partition_with_sizes_that_differ_by_at_most_one(real, count):
    mask = np.zeros(9, bool)
    mask[np.arange(9)[:: 1 if real > 4 else 2][:real]] = True
    which, there = map(np.asarray, chunks_of(KEY, mask, count))
    assert which.shape == there.shape == (count, -(-9 // count))
    assert sorted(which[there]) == list(np.flatnonzero(mask))
    assert np.ptp(there.sum(1)) <= 1


def test_chunks_are_in_random_order():
    which, _ = jax.jit(jax.vmap(lambda key: chunks(key, jnp.ones(5, bool), 5)))(jax.random.split(KEY, 40))
    assert set(np.asarray(which)[:, 0, 0].tolist()) == set(range(5))


def test_pairs_are_uniform_and_of_two_different_examples():
    mask = np.array([False, True, True, False, True])
    draw = jax.jit(jax.vmap(lambda key: random_pairs(key, jnp.asarray(mask), 3)))
    drawn, valid = map(np.asarray, draw(jax.random.split(KEY, 1000)))
    assert valid.all()
    kinds, counts = np.unique(drawn.reshape(-1, 2), axis=0, return_counts=True)
    assert kinds.tolist() == [[1, 2], [1, 4], [2, 1], [2, 4], [4, 1], [4, 2]]
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)
    # At most as many pairs as examples, and none for a single example.
    pairs = jax.jit(random_pairs, static_argnums=2)
    assert pairs(KEY, mask, 5)[1].tolist() == [True, True, True, False, False]
    assert not pairs(KEY, np.array([True, False]), 2)[1].any()


def softmax(scores):
    powers = np.exp(scores)
    return powers / powers.sum(-1, keepdims=True)


def test_attention_is_the_softmax_of_cosines():
    rng = np.random.default_rng(0)
    keys, r = rng.normal(size=(4, 3)), rng.normal(size=(2, 3))
    cosines = (r @ keys.T) / np.linalg.norm(r, axis=1)[:, None] / np.linalg.norm(keys, axis=1)[None]
    weights = jax.jit(attend)
    np.testing.assert_allclose(weights(keys, np.ones(4, bool), r), softmax(cosines), rtol=1e-10)
    mask = np.array([True, False, True, True])
    actual = np.asarray(weights(keys, mask, r))
    np.testing.assert_array_equal(actual[:, 1], 0)
    np.testing.assert_allclose(actual[:, [0, 2, 3]], softmax(cosines[:, [0, 2, 3]]), rtol=1e-10)
    gradient = jax.jit(jax.grad(lambda keys: attend(keys, jnp.asarray(mask), jnp.asarray(r))[0, 0]))
    assert np.isfinite(gradient(np.zeros((4, 3)))).all()


def test_pair_losses_match_their_formulas():
    a, b = np.array([1.0, 2.0]), np.array([2.0, 0.0])
    head = {"weights": np.array([-1.0, 0.5]), "bias": np.asarray(0.25)}
    loss = jax.jit(pair_loss, static_argnums=(0, 5))
    p = 1 / (1 + np.exp(-(0.25 - 1 + 1)))
    for same, expected in ((True, -np.log(p)), (False, -np.log(1 - p))):
        actual = loss("verification", head, a, b, np.asarray(same))
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
    for same, margin, expected in ((True, 1.0, 5.0), (False, 1.0, 0.0), (False, 3.0, (3 - np.sqrt(5)) ** 2)):
        actual = loss("contrastive", None, a, b, np.asarray(same), margin)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
    for kind in ("verification", "contrastive"):
        gradient = jax.jit(jax.grad(lambda a, kind=kind: loss(kind, head, a, a * 1.0, np.asarray(False))))(a)
        assert np.isfinite(gradient).all()


# --- Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding_loss": "triplet"}, "embedding_loss: got 'triplet'; it must be one of"),
        ({"task_weights": "base"}, "task_weights: got 'base'; it must be one of"),
        ({"samples": 0}, "samples: got 0; it must be at least 1"),
        ({"hidden": 0}, "hidden: got 0; it must be at least 1"),
        ({"queries_at_once": 0}, "queries_at_once: got 0; it must be at least 1"),
        ({"margin": 0.0}, r"margin: got 0\.0; it must be positive"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        metanet(*nets(), **settings)


def test_networks_that_do_not_fit_are_refused():
    embedding, base = nets()
    task = task_of(blocks=1)
    with pytest.raises(ValueError, match="embedding: got MLP, whose call takes no `fast`"):
        metanet(jm.nn.MLP(out=4), base)
    with pytest.raises(ValueError, match="base: got MLP, whose call takes no `fast`"):
        metanet(embedding, jm.nn.MLP(out=4))
    with pytest.raises(
        ValueError, match=r"base: gives shape \(6, 5\) for 6 examples of 3 ways; it must be \(6, 3\)"
    ):
        make(blocks=1, ways=5).init(KEY, task)
    with pytest.raises(
        ValueError, match=r"fast_layers: got \['fd'\]; it must be among the layers \('conv_0'"
    ):
        make(blocks=1, fast_layers=("fc", "fd")).init(KEY, task)
    with pytest.raises(ValueError, match=r"embedding: gives shape \(6, 5, 5, 1\) for 6 examples"):
        metanet(jm.nn.augmented.Augmented(lambda key, x: {}, lambda p, x, fast=None: x), base).init(KEY, task)


def test_support_sets_that_do_not_fit_are_refused():
    task = task_of()
    learner = make(samples=7)
    with pytest.raises(ValueError, match="samples: got 7 for 6 support examples; it must be at most 6"):
        learner.init(KEY, task)
    params = params_of(make(), task)
    with pytest.raises(ValueError, match="samples: got 7"):
        learner.adapt(params, task.support, KEY)
    single = jm.Batch(task.support.x[:1], task.support.y[:1], ways=WAYS)
    with pytest.raises(ValueError, match=r'tasks: got 1 support example, .*; use embedding_loss="xent"'):
        make().adapt(params, single, KEY)
    make(task_weights="none").adapt(params, single, KEY)
    floats = dataclasses.replace(task.support, y=np.asarray(task.support.x)[:, 0])
    with pytest.raises(
        ValueError, match="tasks: got targets of type float64; metanet needs integer class slots"
    ):
        make().init(KEY, task._replace(support=floats))
    labels = np.asarray(task.support.y)
    with pytest.raises(ValueError, match="tasks: got 6 support examples and 2 class slots"):
        make().adapt(params, dataclasses.replace(task.support, y=labels[:2]), KEY)
    with pytest.raises(ValueError, match=r"ways is None and batch\.y is traced"):
        jax.jit(make().init)(KEY, task._replace(support=dataclasses.replace(task.support, ways=None)))


# --- Training -----------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("embedding_loss", ["verification", "contrastive", "xent"])
def test_training_learns_labels_that_only_the_support_set_reveals(embedding_loss):
    """Each task has three of six points, with random class slots."""
    learner = metanet(*nets(blocks=0), hidden=8, embedding_loss=embedding_loss)

    def draw(key):
        for_classes, for_noise = jax.random.split(key)
        centres = 3 * jnp.eye(6)[jax.random.permutation(for_classes, 6)[:WAYS]]
        y = jnp.tile(jnp.arange(WAYS), 3)
        x = centres[y] + 0.3 * jax.random.normal(for_noise, (9, 6))
        return jm.Task(jm.Batch(x[:3], y[:3], ways=WAYS), jm.Batch(x[3:], y[3:], ways=WAYS))

    optimizer = optax.adam(1e-2)
    params = learner.init(jax.random.key(0), draw(KEY))

    def mean_loss(params, key):
        keys = jax.random.split(key, 8)
        return jax.vmap(lambda task_key: learner.loss(params, draw(task_key), task_key)[0])(keys).mean()

    def step(carry, key):
        params, state = carry
        value, gradient = jax.value_and_grad(mean_loss)(params, key)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, keys: lax.scan(step, carry, keys))
    _, values = run((params, optimizer.init(params)), jax.random.split(jax.random.key(1), 400))
    np.testing.assert_allclose(values[0], np.log(3), rtol=0.1)
    assert values[-20:].mean() < 0.7 * np.log(3)
