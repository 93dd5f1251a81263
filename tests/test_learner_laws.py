"""Properties of every learner, with every kind of batch statistics and on both kinds of tasks.

A new learner is tested by its entry in `jaxmeta.cli.names.LEARNERS`, and your own learner by
`pytest tests/test_learner_laws.py --learner my_module:my_learner`. `EXEMPT` lists the exceptions with their
reasons.

The default run checks each learner on inductive classification (a transductive method on its only row), and
MAML also on regression; properties that compile a second program run on one learner of each family. The
nightly run adds the other learners and kinds of tasks, and transductive rows of one learner of each family.
Those of the others are slow: they differ from the inductive ones in the source of the batch statistics alone.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from flax import linen

import jaxmeta as jm
from jaxmeta.cli import names
from jaxmeta.cli.build import learner_of as built
from jaxmeta.cli.config import Chosen, base_of, resolve
from jaxmeta.declare import facts_of
from jaxmeta.learner_form import normalized
from jaxmeta.nn.embedding import ConvNorm

WAYS, SHOTS, QUERIES = 3, 2, 2
IMAGE = (6, 6, 1)
# Support and query both end with examples that are padding.
PADDING = 2

# (property, learner) -> reason why it does not hold.
EXEMPT: dict[tuple[str, str], str] = {
    (
        "permuted_classes_permute_outputs",
        "learned_optimizer",
    ): "it starts from a new random network, whose parameters the test does not permute",
    **{
        ("loss_metrics_match_predictions", name): "trains a classifier of all training classes, and "
        "predicts by the classes of a support set"
        for name in ("simple_shot", "fine_tuned_head")
    },
    (
        "permuted_classes_permute_outputs",
        "mann",
    ): "labels are also inputs, by rows of a kernel; tests/model_based/test_mann.py permutes those, too",
    (
        "example_order_has_no_effect",
        "mann",
    ): "it reads a sequence, and its memory depends on the order",
    (
        "example_order_has_no_effect",
        "metanet",
    ): "an LSTM reads gradients in order; tests/model_based/test_metanet.py tests what order does not change",
    (
        "gradient_steps_lower_the_loss",
        "reptile",
    ): "its loss is the distance to the adapted parameters, which its gradient holds constant; "
    "tests/optimization_based/test_maml_relatives.py tests the loss that falls",
}

# learner -> settings that replace the small ones below.
SETTINGS: dict[str, dict[str, Any]] = {
    "reptile": {"inner_lr": 0.01, "inner_batch": None},
    # The implicit gradient assumes a minimum, which two steps reach only with a strong proximal term.
    "imaml": {"proximal": 2.0, "damping": 0.0},
    "learned_optimizer": {"inner_steps": 4, "eval_steps": 4, "truncation": 2},
}

# Leaves whose gradient is zero by design.
ZERO_GRADIENT = {
    "^population/": "no loss depends on the statistics that jm.calibrate fills in after training",
    "^embedding_head/": "MetaNet's gradients of the support set are constants to the task's loss",
    r"ConvNorm_\d+/bias$": "batch normalisation subtracts the batch mean, and the convolution's bias with it",
}

pytestmark = pytest.mark.usefixtures("x64")


class TinyConv(linen.Module):
    """A network with one block of Conv4's kind."""

    ways: int | None

    @linen.compact
    def __call__(self, x, mask=None):
        x = jax.nn.relu(ConvNorm(4, strides=2)(x, mask))
        x = x.reshape(x.shape[0], -1)
        return x if self.ways is None else linen.Dense(self.ways, name="head")(x)


def tiny_mlp(out):
    return jm.nn.MLP(out=out, hidden=(5,), kernel_init=linen.initializers.lecun_normal())


class TinyMaps(linen.Module):
    """An embedding of one block, for methods that compare feature maps."""

    @linen.compact
    def __call__(self, x, mask=None):
        return jax.nn.relu(ConvNorm(4)(x, mask))


def tiny_network(case):
    """Return a function that builds the small network of a case for an output width."""

    def build(out):
        if case.kind == "regression":
            return tiny_mlp(1)
        works_with = facts_of(factory_of(case.name)).networks or ()
        if "lrua" in works_with:
            return jm.nn.MemoryNetwork(out, jm.nn.LRUA(rows=6, width=3, heads=2), hidden=5)
        if "augmented-cnn" in works_with:
            return jm.nn.AugmentedCNN(out, filters=2, blocks=1, features=4)
        if "relation" in works_with:
            return TinyMaps()
        return TinyConv(out)

    return with_float64_init(build) if case.name == "learned_optimizer" else build


def with_float64_init(build):
    def build_rounded(out):
        model = jm.nn.as_model(build(out))

        def init(key, x):
            # Random numbers are float32 and may differ in the last bit between programs: round them.
            return jax.tree.map(
                lambda leaf: jnp.round(1024 * leaf.astype(jnp.float64)) / 1024, model.init(key, x)
            )

        return model._replace(init=init)

    return build_rounded


def factory_of(name):
    return names.find("learner", name, names.LEARNERS)


KEY = jax.random.key(2)


class Case(NamedTuple):
    name: str
    row: str  # row of the report: "transductive" or "inductive"
    kind: str

    def __str__(self):
        return f"{self.name}-{self.row}-{self.kind}"


CASES = [
    Case(name, row, kind)
    for name in support.requested_learners or names.LEARNERS
    for row in facts_of(factory_of(name)).rows
    for kind in facts_of(factory_of(name)).kinds
    # The networks for regression have no batch statistics, so all rows are the same.
    if kind == "classification" or row == "inductive"
]
# One learner of each family, for properties that compile another program.
REPRESENTATIVES = ("maml", "prototypical", "mann", *support.requested_learners)


def transductive(case):
    """Return whether predictions depend on the other queries by the method itself, under every `norm`."""
    return facts_of(factory_of(case.name)).transductive


def one_row(case):
    """Return whether a case is in the default run; see the module's docstring."""
    inductive = case.row == "inductive" or transductive(case)
    return inductive and (case.kind == "classification" or case.name == "maml")


def one_row_of_representatives(case):
    return one_row(case) and case.name in REPRESENTATIVES and case.kind == "classification"


def marks_of(case, default, every_row):
    """Return the marks of a test on a case; see the module's docstring."""
    # Tests of one learner share its compiled program, so they run on one worker.
    group = pytest.mark.xdist_group(f"laws of {case.name}")
    if default(case):
        return [group]
    by_norm_alone = case.row == "transductive" and not transductive(case) and case.name not in REPRESENTATIVES
    return [group, pytest.mark.slow if by_norm_alone and not every_row else pytest.mark.nightly]


def law(where=lambda case: True, default=one_row, every_row=False):
    """Run a test on the cases of `where` that are not exempt.

    Cases that are not in `default` are nightly, or slow where they differ from another by the norm alone,
    unless `every_row`.
    """

    def mark(test):
        name = test.__name__.removeprefix("test_")
        rows = [
            pytest.param(case, id=str(case), marks=marks_of(case, default, every_row))
            for case in CASES
            if where(case) and (name, case.name) not in EXEMPT
        ]
        return pytest.mark.parametrize("case", rows)(test)

    return mark


@functools.cache
def learner_of(case):
    return learner_with(case, norm_of(case))


def learner_with(case, norm):
    classification = case.kind == "classification"
    base = base_of(Chosen(learner=case.name, tasks="glyphs" if classification else "sinusoid"))
    small = {"inner_steps": 2, "eval_steps": 2, "inner_lr": 0.3 if classification else 0.02}
    small |= SETTINGS.get(case.name, {})
    known = base.names().groups()["learner"]
    settings = {name: value for name, value in small.items() if name in known}
    tasks = {"ways": WAYS, "train_ways": WAYS} if classification else {}
    config = resolve(base, {"learner": settings, "tasks": tasks, "training": {"distort": False}})
    # User-defined learners may take no mask or step.
    return normalized(built(config, norm, tiny_network(case)))


def norm_of(case):
    return facts_of(factory_of(case.name)).rows[case.row]


def task_of(case, seed=0):
    rng = np.random.default_rng(seed)

    def part(per_class):
        if case.kind == "regression":
            x = rng.uniform(-2, 2, size=(WAYS * per_class + PADDING, 1))
            y, ways = np.sin(x + seed), None
        else:
            labels = np.arange(WAYS * per_class + PADDING) % WAYS
            x = rng.normal(size=(labels.size, *IMAGE)) + 0.5 * labels.reshape(-1, 1, 1, 1)
            y, ways = labels.astype(np.int32), WAYS
        return jm.Batch(
            jnp.asarray(x), jnp.asarray(y), mask=jnp.asarray(np.arange(len(x)) < WAYS * per_class), ways=ways
        )

    return jm.Task(part(SHOTS), part(QUERIES))


def perturb(params):
    """Move parameters away from zero biases and unit scales, where properties could hold by accident."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape)), params)


@functools.cache
def params_of(case):
    params = jax.jit(learner_of(case).init)(jax.random.key(0), task_of(case))
    params = perturb(params)
    if not on_population(case):
        return params
    statistics = jax.jit(learner_of(case).statistics)
    return params | {"population": statistics(params, task_of(case), KEY)[0]}


def on_population(case):
    """Return whether the learner predicts with population statistics, which `jm.calibrate` fills in."""
    return norm_of(case) == "population"


class Run(NamedTuple):
    """All results of a learner on one task; outputs of padding are zeroed."""

    loss: Any
    metrics: Any
    gradient: Any
    adapted: Any
    outputs: Any


def results(learner, params, task, key, step=None):
    def loss(params):
        return learner.loss(params, task, key, step=step)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    adapted = learner.adapt(params, task.support, key)
    outputs = learner.predict(params, adapted, task.query.x, task.query.mask)
    if task.query.mask is not None:
        outputs = jnp.where(task.query.mask[:, None], outputs, 0)
    return Run(value, metrics, gradient, adapted, outputs)


@functools.cache
def program(case):
    """Return the compiled `results` of a case's learner, and a list that grows with each trace."""
    traces = []

    def traced(params, task, key, step):
        traces.append(case)
        return results(learner_of(case), params, task, key, step)

    return jax.jit(traced), traces


# A meta-step after the end of all schedules, which a loss without a step also assumes.
LATE = np.int32(10**6)


def run(case, task=None, params=None, key=KEY, step=LATE):
    params = params_of(case) if params is None else params
    return program(case)[0](params, task_of(case) if task is None else task, key, step)


def assert_equal(a, b, tolerance=1e-9):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@law()
def test_calls_have_no_side_effects(case):
    params, task = params_of(case), task_of(case)
    before = jax.tree.map(np.array, (params, task))
    first = run(case)
    run(case, task_of(case, seed=1))
    assert_equal(run(case), first, 0)
    assert_equal((params, task), before, 0)


@law(default=one_row_of_representatives)
def test_jit_matches_eager(case):
    learner, params, task = learner_of(case), params_of(case), task_of(case)
    compiled_run = run(case)
    adapted = learner.adapt(params, task.support, KEY)
    assert_equal(adapted, compiled_run.adapted)
    assert_equal(learner.loss(params, task, KEY), (compiled_run.loss, compiled_run.metrics))


@law(default=one_row_of_representatives)
def test_predict_can_be_exported_for_any_number_of_examples(case, tmp_path):
    learner, params, task = learner_of(case), params_of(case), task_of(case)
    adapted = run(case).adapted
    jm.export(tmp_path / "program", learner, params, adapted, task.query.x)
    program = jax.export.deserialize(bytearray((tmp_path / "program").read_bytes()))
    for count in (1, len(task.query.x)):
        x = task.query.x[:count]
        assert_equal(program.call(x), jax.jit(learner.predict)(params, adapted, x))


@law(default=one_row_of_representatives)
def test_vmap_matches_loop(case):
    tasks = [task_of(case, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)
    together = jax.jit(jax.vmap(functools.partial(results, learner_of(case)), (None, 0, None)))(
        params_of(case), stacked, KEY
    )
    for i, task in enumerate(tasks):
        assert_equal(jax.tree.map(lambda leaf: leaf[i], together), run(case, task))  # noqa: B023


@law()
def test_values_of_padding_have_no_effect(case):
    expected = run(case)
    for garbage in (np.nan, np.inf, 1e30):

        def spoil(part, garbage=garbage):
            def fill(leaf, value):
                real = np.reshape(part.mask, (-1, *(1,) * (leaf.ndim - 1)))
                return jnp.asarray(np.where(real, leaf, np.asarray(value, leaf.dtype)))

            return jm.Batch(
                fill(part.x, garbage),
                fill(part.y, garbage if part.ways is None else 0),
                mask=part.mask,
                ways=part.ways,
            )

        assert_equal(run(case, jm.Task(*map(spoil, task_of(case)))), expected)


@law(default=one_row_of_representatives)
def test_padded_task_matches_task_without_padding(case):
    expected = run(case)
    kept = jm.Task(*(jm.Batch(p.x[:-PADDING], p.y[:-PADDING], ways=p.ways) for p in task_of(case)))
    bare = run(case, kept)
    if not facts_of(factory_of(case.name)).head or case.name == "metanet":
        # The adapted state may hold the examples themselves, including padding.
        bare = bare._replace(adapted=expected.adapted)
    assert_equal(bare._replace(outputs=expected.outputs), expected)
    assert_equal(bare.outputs, expected.outputs[:-PADDING])


@law(lambda case: case.kind == "classification")
def test_permuted_classes_permute_outputs(case):
    """Permute the class slots c -> σ(c) and the head's columns: outputs permute, all else is unchanged."""
    sigma = np.array([2, 0, 1], np.int32)
    moved = np.argsort(sigma)  # column σ(c) is the old column c

    def permute(tree):
        """Permute the last axis of the leaves under a head that have one entry per class."""

        def columns(path, leaf):
            has_slots = "head" in jax.tree_util.keystr(path) and leaf.shape[-1:] == (WAYS,)
            return leaf[..., moved] if has_slots else leaf

        return jax.tree_util.tree_map_with_path(columns, tree)

    expected = run(case)
    task = jm.Task(*(jm.Batch(p.x, jnp.asarray(sigma[p.y]), mask=p.mask, ways=p.ways) for p in task_of(case)))
    permuted = run(case, task, permute(params_of(case)))
    assert_equal(permuted.outputs, expected.outputs[:, moved])
    assert np.ptp(expected.outputs[:-PADDING], axis=1).min() > 1e-3
    assert_equal(permuted.gradient, permute(expected.gradient))
    assert_equal((permuted.loss, permuted.metrics), (expected.loss, expected.metrics))


@law()
def test_example_order_has_no_effect(case):
    expected, task = run(case), task_of(case)
    for which in ("query", "support"):
        order = np.roll(np.arange(getattr(task, which).y.shape[0])[::-1], 2)
        part = jax.tree.map(lambda leaf: leaf[order], getattr(task, which))  # noqa: B023
        reordered = run(case, task._replace(**{which: part}))
        outputs = expected.outputs[order] if which == "query" else expected.outputs
        assert_equal(reordered._replace(adapted=expected.adapted), expected._replace(outputs=outputs))


@law(default=lambda case: one_row(case) or case.name in REPRESENTATIVES, every_row=True)
def test_other_queries_matter_only_if_transductive(case):
    learner, params, query = learner_of(case), params_of(case), task_of(case).query
    joint = run(case)
    alone = jax.jit(jax.vmap(lambda x: learner.predict(params, joint.adapted, x[None])[0]))(query.x)
    real = np.asarray(query.mask)
    if case.row == "inductive":
        assert_equal(joint.outputs[real], alone[real])
    else:
        assert np.abs(joint.outputs[real] - alone[real]).max() > 1e-3


@law(transductive)
def test_transductive_methods_use_the_other_queries_by_themselves_but_not_their_order(case):
    """Without batch statistics of the queries, a prediction still depends on the other queries."""
    learner, params, query = learner_with(case, "support"), params_of(case), task_of(case).query
    adapted = jax.jit(learner.adapt)(params, task_of(case).support, KEY)
    predict = jax.jit(lambda x, mask: learner.predict(params, adapted, x, mask))
    joint, real = predict(query.x, query.mask), np.flatnonzero(query.mask)
    order = np.roll(np.arange(query.x.shape[0])[::-1], 2)
    reordered = predict(query.x[order], query.mask[order])
    assert_equal(reordered[np.argsort(order)][real], joint[real])
    for index in real:
        alone = predict(query.x, query.mask & (np.arange(query.x.shape[0]) == index))
        assert np.isfinite(alone[index]).all()
        assert np.abs(alone[index] - joint[index]).max() > 1e-3


@law()
def test_new_values_do_not_retrace(case):
    run(case)
    traced = len(program(case)[1])
    params = jax.tree.map(lambda leaf: jnp.asarray(1.1 * np.asarray(leaf)), params_of(case))
    run(case, task_of(case, seed=1), params, jax.random.key(1), np.int32(1))
    assert len(program(case)[1]) == traced


@law()
def test_saved_and_loaded_learner_predicts_the_same(case, tmp_path):
    expected, learner, params = run(case), learner_of(case), params_of(case)
    tree = {"params": params, "adapted": expected.adapted}
    jm.save(tmp_path / "saved", tree)
    # Without `like`, because a program that only predicts may not have a tree of that structure.
    loaded = jm.load(tmp_path / "saved")
    assert_equal(loaded, tree, 0)
    query = task_of(case).query
    outputs = jax.jit(learner.predict)(loaded["params"], loaded["adapted"], query.x, query.mask)
    assert_equal(outputs[:-PADDING], expected.outputs[:-PADDING])


@law()
def test_gradient_reaches_every_parameter(case):
    gradient = run(case).gradient
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), name
        # With statistics averaged over inner steps the bias does not cancel.
        averaged = norm_of(case) == "episode"
        if not averaged and any(re.search(pattern, name) for pattern in ZERO_GRADIENT):
            np.testing.assert_allclose(leaf, 0, atol=1e-12, err_msg=name)
        else:
            assert np.abs(leaf).max() > 1e-6, name


@law(
    lambda case: not on_population(case),
    default=lambda case: one_row(case) or case.name in REPRESENTATIVES,
)
def test_loss_metrics_match_predictions(case):
    result, query = run(case), task_of(case).query
    name = "mse" if case.kind == "regression" else "accuracy"
    expected = jm.losses.score(result.outputs, query)
    assert_equal(result.metrics[name], expected[name])
    assert result.metrics[name][1] == WAYS * QUERIES
    assert all(np.shape(part) == () for metric in result.metrics.values() for part in metric)


@law()
def test_gradient_steps_lower_the_loss(case):
    """Check that three short gradient steps on the meta-loss lower it."""
    params, losses = params_of(case), []
    for _ in range(4):
        result = run(case, params=params)
        losses.append(float(result.loss))
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(result.gradient)))
        step = 0.02 / max(1, norm)
        params = jax.tree.map(lambda p, g: jnp.asarray(p - step * np.asarray(g)), params, result.gradient)  # noqa: B023
    assert losses[-1] < losses[0]


def test_exemptions_name_existing_properties_and_learners():
    properties = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for (property_name, learner), reason in EXEMPT.items():
        assert property_name in properties
        assert learner in names.LEARNERS
        assert reason
