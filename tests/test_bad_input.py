"""What an argument of a public function cannot be is refused by its name, and what it can be is taken."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxmeta as jm
from jaxmeta import transfer
from jaxmeta.tasks import ClassSplit

KEY = jax.random.key(0)
EACH = settings(
    max_examples=4,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Users have no type checker, which would be first to speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refused(call, *names):
    """That `call` raises a ValueError of one line, which begins with one of the names of what is wrong."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is looked at here
        call()
    said = str(caught.value)
    head = re.match(r"[\w., ]*", said)[0]
    assert set(names) & set(re.findall(r"\w+", head)), said
    assert re.match(r"[\w., ]*: \S", said), said
    assert len(said.splitlines()) == 1
    assert len(said) < 400


# --- Settings: counts, numbers and words ---------------------------------------------------------------


class Kind(NamedTuple):
    """What a setting cannot be, as a search and as some examples of it, and some values that it can have."""

    wrong: st.SearchStrategy
    right: tuple
    examples: tuple = ("?",)


NOTHING = st.one_of(st.text(max_size=5), st.binary(max_size=3), st.lists(st.floats(), max_size=3))
NO_NUMBER = st.one_of(NOTHING, st.sampled_from([math.nan, math.inf, -math.inf, 1j, {}, object()]))


def count(least=1, most=None, none=False):
    """A whole number; 2³¹ of anything are refused where they would be made."""
    fractions = st.floats(width=16).map(lambda value: value + 0.5 if value == least else value)
    wrong = [st.integers(max_value=least - 1), fractions, st.booleans(), NO_NUMBER]
    wrong += [st.integers(min_value=most + 1)] if most else [st.integers(min_value=2**31)]
    wrong += [] if none else [st.none()]
    right = (least, np.int64(least), *([None] if none else []))
    return Kind(st.one_of(wrong), right, (least - 1, least + 0.5, "?", 2**31 if most is None else most + 1))


def number(least=None, above=None, most=None, below=None, none=False, right=()):
    wrong = [NO_NUMBER, st.just(np.ones(2))]
    if least is not None:
        wrong.append(st.floats(max_value=least, exclude_max=True))
    if above is not None:
        wrong.append(st.floats(max_value=above))
    if most is not None:
        wrong.append(st.floats(min_value=most, exclude_min=True))
    if below is not None:
        wrong.append(st.floats(min_value=below))
    wrong += [] if none else [st.none()]
    low = least if least is not None else (0.0 if above is None else above + 0.5)
    right = (*(right or (low, np.float32(low))), *([None] if none else []))
    beyond = [edge + sign for edge, sign in ((least, -1), (most, 1)) if edge is not None]
    beyond += [edge for edge in (above, below) if edge is not None]
    return Kind(st.one_of(wrong), right, (math.nan, "?", *beyond))


def word(*known):
    other = st.one_of(st.text(max_size=6), st.integers(4), st.lists(st.text(max_size=2), max_size=2))
    return Kind(other.filter(lambda value: value not in known), known, ("?", 7))


def interval():
    """(low, high), finite, low below high."""
    ends = st.tuples(st.floats(), st.floats()).filter(
        lambda ends: not -math.inf < ends[0] < ends[1] < math.inf
    )
    wrong = st.one_of(ends, NOTHING, st.just((0, 1, 2)), st.none())
    return Kind(wrong, ((0, 1), (-2.5, 3.0)), ((1, 0), (0, math.nan), (0, 1, 2)))


def thing(*right):
    """A network, a function or an optimizer."""
    return Kind(st.one_of(st.integers(), st.text(max_size=3), st.just([]), st.just({})), right, (3, "?"))


def listed(wrong, right):
    """A setting with few interesting values that it cannot have."""
    return Kind(st.sampled_from(wrong), right, tuple(wrong))


def or_pair(kind):
    """A count, or an inclusive range of them."""
    pairs = [(2, 1), (0, 1), (1, 2, 3), (), (1.0, 2), ("a", "b"), (1, None)]
    wrong = st.one_of(kind.wrong.filter(lambda value: not isinstance(value, list)), st.sampled_from(pairs))
    return Kind(wrong, kind.right, (*kind.examples, *pairs))


MLP = jm.nn.MLP(out=2, hidden=())
IDENTITY = (lambda key, x: {}, lambda params, x: x)
X = np.repeat(np.eye(6, dtype=np.float32), 4, axis=0)
Y = np.repeat(np.arange(6), 4)
NORMS = word("batch", "support")
OPTIMIZER = thing(optax.sgd(0.1))
LOSS = thing(jm.losses.cross_entropy)
MAML = {
    "model": thing(MLP),
    "inner_lr": number(0),
    "inner_steps": count(),
    "eval_steps": count(0, none=True),
    "inner_batch": count(none=True),
    "memory": word("auto", "store", "recompute", "forward_over_reverse"),
    "truncation": count(none=True),
    "proximal": number(0, none=True),
    "cg_steps": count(),
    "damping": number(0),
    "norm": NORMS,
    "loss": LOSS,
}
UNROLLED = ("memory", "truncation", "proximal", "cg_steps", "damping")
TASK = {"ways": count(), "shots": count(), "queries": count()}
SPLIT = word("train", "validation", "test")
PHOTOS = np.zeros((24, 4, 4, 1), np.uint8)


def on(function, *positional, **given):
    """`function` of settings alone, the rest given."""
    return lambda **own: function(*positional, **{**given, **own})


def of_learner(name, **given):
    return on(getattr(jm, name), **{"model": MLP, **given})


LEARNERS: dict[str, tuple[Callable, dict[str, Kind]]] = {
    "maml": (
        of_learner("maml"),
        {**MAML, "order": word("second", "first"), "inner_optimizer": OPTIMIZER},
    ),
    "fomaml": (
        of_learner("fomaml"),
        {
            **{key: MAML[key] for key in MAML if key not in UNROLLED},
            "inner_optimizer": OPTIMIZER,
        },
    ),
    "anil": (of_learner("anil"), {**MAML, "inner_optimizer": OPTIMIZER}),
    "boil": (
        of_learner("boil", model=jm.nn.MLP(out=2, hidden=(3,))),
        {key: MAML[key] for key in ("inner_steps", "norm")},
    ),
    "imaml": (
        of_learner("imaml"),
        {
            "inner_lr": number(0),
            "inner_steps": count(),
            "proximal": number(above=0),
            "cg_steps": count(),
            "damping": number(0),
        },
    ),
    "meta_sgd": (
        of_learner("meta_sgd"),
        {
            "inner_lr": Kind(NO_NUMBER.filter(lambda r: r != [0.0, 0.0]), (0.1, (0.0, 1.0))),
            "inner_steps": count(),
            "order": word("second", "first"),
        },
    ),
    "reptile": (
        of_learner("reptile"),
        {key: MAML[key] for key in MAML if key not in UNROLLED},
    ),
    "maml_plus_plus": (
        of_learner("maml_plus_plus"),
        {
            "inner_lr": number(0),
            "inner_steps": count(),
            "eval_steps": count(none=True),
            "anneal_steps": count(0),
            "first_order_steps": count(0),
            "memory": MAML["memory"],
            "norm": word("batch", "support", "population"),
        },
    ),
    "lstm_meta_learner": (
        of_learner("lstm_meta_learner"),
        {
            "inner_steps": count(),
            "hidden": count(none=True),
            "feedback": word("gate"),
            "gradient_scale": number(),
            "order": word("first", "second"),
        },
    ),
    "learned_optimizer": (
        of_learner("learned_optimizer", truncation=1),
        {
            "inner_steps": count(),
            "eval_steps": count(none=True),
            "truncation": count(),
            "inner_batch": count(none=True),
            "preprocess": number(above=0, none=True),
            "scale": number(),
            "layers": listed([(0,), 3, "ab", (1.5,), (-1, 2), None], ((), (2, 3), [4])),
            "order": word("second", "first"),
            "norm": NORMS,
        },
    ),
    "kernel_classifier": (
        of_learner("kernel_classifier"),
        {
            "model": thing(MLP),
            "similarity": word("cosine", "dot", "euclidean", "learned"),
            "normalise": word("softmax"),
            "reduce": word("sum", "mean", "nearest", "prototype"),
            "scale": number(above=0),
            "norm": word("batch", "support", "population"),
        },
    ),
    "matching": (of_learner("matching"), {"scale": number(above=0), "context_steps": count(none=True)}),
    "prototypical": (
        of_learner("prototypical"),
        {"model": thing(MLP), "divergence": word("euclidean", "cosine"), "norm": word("batch", "support")},
    ),
    "relation": (
        of_learner("relation"),
        {"comparison": thing(MLP, None), "norm": word("batch", "population")},
    ),
    "ridge": (of_learner("ridge"), {"regularisation": number(above=0), "scale": number(above=0)}),
    "siamese": (
        of_learner("siamese"),
        {"pairs": count(2, none=True)._replace(right=(None, 2, 4)), "head": thing(MLP, None)},
    ),
    "simple_shot": (of_learner("simple_shot"), {"transform": word("un", "l2n", "cl2n"), "norm": NORMS}),
    "fine_tuned_head": (
        of_learner("fine_tuned_head"),
        {
            "head": word("linear", "cosine"),
            "eval_steps": count(),
            "scale": number(above=0),
            "inner_lr": number(0),
            "inner_optimizer": OPTIMIZER,
        },
    ),
    "mann": (
        on(jm.mann, network=jm.nn.MemoryNetwork(2)),
        {
            "network": thing(jm.nn.MemoryNetwork(2)),
            "instances": count(0),
            "strings": listed([3, "5,5", (5,), (1, 5), (5, 0), (5, 99), (2.0, 2)], (None, (5, 5))),
        },
    ),
    "metanet": (
        on(jm.metanet, embedding=jm.nn.AugmentedCNN(2), base=jm.nn.AugmentedCNN(2)),
        {
            "embedding": thing(jm.nn.AugmentedCNN(2)),
            "base": thing(jm.nn.AugmentedCNN(2)),
            "embedding_loss": word("verification", "contrastive", "xent"),
            "task_weights": word("none", "embedding", "both"),
            "samples": count(none=True),
            "hidden": count(),
            "margin": number(above=0),
            "queries_at_once": count(none=True),
        },
    ),
    "inner_loop": (
        on(jm.inner_loop, lambda params, batch: 0.0, optax.sgd(0.1), steps=1),
        {
            "steps": count(0),
            "order": word("second", "first"),
            "memory": MAML["memory"],
            "truncation": count(none=True),
            "proximal": number(0, none=True),
            "cg_steps": count(),
            "damping": number(0),
        },
    ),
}

ARRAYS = {"x": X, "y": Y, "ways": 1, "shots": 1}
FRACTIONS = listed(
    [(0.5, 0.5), (0.5, 0.6, -0.1), (math.nan, 0.5, 0.5), 0.5, "abc", ("a", 0, 1), (1j, 0, 0)],
    ((0.5, 0.25, 0.25), (1, 0, 0)),
)
SEED = count(0, most=2**63 - 1)
GLYPHS = jm.tasks.glyphs(ways=2, shots=2)
SEQUENCES = jm.tasks.sequences(GLYPHS, length=4)

TASKS: dict[str, tuple[Callable, dict[str, Kind]]] = {
    "sinusoid": (
        jm.tasks.sinusoid,
        {
            "split": SPLIT,
            "shots": count(),
            "queries": count(),
            "amplitude": interval(),
            "phase": interval(),
            "inputs": interval(),
            "noise": number(0),
        },
    ),
    "harmonic": (
        jm.tasks.harmonic,
        {"split": SPLIT, "shots": count(), "queries": count(), "noise": number(0)},
    ),
    "quadratics": (jm.tasks.quadratics, {"split": SPLIT, "dim": count()}),
    "glyphs": (
        jm.tasks.glyphs,
        {"split": SPLIT, "ways": count(), "shots": count(0), "queries": count(), "size": count(8)},
    ),
    "glyph_metadata": (
        lambda class_id: jm.tasks.glyph_metadata(class_id),
        {
            "class_id": listed([-1, 6144, 1.5, "a", [0, 7000], None, True], (0, [1, 2])),
        },
    ),
    "sequences": (
        on(jm.tasks.sequences, GLYPHS),
        {
            "length": Kind(
                count(2).wrong.filter(lambda length: length is not None), (2, 4, None), count(2).examples
            ),
            "strings": LEARNERS["mann"][1]["strings"],
        },
    ),
    "with_ways": (on(jm.tasks.with_ways, SEQUENCES), {"ways": count(1, most=2)}),
    "supervised": (
        on(jm.tasks.supervised, GLYPHS),
        {"batch": Kind(st.one_of(count(2).wrong, st.just(3)), (2, 64), (3, *count(2).examples))},
    ),
    "labelled": (
        on(jm.tasks.labelled, GLYPHS, key=KEY),
        {"per_class": Kind(count().wrong.filter(lambda value: value != 2**31), (), (0, 1.5, "?"))},
    ),
    "split_per_class": (on(jm.tasks.split_per_class, Y, key=KEY), {"shots": count()}),
    "from_arrays": (
        on(jm.tasks.from_arrays, **ARRAYS),
        {
            "ways": or_pair(count()),
            "shots": or_pair(count()),
            "queries": count(),
            "split": SPLIT,
            "split_seed": SEED,
            "rotations": word("none"),
            "classes": FRACTIONS,
        },
    ),
    "from_regression": (
        on(jm.tasks.from_regression, Y, X, Y, shots=1, queries=1),
        {
            "shots": count(),
            "queries": count(),
            "split": SPLIT,
            "split_seed": SEED,
            "task_split": FRACTIONS,
        },
    ),
    "from_fractions": (on(ClassSplit.from_fractions, "abcd"), {"fractions": FRACTIONS}),
    "from_counts": (
        on(ClassSplit.from_counts, "abcd", counts=(2, 1, 1)),
        {
            "counts": listed([(2, 1), (5, -1, 0), (2.0, 1, 1), "abc", 4, (1, 1, 1)], ((4, 0, 0),)),
            "seed": SEED,
        },
    ),
    "omniglot_split": (
        jm.tasks.omniglot_split,
        {"protocol": word("vinyals", "lake"), "split_seed": SEED},
    ),
    "distort": (
        on(jm.tasks.distort, KEY, jnp.zeros((2, 4, 4, 1))),
        {
            "rotation": number(0),
            "shear": number(0),
            "scale": number(0, most=0.99),
            "shift": number(0),
            "probability": number(0, most=1),
        },
    ),
}

FEATURES = np.array([[0.0, 1], [1, 0], [2, 2], [3, 1]], np.float32)
LABELS = np.array([0, 1, 1, 0])
CONFUSION = np.array([[0.5, 0.1], [0.1, 0.3]])
LINEAR = transfer.classifier(jm.nn.MLP(out=3, hidden=()), 2)
VARIABLES = LINEAR.init(KEY, jnp.asarray(FEATURES))
DATA = jm.Batch(FEATURES, LABELS)
PARAMS = {"a": jnp.ones(2), "head": jnp.ones(2)}
FIT = {"optimizer": optax.sgd(0.1), "steps": 1, "key": KEY}
FITTED = {"steps": count(), "batch_size": count(), "every": count(none=True)}

# Of one class, a message may name the labels as well.
CLASSES_OF_TWO = count(2)._replace(examples=(0, 2.5, "?", 2**31))
TRANSFER: dict[str, tuple[Callable, dict[str, Kind]]] = {
    "classifier": (
        on(transfer.classifier, MLP, classes=2),
        {"classes": count(2), "momentum": number(0, below=1)},
    ),
    "input_adapter": (
        transfer.input_adapter,
        {
            "channels": word(1, 3, None),
            "size": listed([0, -1, 1.5, "a", (1,), (1, 2, 3), (0, 1), True], (None, 4, (2, 3))),
            "mean": listed([math.nan, "a", [[0.0]], None, [math.inf]], (0.5, [0.1, 0.2, 0.3])),
            "std": listed([0.0, -1.0, math.nan, "a", [[1.0]], None], (0.5, [0.1, 0.2, 0.3])),
            "method": word("linear", "nearest", "cubic"),
        },
    ),
    "learned_stem": (
        on(transfer.learned_stem, channels=2),
        {
            "channels": count(),
            "kernel": Kind(st.one_of(count().wrong, st.just(2)), (1, 3), (2, *count().examples)),
        },
    ),
    "coral": (transfer.coral, {"weight": number(0), "variant": word("paper", "mean+cov")}),
    "mmd": (transfer.mmd, {"weight": number(0)}),
    "dann": (
        transfer.dann,
        {"weight": number(0), "gamma": number(), "hidden": LEARNERS["learned_optimizer"][1]["layers"]},
    ),
    "dann_strength": (on(transfer.dann_strength, 0.5), {"gamma": number()}),
    "dann_schedule": (on(transfer.dann_schedule, steps=3), {"steps": count()}),
    "gradient_reversal": (
        on(transfer.gradient_reversal, jnp.ones(2)),
        {"strength": number(right=(0.0, 1.0))},
    ),
    "align": (
        on(
            transfer.align,
            LINEAR,
            VARIABLES,
            DATA,
            FEATURES,
            transfer.coral(),
            **{**FIT, "batch_size": 4},
        ),
        {**FITTED, "batch_size": count()._replace(right=(4,)), "norm": word("separate", "joint")},
    ),
    "fine_tune": (on(transfer.fine_tune, LINEAR, VARIABLES, DATA, **FIT), FITTED),
    "feature_extraction": (
        on(transfer.feature_extraction, LINEAR, VARIABLES, DATA),
        {"head": word("logistic", "ridge")},
    ),
    "gradual_unfreezing": (
        on(transfer.gradual_unfreezing, LINEAR, VARIABLES, DATA, ["head", "**"], stage_steps=10, key=KEY),
        {"stage_steps": count(10), "last_steps": count(10, none=True), "rate": number(above=0)},
    ),
    "discriminative": (
        on(transfer.discriminative, optax.sgd(0.1), PARAMS, ["a", "head"]),
        {"decay": number(1)},
    ),
    "slanted_triangular": (
        on(transfer.slanted_triangular, steps=100),
        {
            "steps": count()._replace(right=(100,)),
            "peak": number(),
            "cut_fraction": number(above=0, below=1),
            "ratio": number(1),
        },
    ),
    "l2_sp": (on(transfer.l2_sp, PARAMS), {"alpha": number(0), "beta": number(0)}),
    "ridge_head": (
        on(transfer.ridge_head, FEATURES, LABELS, classes=2),
        {
            "classes": count(2),
            "penalty": Kind(
                number(above=0).wrong.filter(lambda p: not isinstance(p, list) or not all(p)),
                (0.1, [0.1, 1.0], np.float32(1)),
                number(above=0).examples,
            ),
        },
    ),
    "logistic_head": (
        on(transfer.logistic_head, FEATURES, LABELS, classes=2),
        {"classes": count(2), "penalty": number(0, right=(0.1,)), "steps": count(), "tolerance": number(0)},
    ),
    "density_ratio": (
        on(transfer.density_ratio, FEATURES, FEATURES[::2] + 0.5, tolerance=1e-6),
        {
            "regularisation": number(above=0),
            "tolerance": number(0, right=(1e-6,)),
            "steps": count()._replace(right=(100,)),
        },
    ),
    "kernel_mean_matching": (
        on(transfer.kernel_mean_matching, FEATURES, FEATURES[::2]),
        {
            "bandwidth": number(above=0, none=True),
            "bound": number(1, right=(2.0,)),
            "slack": number(0, none=True, right=(0.5,)),
            "tolerance": number(0, right=(1e-2,)),
            "steps": count()._replace(right=(20000,)),
        },
    ),
    "joint_confusion": (on(transfer.joint_confusion, LABELS, LABELS), {"classes": CLASSES_OF_TWO}),
    "bbse": (on(transfer.bbse, CONFUSION, LABELS), {"max_condition": number(1, right=(100.0,))}),
    "rlls": (
        on(transfer.rlls, CONFUSION, LABELS, penalty=0.1),
        {"penalty": number(above=0), "shrink": number(0, most=1)},
    ),
    "em_prior": (
        on(transfer.em_prior, CONFUSION / CONFUSION.sum(1)[:, None], np.array([0.5, 0.5])),
        {"tolerance": number(0, right=(1e-3,)), "steps": count()._replace(right=(10000,))},
    ),
    "coral_loss": (on(transfer.coral_loss, FEATURES, FEATURES), {"variant": word("paper", "mean+cov")}),
    "coral_transform": (on(transfer.coral_transform, FEATURES, FEATURES), {"regularisation": number(0)}),
    "mmd2": (
        on(transfer.mmd2, FEATURES, FEATURES),
        {
            "estimator": word("biased", "unbiased", "linear"),
            "bandwidth": listed(
                [0.0, -1.0, math.nan, math.inf, "max", [], [1.0, -1.0], None, [[1.0]]],
                ("mean", "median", 1.0, [1.0, 2.0]),
            ),
            "multiples": listed([(), (0.0,), (math.nan,), "a", None, (math.inf,)], ((1.0,), (0.5, 2))),
            "weights": listed([(1.0,), "a", (math.nan,) * 5, 1.0], ((0.2,) * 5, None)),
        },
    ),
    "h_score": (
        on(transfer.h_score, FEATURES, LABELS),
        {"shrinkage": number(0, below=1, none=True, right=(0.5, "ledoit-wolf"))},
    ),
    "rank_sources": (
        on(transfer.rank_sources, {"a": lambda x: transfer.Candidate(features=x)}, (FEATURES, LABELS)),
        {"score": word("log_me", "h_score")},
    ),
    "predict_logits": (on(transfer.predict_logits, LINEAR, VARIABLES, FEATURES), {"batch": count()}),
    "confusion_matrix": (on(jm.transfer.confusion_matrix, LABELS, LABELS), {"classes": CLASSES_OF_TWO}),
}

SINUSOID = jm.tasks.sinusoid(shots=2, queries=2)
REGRESSOR = jm.maml(jm.nn.MLP(out=1, hidden=()), loss=jm.losses.mse)
REGRESSION = jm.init_state(REGRESSOR, optax.sgd(0.1), SINUSOID, KEY).params
FEW = {"episodes": 2, "key": KEY}


def steps(least, none=False):
    """As `count`; a training by each value that can be would take long."""
    return count(least, none=none)._replace(right=())


TRAINING: dict[str, tuple[Callable, dict[str, Kind]]] = {
    "train": (
        on(jm.train, REGRESSOR, SINUSOID, optax.sgd(0.1), steps=1, key=KEY),
        {
            "steps": steps(1),
            "meta_batch": steps(1),
            "validate_every": steps(1),
            "validation_episodes": steps(2),
            "checkpoint_every": steps(1, none=True),
            "log_every": steps(1),
            "strategy": Kind(st.text(max_size=5), ()),
        },
    ),
    "meta_step": (
        on(jm.meta_step, REGRESSOR, optax.sgd(0.1), 2),
        {
            "strategy": Kind(
                st.one_of(st.text(max_size=5), st.integers(max_value=0)), ("auto", "vmap", "scan", 1)
            )
        },
    ),
    "evaluate": (
        on(jm.evaluate, REGRESSOR, REGRESSION, SINUSOID, **FEW),
        {"episodes": steps(2), "batch": steps(1, none=True)},
    ),
    "evaluate_episodes": (
        on(jm.evaluate_episodes, REGRESSOR, REGRESSION, SINUSOID, **FEW),
        {"episodes": steps(1), "batch": steps(1, none=True)},
    ),
    "evaluate_metrics": (
        on(jm.evaluate_metrics, REGRESSOR, REGRESSION, SINUSOID, **FEW),
        {"episodes": steps(1)},
    ),
}


def settings_of(*tables):
    return [
        pytest.param(function, name, kind, id=f"{owner}-{name}")
        for table in tables
        for owner, (function, kinds) in table.items()
        for name, kind in kinds.items()
    ]


# To take a setting of these is to fit or train with it.
TRAINED = settings_of(TRANSFER, TRAINING)
SETTINGS = [*settings_of(LEARNERS, TASKS), *TRAINED]


@pytest.mark.parametrize(("function", "name", "kind"), SETTINGS)
def test_a_setting_outside_its_range_is_refused_by_its_name(function, name, kind):
    for value in kind.examples:
        refused(lambda value=value: function(**{name: value}), name)


@pytest.mark.nightly
@pytest.mark.parametrize(("function", "name", "kind"), SETTINGS)
def test_a_search_finds_no_setting_outside_its_range_that_is_taken(function, name, kind):
    @EACH
    @given(value=kind.wrong)
    def check(value):
        refused(lambda: function(**{name: value}), name)

    check()


@pytest.mark.parametrize(
    ("function", "name", "kind"),
    [
        pytest.param(*each.values, id=each.id, marks=pytest.mark.nightly if each in TRAINED else ())
        for each in SETTINGS
        if each.values[2].right
    ],
)
def test_a_setting_at_the_edge_of_its_range_is_taken(function, name, kind):
    for value in kind.right:
        function(**{name: value})


# --- Arrays: shapes, types, NaN, classes without examples -----------------------------------------------


def with_value(value):
    def spoil(array):
        array = np.array(array)
        array[(-1,) * array.ndim] = value
        return array

    return spoil


def cut(array):
    return array[:-1]


FLAT = (np.ravel, lambda a: a[None], lambda a: a[:0], lambda a: a[:, :0])
NO_NUMBERS = (lambda a: a.astype(str), lambda a: a.astype(complex), lambda a: a.astype(bool))
RAGGED = (lambda a: [[0.0], [0.0, 1.0]], lambda a: [None] * len(a))
UNTOLD = (with_value(math.nan), with_value(math.inf), with_value(-math.inf))
# Of values, and of shapes alone where values may be traced.
FEATURE = (*FLAT, *NO_NUMBERS, *RAGGED, *UNTOLD)
SHAPE = (*FLAT, *NO_NUMBERS)
LABEL = (
    lambda y: y + 0.5,
    lambda y: y - 1,
    lambda y: y[None],
    lambda y: y.astype(str),
    lambda y: y[:0],
    lambda y: y.astype(complex),
    lambda y: [[0], [0, 1]],
    cut,
)
MANY = with_value(7)
PROBABILITY = (*FEATURE, with_value(-0.5), with_value(2.0))
SHARE = (with_value(math.nan), with_value(2.0), with_value(-1.0), cut, lambda p: p[:0])
PROBS = CONFUSION[[0, 1, 0, 1]] / CONFUSION[[0, 1, 0, 1]].sum(1)[:, None]
PRIOR = np.array([0.5, 0.5])

# Function, its arrays, and of each the ways to spoil it.
DATA_OF: dict[str, tuple[Callable, dict[str, np.ndarray], dict[str, tuple[Callable, ...]]]] = {
    "nce": (
        transfer.nce,
        {"source_labels": LABELS, "labels": LABELS},
        {"source_labels": LABEL, "labels": LABEL},
    ),
    "leep": (
        transfer.leep,
        {"source_probs": PROBS, "labels": LABELS},
        {"source_probs": PROBABILITY, "labels": LABEL},
    ),
    "h_score": (
        transfer.h_score,
        {"features": FEATURES, "labels": LABELS},
        {"features": FEATURE, "labels": LABEL},
    ),
    "log_me": (
        transfer.log_me,
        {"features": FEATURES, "labels": LABELS},
        {
            "features": FEATURE,
            "labels": (cut, lambda y: y - 1, lambda y: y.astype(str), lambda y: y[:0]),
        },
    ),
    "ridge_head": (
        on(transfer.ridge_head, classes=2),
        {"features": FEATURES, "labels": LABELS},
        {"features": FEATURE, "labels": (*LABEL, MANY, np.zeros_like)},
    ),
    "logistic_head": (
        on(transfer.logistic_head, classes=2),
        {"features": FEATURES, "labels": LABELS, "weights": np.ones(4, np.float32)},
        {
            "features": FEATURE,
            "labels": (*LABEL, MANY, np.zeros_like),
            "weights": (cut, with_value(math.nan), lambda w: w[None], with_value(-1.0), lambda w: w * 0),
        },
    ),
    "density_ratio": (
        on(transfer.density_ratio, tolerance=1e-6),
        {"source": FEATURES, "target": FEATURES + 0.5},
        {"source": FEATURE, "target": FEATURE},
    ),
    "kernel_mean_matching": (
        transfer.kernel_mean_matching,
        {"source": FEATURES, "target": FEATURES + 0.5},
        {"source": FEATURE, "target": FEATURE},
    ),
    "effective_sample_size": (
        transfer.effective_sample_size,
        {"weights": np.ones(4)},
        {"weights": (lambda w: w[None], lambda w: w[:0], with_value(-1.0), lambda w: w[0])},
    ),
    "joint_confusion": (
        on(transfer.joint_confusion, classes=2),
        {"predictions": LABELS, "labels": LABELS},
        {"predictions": LABEL, "labels": LABEL},
    ),
    "bbse": (
        transfer.bbse,
        {"joint_confusion": CONFUSION, "target_predictions": PRIOR},
        {
            "joint_confusion": (
                np.ravel,
                cut,
                lambda c: c * 2,
                with_value(math.nan),
                with_value(-0.1),
                np.zeros_like,
            ),
            "target_predictions": SHARE,
        },
    ),
    "rlls": (
        on(transfer.rlls, penalty=0.1),
        {"joint_confusion": CONFUSION, "target_predictions": PRIOR},
        {"joint_confusion": (np.ravel, cut, with_value(math.nan)), "target_predictions": SHARE},
    ),
    "em_prior": (
        transfer.em_prior,
        {"probs": PROBS, "source_prior": PRIOR},
        {"probs": PROBABILITY, "source_prior": SHARE},
    ),
    "adjust": (
        transfer.adjust,
        {"probs": PROBS, "weights": np.ones(2)},
        {"weights": (cut, lambda w: w[None], lambda w: w.astype(str))},
    ),
    "temperature": (
        transfer.temperature,
        {"logits": np.array([[2.0, 0], [0, 1], [1, 0], [0, 3]]), "labels": np.array([0, 1, 1, 1])},
        {"logits": FEATURE, "labels": (*LABEL, MANY)},
    ),
    "confusion_matrix": (
        on(transfer.confusion_matrix, classes=2),
        {"predictions": LABELS, "labels": LABELS},
        {"predictions": LABEL, "labels": LABEL},
    ),
    "covariance": (transfer.covariance, {"x": FEATURES}, {"x": SHAPE}),
    "coral_loss": (
        transfer.coral_loss,
        {"source": FEATURES, "target": FEATURES},
        {"source": SHAPE, "target": SHAPE},
    ),
    "coral_transform": (
        transfer.coral_transform,
        {"source": FEATURES, "target": FEATURES},
        {"source": SHAPE, "target": SHAPE},
    ),
    "mmd2": (
        transfer.mmd2,
        {"source": FEATURES, "target": FEATURES},
        {"source": SHAPE, "target": SHAPE},
    ),
    "domain_loss": (
        transfer.domain_loss,
        {"source": PRIOR, "target": PRIOR},
        {"source": (lambda s: s[:0], lambda s: s[None], lambda s: s.astype(str))},
    ),
    "predict_logits": (
        on(transfer.predict_logits, LINEAR, VARIABLES),
        {"x": FEATURES},
        {"x": (lambda x: x[:0], lambda x: x.astype(str), lambda x: x.astype(complex))},
    ),
    "from_arrays": (
        on(jm.tasks.from_arrays, ways=2, shots=1),
        {"x": X, "y": Y},
        {
            "x": (*UNTOLD, cut, lambda x: x[:0], lambda x: x.astype(complex), lambda x: x > 0),
            "y": (cut, lambda y: y + 0.5, lambda y: y[None], lambda y: y[:0], lambda y: [None] * len(y)),
        },
    ),
    "from_regression": (
        on(jm.tasks.from_regression, shots=1, queries=1),
        {"task": Y, "x": X, "y": Y},
        {
            "task": (cut, lambda t: t + 0.5, lambda t: t[None], lambda t: t[:0], lambda t: [None] * len(t)),
            "x": (cut, lambda x: x[:0], lambda x: x.astype(complex), lambda x: x.astype(str)),
            "y": (cut, lambda y: y[None], lambda y: y[:0], lambda y: y.astype(complex)),
        },
    ),
    "cross_entropy": (
        jm.losses.cross_entropy,
        {"logits": jnp.eye(4), "labels": jnp.arange(4)},
        {
            "logits": (cut, jnp.ravel, lambda z: z[None], lambda z: z.astype(int)),
            "labels": (cut, lambda y: y[None], lambda y: y + 0.5, lambda y: y - 1, lambda y: y + 1),
        },
    ),
    "mse": (
        jm.losses.mse,
        {"outputs": jnp.ones((4, 1)), "targets": jnp.zeros((4, 1))},
        {
            "outputs": (cut, jnp.ravel, lambda z: z[None]),
            "targets": (cut, jnp.ravel, lambda z: z.T),
        },
    ),
    "masked_mean": (
        jm.losses.masked_mean,
        {"values": jnp.ones(4), "mask": jnp.array([True, True, False, True])},
        {"mask": (cut, lambda m: m[None], lambda m: m.astype(float))},
    ),
    "distort": (
        on(jm.tasks.distort, KEY),
        {"x": jnp.zeros((2, 4, 4, 1))},
        {"x": (jnp.ravel, lambda x: x[0], lambda x: x[..., 0])},
    ),
    "split_per_class": (
        on(jm.tasks.split_per_class, shots=1, key=KEY),
        {"y": Y},
        {"y": (lambda y: y[:0], lambda y: y[None], lambda y: y + 0.5, lambda y: [None] * len(y))},
    ),
}
SPOILT = [
    pytest.param(function, arrays, name, ways, id=f"{owner}-{name}")
    for owner, (function, arrays, spoiled) in DATA_OF.items()
    for name, ways in spoiled.items()
]


@pytest.mark.parametrize(("function", "arrays", "name", "ways"), SPOILT)
def test_a_bad_array_is_refused_by_its_name(function, arrays, name, ways):
    # Of a number that differs the message may name either.
    others = [other for other in arrays if other != name]

    for spoil in ways:
        named = (name, *others) if spoil is cut else (name,)
        refused(lambda spoil=spoil: function(**{**arrays, name: spoil(arrays[name])}), *named)


@pytest.mark.parametrize(
    ("function", "arrays"), [pytest.param(*given[:2], id=owner) for owner, given in DATA_OF.items()]
)
def test_good_arrays_give_finite_results(function, arrays):
    found = function(**arrays)
    for leaf in jax.tree.leaves(found):
        if isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert np.isfinite(leaf).all()


# --- Arguments of another kind, and in the wrong order ---------------------------------------------------

OPTIMIZER_OF_TRAINING = optax.sgd(0.1)
STATE = jm.init_state(REGRESSOR, OPTIMIZER_OF_TRAINING, SINUSOID, KEY)
OF_TRAINING = {
    "learner": REGRESSOR,
    "tasks": SINUSOID,
    "optimizer": OPTIMIZER_OF_TRAINING,
    "params": REGRESSION,
    "key": KEY,
}
CALLS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "train": (on(jm.train, steps=1), ("learner", "tasks", "optimizer", "key")),
    "init_state": (jm.init_state, ("learner", "optimizer", "tasks", "key")),
    "meta_step": (on(jm.meta_step, meta_batch=1), ("learner", "optimizer")),
    "evaluate": (on(jm.evaluate, episodes=2), ("learner", "params", "tasks", "key")),
    "evaluate_episodes": (on(jm.evaluate_episodes, episodes=2), ("learner", "params", "tasks", "key")),
    "evaluate_metrics": (on(jm.evaluate_metrics, episodes=2), ("learner", "params", "tasks", "key")),
    "run_episodes": (on(jm.run_episodes, episodes=2), ("learner", "params", "tasks", "key")),
    "calibrate": (jm.calibrate, ("learner", "params", "tasks", "key")),
    "check_learner": (jm.check_learner, ("learner", "tasks")),
}
# What stands in the place of each argument, and what is said of it.
MISTAKEN: dict[str, tuple[tuple[object, str], ...]] = {
    "learner": (
        (jm.maml, r"got the function maml; .*jm\.Learner.*; call maml\(…\) to make one"),
        (SINUSOID, r"got TaskDistribution\(…\); it must be a jm\.Learner"),
        (REGRESSION, r"got dict\(…\); it must be a jm\.Learner"),
        (jm.nn.MLP(out=1), r"got MLP\(…\); it must be a jm\.Learner"),
    ),
    "tasks": (
        (jm.tasks.glyphs, r"got the function glyphs; .*jm\.TaskDistribution.*; call glyphs\(…\) to make one"),
        (jm.tasks, r"got the module jaxmeta\.tasks; it must be a jm\.TaskDistribution"),
        (SINUSOID.sample, r"got a sampler; it must be tasks: jm\.TaskDistribution\(sample\)"),
        (REGRESSOR, r"got Learner\(…\); it must be a jm\.TaskDistribution"),
        (REGRESSION, r"got dict\(…\); it must be a jm\.TaskDistribution"),
        (None, r"got None; it must be a jm\.TaskDistribution"),
    ),
    "optimizer": (
        (1e-3, r"got 0\.001 \(float\); it must be an optax transformation, such as optax\.adam\(1e-3\)"),
        ("adam", r"got 'adam' \(str\); it must be an optax transformation"),
        (optax.adam, r"got the function adam; .*; call adam\(…\) to make one"),
        (SINUSOID, r"got TaskDistribution\(…\); it must be an optax transformation"),
    ),
    "params": (
        (STATE, r"got TrainState\(…\); it must be the parameters in it, state\.params"),
        (REGRESSOR, r"got Learner\(…\); it must be parameters"),
        (jm.tasks.glyphs, r"got the function glyphs; it must be parameters"),
    ),
    "key": (
        (0, r"got 0 \(int\); it must be a single key of JAX, such as jax\.random\.key\(0\)"),
        (7, r"such as jax\.random\.key\(7\)"),
        (None, r"got None; it must be a single key"),
        (jax.random.split(KEY, 3), r"got an array of shape \(3,\)"),
    ),
}


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, (_, names) in CALLS.items() for name in names]
)
def test_an_argument_of_another_kind_is_refused_by_its_name(owner, name):
    function, names = CALLS[owner]
    given = {each: OF_TRAINING[each] for each in names}
    for value, said in MISTAKEN[name]:
        refused(lambda value=value: function(**given | {name: value}), name)
        with pytest.raises(ValueError, match=f"^{name}: .*{said}"):
            function(**given | {name: value})


def test_arguments_in_the_wrong_order_are_refused_by_the_name_of_one_of_them():
    learner, tasks, optimizer = REGRESSOR, SINUSOID, OPTIMIZER_OF_TRAINING
    once = {"steps": 1, "key": KEY}
    refused(lambda: jm.train(tasks, learner, optimizer, **once), "learner")
    refused(lambda: jm.train(learner, optimizer, tasks, **once), "tasks")
    refused(lambda: jm.meta_step(optimizer, learner, 1), "learner")
    refused(lambda: jm.init_state(learner, tasks, optimizer, KEY), "tasks", "optimizer")
    refused(lambda: jm.check_learner(tasks, learner), "learner")
    for function in (jm.evaluate, jm.run_episodes, jm.evaluate_episodes, jm.evaluate_metrics):
        refused(lambda function=function: function(learner, tasks, REGRESSION, **FEW), "tasks")
        refused(lambda function=function: function(REGRESSION, learner, tasks, **FEW), "learner")
    refused(lambda: jm.calibrate(learner, tasks, REGRESSION, KEY), "tasks")


def test_classes_modules_and_numbers_in_the_place_of_what_is_due_are_named_as_what_they_are():
    network = jm.nn.MLP(out=2)
    for factory in (jm.maml, jm.prototypical, jm.learned_optimizer):
        with pytest.raises(ValueError, match=r"^model: got the class Conv4; .*call Conv4\(…\) to make one"):
            factory(jm.nn.Conv4)
    with pytest.raises(ValueError, match=r"^loss: got the module jaxmeta\.losses; it must be a function"):
        jm.maml(network, loss=jm.losses)
    with pytest.raises(ValueError, match=r"^inner_optimizer: got 0\.001 \(float\); it must be an optax"):
        jm.maml(network, inner_optimizer=1e-3)
    with pytest.raises(ValueError, match=r"^optimizer: got 0\.001 \(float\); it must be an optax"):
        jm.inner_loop(jm.losses.mse, 1e-3, 1)
    for name in ("report", "should_stop"):
        with pytest.raises(ValueError, match=rf"^{name}: got True \(bool\); it must be a function"):
            jm.train(REGRESSOR, SINUSOID, OPTIMIZER_OF_TRAINING, steps=1, key=KEY, **{name: True})
    with pytest.raises(ValueError, match=r"^validation: got the function glyphs; .*TaskDistribution"):
        jm.train(REGRESSOR, SINUSOID, OPTIMIZER_OF_TRAINING, steps=1, key=KEY, validation=jm.tasks.glyphs)
    with pytest.raises(ValueError, match=r"^devices: got 8 \(int\); .*make_mesh.*JAX_NUM_CPU_DEVICES=8"):
        jm.train(REGRESSOR, SINUSOID, OPTIMIZER_OF_TRAINING, steps=1, key=KEY, devices=8)
    for function in (jm.tasks.supervised, jm.tasks.labelled, jm.tasks.sequences):
        refused(lambda function=function: function(jm.tasks.glyphs), "tasks")
    support = SINUSOID.sample(KEY).support
    with pytest.raises(ValueError, match=r"^support: got dict\(…\); it must be a jm\.Batch of examples"):
        REGRESSOR.adapt(support, REGRESSION, KEY)


def test_transfer_refuses_arguments_of_another_kind_by_their_names():
    given = {"model": LINEAR, "variables": VARIABLES, "data": DATA, **FIT}
    for name, value, said in (
        ("optimizer", 1e-3, r"got 0\.001 \(float\); it must be an optax transformation"),
        ("key", 0, r"got 0 \(int\); it must be a single key of JAX"),
        ("model", jm.nn.MLP(out=2), r"got MLP\(…\); it must be of jm\.transfer\.classifier"),
        ("data", (FEATURES, LABELS), r"got tuple\(…\); it must be jm\.Batch\(x, y\)"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {said}"):
            transfer.fine_tune(**given | {name: value})
    refused(lambda: transfer.freeze(1e-3, PARAMS, "a"), "optimizer")
    refused(lambda: jm.tasks.labelled(GLYPHS, per_class=1, key=0), "key")
    refused(lambda: jm.tasks.split_per_class(Y, 1, 0), "key")
    refused(lambda: jm.tasks.stream("photos", key=KEY, meta_batch=1, ways=2, shots=1), "prepared")
    refused(lambda: jm.tasks.classes_of(GLYPHS, 0), "key")


def test_tasks_need_no_card():
    """What has been drawn is the same with and without one."""
    bare = jm.TaskDistribution(SINUSOID.sample)
    assert bare.card is None
    jm.check_learner(REGRESSOR, bare)
    settings = {"steps": 1, "meta_batch": 1, "key": KEY, "validation": bare, "validation_episodes": 2}
    state = jm.train(REGRESSOR, bare, OPTIMIZER_OF_TRAINING, **settings)
    assert jm.evaluate(REGRESSOR, state.params, bare, **FEW) == jm.evaluate(
        REGRESSOR, state.params, SINUSOID, **FEW
    )
    assert jm.run_episodes(REGRESSOR, state.params, bare, **FEW).scores.shape == (2,)
    for function in (jm.tasks.supervised, jm.tasks.labelled, jm.tasks.sequences):
        refused(lambda function=function: function(bare), "tasks")
