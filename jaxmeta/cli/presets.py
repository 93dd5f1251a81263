"""Named protocols (presets): values of settings for a complete training.

A protocol maps names of settings, without their groups, to values; `base` names a protocol that it modifies.
If its learner differs from the base's, that learner's own defaults are applied before the protocol's values.
"""

from typing import Any

from jaxmeta.cli.names import LEARNERS
from jaxmeta.cli.schema import summary
from jaxmeta.declare import facts_of

Protocol = dict[str, Any]


def _official_omniglot(ways: int, shots: int) -> Protocol:
    # The official code sums the mean losses of the N classes where jaxmeta takes one mean: α_here = N·α.
    inner: Protocol = (
        {"inner_lr": 5 * 0.4, "inner_steps": 1, "eval_steps": 3, "meta_batch": 32}
        if ways == 5
        else {"inner_lr": 20 * 0.1, "inner_steps": 5, "eval_steps": 5, "meta_batch": 16}
    )
    return {
        "description": f"Finn et al. 2017: Omniglot, {ways}-way {shots}-shot, 60,000 meta-steps",
        "tasks": "omniglot",
        "ways": ways,
        "train_ways": ways,
        "shots": shots,
        "train_shots": shots,
        "queries": shots,
        "train_queries": shots,
        "protocol": "maml",
        "network": "strided-conv4-without-scale",
        **inner,
    }


# MAML on images, with one support example per class.
_ONE_SHOT: Protocol = {
    "ways": 5,
    "shots": 1,
    "queries": 1,
    "train_ways": 5,
    "train_shots": 1,
    "train_queries": 1,
    "network": "strided-conv4",
    "inner_lr": 0.4,
    "inner_steps": 1,
    "eval_steps": 3,
}

_REGRESSION: Protocol = {
    "shots": 5,
    "queries": 100,
    "train_shots": 10,
    "train_queries": 10,
    "network": "mlp-40",
    "inner_lr": 0.002,
    "inner_steps": 1,
    "eval_steps": 1,
    "report_steps": (1, 5, 10),
    "outer_lr": 3e-3,
    "schedule": "cosine",
    "steps": 120_000,
    "meta_batch": 50,
    "strategy": "vmap",
    "episodes": 600,
    "validate_every": 5000,
    "log_every": 500,
}

_FINN_MINI_IMAGENET: Protocol = _ONE_SHOT | {
    "train_queries": 15,
    "network": "conv4-32",
    "inner_lr": 5 * 0.01,
    "inner_steps": 5,
    "eval_steps": 10,
    "clip": 10.0,
    "meta_batch": 4,
    "episodes": 600,
}

# With only ten classes to draw from, a short training is enough.
_TEN_DIGITS: Protocol = _ONE_SHOT | {
    "train_queries": 3,
    "queries": 5,
    "outer_lr": 3e-3,
    "schedule": "cosine",
    "steps": 2000,
    "meta_batch": 8,
}

# The user's images are normalised by the support set's statistics, since `jaxmeta predict` classifies each
# query independently.
_OWN_IMAGES: Protocol = _ONE_SHOT | {
    "queries": 5,
    "train_queries": 5,
    "network": "conv4-32",
    "norm": "support",
    "inner_lr": 0.1,
    "inner_steps": 3,
    "eval_steps": 5,
    "schedule": "cosine",
    "steps": 2000,
    "meta_batch": 4,
    "episodes": 600,
    "validate_every": 500,
    "log_every": 25,
}

PRESETS: dict[str, Protocol] = {
    "glyphs": _ONE_SHOT
    | {
        "description": "MAML on drawn characters in minutes on a laptop; the default of `jaxmeta train`",
        "tasks": "glyphs",
        "queries": 5,
        "train_queries": 3,
        "outer_lr": 3e-3,
        "schedule": "cosine",
        "steps": 2000,
        "meta_batch": 8,
        "validate_every": 500,
        "log_every": 25,
    },
    "omniglot": _ONE_SHOT
    | {
        "description": "MAML on Omniglot, 5-way 1-shot, in minutes on a laptop",
        "tasks": "omniglot",
        "train_queries": 3,
        "protocol": "vinyals",
        # Half the tasks of the paper's meta-step and three times its rate: in a laptop's budget
        # more and larger steps gain more than less noisy ones.
        "outer_lr": 3e-3,
        "schedule": "cosine",
        "steps": 6000,
        "meta_batch": 16,
    },
    "omniglot-alphabet": _ONE_SHOT
    | {
        "description": "MAML on Omniglot's background set, 20-way 1-shot, to classify an alphabet's letters "
        "with `predict`",
        "tasks": "omniglot",
        "ways": 20,
        "train_ways": 20,
        "protocol": "lake",
        "norm": "support",
        "inner_lr": 2.0,
        "inner_steps": 2,
        "eval_steps": 4,
        "outer_lr": 3e-3,
        "schedule": "cosine",
        "steps": 8000,
        "meta_batch": 8,
    },
    "mnist": _TEN_DIGITS
    | {"description": "MAML on MNIST's ten digits, 5-way 1-shot, as a source for transfer", "tasks": "mnist"},
    "fashion-mnist": _TEN_DIGITS
    | {
        "description": "MAML on Fashion-MNIST's ten kinds of clothes, 5-way 1-shot, as a source for transfer",
        "tasks": "fashion_mnist",
    },
    "usps": _TEN_DIGITS
    | {
        "description": "MAML on the ten digits of USPS, 5-way 1-shot, as a source for transfer",
        "tasks": "usps",
    },
    "maml-omniglot-5way-1shot": _official_omniglot(5, 1),
    "maml-omniglot-5way-5shot": _official_omniglot(5, 5),
    "maml-omniglot-20way-1shot": _official_omniglot(20, 1),
    "maml-omniglot-20way-5shot": _official_omniglot(20, 5),
    # With the paper's α = 0.01 (its code's default is 0.001) some test tasks of 5 points diverge within 10
    # steps and dominate the mean error. A fifth of this α does not diverge, and adapts as well.
    "sinusoid": _REGRESSION
    | {
        "description": "MAML on sine waves, trained with 10 points, tested with 5 (Finn et al. 2017)",
        "tasks": "sinusoid",
    },
    "harmonic": _REGRESSION
    | {
        "description": "MAML on sums of two sine waves, trained and tested with 10 points",
        "tasks": "harmonic",
        "shots": 10,
    },
    "quadratics": {
        "description": "Andrychowicz et al. 2016: an LSTM learns to minimise quadratics in 100 steps",
        "tasks": "quadratics",
        "learner": "learned_optimizer",
        "network": "linear",
        "inner_steps": 100,
        "eval_steps": 100,
        "truncation": 20,
        "order": "first",
        "learner.scale": 0.1,
        "outer_lr": 3e-3,
        "schedule": "cosine",
        "steps": 3000,
        "meta_batch": 32,
        "strategy": "vmap",
        "episodes": 600,
        "log_every": 25,
    },
    "folder": _OWN_IMAGES
    | {"description": "MAML on a folder of your own images, 5-way 1-shot", "tasks": "folder:PATH"},
    "arrays": _OWN_IMAGES
    | {"description": "MAML on your own labelled arrays, 5-way 1-shot", "tasks": "arrays:FILE"},
    "table": _REGRESSION
    | {
        "description": "MAML on a table of your own regression tasks, 5 support and 5 query examples",
        "tasks": "table:FILE",
        "queries": 5,
        "train_shots": 5,
        "train_queries": 5,
        "inner_lr": 0.01,
        "steps": 10_000,
        "meta_batch": 16,
        "validate_every": 500,
        "log_every": 50,
    },
    "tfds": _OWN_IMAGES
    | {"description": "MAML on a data set of tensorflow-datasets, 5-way 1-shot", "tasks": "tfds:NAME"},
    "mini-imagenet": _FINN_MINI_IMAGENET
    | {
        "description": "Finn et al. 2017: mini-ImageNet, 5-way 1-shot, 60,000 meta-steps",
        "tasks": "mini_imagenet",
    },
    "cifar-fs": _FINN_MINI_IMAGENET
    | {
        "description": "MAML's mini-ImageNet settings on CIFAR-FS, 5-way 1-shot, 60,000 meta-steps",
        "tasks": "cifar_fs",
    },
    "cub": _FINN_MINI_IMAGENET
    | {
        "description": "MAML's mini-ImageNet settings on CUB-200-2011, 5-way 1-shot, 60,000 meta-steps",
        "tasks": "cub",
    },
    "emoji": _OWN_IMAGES
    | {
        "description": "MAML on emoji of six designers, 84x84 in colour, 5-way 1-shot",
        "tasks": "emoji",
        # A class may have only three pictures.
        "queries": 2,
        "train_queries": 2,
    },
    "glyphs-zero-shot": {
        "description": "drawn characters by their strokes alone, 20-way zero-shot, by prototypical networks",
        "base": "glyphs",
        "learner": "prototypical",
        "ways": 20,
        "shots": 0,
        "train_shots": 0,
    },
    "omniglot-within-alphabet": {
        "description": "Omniglot's classical test: 20 letters of one new alphabet, queries by another writer",
        "base": "omniglot",
        "learner": "matching",
        "ways": 20,
        "train_ways": 20,
        "protocol": "lake-validation",
        "within_alphabet": True,
        # 32 pixels give a final map of 2×2, where 28 give 1×1; with 48 far more steps would be needed.
        "size": 32,
        "distort": True,
        "steps": 10_000,
    },
    "mann-omniglot": {
        "description": "Santoro et al. 2016: sequences of 50 images of 5 classes, labels one step late",
        "base": "omniglot",
        "learner": "mann",
        "protocol": "maml",
        "size": 20,
        "shots": 18,
        "train_shots": 18,
        "train_queries": 1,
        "distort": True,
        "clip": 10.0,
        "steps": 30_000,
        "sequence": 50,
    },
    "mann-omniglot-strings": {
        "description": "Santoro et al. 2016: 15 classes in 150 images, labels of five characters",
        "base": "mann-omniglot",
        "ways": 15,
        "train_ways": 15,
        "sequence": 150,
        "strings": (5, 5),
    },
    "omniglot-koch": {
        "description": "Koch et al. 2015: Siamese network for 105x105 images on the same test; needs a GPU",
        "base": "omniglot-within-alphabet",
        "learner": "siamese",
        "network": "koch",
        "size": 105,
        "outer_lr": 1e-4,
        "steps": 20_000,
    },
}

# The protocol of `train METHOD --tasks omniglot` for each method. learned_optimizer is left out, since its
# training on a network of this size would take many times longer.
PRESETS |= {
    f"omniglot-{name.replace('_', '-')}": {
        "description": f"Omniglot, 5-way 1-shot: {summary(factory)}",
        "base": "omniglot",
        "learner": name,
    }
    for name, factory in LEARNERS.items()
    if name not in ("maml", "learned_optimizer") and "classification" in facts_of(factory).kinds
}
