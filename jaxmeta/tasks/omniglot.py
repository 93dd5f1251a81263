"""Omniglot (Lake et al. 2015): 1623 handwritten characters, 20 drawings each, in every published split."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from jaxmeta.checks import LARGEST_SEED, ArgumentError, check_count, check_word
from jaxmeta.core import ProtocolCard, Rotations, SplitName, TaskDistribution
from jaxmeta.tasks.archives import DRAWERS, Edition, prepare
from jaxmeta.tasks.episodes import from_arrays
from jaxmeta.tasks.splits import ClassSplit, check_part

# Number of characters of every alphabet.
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

# Default rotations of train, validation and test, and what the protocol card says.
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
    """The class split of a published Omniglot protocol; names are "Alphabet/characterNN".

    | protocol | train/validation/test | which |
    | --- | --- | --- |
    | vinyals | 1028/172/423 | all background and the first 236 evaluation characters, of which five whole \
background alphabets validate; the other evaluation characters test |
    | vinyals-trainval | 1200/0/423 | the same, trained on train and validation together |
    | maml | 1100/100/423 | random, by `split_seed` |
    | reptile | 1200/0/423 | random, by `split_seed` |
    | lake | 964/0/659 | background trains, evaluation tests |
    | lake-validation | 792/172/659 | the same, vinyals' validation alphabets held out of training |

    Leakage: Lake's evaluation alphabets, and with them the official 20 one-shot runs, may only judge
    models trained by "lake" or "lake-validation". Vinyals' training set contains Atlantean, Ge_ez,
    Glagolitic and most of Gurmukhi. `ClassSplit.assert_disjoint` and the argument `trained_on` of
    `omniglot` refuse such a comparison.

    Raises:
      ValueError: another protocol.

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
    """Few-shot tasks of handwritten characters, by one of the published protocols.

    Images are `(size, size, 1)` float32, ink = 1 on 0, resized from 105×105 by Lanczos' filter, as in
    MAML's code, then turned. They are decoded once and kept in the cache folder ($JAXMETA_CACHE, else
    the platform's); a file found there is enough without tensorflow-datasets.

    Rotations by default: vinyals, as extra classes in every part, also at test; maml, one random
    rotation per drawn class in every part; reptile and lake, extra classes in training, none at
    validation and test.

    With `within_alphabet` an episode has characters of one alphabet only, drawn uniformly from those
    with enough, and its queries are by other drawers than its support set, the same of every character,
    as in Lake's 20-way runs. That is harder: letters of one alphabet look alike, and the hand does not
    give the answer away. Turned alphabets are alphabets of their own where turned characters are classes.

    Args:
      split: "train", "validation" or "test".
      ways: classes of a task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from.
      queries: examples per class to be judged on; five in Snell et al.
      data: a folder with images_background.zip and images_evaluation.zip, or with the folders they unpack to
        (or whose folder `omniglot` has them), or a prepared array file; None for the cache, and a download
        where it is empty.
      protocol: published class split, see `omniglot_split`.
      rotations: how images are turned: "none", "classes" or "random", see `from_arrays`; None for the
        protocol's own.
      size: side of the images in pixels.
      split_seed: seed of the random class splits "maml" and "reptile"; episodes depend on the key alone.
      trained_on: split, or training card, of the model to be judged on these tasks.
      within_alphabet: whether the characters of an episode are of one alphabet, and support and queries
        by different drawers.

    Raises:
      ValueError: an unknown protocol, a part that the protocol does not have, corrupted data, a model
        that has seen classes it is to be judged on; no alphabet with enough characters.
      OSError: a path that does not exist, too little disk, no connection.

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
        paired=within_alphabet,
    )


def _split_of(trained_on: ClassSplit | ProtocolCard, split_seed: int) -> ClassSplit:
    """The class names a training card stands for, found by its hash."""
    if isinstance(trained_on, ClassSplit):
        return trained_on
    for protocol in _PROTOCOLS:
        candidate = omniglot_split(protocol, split_seed)
        if candidate.hash == trained_on.split_hash:
            return candidate
    raise ArgumentError(
        "trained_on",
        f"the card of {trained_on.tasks!r} tasks has split hash {trained_on.split_hash}, which "
        f"is no Omniglot protocol's (with split_seed={split_seed}); give the ClassSplit the model was "
        "trained with",
    )
