"""Emoji: pictures of about 1,600 things in the styles of several designers."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxmeta.checks import ArgumentError, check_count, check_kind, join_names
from jaxmeta.core import SplitName, TaskDistribution
from jaxmeta.tasks.class_vectors import class_vectors
from jaxmeta.tasks.emoji_packs import Pack, classes_of_packs, left_out_of, read_packs, render
from jaxmeta.tasks.prepared import ReadSummary, SplitImages, from_prepared, prepare
from jaxmeta.tasks.splits import FRACTIONS, PARTS, Classes, ClassSplit, check_part, class_split

# Largest side of the images in pixels.
_LARGEST = 1024
# Version of the rendering; increase it to render all packs again.
_RENDERING = 1


def emoji(
    split: SplitName = "train",
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 1,
    queries: int = 2,
    data: str | os.PathLike[str],
    size: int = 84,
    styles: tuple[str, ...] | None = None,
    test_styles: tuple[str, ...] | None = None,
    across: bool = False,
    min_styles: int = 3,
    classes: Classes = "auto",
    word_vectors: str | os.PathLike[str] | None = None,
    skip_small_classes: bool = True,
) -> TaskDistribution:
    """Return few-shot tasks of emoji, in which one thing is a class and one designer's set is a style.

    The sets are packs of Iconify, such as `iconify-json-noto-1.2.9.tgz` from `npm pack @iconify-json/noto`.
    A class is a name, such as "fire-engine", and has one picture in each pack that knows the name or an alias
    of it (see `classes_of_packs` in the source for packs that differ). Variants of skin tone, flags of
    countries, keycaps, letters and hidden icons are left out. Images are `(size, size, 3)` float32 in [0, 1],
    rendered over white once and kept in the cache.

    A class belongs to a part by a hash of its name: to "train" with probability 0.64, "validation" 0.16,
    "test" 0.2. It keeps its part when packs are added or left out, as long as its name is the same.

    Style is the domain: with `across` the support set and the queries are in different styles, and
    `test_styles` are used in testing only (see `from_arrays`).

    With `shots=0` the tasks are zero-shot: the support set has one vector per class, from a table of word
    vectors (see `class_vectors`).

    Args:
      split: "train", "validation" or "test".
      ways: classes per task, or an inclusive range (low, high) to draw their number from.
      shots: examples per class to learn from, or an inclusive range (low, high) to draw their number from; 0
        with `word_vectors`.
      queries: examples per class to evaluate on.
      data: folder with the packs, directly or in a folder `emoji`: archives `*.tgz`, folders with icons.json,
        or files NAME.json.
      size: side of the images in pixels.
      styles: packs to use, such as noto,openmoji; None: all.
      test_styles: packs held out for test: training and validation use the others only, testing uses these
        only; with `across`, the queries of test tasks are from these packs and the support sets from the
        others.
      across: whether support and queries of a class are from different styles.
      min_styles: smallest number of packs that must have a class.
      classes: class split: the fractions of train, validation and test for a random split, or the path of a
        JSON file `{"train": [names], "validation": [names], "test": [names]}`; in Python also such a mapping
        or a `ClassSplit`. "auto": by a hash of the names. None: every part draws from all classes.
      word_vectors: text file of word vectors (GloVe, word2vec, fastText) for zero-shot tasks; classes whose
        words it lacks are left out.
      skip_small_classes: whether to skip, with a warning, classes with fewer than shots + queries images,
        after the classes are split.

    Raises:
      FileNotFoundError: `data` is not a folder, or has no packs.
      ValueError: a damaged pack, or one whose pictures cannot be rendered; an unknown style; too few styles
        for `across`, `min_styles` or the episodes; or see `from_arrays`.
      ImportError: resvg-py is not installed.

    Examples:
      >>> tasks = emoji("test", data="../shared/data", across=True)  # doctest: +SKIP
      >>> tasks.sample(jax.random.key(0)).support.x.shape  # doctest: +SKIP
      (5, 84, 84, 3)

    References:
      Iconify, https://iconify.design; the licence of each pack is in `emoji_licences`.
    """
    check_part(split)
    prepared, parts, protocol = emoji_images(
        data,
        size=size,
        styles=styles,
        test_styles=test_styles,
        min_styles=min_styles,
        classes=classes,
        word_vectors=word_vectors,
    )
    metadata = emoji_vectors(word_vectors, prepared.classes) if shots == 0 else None
    return from_prepared(
        prepared,
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=parts,
        protocol=protocol,
        across=across,
        test_domains=test_styles,
        metadata=metadata,
        skip_small_classes=skip_small_classes,
    )


def emoji_licences(data: str | os.PathLike[str]) -> dict[str, str]:
    """Return the licence and author of each pack of a folder, by the pack's name.

    Args:
      data: see `emoji`.

    Raises:
      FileNotFoundError, ValueError: see `emoji`.

    Examples:
      >>> emoji_licences("../shared/data")["noto"]  # doctest: +SKIP
      'Apache 2.0, Google Inc'
    """
    return {name: pack.licence for name, pack in read_packs(Path(data).expanduser()).items()}


def emoji_vectors(
    word_vectors: str | os.PathLike[str] | None, names: tuple[str, ...]
) -> Mapping[str, Float[np.ndarray, " d"]]:
    """Return the word vectors of classes; see `class_vectors`."""
    if word_vectors is None:
        raise ArgumentError("word_vectors", "zero-shot tasks (shots=0) need a file of word vectors")
    return class_vectors(word_vectors, names, "word_vectors")


def emoji_images(
    data: str | os.PathLike[str],
    *,
    size: int,
    styles: tuple[str, ...] | None,
    test_styles: tuple[str, ...] | None,
    min_styles: int,
    classes: Classes,
    word_vectors: str | os.PathLike[str] | None,
) -> SplitImages:
    """Return the images, class split and protocol of `emoji`."""
    check_count("size", size, 1, _LARGEST)
    check_count("min_styles", min_styles)
    packs = read_packs(Path(data).expanduser())
    chosen = _chosen("styles", styles, tuple(packs))
    if test_styles is not None:
        _chosen("test_styles", test_styles, chosen)
    if min_styles > len(chosen):
        raise ArgumentError(
            "min_styles", f"got {min_styles}; it must be at most the number of styles, {len(chosen)}"
        )
    # The names come from all packs, so that a class has the same name and part whichever styles are chosen.
    pictures = {
        name: by_pack
        for name, all_packs in classes_of_packs(list(packs.values())).items()
        if len(by_pack := {pack: all_packs[pack] for pack in chosen if pack in all_packs}) >= min_styles
    }
    if word_vectors is not None:
        known = emoji_vectors(word_vectors, tuple(pictures))
        pictures = {name: by_pack for name, by_pack in pictures.items() if name in known}
    if not pictures:
        raise ArgumentError("styles", f"{join_names(chosen, 20)} share no classes; use others, or fewer")
    prepared = prepare(
        "emoji",
        _fingerprint(packs, pictures),
        (int(size), int(size), 3),
        _rendered(packs, pictures, int(size)),
        expected=sum(map(len, pictures.values())),
    )
    used = [packs[name] for name in chosen]
    licences = "; ".join(f"{pack.name}: {pack.licence}" for pack in used)
    prepared = dataclasses.replace(
        prepared,
        domains=tuple(pack for by_pack in pictures.values() for pack in by_pack),
        summary=ReadSummary(
            f"their names in {len(used)} packs ({licences})",
            len(prepared),
            len(prepared.classes),
            left_out_of(used),
        ),
    )
    protocol = f"emoji in {len(used)} styles ({licences})"
    split = class_split(classes)
    if split == "auto":
        split = split_by_hash(prepared.classes)
        protocol += ", classes split by a hash of their names"
    elif isinstance(split, tuple):
        protocol += f", random class split {split}"
    return SplitImages(prepared, split, protocol)


def split_by_hash(names: tuple[str, ...]) -> ClassSplit:
    """Return a class split in which the part of a class depends on its name only.

    The first 8 bytes of SHA-256 of the name, as a fraction of 2⁶⁴, are compared to the default fractions of
    train and validation.

    Examples:
      >>> split_by_hash(("cat", "dog", "owl", "fox", "bee"))
      ClassSplit(train=('cat', 'owl', 'fox', 'bee'), validation=(), test=('dog',))
    """
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name in names:
        fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        index = [fraction < FRACTIONS[0], fraction < FRACTIONS[0] + FRACTIONS[1], True].index(True)
        parts[PARTS[index]].append(name)
    return ClassSplit(**{part: tuple(members) for part, members in parts.items()})


def _chosen(argument: str, styles: tuple[str, ...] | None, present: tuple[str, ...]) -> tuple[str, ...]:
    """Return the chosen styles in the order of the packs."""
    if styles is None:
        return present
    check_kind(argument, styles, tuple | list, "a tuple of names of packs")
    unknown = [str(name) for name in styles if name not in present]
    if unknown or not styles:
        raise ArgumentError(
            argument,
            f"got {join_names(map(repr, unknown)) or 'no names'}; the packs are "
            f"{join_names(map(repr, present), 20)}",
        )
    if argument == "test_styles" and set(styles) == set(present):
        raise ArgumentError(argument, "got all styles; training needs another one")
    return tuple(name for name in present if name in styles)


def _fingerprint(packs: Mapping[str, Pack], pictures: Mapping[str, Mapping[str, str]]) -> str:
    digest = hashlib.sha256(f"{_RENDERING}".encode())
    for name, by_pack in pictures.items():
        for pack, picture in by_pack.items():
            digest.update(f"\n{name},{pack},{packs[pack].pictures[picture]}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _rendered(
    packs: Mapping[str, Pack], pictures: Mapping[str, Mapping[str, str]], size: int
) -> Iterator[tuple[str, np.ndarray]]:
    for name, by_pack in pictures.items():
        for pack, picture in by_pack.items():
            yield name, render(pack, picture, packs[pack].pictures[picture], size)
