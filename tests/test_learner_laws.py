"""Laws that every learner keeps, in every row of its report and on both kinds of tasks.

A new learner joins by its line in `jaxmeta.cli.names.LEARNERS`; one of your own is tested by
`pytest tests/test_learner_laws.py --learner my_module:my_learner`. Where a learner breaks a law for a good
reason, it says so in `EXEMPT`.

The default run checks each learner on one row of classification, and MAML on regression, too; laws that
compile a second program run on one learner of each family. The nightly run checks all.
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

# (law, learner) -> why it does not hold.
EXEMPT: dict[tuple[str, str], str] = {
    (
        "permuted_classes_permute_outputs",
        "learned_optimizer",
    ): "it begins with a fresh random network, not with parameters that could be renamed along",
    **{
        ("loss_metrics_match_predictions", name): "trains a classifier of all training classes, and "
        "predicts by the classes of a support set"
        for name in ("simple_shot", "fine_tuned_head")
    },
    (
        "permuted_classes_permute_outputs",
        "mann",
    ): "labels go in, too, by rows of a kernel; tests/model_based/test_mann.py renames those along",
    (
        "example_order_has_no_effect",
        "mann",
    ): "what is shown later is remembered otherwise, that being what a sequence is",
    (
        "example_order_has_no_effect",
        "metanet",
    ): "an LSTM reads gradients in order; tests/model_based/test_metanet.py has what no order moves",
    (
        "gradient_steps_lower_the_loss",
        "reptile",
    ): "its loss is the distance to where descent ends, and its gradient "
    "holds that end fixed; tests/optimization_based/test_reptile.py has what falls instead",
}

# learner -> settings in place of the small ones below.
SETTINGS: dict[str, dict[str, Any]] = {
    "reptile": {"inner_lr": 0.01, "inner_batch": None},
    # Two steps come near the minimum, which the gradient is about, where the proximal term is strong.
    "imaml": {"proximal": 2.0, "damping": 0.0},
    "learned_optimizer": {"inner_steps": 4, "eval_steps": 4, "truncation": 2},
}

# Leaves whose gradient is zero by mathematics, not by mistake.
ZERO_GRADIENT = {
    "^population/": "no loss depends on what jm.calibrate fills in after training",
    "^embedding_head/": "MetaNet's gradients of the support set are constants to the task's loss",
    r"ConvNorm_\d+/bias$": "the bias of a convolution is taken away again by the batch normalisation "
    "that follows, whose statistics are of a batch with the same bias",
}

pytestmark = pytest.mark.usefixtures("x64")


class TinyConv(linen.Module):
    """One block of the published kind."""

    ways: int | None

    @linen.compact
    def __call__(self, x, mask=None):
        x = jax.nn.relu(ConvNorm(4, strides=2)(x, mask))
        x = x.reshape(x.shape[0], -1)
        return x if self.ways is None else linen.Dense(self.ways, name="head")(x)


def tiny_mlp(out):
    return jm.nn.MLP(out=out, hidden=(5,), kernel_init=linen.initializers.lecun_normal())


class TinyMaps(linen.Module):
    """One block, for methods that compare maps."""

    @linen.compact
    def __call__(self, x, mask=None):
        return jax.nn.relu(ConvNorm(4)(x, mask))


def tiny_network(case):
    """Return what builds the small network of a case with a given output width."""

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

    return starting_in_float64(build) if case.name == "learned_optimizer" else build


def starting_in_float64(build):
    def rounded(out):
        model = jm.nn.as_model(build(out))

        def init(key, x):
            # Draws are of float32, and may differ in their last bit from one program to the next.
            return jax.tree.map(
                lambda leaf: jnp.round(1024 * leaf.astype(jnp.float64)) / 1024, model.init(key, x)
            )

        return model._replace(init=init)

    return rounded


def factory_of(name):
    return names.find("learner", name, names.LEARNERS)


KEY = jax.random.key(2)


class Case(NamedTuple):
    name: str
    row: str  # of the report: "transductive" or "inductive"
    kind: str

    def __str__(self):
        return f"{self.name}-{self.row}-{self.kind}"


CASES = [
    Case(name, row, kind)
    for name in support.own_learners or names.LEARNERS
    for row in facts_of(factory_of(name)).rows
    for kind in facts_of(factory_of(name)).kinds
    # Without batch statistics the rows of a report are one and the same.
    if kind == "classification" or row == "inductive"
]
# One learner of each family, for laws whose cost is a further compilation.
REPRESENTATIVES = ("maml", "prototypical", "mann", *support.own_learners)


def one_row(case):
    """Say whether a case is of classification by inductive statistics, or MAML's of regression."""
    return case.row == "inductive" and (case.kind == "classification" or case.name == "maml")


def one_row_of_representatives(case):
    return one_row(case) and case.name in REPRESENTATIVES and case.kind == "classification"


def law(where=lambda case: True, default=one_row):
    """Run `test_LAW` on the cases of `where` that are not exempt from LAW; nightly, if not in `default`."""

    def mark(test):
        name = test.__name__.removeprefix("test_")
        rows = [
            pytest.param(
                case,
                id=str(case),
                # Tests of one learner share its compiled program.
                marks=[
                    pytest.mark.xdist_group(f"laws of {case.name}"),
                    *([] if default(case) else [pytest.mark.nightly]),
                ],
            )
            for case in CASES
            if where(case) and (name, case.name) not in EXEMPT
        ]
        return pytest.mark.parametrize("case", rows)(test)

    return mark


@functools.cache
def learner_of(case):
    classification = case.kind == "classification"
    base = base_of(Chosen(learner=case.name, tasks="glyphs" if classification else "sinusoid"))
    small = {"inner_steps": 2, "eval_steps": 2, "inner_lr": 0.3 if classification else 0.02}
    small |= SETTINGS.get(case.name, {})
    known = base.names().groups()["learner"]
    settings = {name: value for name, value in small.items() if name in known}
    tasks = {"ways": WAYS, "train_ways": WAYS} if classification else {}
    config = resolve(base, {"learner": settings, "tasks": tasks, "training": {"distort": False}})
    # One of your own may take no mask and no step.
    return normalized(built(config, norm_of(case), tiny_network(case)))


def norm_of(case):
    return facts_of(factory_of(case.name)).rows[case.row]


def task_of(case, seed=0):
    rng = np.random.default_rng(seed)

    def part(each):
        if case.kind == "regression":
            x = rng.uniform(-2, 2, size=(WAYS * each + PADDING, 1))
            y, ways = np.sin(x + seed), None
        else:
            labels = np.arange(WAYS * each + PADDING) % WAYS
            x = rng.normal(size=(labels.size, *IMAGE)) + 0.5 * labels.reshape(-1, 1, 1, 1)
            y, ways = labels.astype(np.int32), WAYS
        return jm.Batch(
            jnp.asarray(x), jnp.asarray(y), mask=jnp.asarray(np.arange(len(x)) < WAYS * each), ways=ways
        )

    return jm.Task(part(SHOTS), part(QUERIES))


def stirred(params):
    """Parameters away from symmetric starts (zero biases, unit scales), where laws could hold by accident."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.1 * rng.normal(size=leaf.shape)), params)


@functools.cache
def params_of(case):
    params = jax.jit(learner_of(case).init)(jax.random.key(0), task_of(case))
    params = stirred(params)
    if not on_population(case):
        return params
    statistics = jax.jit(learner_of(case).statistics)
    return params | {"population": statistics(params, task_of(case), KEY)[0]}


def on_population(case):
    """Whether it predicts by statistics other than those it trains with, which `jm.calibrate` fills."""
    return norm_of(case) == "population"


class Run(NamedTuple):
    """All that a learner says of one task; entries of padding are zeroed."""

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
    """`results` of the case's learner, compiled, and the list that grows by one each time it is traced."""
    traces = []

    def traced(params, task, key, step):
        traces.append(case)
        return results(learner_of(case), params, task, key, step)

    return jax.jit(traced), traces


# Schedules over meta-steps have ended by then, as they have for a loss that is told no step.
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
        # What has been learned may be the examples, padding and all.
        bare = bare._replace(adapted=expected.adapted)
    assert_equal(bare._replace(outputs=expected.outputs), expected)
    assert_equal(bare.outputs, expected.outputs[:-PADDING])


@law(lambda case: case.kind == "classification")
def test_permuted_classes_permute_outputs(case):
    """Slots renamed c -> σ(c), and the head's columns along: so are outputs; all else stays."""
    sigma = np.array([2, 0, 1], np.int32)
    moved = np.argsort(sigma)  # where column σ(c) = old column c comes from

    def rename(tree):
        """Slots are the last axis of what is under a head, if it has as many entries."""

        def columns(path, leaf):
            has = "head" in jax.tree_util.keystr(path) and leaf.shape[-1:] == (WAYS,)
            return leaf[..., moved] if has else leaf

        return jax.tree_util.tree_map_with_path(columns, tree)

    expected = run(case)
    task = jm.Task(*(jm.Batch(p.x, jnp.asarray(sigma[p.y]), mask=p.mask, ways=p.ways) for p in task_of(case)))
    found = run(case, task, rename(params_of(case)))
    assert_equal(found.outputs, expected.outputs[:, moved])
    assert np.ptp(expected.outputs[:-PADDING], axis=1).min() > 1e-3
    assert_equal(found.gradient, rename(expected.gradient))
    assert_equal((found.loss, found.metrics), (expected.loss, expected.metrics))


@law()
def test_example_order_has_no_effect(case):
    expected, task = run(case), task_of(case)
    for which in ("query", "support"):
        order = np.roll(np.arange(getattr(task, which).y.shape[0])[::-1], 2)
        part = jax.tree.map(lambda leaf: leaf[order], getattr(task, which))  # noqa: B023
        found = run(case, task._replace(**{which: part}))
        outputs = expected.outputs[order] if which == "query" else expected.outputs
        assert_equal(found._replace(adapted=expected.adapted), expected._replace(outputs=outputs))


@law(default=lambda case: one_row(case) or case.name in REPRESENTATIVES)
def test_other_queries_matter_only_if_transductive(case):
    learner, params, query = learner_of(case), params_of(case), task_of(case).query
    joint = run(case)
    alone = jax.jit(jax.vmap(lambda x: learner.predict(params, joint.adapted, x[None])[0]))(query.x)
    real = np.asarray(query.mask)
    if case.row == "inductive":
        assert_equal(joint.outputs[real], alone[real])
    else:
        assert np.abs(joint.outputs[real] - alone[real]).max() > 1e-3


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
    # Without `like`: who predicts later may have nothing to make one from.
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
        # Averages over inner steps are of other biases than the ones in use.
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
    found, query = run(case), task_of(case).query
    name = "mse" if case.kind == "regression" else "accuracy"
    expected = jm.losses.score(found.outputs, query)
    assert_equal(found.metrics[name], expected[name])
    assert found.metrics[name][1] == WAYS * QUERIES
    assert all(np.shape(part) == () for metric in found.metrics.values() for part in metric)


@law()
def test_gradient_steps_lower_the_loss(case):
    """The one law that is not an identity: a few short gradient steps on the meta-loss lower it."""
    params, losses = params_of(case), []
    for _ in range(4):
        found = run(case, params=params)
        losses.append(float(found.loss))
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(found.gradient)))
        step = 0.02 / max(1, norm)
        params = jax.tree.map(lambda p, g: jnp.asarray(p - step * np.asarray(g)), params, found.gradient)  # noqa: B023
    assert losses[-1] < losses[0]


def test_exemptions_name_existing_laws_and_learners():
    laws = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for (law_name, learner), reason in EXEMPT.items():
        assert law_name in laws
        assert learner in names.LEARNERS
        assert reason
