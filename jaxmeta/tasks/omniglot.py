"""Omniglot (Lake et al. 2015): 1623 handwritten characters, 20 drawings each, in the published splits."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from jaxmeta.checks import LARGEST_SEED, ArgumentError, check_count, check_word
from jaxmeta.core import ProtocolCard, Rotations, SplitName, TaskDistribution
from jaxmeta.tasks.archives import DRAWERS, Edition, prepare
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.splits import ClassSplit, check_part

# Number of characters per alphabet.
BACKGROUND = {
    "Alphabet_of_the_Magi": 20,
    "Anglo-Saxon_Futhorc": 29,
    "Arcadian": 26,
    "Armenian": 41,
    "Asomtavruli_(Georgian)": 40,
    "Balinese": 24,
    "Bengali": 46,
    "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
    "Braille": 26,
    "Burmese_(Myanmar)": 34,
    "Cyrillic": 33,
    "Early_Aramaic": 22,
    "Futurama": 26,
    "Grantha": 43,
    "Greek": 24,
    "Gujarati": 48,
    "Hebrew": 22,
    "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
    "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Malay_(Jawi_-_Arabic)": 40,
    "Mkhedruli_(Georgian)": 41,
    "N_Ko": 33,
    "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
    "Sanskrit": 42,
    "Syriac_(Estrangelo)": 23,
    "Tagalog": 17,
    "Tifinagh": 55,
}
EVALUATION = {
    "Angelic": 20,
    "Atemayar_Qelisayer": 26,
    "Atlantean": 26,
    "Aurek-Besh": 26,
    "Avesta": 26,
    "Ge_ez": 26,
    "Glagolitic": 45,
    "Gurmukhi": 45,
    "Kannada": 41,
    "Keble": 26,
    "Malayalam": 47,
    "Manipuri": 40,
    "Mongolian": 30,
    "Old_Church_Slavonic_(Cyrillic)": 45,
    "Oriya": 46,
    "Sylheti": 28,
    "Syriac_(Serto)": 23,
    "Tengwar": 25,
    "Tibetan": 42,
    "ULOG": 26,
}
# The validation alphabets of Vinyals' split, all from the background part: 172 characters.
_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")


def _characters(alphabets: dict[str, int]) -> tuple[str, ...]:
    return tuple(
        f"{name}/character{i:02d}" for name, count in sorted(alphabets.items()) for i in range(1, count + 1)
    )


EDITION = Edition(
    characters={"background": _characters(BACKGROUND), "evaluation": _characters(EVALUATION)},
    digest="96f1935e44a733367c6dc7fc72d49af70f2d372fe09afdba045f59e9f4ad164e",
    md5={
        "background": "68d2efa1b9178cc56df9314c21c6e718",
        "evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
    },
)

_Protocol = Literal["vinyals", "vinyals-trainval", "maml", "reptile", "lake", "lake-validation"]

# Default rotations of train, validation and test, and the sentence for the protocol card.
_PROTOCOLS: dict[_Protocol, tuple[tuple[Rotations, Rotations, Rotations], str]] = {
    "vinyals": (("classes", "classes", "classes"), "Vinyals et al. 2016 / Snell et al. 2017, 1028/172/423"),
    "vinyals-trainval": (
        ("classes", "classes", "classes"),
        "Vinyals et al. 2016 / Snell et al. 2017, trained on train and validation, 1200/423",
    ),
    "maml": (("random", "random", "random"), "Finn et al. 2017, random 1100/100/423"),
    "reptile": (("classes", "none", "none"), "Nichol et al. 2018, random 1200/423"),
    "lake": (("classes", "none", "none"), "Lake et al. 2015, background/evaluation 964/659"),
    "lake-validation": (
        ("classes", "none", "none"),
        "Lake et al. 2015, evaluation 659; five background alphabets held out for validation, 792/172/659",
    ),
}


def omniglot_split(
    protocol: _Protocol = "vinyals",
    split_seed: int = 0,
) -> ClassSplit:
    """Return the class split of a published Omniglot protocol; class names are "Alphabet/characterNN".

    | protocol | train/validation/test | classes |
    | --- | --- | --- |
    | vinyals | 1028/172/423 | train and validation: all background and the first 236 evaluation characters, \
with five background alphabets for validation; test: the other evaluation characters |
    | vinyals-trainval | 1200/0/423 | as vinyals, with validation added to train |
    | maml | 1100/100/423 | random, seeded by `split_seed` |
    | reptile | 1200/0/423 | random, seeded by `split_seed` |
    | lake | 964/0/659 | train: background; test: evaluation |
    | lake-validation | 792/172/659 | as lake, with the validation alphabets of vinyals held out of train |

    Leakage: Lake's evaluation alphabets, and with them the official 20 one-shot runs, may only be used to
    evaluate models trained by "lake" or "lake-validation". The training set of "vinyals" contains Atlantean,
    Ge_ez, Glagolitic and most of Gurmukhi. `ClassSplit.assert_disjoint` and the argument `trained_on` of
    `omniglot` refuse such a comparison.

    Args:
      protocol: one of the protocols above.
      split_seed: seed of the random splits "maml" and "reptile".

    Raises:
      ValueError: an unknown protocol.

    Examples:
      >>> omniglot_split("vinyals").sizes
      (1028, 172, 423)
      >>> omniglot_split("vinyals").assert_disjoint(omniglot_split("vinyals-trainval"))
      >>> omniglot_split("lake").assert_disjoint(omniglot_split("vinyals"))
    """
    check_word("protocol", protocol, _PROTOCOLS)
    check_count("split_seed", split_seed, 0, LARGEST_SEED)
    background, evaluation = EDITION.characters["background"], EDITION.characters["evaluation"]
    held_out = tuple(name for name in background if name.split("/")[0] in _VALIDATION)
    if protocol == "lake":
        return ClassSplit(background, (), evaluation)
    if protocol == "lake-validation":
        return ClassSplit(tuple(sorted(set(background) - set(held_out))), held_out, evaluation)
    if protocol == "maml":
        return ClassSplit.from_counts(EDITION.names, (1100, 100, 423), split_seed)
    if protocol == "reptile":
        return ClassSplit.from_counts(EDITION.names, (1200, 0, 423), split_seed)
    trainval, test = EDITION.names[:1200], EDITION.names[1200:]
    if protocol == "vinyals-trainval":
        return ClassSplit(trainval, (), test)
    return ClassSplit(tuple(name for name in trainval if name not in held_out), held_out, test)


def omniglot(
    split: SplitName = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 5,
    data: str | os.PathLike[str] | None = None,
    protocol: _Protocol = "vinyals",
    rotations: Rotations | None = None,
    size: int = 28,
    split_seed: int = 0,
    trained_on: ClassSplit | ProtocolCard | None = None,
    within_alphabet: bool = False,
) -> TaskDistribution:
    """Return few-shot tasks of handwritten characters, by one of the published protocols.

    Images are `(size, size, 1)` float32, ink 1 on 0, resized from 105×105 with a Lanczos filter, as in
    MAML's code, then rotated. They are decoded once and kept in the cache folder ($JAXMETA_CACHE, else
    the platform's); tensorflow-datasets is needed only to fill the cache.

    Default rotations: vinyals, additional classes in every part, including test; maml, one random
    rotation per class and episode in every part; reptile and lake, additional classes in training, none
    in validation and test.

    With `within_alphabet` all characters of an episode belong to one alphabet, drawn uniformly from those
    with enough characters, and support and queries are by different drawers, the same drawers for every
    character, as in Lake's 20-way runs. These tasks are harder: characters of one alphabet are similar, and
    the handwriting does not identify the character. With rotations="classes" each rotation of an alphabet
    is an additional alphabet.

    Args:
      split: "train", "validation" or "test".
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to evaluate on; five in Snell et al.
      data: folder with images_background.zip and images_evaluation.zip or the folders they unpack to,
        directly or in a folder `omniglot`; or a prepared array file. None: the cache, or a download if the
        cache is empty.
      protocol: published class split, see `omniglot_split`.
      rotations: rotations of the images, "none", "classes" or "random", see `from_arrays`; None: those of
        the protocol.
      size: side of the images in pixels.
      split_seed: seed of the random class splits "maml" and "reptile"; episodes depend only on the key.
      trained_on: class split or training card of the model to evaluate on these tasks, to check for leakage.
      within_alphabet: whether all characters of an episode belong to one alphabet, with different drawers
        for support and queries.

    Raises:
      ValueError: an unknown protocol, a part that the protocol does not have, damaged data, a model that
        was trained on classes to evaluate on, or no alphabet with enough characters.
      OSError: a path that does not exist, too little disk space, or no connection.

    Examples:
      >>> tasks = omniglot("test", ways=5, shots=1, data="../shared/data")  # doctest: +SKIP
      >>> tasks.card.classes  # 423 characters in four rotations  # doctest: +SKIP
      1692

    References:
      Lake, Salakhutdinov, Tenenbaum 2015, doi:10.1126/science.aab3050.
    """
    parts = omniglot_split(protocol, split_seed)
    by_part, sentence = _PROTOCOLS[protocol]
    which = ("train", "validation", "test").index(check_part(split))
    parts.part(split)
    check_count("size", size, 1, 105)
    if trained_on is not None:
        _split_of(trained_on, split_seed).assert_disjoint(ClassSplit(test=parts.part(split)))
    images = prepare(EDITION, int(size), None if data is None else Path(data).expanduser())
    return from_arrays(
        images.reshape(-1, size, size, 1),
        np.repeat(np.array(EDITION.names), DRAWERS),
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=parts,
        rotations=by_part[which] if rotations is None else rotations,
        name="omniglot",
        protocol=sentence
        + (f", seed {split_seed}" if protocol in ("maml", "reptile") else "")
        + (", within one alphabet, different drawers for support and query" if within_alphabet else ""),
        groups={name: name.split("/")[0] for name in EDITION.names} if within_alphabet else None,
        # The drawings of a character are stored by drawer.
        domains=np.tile(np.arange(1, DRAWERS + 1), len(EDITION.names)) if within_alphabet else None,
        across=within_alphabet,
    )


def _split_of(trained_on: ClassSplit | ProtocolCard, split_seed: int) -> ClassSplit:
    """Return the class split of a training card, identified by its hash."""
    if isinstance(trained_on, ClassSplit):
        return trained_on
    for protocol in _PROTOCOLS:
        candidate = omniglot_split(protocol, split_seed)
        if candidate.hash == trained_on.split_hash:
            return candidate
    raise ArgumentError(
        "trained_on",
        f"the card of {trained_on.tasks!r} tasks has split hash {trained_on.split_hash}, which does not "
        f"belong to any Omniglot protocol with split_seed={split_seed}; pass the ClassSplit that the model "
        "was trained with",
    )
