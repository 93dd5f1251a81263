"""Classification of images by a source: `jaxmeta predict`."""

import csv as csv_format
import io
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmeta.checks import ArgumentError, check_number, join_names
from jaxmeta.cli import folders
from jaxmeta.cli.classifier import Classifier, load_classifier, print_inverted
from jaxmeta.cli.figures import plot_confusion
from jaxmeta.cli.own_images import read_images, warn_of_negatives
from jaxmeta.cli.parser import print_table
from jaxmeta.cli.report import plural
from jaxmeta.declare import forwards
from jaxmeta.files import write_json, write_text
from jaxmeta.tasks.images import image_files, subfolders
from jaxmeta.transfer import confusion_matrix

UNKNOWN = "unknown"


@forwards(load_classifier)
def predict(
    source: str,
    *,
    query: str,
    json: str | None = None,
    csv: str | None = None,
    confusion: str | None = None,
    unknown_above: float | None = None,
    skip_unreadable: bool = False,
    **reading: Any,
) -> list[dict[str, Any]]:
    """Classify images by a source's classes, or by classes with a folder of examples.

    The prediction for an image depends on the classifier and on the image alone, not on the other images.

    Args:
      source: folder of `train`, which needs --support; folder of `transfer` or `export`; .safetensors or
        .msgpack file; folder of Hugging Face's save_pretrained, or hf:owner/name. With --support, a transfer
        and the last three classify by the head that --learner names, by default the nearest class mean of
        features normalised to length 1.
      query: images to classify: a folder, with or without subfolders, or a single image.
      json: file to write the predictions to, with the probability of each class.
      csv: file to write the predictions to, as a table of file, class and probabilities.
      confusion: PNG file to draw the confusion matrix to, where the images lie in folders named after
        the classes.
      unknown_above: distance to the nearest class above which an image is called unknown, for methods that
        measure distances. It has no natural scale: look at the distances of known images first.
      skip_unreadable: whether to leave out images that cannot be read.
      **reading: settings of `jm.load_classifier`.

    Returns:
      `{file, class, probabilities: {class: p}}` for each image, `file` relative to `query`; and `distance` to
      the nearest class where the method measures distances.

    Raises:
      FileNotFoundError, NotADirectoryError: a folder does not exist.
      ValueError: the source, the classes or the images cannot be used, or there are more classes than the
        learner can distinguish.
      FloatingPointError: the scores are not finite, for example after a diverging adaptation.
    """
    target, table = folders.output_file("json", json), folders.output_file("csv", csv)
    picture = folders.output_file("confusion", confusion)
    outputs = [path for path in (target, table, picture) if path is not None]
    if len(set(outputs)) < len(outputs):
        raise ArgumentError("json, csv, confusion", "two of them name the same file; give each its own")
    if unknown_above is not None:
        check_number("unknown_above", unknown_above, 0)
    started = time.perf_counter()
    candidates, root = _query_files(Path(query).expanduser())
    with warnings.catch_warnings(record=True) as warned:
        classifier = load_classifier(source, skip_unreadable=skip_unreadable, **reading)
    print_inverted(classifier, bool(reading.get("invert")))
    if unknown_above is not None and UNKNOWN in classifier.classes:
        raise ArgumentError(
            "unknown_above",
            f"a class is called {UNKNOWN}, the name for images far from all classes; rename the class",
        )
    if unknown_above is not None and not classifier.measures:
        raise ArgumentError(
            "unknown_above",
            f"{source} measures no distances; prototypical, simple_shot and weights with --support do",
        )
    queries, readable = read_images(candidates, classifier.images, skip_unreadable, "query")
    files = [candidates[index] for index in readable]
    names = [file.relative_to(root).as_posix() for file in files]
    truth = _truth(names, classifier.classes)
    if picture is not None and truth is None:
        raise ArgumentError(
            "confusion",
            f"the images in {query} do not lie in folders named after the classes; leave it out",
        )
    # Warnings come after the last check, so that a usage error is the only line on standard error.
    for warning in warned:
        warnings.warn(str(warning.message), stacklevel=2)
    seen = 1 - queries if classifier.inverted else queries
    warn_of_negatives("query", classifier.images, seen, [str(file) for file in files])
    probabilities, distances = classifier.with_distances(queries)
    predictions: list[dict[str, Any]] = [
        {
            "file": name,
            "class": classifier.classes[int(np.argmax(row))],
            "probabilities": dict(zip(classifier.classes, map(float, row), strict=True)),
        }
        for name, row in zip(names, probabilities, strict=True)
    ]
    if distances is not None:
        for prediction, distance in zip(predictions, distances, strict=True):
            prediction["distance"] = float(distance)
            if unknown_above is not None and distance > unknown_above:
                prediction["class"] = UNKNOWN
    results = folders.Results()
    if target is not None:
        with results.writing(target):
            write_json(target, predictions)
    if table is not None:
        with results.writing(table):
            write_text(table, _as_csv(predictions))
    if picture is not None and truth is not None:
        classes = [*classifier.classes, *([UNKNOWN] if unknown_above is not None else [])]
        number = {name: index for index, name in enumerate(classes)}
        predicted = np.array([number[prediction["class"]] for prediction in predictions])
        matrix = confusion_matrix(predicted, np.array([number[name] for name in truth]), len(classes))
        with folders.tolerated(picture) as path:
            plot_confusion(path, matrix, classes, f"{query} by {source}")
    _print(predictions, truth)
    if truth is not None:
        _print_classes(predictions, truth)
    elif any("/" in prediction["file"] for prediction in predictions):
        known = join_names(classifier.classes)
        print(f"no accuracy: the folders of {query} are not all named after the classes ({known})")
    print(_time(classifier, len(files), time.perf_counter() - started))
    results.check()
    return predictions


def _time(classifier: Classifier, images: int, seconds: float) -> str:
    """Return the line on the time that the images took, and on features from the cache."""
    line = f"{plural(images, 'image')} in {seconds:.1f} s"
    if classifier.embed is None:
        return line
    cached = classifier.embed.seen - classifier.embed.computed
    return f"{line}; features of {cached} of {classifier.embed.seen} images from the cache"


def _as_csv(predictions: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    names = list(predictions[0]["probabilities"])
    # The header does not tell whether there are distances: a class may be called "distance".
    distance = ["distance"] if "distance" in predictions[0] else []
    writer.writerow(["file", "class", *distance, *names])
    for prediction in predictions:
        row = [prediction["file"], prediction["class"], *(prediction[name] for name in distance)]
        writer.writerow([*row, *(prediction["probabilities"][name] for name in names)])
    return text.getvalue()


def _query_files(query: Path) -> tuple[list[Path], Path]:
    """Return the images to classify, and the folder that their names are relative to."""
    if query.is_file():
        return [query], query.parent
    if not query.exists():
        raise ArgumentError("query", f"{query} does not exist")
    files = [file for folder in _folders_below(query) for file in image_files(folder)]
    if not files:
        raise ArgumentError("query", f"{query} contains no images")
    return files, query


def _folders_below(folder: Path) -> list[Path]:
    """Return a folder and all its subfolders, without links that lead back into it."""
    found, pending, seen = [], [folder], set()
    while pending:
        each = pending.pop(0)
        if each.resolve() not in seen:
            seen.add(each.resolve())
            found.append(each)
            pending += subfolders(each)
    return sorted(found)


def _truth(files: Sequence[str], classes: Sequence[str]) -> list[str] | None:
    """Return the class of each image by its folder; None where a folder is not named after a class."""
    folder_names = [file.rpartition("/")[0].rpartition("/")[2] for file in files]
    return folder_names if set(folder_names) <= set(classes) else None


def _print(predictions: Sequence[Mapping[str, Any]], truth: Sequence[str] | None) -> None:
    width = max(len(prediction["file"]) for prediction in predictions)
    true_classes: Sequence[str | None] = truth or [None] * len(predictions)
    for prediction, true_class in zip(predictions, true_classes, strict=True):
        probability = max(prediction["probabilities"].values())
        distance = f"  distance {prediction['distance']:.4g}" if "distance" in prediction else ""
        wrong = "  ← wrong" if true_class is not None and prediction["class"] != true_class else ""
        percent = f"{100 * probability:.1f} %"
        print(f"{prediction['file']:<{width}}  {prediction['class']}  {percent}{distance}{wrong}")


def _print_classes(predictions: Sequence[Mapping[str, Any]], truth: Sequence[str]) -> None:
    """Print the recall of each class, and the accuracy."""
    rows = [("class", "right", "of", "recall")]
    for name in dict.fromkeys(truth):
        predicted = [
            prediction["class"]
            for prediction, true_class in zip(predictions, truth, strict=True)
            if true_class == name
        ]
        right = predicted.count(name)
        rows.append((name, str(right), str(len(predicted)), f"{100 * right / len(predicted):.1f} %"))
    print()
    print_table(rows)
    right = sum(
        prediction["class"] == true_class for prediction, true_class in zip(predictions, truth, strict=True)
    )
    share = 100 * right / len(predictions)
    print(f"{right} of {len(predictions)} predictions are the class of the image's folder ({share:.1f} %)")
