"""Argument validation of the public functions: errors name the argument, and valid values are accepted."""

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
SEARCH = settings(
    max_examples=4,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def without_type_checks():
    """Turn run-time type checks off: users do not have them, and they would refuse arguments first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_refused(call, *names):
    """Assert that `call` raises a ValueError with a message of one line, which begins with one of `names`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        call()
    message = str(caught.value)
    head = re.match(r"[\w., ]*", message)[0]
    assert set(names) & set(re.findall(r"\w+", head)), message
    assert re.match(r"[\w., ]*: \S", message), message
    assert len(message.splitlines()) == 1
    assert len(message) < 400


# --- Settings: counts, numbers and choices -------------------------------------------------------------


class Setting(NamedTuple):
    """Invalid values of a setting, as a search strategy and as examples, and some valid values."""

    wrong: st.SearchStrategy
    right: tuple
    examples: tuple = ("?",)


OTHER_TYPES = st.one_of(st.text(max_size=5), st.binary(max_size=3), st.lists(st.floats(), max_size=3))
NOT_FINITE = st.one_of(OTHER_TYPES, st.sampled_from([math.nan, math.inf, -math.inf, 1j, {}, object()]))


def count(least=1, most=None, none=False):
    """Build the setting of an integer; counts of 2³¹ and more are invalid."""
    fractions = st.floats(width=16).map(lambda value: value + 0.5 if value == least else value)
    wrong = [st.integers(max_value=least - 1), fractions, st.booleans(), NOT_FINITE]
    wrong += [st.integers(min_value=most + 1)] if most else [st.integers(min_value=2**31)]
    wrong += [] if none else [st.none()]
    right = (least, np.int64(least), *([None] if none else []))
    return Setting(
        st.one_of(wrong), right, (least - 1, least + 0.5, "?", 2**31 if most is None else most + 1)
    )


def number(least=None, above=None, most=None, below=None, none=False, right=()):
    """Build the setting of a real number in [least, most] or between `above` and `below`, exclusive."""
    wrong = [NOT_FINITE, st.just(np.ones(2))]
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
    return Setting(st.one_of(wrong), right, (math.nan, "?", *beyond))


def choice(*known):
    """Build the setting of one of several values."""
    other = st.one_of(st.text(max_size=6), st.integers(4), st.lists(st.text(max_size=2), max_size=2))
    return Setting(other.filter(lambda value: value not in known), known, ("?", 7))


def interval():
    """Build the setting of an interval (low, high), finite and with low < high."""
    ends = st.tuples(st.floats(), st.floats()).filter(
        lambda ends: not -math.inf < ends[0] < ends[1] < math.inf
    )
    wrong = st.one_of(ends, OTHER_TYPES, st.just((0, 1, 2)), st.none())
    return Setting(wrong, ((0, 1), (-2.5, 3.0)), ((1, 0), (0, math.nan), (0, 1, 2)))


def instance(*right):
    """Build the setting of a network, a function or an optimizer."""
    return Setting(st.one_of(st.integers(), st.text(max_size=3), st.just([]), st.just({})), right, (3, "?"))


def listed(wrong, right):
    """Build a setting with a list of invalid values."""
    return Setting(st.sampled_from(wrong), right, tuple(wrong))


def count_or_range(setting):
    """Build the setting of a count or of an inclusive range of counts."""
    pairs = [(2, 1), (0, 1), (1, 2, 3), (), (1.0, 2), ("a", "b"), (1, None)]
    wrong = st.one_of(setting.wrong.filter(lambda value: not isinstance(value, list)), st.sampled_from(pairs))
    return Setting(wrong, setting.right, (*setting.examples, *pairs))


MLP = jm.nn.MLP(out=2, hidden=())
IDENTITY = (lambda key, x: {}, lambda params, x: x)
X = np.repeat(np.eye(6, dtype=np.float32), 4, axis=0)
Y = np.repeat(np.arange(6), 4)
NORMS = choice("batch", "support")
OPTIMIZER = instance(optax.sgd(0.1))
LOSS = instance(jm.losses.cross_entropy)
MAML = {
    "model": instance(MLP),
    "inner_lr": number(0),
    "inner_steps": count(),
    "eval_steps": count(0, none=True),
    "inner_batch": count(none=True),
    "memory": choice("auto", "store", "recompute", "forward_over_reverse"),
    "truncation": count(none=True),
    "proximal": number(0, none=True),
    "cg_steps": count(),
    "damping": number(0),
    "norm": NORMS,
    "loss": LOSS,
}
UNROLLED = ("memory", "truncation", "proximal", "cg_steps", "damping")
TASK = {"ways": count(), "shots": count(), "queries": count()}
SPLIT = choice("train", "validation", "test")
PHOTOS = np.zeros((24, 4, 4, 1), np.uint8)


def with_defaults(function, *positional, **defaults):
    """Return `function` with default arguments, so that a test passes only one setting."""
    return lambda **setting: function(*positional, **{**defaults, **setting})


def learner_with_defaults(name, **defaults):
    return with_defaults(getattr(jm, name), **{"model": MLP, **defaults})


LEARNERS: dict[str, tuple[Callable, dict[str, Setting]]] = {
    "maml": (
        learner_with_defaults("maml"),
        {**MAML, "order": choice("second", "first"), "inner_optimizer": OPTIMIZER},
    ),
    "fomaml": (
        learner_with_defaults("fomaml"),
        {
            **{key: MAML[key] for key in MAML if key not in UNROLLED},
            "inner_optimizer": OPTIMIZER,
        },
    ),
    "anil": (learner_with_defaults("anil"), {**MAML, "inner_optimizer": OPTIMIZER}),
    "boil": (
        learner_with_defaults("boil", model=jm.nn.MLP(out=2, hidden=(3,))),
        {key: MAML[key] for key in ("inner_steps", "norm")},
    ),
    "imaml": (
        learner_with_defaults("imaml"),
        {
            "inner_lr": number(0),
            "inner_steps": count(),
            "proximal": number(above=0),
            "cg_steps": count(),
            "damping": number(0),
        },
    ),
    "meta_sgd": (
        learner_with_defaults("meta_sgd"),
        {
            "inner_lr": Setting(NOT_FINITE.filter(lambda r: r != [0.0, 0.0]), (0.1, (0.0, 1.0))),
            "inner_steps": count(),
            "order": choice("second", "first"),
        },
    ),
    "reptile": (
        learner_with_defaults("reptile"),
        {key: MAML[key] for key in MAML if key not in UNROLLED},
    ),
    "maml_plus_plus": (
        learner_with_defaults("maml_plus_plus"),
        {
            "inner_lr": number(0),
            "inner_steps": count(),
            "eval_steps": count(none=True),
            "anneal_steps": count(0),
            "first_order_steps": count(0),
            "memory": MAML["memory"],
            "norm": choice("batch", "support", "population"),
        },
    ),
    "lstm_meta_learner": (
        learner_with_defaults("lstm_meta_learner"),
        {
            "inner_steps": count(),
            "hidden": count(none=True),
            "feedback": choice("gate"),
            "gradient_scale": number(),
            "order": choice("first", "second"),
        },
    ),
    "learned_optimizer": (
        learner_with_defaults("learned_optimizer", truncation=1),
        {
            "inner_steps": count(),
            "eval_steps": count(none=True),
            "truncation": count(),
            "inner_batch": count(none=True),
            "preprocess": number(above=0, none=True),
            "scale": number(),
            "layers": listed([(0,), 3, "ab", (1.5,), (-1, 2), None], ((), (2, 3), [4])),
            "order": choice("second", "first"),
            "norm": NORMS,
        },
    ),
    "kernel_classifier": (
        learner_with_defaults("kernel_classifier"),
        {
            "model": instance(MLP),
            "similarity": choice("cosine", "dot", "euclidean", "learned"),
            "normalise": choice("softmax"),
            "reduce": choice("sum", "mean", "nearest", "prototype"),
            "scale": number(above=0),
            "norm": choice("batch", "support", "population"),
        },
    ),
    "matching": (
        learner_with_defaults("matching"),
        {"scale": number(above=0), "context_steps": count(none=True)},
    ),
    "prototypical": (
        learner_with_defaults("prototypical"),
        {
            "model": instance(MLP),
            "divergence": choice("euclidean", "cosine"),
            "norm": choice("batch", "support"),
        },
    ),
    "relation": (
        learner_with_defaults("relation"),
        {"comparison": instance(MLP, None), "norm": choice("batch", "population")},
    ),
    "ridge": (learner_with_defaults("ridge"), {"regularisation": number(above=0), "scale": number(above=0)}),
    "mahalanobis": (
        learner_with_defaults("mahalanobis"),
        {"regularisation": number(above=0), "transform": choice("un", "l2n"), "norm": NORMS},
    ),
    "soft_kmeans": (
        learner_with_defaults("soft_kmeans"),
        {"refinement_steps": count(0), "scale": number(above=0), "norm": NORMS},
    ),
    "label_propagation": (
        learner_with_defaults("label_propagation"),
        {
            "alpha": number(above=0, below=1),
            "neighbours": count(),
            "sigma": number(above=0, none=True),
            "norm": NORMS,
        },
    ),
    "siamese": (
        learner_with_defaults("siamese"),
        {"pairs": count(2, none=True)._replace(right=(None, 2, 4)), "head": instance(MLP, None)},
    ),
    "simple_shot": (
        learner_with_defaults("simple_shot"),
        {"transform": choice("un", "l2n", "cl2n"), "norm": NORMS},
    ),
    "fine_tuned_head": (
        learner_with_defaults("fine_tuned_head"),
        {
            "head": choice("linear", "cosine"),
            "eval_steps": count(),
            "scale": number(above=0),
            "inner_lr": number(0),
            "inner_optimizer": OPTIMIZER,
        },
    ),
    "mann": (
        with_defaults(jm.mann, network=jm.nn.MemoryNetwork(2)),
        {
            "network": instance(jm.nn.MemoryNetwork(2)),
            "instances": count(0),
            "strings": listed([3, "5,5", (5,), (1, 5), (5, 0), (5, 99), (2.0, 2)], (None, (5, 5))),
        },
    ),
    "metanet": (
        with_defaults(jm.metanet, embedding=jm.nn.AugmentedCNN(2), base=jm.nn.AugmentedCNN(2)),
        {
            "embedding": instance(jm.nn.AugmentedCNN(2)),
            "base": instance(jm.nn.AugmentedCNN(2)),
            "embedding_loss": choice("verification", "contrastive", "xent"),
            "task_weights": choice("none", "embedding", "both"),
            "samples": count(none=True),
            "hidden": count(),
            "margin": number(above=0),
            "queries_at_once": count(none=True),
        },
    ),
    "inner_loop": (
        with_defaults(jm.inner_loop, lambda params, batch: 0.0, optax.sgd(0.1), steps=1),
        {
            "steps": count(0),
            "order": choice("second", "first"),
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

TASKS: dict[str, tuple[Callable, dict[str, Setting]]] = {
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
        with_defaults(jm.tasks.sequences, GLYPHS),
        {
            "length": Setting(
                count(2).wrong.filter(lambda length: length is not None), (2, 4, None), count(2).examples
            ),
            "strings": LEARNERS["mann"][1]["strings"],
        },
    ),
    "with_ways": (with_defaults(jm.tasks.with_ways, SEQUENCES), {"ways": count(1, most=2)}),
    "supervised": (
        with_defaults(jm.tasks.supervised, GLYPHS),
        {"batch": Setting(st.one_of(count(2).wrong, st.just(3)), (2, 64), (3, *count(2).examples))},
    ),
    "labelled": (
        with_defaults(jm.tasks.labelled, GLYPHS, key=KEY),
        {"per_class": Setting(count().wrong.filter(lambda value: value != 2**31), (), (0, 1.5, "?"))},
    ),
    "split_per_class": (with_defaults(jm.tasks.split_per_class, Y, key=KEY), {"shots": count()}),
    "from_arrays": (
        with_defaults(jm.tasks.from_arrays, **ARRAYS),
        {
            "ways": count_or_range(count()),
            "shots": count_or_range(count()),
            "queries": count(),
            "split": SPLIT,
            "split_seed": SEED,
            "rotations": choice("none"),
            "classes": FRACTIONS,
        },
    ),
    "from_regression": (
        with_defaults(jm.tasks.from_regression, Y, X, Y, shots=1, queries=1),
        {
            "shots": count(),
            "queries": count(),
            "split": SPLIT,
            "split_seed": SEED,
            "task_split": FRACTIONS,
        },
    ),
    "from_fractions": (with_defaults(ClassSplit.from_fractions, "abcd"), {"fractions": FRACTIONS}),
    "from_counts": (
        with_defaults(ClassSplit.from_counts, "abcd", counts=(2, 1, 1)),
        {
            "counts": listed([(2, 1), (5, -1, 0), (2.0, 1, 1), "abc", 4, (1, 1, 1)], ((4, 0, 0),)),
            "seed": SEED,
        },
    ),
    "omniglot_split": (
        jm.tasks.omniglot_split,
        {"protocol": choice("vinyals", "lake"), "split_seed": SEED},
    ),
    "distort": (
        with_defaults(jm.tasks.distort, KEY, jnp.zeros((2, 4, 4, 1))),
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

# With labels of two classes, a message about a wrong number of classes may name the labels instead.
CLASSES_OF_TWO = count(2)._replace(examples=(0, 2.5, "?", 2**31))
TRANSFER: dict[str, tuple[Callable, dict[str, Setting]]] = {
    "classifier": (
        with_defaults(transfer.classifier, MLP, classes=2),
        {"classes": count(2), "momentum": number(0, below=1)},
    ),
    "input_adapter": (
        transfer.input_adapter,
        {
            "channels": choice(1, 3, None),
            "size": listed([0, -1, 1.5, "a", (1,), (1, 2, 3), (0, 1), True], (None, 4, (2, 3))),
            "mean": listed([math.nan, "a", [[0.0]], None, [math.inf]], (0.5, [0.1, 0.2, 0.3])),
            "std": listed([0.0, -1.0, math.nan, "a", [[1.0]], None], (0.5, [0.1, 0.2, 0.3])),
            "method": choice("linear", "nearest", "cubic"),
        },
    ),
    "learned_stem": (
        with_defaults(transfer.learned_stem, channels=2),
        {
            "channels": count(),
            "kernel": Setting(st.one_of(count().wrong, st.just(2)), (1, 3), (2, *count().examples)),
        },
    ),
    "coral": (transfer.coral, {"weight": number(0), "variant": choice("paper", "mean+cov")}),
    "mmd": (transfer.mmd, {"weight": number(0)}),
    "dann": (
        transfer.dann,
        {"weight": number(0), "gamma": number(), "hidden": LEARNERS["learned_optimizer"][1]["layers"]},
    ),
    "dann_strength": (with_defaults(transfer.dann_strength, 0.5), {"gamma": number()}),
    "dann_schedule": (with_defaults(transfer.dann_schedule, steps=3), {"steps": count()}),
    "gradient_reversal": (
        with_defaults(transfer.gradient_reversal, jnp.ones(2)),
        {"strength": number(right=(0.0, 1.0))},
    ),
    "align": (
        with_defaults(
            transfer.align,
            LINEAR,
            VARIABLES,
            DATA,
            FEATURES,
            transfer.coral(),
            **{**FIT, "batch_size": 4},
        ),
        {**FITTED, "batch_size": count()._replace(right=(4,)), "norm": choice("separate", "joint")},
    ),
    "fine_tune": (with_defaults(transfer.fine_tune, LINEAR, VARIABLES, DATA, **FIT), FITTED),
    "feature_extraction": (
        with_defaults(transfer.feature_extraction, LINEAR, VARIABLES, DATA),
        {"head": choice("logistic", "ridge")},
    ),
    "gradual_unfreezing": (
        with_defaults(
            transfer.gradual_unfreezing, LINEAR, VARIABLES, DATA, ["head", "**"], stage_steps=10, key=KEY
        ),
        {"stage_steps": count(10), "last_steps": count(10, none=True), "rate": number(above=0)},
    ),
    "discriminative": (
        with_defaults(transfer.discriminative, optax.sgd(0.1), PARAMS, ["a", "head"]),
        {"decay": number(1)},
    ),
    "slanted_triangular": (
        with_defaults(transfer.slanted_triangular, steps=100),
        {
            "steps": count()._replace(right=(100,)),
            "peak": number(),
            "cut_fraction": number(above=0, below=1),
            "ratio": number(1),
        },
    ),
    "l2_sp": (with_defaults(transfer.l2_sp, PARAMS), {"alpha": number(0), "beta": number(0)}),
    "ridge_head": (
        with_defaults(transfer.ridge_head, FEATURES, LABELS, classes=2),
        {
            "classes": count(2),
            "penalty": Setting(
                number(above=0).wrong.filter(lambda p: not isinstance(p, list) or not all(p)),
                (0.1, [0.1, 1.0], np.float32(1)),
                number(above=0).examples,
            ),
        },
    ),
    "logistic_head": (
        with_defaults(transfer.logistic_head, FEATURES, LABELS, classes=2),
        {"classes": count(2), "penalty": number(0, right=(0.1,)), "steps": count(), "tolerance": number(0)},
    ),
    "density_ratio": (
        with_defaults(transfer.density_ratio, FEATURES, FEATURES[::2] + 0.5, tolerance=1e-6),
        {
            "regularisation": number(above=0),
            "tolerance": number(0, right=(1e-6,)),
            "steps": count()._replace(right=(100,)),
        },
    ),
    "kernel_mean_matching": (
        with_defaults(transfer.kernel_mean_matching, FEATURES, FEATURES[::2]),
        {
            "bandwidth": number(above=0, none=True),
            "bound": number(1, right=(2.0,)),
            "slack": number(0, none=True, right=(0.5,)),
            "tolerance": number(0, right=(1e-2,)),
            "steps": count()._replace(right=(20000,)),
        },
    ),
    "joint_confusion": (with_defaults(transfer.joint_confusion, LABELS, LABELS), {"classes": CLASSES_OF_TWO}),
    "bbse": (with_defaults(transfer.bbse, CONFUSION, LABELS), {"max_condition": number(1, right=(100.0,))}),
    "rlls": (
        with_defaults(transfer.rlls, CONFUSION, LABELS, penalty=0.1),
        {"penalty": number(above=0), "shrink": number(0, most=1)},
    ),
    "em_prior": (
        with_defaults(transfer.em_prior, CONFUSION / CONFUSION.sum(1)[:, None], np.array([0.5, 0.5])),
        {"tolerance": number(0, right=(1e-3,)), "steps": count()._replace(right=(10000,))},
    ),
    "coral_loss": (
        with_defaults(transfer.coral_loss, FEATURES, FEATURES),
        {"variant": choice("paper", "mean+cov")},
    ),
    "coral_transform": (
        with_defaults(transfer.coral_transform, FEATURES, FEATURES),
        {"regularisation": number(0)},
    ),
    "mmd2": (
        with_defaults(transfer.mmd2, FEATURES, FEATURES),
        {
            "estimator": choice("biased", "unbiased", "linear"),
            "bandwidth": listed(
                [0.0, -1.0, math.nan, math.inf, "max", [], [1.0, -1.0], None, [[1.0]]],
                ("mean", "median", 1.0, [1.0, 2.0]),
            ),
            "multiples": listed([(), (0.0,), (math.nan,), "a", None, (math.inf,)], ((1.0,), (0.5, 2))),
            "weights": listed([(1.0,), "a", (math.nan,) * 5, 1.0], ((0.2,) * 5, None)),
        },
    ),
    "h_score": (
        with_defaults(transfer.h_score, FEATURES, LABELS),
        {"shrinkage": number(0, below=1, none=True, right=(0.5, "ledoit-wolf"))},
    ),
    "rank_sources": (
        with_defaults(
            transfer.rank_sources, {"a": lambda x: transfer.Candidate(features=x)}, (FEATURES, LABELS)
        ),
        {"score": choice("log_me", "h_score")},
    ),
    "predict_logits": (
        with_defaults(transfer.predict_logits, LINEAR, VARIABLES, FEATURES),
        {"batch": count()},
    ),
    "confusion_matrix": (
        with_defaults(jm.transfer.confusion_matrix, LABELS, LABELS),
        {"classes": CLASSES_OF_TWO},
    ),
}

SINUSOID = jm.tasks.sinusoid(shots=2, queries=2)
REGRESSOR = jm.maml(jm.nn.MLP(out=1, hidden=()), loss=jm.losses.mse)
REGRESSION = jm.init_state(REGRESSOR, optax.sgd(0.1), SINUSOID, KEY).params
FEW = {"episodes": 2, "key": KEY}


def costly_count(least, none=False):
    """Build a count without valid values, because each would train or evaluate a learner."""
    return count(least, none=none)._replace(right=())


TRAINING: dict[str, tuple[Callable, dict[str, Setting]]] = {
    "train": (
        with_defaults(jm.train, REGRESSOR, SINUSOID, optax.sgd(0.1), steps=1, key=KEY),
        {
            "steps": costly_count(1),
            "meta_batch": costly_count(1),
            "validate_every": costly_count(1),
            "validation_episodes": costly_count(2),
            "checkpoint_every": costly_count(1, none=True),
            "log_every": costly_count(1),
            "strategy": Setting(st.text(max_size=5), ()),
        },
    ),
    "meta_step": (
        with_defaults(jm.meta_step, REGRESSOR, optax.sgd(0.1), 2),
        {
            "strategy": Setting(
                st.one_of(st.text(max_size=5), st.integers(max_value=0)), ("auto", "vmap", "scan", 1)
            )
        },
    ),
    "evaluate": (
        with_defaults(jm.evaluate, REGRESSOR, REGRESSION, SINUSOID, **FEW),
        {"episodes": costly_count(2), "batch": costly_count(1, none=True)},
    ),
    "evaluate_episodes": (
        with_defaults(jm.evaluate_episodes, REGRESSOR, REGRESSION, SINUSOID, **FEW),
        {"episodes": costly_count(1), "batch": costly_count(1, none=True)},
    ),
    "evaluate_metrics": (
        with_defaults(jm.evaluate_metrics, REGRESSOR, REGRESSION, SINUSOID, **FEW),
        {"episodes": costly_count(1)},
    ),
}


def settings_of(*tables):
    return [
        pytest.param(function, name, setting, id=f"{owner}-{name}")
        for table in tables
        for owner, (function, parameters) in table.items()
        for name, setting in parameters.items()
    ]


# Accepting a value of these settings fits or trains a model.
TRAINED = settings_of(TRANSFER, TRAINING)
SETTINGS = [*settings_of(LEARNERS, TASKS), *TRAINED]


@pytest.mark.parametrize(("function", "name", "setting"), SETTINGS)
def test_the_error_for_a_setting_outside_its_range_names_it(function, name, setting):
    for value in setting.examples:
        assert_refused(lambda value=value: function(**{name: value}), name)


@pytest.mark.nightly
@pytest.mark.parametrize(("function", "name", "setting"), SETTINGS)
def test_a_search_finds_no_accepted_setting_outside_its_range(function, name, setting):
    @SEARCH
    @given(value=setting.wrong)
    def check(value):
        assert_refused(lambda: function(**{name: value}), name)

    check()


@pytest.mark.parametrize(
    ("function", "name", "setting"),
    [
        pytest.param(*row.values, id=row.id, marks=pytest.mark.nightly if row in TRAINED else ())
        for row in SETTINGS
        if row.values[2].right
    ],
)
def test_a_setting_at_the_edge_of_its_range_is_accepted(function, name, setting):
    for value in setting.right:
        function(**{name: value})


# --- Arrays: shapes, types, NaN, classes without examples -----------------------------------------------


def with_value(value):
    def corrupt(array):
        array = np.array(array)
        array[(-1,) * array.ndim] = value
        return array

    return corrupt


def cut(array):
    return array[:-1]


WRONG_SHAPES = (np.ravel, lambda a: a[None], lambda a: a[:0], lambda a: a[:, :0])
WRONG_TYPES = (lambda a: a.astype(str), lambda a: a.astype(complex), lambda a: a.astype(bool))
RAGGED = (lambda a: [[0.0], [0.0, 1.0]], lambda a: [None] * len(a))
NON_FINITE = (with_value(math.nan), with_value(math.inf), with_value(-math.inf))
# Functions that may be traced check only shapes and types.
FEATURE = (*WRONG_SHAPES, *WRONG_TYPES, *RAGGED, *NON_FINITE)
SHAPE = (*WRONG_SHAPES, *WRONG_TYPES)
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
EXTRA_CLASS = with_value(7)
PROBABILITY = (*FEATURE, with_value(-0.5), with_value(2.0))
SHARE = (with_value(math.nan), with_value(2.0), with_value(-1.0), cut, lambda p: p[:0])
PROBS = CONFUSION[[0, 1, 0, 1]] / CONFUSION[[0, 1, 0, 1]].sum(1)[:, None]
PRIOR = np.array([0.5, 0.5])

# A function, valid arrays for it, and for each array the functions that make it invalid.
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
        with_defaults(transfer.ridge_head, classes=2),
        {"features": FEATURES, "labels": LABELS},
        {"features": FEATURE, "labels": (*LABEL, EXTRA_CLASS, np.zeros_like)},
    ),
    "logistic_head": (
        with_defaults(transfer.logistic_head, classes=2),
        {"features": FEATURES, "labels": LABELS, "weights": np.ones(4, np.float32)},
        {
            "features": FEATURE,
            "labels": (*LABEL, EXTRA_CLASS, np.zeros_like),
            "weights": (cut, with_value(math.nan), lambda w: w[None], with_value(-1.0), lambda w: w * 0),
        },
    ),
    "density_ratio": (
        with_defaults(transfer.density_ratio, tolerance=1e-6),
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
        with_defaults(transfer.joint_confusion, classes=2),
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
        with_defaults(transfer.rlls, penalty=0.1),
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
        {"logits": FEATURE, "labels": (*LABEL, EXTRA_CLASS)},
    ),
    "confusion_matrix": (
        with_defaults(transfer.confusion_matrix, classes=2),
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
        with_defaults(transfer.predict_logits, LINEAR, VARIABLES),
        {"x": FEATURES},
        {"x": (lambda x: x[:0], lambda x: x.astype(str), lambda x: x.astype(complex))},
    ),
    "from_arrays": (
        with_defaults(jm.tasks.from_arrays, ways=2, shots=1),
        {"x": X, "y": Y},
        {
            "x": (*NON_FINITE, cut, lambda x: x[:0], lambda x: x.astype(complex), lambda x: x > 0),
            "y": (cut, lambda y: y + 0.5, lambda y: y[None], lambda y: y[:0], lambda y: [None] * len(y)),
        },
    ),
    "from_regression": (
        with_defaults(jm.tasks.from_regression, shots=1, queries=1),
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
        with_defaults(jm.tasks.distort, KEY),
        {"x": jnp.zeros((2, 4, 4, 1))},
        {"x": (jnp.ravel, lambda x: x[0], lambda x: x[..., 0])},
    ),
    "split_per_class": (
        with_defaults(jm.tasks.split_per_class, shots=1, key=KEY),
        {"y": Y},
        {"y": (lambda y: y[:0], lambda y: y[None], lambda y: y + 0.5, lambda y: [None] * len(y))},
    ),
}
CORRUPTED = [
    pytest.param(function, arrays, name, corruptions, id=f"{owner}-{name}")
    for owner, (function, arrays, invalid) in DATA_OF.items()
    for name, corruptions in invalid.items()
]


@pytest.mark.parametrize(("function", "arrays", "name", "corruptions"), CORRUPTED)
def test_the_error_for_an_invalid_array_names_it(function, arrays, name, corruptions):
    # Where lengths differ, the message may name either array.
    others = [other for other in arrays if other != name]

    for corrupt in corruptions:
        named = (name, *others) if corrupt is cut else (name,)
        assert_refused(lambda corrupt=corrupt: function(**{**arrays, name: corrupt(arrays[name])}), *named)


@pytest.mark.parametrize(
    ("function", "arrays"), [pytest.param(*row[:2], id=owner) for owner, row in DATA_OF.items()]
)
def test_good_arrays_give_finite_results(function, arrays):
    result = function(**arrays)
    for leaf in jax.tree.leaves(result):
        if isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert np.isfinite(leaf).all()


# --- Arguments of another type, and in the wrong order ---------------------------------------------------

OPTIMIZER_OF_TRAINING = optax.sgd(0.1)
STATE = jm.init_state(REGRESSOR, OPTIMIZER_OF_TRAINING, SINUSOID, KEY)
VALID = {
    "learner": REGRESSOR,
    "tasks": SINUSOID,
    "optimizer": OPTIMIZER_OF_TRAINING,
    "params": REGRESSION,
    "key": KEY,
}
CALLS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "train": (with_defaults(jm.train, steps=1), ("learner", "tasks", "optimizer", "key")),
    "init_state": (jm.init_state, ("learner", "optimizer", "tasks", "key")),
    "meta_step": (with_defaults(jm.meta_step, meta_batch=1), ("learner", "optimizer")),
    "evaluate": (with_defaults(jm.evaluate, episodes=2), ("learner", "params", "tasks", "key")),
    "evaluate_episodes": (
        with_defaults(jm.evaluate_episodes, episodes=2),
        ("learner", "params", "tasks", "key"),
    ),
    "evaluate_metrics": (
        with_defaults(jm.evaluate_metrics, episodes=2),
        ("learner", "params", "tasks", "key"),
    ),
    "run_episodes": (with_defaults(jm.run_episodes, episodes=2), ("learner", "params", "tasks", "key")),
    "calibrate": (jm.calibrate, ("learner", "params", "tasks", "key")),
    "check_learner": (jm.check_learner, ("learner", "tasks")),
}
# Wrong values of each argument, with a pattern of the message.
WRONG_ARGUMENTS: dict[str, tuple[tuple[object, str], ...]] = {
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
def test_the_error_for_an_argument_of_another_type_names_it(owner, name):
    function, names = CALLS[owner]
    arguments = {argument: VALID[argument] for argument in names}
    for value, message in WRONG_ARGUMENTS[name]:
        assert_refused(lambda value=value: function(**arguments | {name: value}), name)
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            function(**arguments | {name: value})


def test_the_error_for_arguments_in_the_wrong_order_names_one_of_them():
    learner, tasks, optimizer = REGRESSOR, SINUSOID, OPTIMIZER_OF_TRAINING
    once = {"steps": 1, "key": KEY}
    assert_refused(lambda: jm.train(tasks, learner, optimizer, **once), "learner")
    assert_refused(lambda: jm.train(learner, optimizer, tasks, **once), "tasks")
    assert_refused(lambda: jm.meta_step(optimizer, learner, 1), "learner")
    assert_refused(lambda: jm.init_state(learner, tasks, optimizer, KEY), "tasks", "optimizer")
    assert_refused(lambda: jm.check_learner(tasks, learner), "learner")
    for function in (jm.evaluate, jm.run_episodes, jm.evaluate_episodes, jm.evaluate_metrics):
        assert_refused(lambda function=function: function(learner, tasks, REGRESSION, **FEW), "tasks")
        assert_refused(lambda function=function: function(REGRESSION, learner, tasks, **FEW), "learner")
    assert_refused(lambda: jm.calibrate(learner, tasks, REGRESSION, KEY), "tasks")


def test_the_message_names_the_class_module_or_number_in_place_of_an_object():
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
        assert_refused(lambda function=function: function(jm.tasks.glyphs), "tasks")
    support = SINUSOID.sample(KEY).support
    with pytest.raises(ValueError, match=r"^support: got dict\(…\); it must be a jm\.Batch of examples"):
        REGRESSOR.adapt(support, REGRESSION, KEY)


def test_errors_of_transfer_for_arguments_of_another_type_name_them():
    arguments = {"model": LINEAR, "variables": VARIABLES, "data": DATA, **FIT}
    for name, value, message in (
        ("optimizer", 1e-3, r"got 0\.001 \(float\); it must be an optax transformation"),
        ("key", 0, r"got 0 \(int\); it must be a single key of JAX"),
        ("model", jm.nn.MLP(out=2), r"got MLP\(…\); it must be a model of jm\.transfer\.classifier"),
        ("data", (FEATURES, LABELS), r"got tuple\(…\); it must be jm\.Batch\(x, y\)"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            transfer.fine_tune(**arguments | {name: value})
    assert_refused(lambda: transfer.freeze(1e-3, PARAMS, "a"), "optimizer")
    assert_refused(lambda: jm.tasks.labelled(GLYPHS, per_class=1, key=0), "key")
    assert_refused(lambda: jm.tasks.split_per_class(Y, 1, 0), "key")
    assert_refused(lambda: jm.tasks.stream("photos", key=KEY, meta_batch=1, ways=2, shots=1), "prepared")
    assert_refused(lambda: jm.tasks.classes_of(GLYPHS, 0), "key")


def test_tasks_need_no_card():
    """Check that results are the same with and without a card."""
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
        assert_refused(lambda function=function: function(bare), "tasks")
