"""The registry: methods and networks by name; `sources.py` has the task sources.

A new learner joins by one entry of `LEARNERS`; every command and every law then runs it.
"""

import contextlib
import dataclasses
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import optax
from jax.nn.initializers import lecun_normal

from jaxmeta import losses, nn
from jaxmeta.core import Learner, Model
from jaxmeta.metric_based import (
    fine_tuned_head,
    kernel_classifier,
    matching,
    prototypical,
    relation,
    ridge,
    siamese,
    simple_shot,
)
from jaxmeta.metric_based.pretrained import released_sgd
from jaxmeta.model_based import mann, metanet
from jaxmeta.optimization_based import (
    anil,
    boil,
    fomaml,
    imaml,
    learned_optimizer,
    lstm_meta_learner,
    maml,
    maml_plus_plus,
    meta_sgd,
    reptile,
)
from jaxmeta.settings import Preset, flag_of
from jaxmeta.tasks.distortions import distort


def _network(settings: Preset) -> Model:
    return nn.as_model(NETWORKS[settings.network](1 if settings.train_ways is None else settings.train_ways))


OUTER_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "Adam": optax.adam,
    "SGD": optax.sgd,
}

NETWORKS: dict[str, Callable[[Any], Any]] = {
    "strided-conv4": lambda out: nn.StridedConv4(ways=out),
    "strided-conv4-flat": lambda out: nn.StridedConv4(ways=out, flatten=True),
    "strided-conv4-without-scale": lambda out: nn.StridedConv4(ways=out, use_scale=False),
    "conv4": lambda out: nn.Conv4(ways=out),
    "conv4-32": lambda out: nn.Conv4(ways=out, filters=32),
    "resnet12": lambda out: nn.ResNet12(ways=out),
    "mlp": lambda out: nn.MLP(out=out, hidden=(256, 128, 64, 64), norm=True),
    "mlp-40": lambda out: nn.MLP(out=out),
    "linear": lambda out: nn.MLP(out=out, hidden=(), use_bias=False),
    "relation": lambda out: nn.RelationEmbedding(),
    "koch": lambda out: nn.Koch(),
    "lrua": lambda out: nn.MemoryNetwork(out),
    "lrua-feed-forward": lambda out: nn.MemoryNetwork(out, controller="feed_forward"),
    "ntm": lambda out: nn.MemoryNetwork(out, nn.NTM()),
    "lstm": lambda out: nn.MemoryNetwork(out, None),
    "feed-forward": lambda out: nn.MemoryNetwork(out, None, controller="feed_forward"),
    "augmented-cnn": lambda out: nn.AugmentedCNN(out),
    "augmented-cnn-32": lambda out: nn.AugmentedCNN(out, filters=32),
}


@dataclasses.dataclass(frozen=True)
class LearnerSpec:
    """How the command line and the laws build a method.

    Attributes:
      factory: the public factory, such as `jm.maml`.
      family: of the method.
      description: one line.
      build: `(network, settings, norm) -> Learner`.
      takes: the fields of `Preset` that only some methods have and this one does.
      norms: `norm=` of each row that a report gives.
      fixed_ways: whether the network's output width is the number of ways.
      zero_shot: whether it can learn from class metadata alone.
      kinds: of tasks that it can learn: "classification", "regression".
      supervised: whether it trains on all training classes at once, in mini-batches, and not on episodes.
      networks: those it can work with; None for all.
      network: default network, from the settings.
      outer: outer optimizer, a name in `OUTER_OPTIMIZERS`.
      train_shots: support examples in training for each one of the protocol.
      defaults: settings that this learner has in place of those of a preset made for another.
    """

    factory: Callable[..., Learner]
    family: str
    description: str
    build: Callable[[Any, Preset, str], Learner]
    takes: tuple[str, ...] = ()
    norms: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"transductive": "batch", "inductive": "support"}
    )
    fixed_ways: bool = True
    zero_shot: bool = False
    kinds: tuple[str, ...] = ("classification", "regression")
    supervised: bool = False
    networks: tuple[str, ...] | None = None
    network: Callable[[Preset], Any] = _network
    outer: str = "Adam"
    train_shots: int = 1
    defaults: Callable[[Preset], Mapping[str, Any]] = lambda preset: {}


# A factory's arguments by the settings that they come from.
_ARGUMENTS = {
    "inner_steps": "steps",
    "eval_steps": "eval_steps",
    "inner_batch": "batch_size",
    "order": "order",
    "memory": "memory",
    "truncation": "truncation",
    "proximal": "proximal",
    "cg_steps": "cg_steps",
    "damping": "damping",
}


@contextlib.contextmanager
def _said_of_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """What a factory says of an argument, said of the flag it comes from."""
    try:
        yield
    except ValueError as error:
        argument, said = re.match(r"(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
        raise ValueError(flags.get(argument, argument) + said) from error


def _build(
    factory: Callable[..., Learner], own: Callable[[Preset], Mapping[str, Any]] = lambda settings: {}
) -> Callable[[Model, Preset, str], Learner]:
    """Builds a method by its factory from what is set, and `own` arguments made of settings.

    What the factory says of an argument it then says of the flag.
    """

    def build(network: Model, settings: Preset, norm: str) -> Learner:
        given = {name: getattr(settings, field) for field, name in _ARGUMENTS.items()}
        with _said_of_flags({name: flag_of(field) for field, name in _ARGUMENTS.items()}):
            return factory(
                network,
                norm=norm,
                loss=losses.mse if settings.ways is None else losses.cross_entropy,
                **{name: value for name, value in given.items() if value is not None},
                **own(settings),
            )

    return build


def _sgd(settings: Preset) -> dict[str, Any]:
    return {"inner_optimizer": optax.sgd(settings.inner_lr)}


def _maml_plus_plus(settings: Preset) -> dict[str, Any]:
    parts = {"anneal_steps": settings.anneal, "first_order_steps": settings.first_order}
    steps = {name: round(part * settings.steps) for name, part in parts.items() if part is not None}
    return {"rate": settings.inner_lr, **steps}


def _imaml_defaults(preset: Preset) -> dict[str, Any]:
    found = {
        "inner_steps": 16,
        "eval_steps": 16,
        "report_steps": (),
        "proximal": 2.0,
        "cg_steps": 5,
        "damping": 0.0,
    }
    if preset.ways is not None:
        # Images take the weight to be weaker than the paper's 2, which keeps 16 steps too close to the
        # start, and the damping that the official code has; and the network is iMAML's own.
        flat = {"strided-conv4": "strided-conv4-flat"}
        found |= {"network": flat.get(preset.network, preset.network)}
        found |= {"inner_lr": 0.1, "proximal": 0.2, "damping": 1.0}
    return found


def _reptile_defaults(preset: Preset) -> dict[str, Any]:
    return {
        # The official code's inner optimizer is Adam, whose second moments live on from task to task.
        # Ours begins anew with each task, and SGD then learns faster.
        "inner_lr": 0.02 if preset.ways is None else 0.5,
        "inner_steps": 5,
        "eval_steps": 20,
        "inner_batch": 10,
        "outer_lr": 1.0,
        "schedule": "linear",
    }


def _lstm_defaults(preset: Preset) -> dict[str, Any]:
    found = {"inner_steps": 12, "eval_steps": 12, "report_steps": (), "order": "first"}
    if preset.ways is not None:
        # Its meta-gradient costs far more than MAML's: two LSTMs at every parameter, twelve times.
        found |= {
            "network": "conv4-32",
            "meta_batch": min(preset.meta_batch, 4),
            "steps": max(preset.steps // 2, 1),
        }
    return found


# Queries of each class in training where its tasks have more ways than those of the test.
_MANY_WAYS = {"omniglot": 5, "glyphs": 5, "mini_imagenet": 15, "cifar_fs": 15}
# Width of both embeddings of zero-shot learning.
_ZERO_SHOT_DIM = 128


def _embedding(settings: Preset) -> Model:
    return nn.as_model(NETWORKS[settings.network](None if settings.shots else _ZERO_SHOT_DIM))


def _metric(
    factory: Callable[..., Learner], own: Callable[[Preset], Mapping[str, Any]] = lambda settings: {}
) -> Callable[[Model, Preset, str], Learner]:
    """Builds a method that compares embeddings, by its factory."""

    def build(network: Model, settings: Preset, norm: str) -> Learner:
        augment = distort if settings.distort else None
        flags = {field.name: flag_of(field.name) for field in dataclasses.fields(Preset)}
        with _said_of_flags(flags | {"steps": flag_of("eval_steps")}):
            return factory(network, norm=norm, augment=augment, **own(settings))

    return build


def _given(*fields: str) -> Callable[[Preset], dict[str, Any]]:
    """The settings of these names that there are, as arguments of the same names."""
    return lambda settings: {
        field: getattr(settings, field) for field in fields if getattr(settings, field) is not None
    }


def _prototypical(settings: Preset) -> dict[str, Any]:
    own = _given("divergence")(settings)
    if not settings.shots:
        own["metadata"] = nn.MLP(out=_ZERO_SHOT_DIM, hidden=(256, 256), kernel_init=lecun_normal())
    return own


def _fine_tuned(settings: Preset) -> dict[str, Any]:
    optimizer = None if settings.inner_lr is None else released_sgd(settings.inner_lr)
    return {**_given("head", "scale")(settings), "steps": settings.eval_steps, "optimizer": optimizer}


def _metric_spec(
    factory: Callable[..., Learner],
    description: str,
    own: Callable[[Preset], Mapping[str, Any]] = lambda settings: {},
    takes: tuple[str, ...] = (),
    *,
    train_ways: int | None = None,
    fewer: int = 1,
    distorts: bool = False,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
    **spec: Any,
) -> LearnerSpec:
    def of(preset: Preset) -> Mapping[str, Any]:
        # Of strokes alone is what comes in from outside the image known.
        distort = distorts and preset.tasks in ("omniglot", "glyphs")
        found: dict[str, Any] = {"norm": "batch", "distort": distort or preset.distort, **defaults}
        if preset.network.startswith("strided-conv4"):
            found.setdefault("network", "conv4")
        by_gradients = LEARNERS[preset.learner].family != "metric-based"
        if by_gradients and preset.tasks in _MANY_WAYS and train_ways is not None:
            found |= {
                "train_ways": max(train_ways, preset.ways or 0),
                "train_queries": _MANY_WAYS[preset.tasks],
                "meta_batch": 2,
                "steps": max(preset.steps // fewer, 1),
            }
        return found

    return LearnerSpec(
        factory,
        "metric-based",
        description,
        _metric(factory, own),
        takes=(*takes, "distort"),
        norms={"transductive": "batch", "inductive": "population"},
        fixed_ways=False,
        kinds=("classification",),
        network=_embedding,
        defaults=of,
        **spec,
    )


def _memory_network(settings: Preset) -> nn.MemoryNetwork:
    strings = settings.label_strings
    return NETWORKS[settings.network](settings.train_ways if strings is None else math.prod(strings))


def _mann(network: nn.MemoryNetwork, settings: Preset, norm: str) -> Learner:
    del norm
    # Up to 10 of 105 pixels and π/16, as in the paper.
    moved = partial(distort, rotation=11.25, shear=0.0, scale=0.0, shift=10 / 105, probability=1.0)
    return mann(
        network,
        strings=settings.label_strings,
        augment=moved if settings.distort else None,
    )


def _embedding_and_base(settings: Preset) -> tuple[nn.AugmentedCNN, nn.AugmentedCNN]:
    network = NETWORKS[settings.network]
    return network(None), network(settings.train_ways)


def _metanet(networks: tuple[Any, Any], settings: Preset, norm: str) -> Learner:
    del norm
    with _said_of_flags({"embedding_loss": flag_of("embedding_loss")}):
        return metanet(
            *networks,
            task_weights=settings.task_weights != "none",
            base_task_weights=settings.task_weights == "both",
            augment=distort if settings.distort else None,
            **_given("embedding_loss")(settings),
        )


_STEPS = ("inner_steps", "eval_steps", "report_steps")
_DESCENT = (*_STEPS, "inner_lr", "inner_batch")
_UNROLLED = (*_DESCENT, "memory", "truncation")
_ORDER = ("order", "diagnose")
_IMPLICIT = ("proximal", "cg_steps", "damping")

LEARNERS: dict[str, LearnerSpec] = {
    "maml": LearnerSpec(
        maml,
        "optimization-based",
        "an initialisation from which a few gradient steps suffice (Finn et al. 2017)",
        _build(maml, _sgd),
        takes=(*_UNROLLED, *_ORDER, *_IMPLICIT),
    ),
    "fomaml": LearnerSpec(
        fomaml,
        "optimization-based",
        "MAML without second derivatives (Finn et al. 2017)",
        _build(fomaml, _sgd),
        takes=_DESCENT,
    ),
    "anil": LearnerSpec(
        anil,
        "optimization-based",
        "MAML that adapts the head alone (Raghu et al. 2020)",
        _build(anil, _sgd),
        takes=(*_UNROLLED, *_ORDER, *_IMPLICIT),
    ),
    "boil": LearnerSpec(
        boil,
        "optimization-based",
        "MAML that adapts the body alone (Oh et al. 2021)",
        _build(boil, _sgd),
        takes=(*_UNROLLED, *_ORDER, *_IMPLICIT),
    ),
    "meta_sgd": LearnerSpec(
        meta_sgd,
        "optimization-based",
        "MAML with a learned step size for every parameter (Li et al. 2017)",
        _build(meta_sgd, lambda settings: {"rates": settings.inner_lr}),
        takes=(*_UNROLLED, *_ORDER),
    ),
    "imaml": LearnerSpec(
        imaml,
        "optimization-based",
        "MAML with implicit gradients (Rajeswaran et al. 2019)",
        _build(imaml, _sgd),
        takes=(*_STEPS, "inner_lr", *_IMPLICIT),
        defaults=_imaml_defaults,
    ),
    "maml_plus_plus": LearnerSpec(
        maml_plus_plus,
        "optimization-based",
        "MAML with a multi-step loss, learned step sizes and layers for each step (Antoniou et al. 2019)",
        _build(maml_plus_plus, _maml_plus_plus),
        takes=(*_STEPS, "inner_lr", "memory", "anneal", "first_order"),
        defaults=lambda preset: {
            "inner_steps": 5,
            "eval_steps": 5,
            "report_steps": (),
            "anneal": 0.1,
            "first_order": 0.0,
        },
    ),
    "reptile": LearnerSpec(
        reptile,
        "optimization-based",
        "moves the initialisation towards each task's solution (Nichol et al. 2018)",
        _build(reptile, _sgd),
        takes=_DESCENT,
        outer="SGD",
        train_shots=10,
        defaults=_reptile_defaults,
    ),
    "lstm_meta_learner": LearnerSpec(
        lstm_meta_learner,
        "optimization-based",
        "an LSTM as the optimizer, and the start that suits it (Ravi & Larochelle 2017)",
        _build(lstm_meta_learner),
        takes=(*_STEPS, *_ORDER, "inner_batch", "memory", "truncation"),
        norms={"transductive": "batch", "inductive": "episode"},
        defaults=_lstm_defaults,
    ),
    "learned_optimizer": LearnerSpec(
        learned_optimizer,
        "optimization-based",
        "gradient descent learned by gradient descent, for training from scratch (Andrychowicz et al. 2016)",
        # As in the paper; the official code has a tenth of it.
        _build(learned_optimizer, lambda settings: {"scale": 0.1}),
        takes=(*_STEPS, *_ORDER, "inner_batch", "memory", "truncation"),
        defaults=lambda preset: {
            "inner_steps": 100,
            "eval_steps": 100,
            "report_steps": (),
            "truncation": 20,
            "order": "first",
        },
    ),
    "prototypical": _metric_spec(
        prototypical,
        "a class is the mean of its embedded examples (Snell et al. 2017)",
        _prototypical,
        ("divergence",),
        train_ways=60,
        # Ways are dear: a task of 60 has as many images as twelve of five.
        fewer=3,
        defaults={"divergence": "euclidean"},
        zero_shot=True,
    ),
    "matching": _metric_spec(
        matching,
        "attention over the support set, by cosines (Vinyals et al. 2016)",
        _given("scale", "context_steps"),
        ("scale", "context_steps"),
        train_ways=20,
        # With 10, three times as many meta-steps came out a point lower on Omniglot.
        defaults={"scale": 30.0},
        fewer=3,
    ),
    "siamese": _metric_spec(
        siamese,
        "do two images show one class? The best partner names the query (Koch et al. 2015)",
        train_ways=20,
        distorts=True,
    ),
    "relation": _metric_spec(
        relation,
        "a network judges how alike a query and a class are (Sung et al. 2018)",
        defaults={"network": "relation", "train_queries": 10, "meta_batch": 2},
        networks=("relation",),
    ),
    "kernel_classifier": _metric_spec(
        kernel_classifier,
        "a query's label is the mean of the support's, weighted by a kernel",
        _given("similarity", "reduce", "scale"),
        ("similarity", "reduce", "scale"),
        train_ways=20,
        defaults={"similarity": "euclidean", "reduce": "sum", "scale": 1.0},
    ),
    "ridge": _metric_spec(
        ridge,
        "R2-D2: ridge regression in closed form on a learned embedding (Bertinetto et al. 2019)",
        train_ways=20,
    ),
    "simple_shot": _metric_spec(
        simple_shot,
        "baseline: nearest centroid on the features of an ordinary classifier (Wang et al. 2019)",
        defaults={"meta_batch": 2},
        supervised=True,
    ),
    "fine_tuned_head": _metric_spec(
        fine_tuned_head,
        "baseline: a new head trained on the features of an ordinary classifier (Chen et al. 2019)",
        _fine_tuned,
        ("head", "scale", "eval_steps", "inner_lr"),
        defaults={"head": "linear", "scale": 2.0, "eval_steps": 100, "inner_lr": 0.01, "meta_batch": 2},
        supervised=True,
    ),
    "mann": LearnerSpec(
        mann,
        "model-based",
        "a recurrent network writes what it is shown to a memory (Santoro et al. 2016)",
        _mann,
        takes=("sequence", "strings", "distort"),
        norms={"inductive": "none"},
        kinds=("classification",),
        networks=("lrua", "lrua-feed-forward", "ntm", "lstm", "feed-forward"),
        network=_memory_network,
        defaults=lambda preset: {
            "network": "lrua",
            "norm": "none",
            "outer_lr": 1e-3,
            "schedule": "constant",
            "meta_batch": 16,
            # Time is what goes one by one: all sequences of a device take each step together.
            "strategy": "vmap",
        },
    ),
    "metanet": LearnerSpec(
        metanet,
        "model-based",
        "gradients of the support set become fast weights (Munkhdalai & Yu 2017)",
        _metanet,
        takes=("embedding_loss", "task_weights", "distort"),
        norms={"inductive": "none"},
        kinds=("classification",),
        networks=("augmented-cnn", "augmented-cnn-32"),
        network=_embedding_and_base,
        defaults=lambda preset: {
            "network": "augmented-cnn",
            "norm": "none",
            # The paper has it for one example of each class, and the official code always.
            "embedding_loss": "xent",
            "task_weights": "embedding",
            "outer_lr": 1e-3,
            # As published, many small steps of one task each.
            "train_queries": 10,
            "meta_batch": 1,
        },
    ),
}
