"""Vectors of classes from tables of word vectors, the class metadata of zero-shot tasks."""

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxmeta.checks import ArgumentError, MissingFileError, join_names


def class_words(name: str) -> tuple[str, ...]:
    """Return the words of a class name in lower case.

    Words are separated by anything but letters and digits.

    Args:
      name: name of a class.

    Examples:
      >>> class_words("red-haired-woman"), class_words("Golden Retriever"), class_words("flag_2")
      (('red', 'haired', 'woman'), ('golden', 'retriever'), ('flag', '2'))
    """
    return tuple(word for word in re.split(r"[\W_]+", name.lower()) if word)


def class_vectors(
    path: str | os.PathLike[str], names: Iterable[str], argument: str = "path"
) -> dict[str, Float[np.ndarray, " d"]]:
    """Return a vector of each class from a table of word vectors, for zero-shot tasks.

    The vector of a class is that of its whole name ("hot-dog", "hot_dog" or "hotdog") where the table has it,
    else the mean of the vectors of its words that the table has. Words are compared in lower case; where a
    table has several spellings, the lower-case one counts. Classes of which no word is known are left out,
    with a warning.

    Args:
      path: text file of GloVe, word2vec or fastText: a word and its vector in each line, separated by spaces;
        a first line with the numbers of words and dimensions is skipped.
      names: names of the classes.
      argument: name of the caller's argument, for the messages.

    Returns:
      Vectors `(d,)`, float32, by class name.

    Raises:
      FileNotFoundError: `path` is not a file.
      ValueError: a needed line is not a vector of numbers, vectors differ in length, or no class is known.

    Examples:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/vectors.txt"
      >>> _ = Path(path).write_text("fire 1 0\\nengine 0 1\\nhot-dog 2 2\\n")
      >>> {name: v.tolist() for name, v in class_vectors(path, ["fire-engine", "hot-dog"]).items()}
      {'fire-engine': [0.5, 0.5], 'hot-dog': [2.0, 2.0]}
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingFileError(argument, f"{file} is not a file; it must be a text file of word vectors")
    names = list(names)
    words = {name: class_words(name) for name in names}
    whole = {name: [separator.join(words[name]) for separator in ("-", "_", "")] for name in names}
    needed = {word for name in names for word in (*words[name], *whole[name])}
    table = _read(file, needed, argument)
    vectors: dict[str, np.ndarray] = {}
    unknown: list[str] = []
    for name in names:
        vector = next((table[word] for word in whole[name] if word in table), None)
        known = [table[word] for word in words[name] if word in table]
        if vector is None and not known:
            unknown.append(name)
        else:
            vectors[name] = np.asarray(np.mean(known, 0), np.float32) if vector is None else vector
    if not vectors:
        raise ArgumentError(
            argument, f"{file} has none of the words of {len(names)} classes: {join_names(map(repr, names))}"
        )
    if unknown:
        warnings.warn(
            f"{file} has no word of {len(unknown)} of {len(names)} classes, which are left out: "
            + join_names(unknown),
            stacklevel=2,
        )
    return vectors


def _read(file: Path, needed: set[str], argument: str) -> dict[str, Float[np.ndarray, " d"]]:
    """Return the vectors of the needed words, by the word in lower case."""
    table: dict[str, np.ndarray] = {}
    exact: set[str] = set()
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            word, _, rest = line.rstrip().partition(" ")
            key = word.lower()
            if key not in needed or key in exact or (key in table and word != key):
                continue
            fields = rest.split()
            if number == 1 and len(fields) == 1 and word.isdigit() and fields[0].isdigit():
                continue  # the header of word2vec
            try:
                vector = np.array(fields, np.float32)
            except ValueError:
                vector = np.zeros(0, np.float32)
            if not vector.size or not np.isfinite(vector).all():
                raise ArgumentError(
                    argument,
                    f"line {number} of {file} must hold a word and finite numbers, separated by spaces; it "
                    f"starts with {line[:40].rstrip()!r}",
                )
            first = next(iter(table.values()), vector)
            if vector.shape != first.shape:
                raise ArgumentError(
                    argument,
                    f"line {number} of {file} has {vector.size} numbers, earlier lines {first.size}",
                )
            table[key] = vector
            if word == key:
                exact.add(key)
    return table
