"""Predict: learn classes from folders of images, and name other images by them."""

import csv as csv_format
import io
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, some
from jaxmeta.cli import build, folders
from jaxmeta.cli.config import stored
from jaxmeta.cli.data import ImageSpec, images_of
from jaxmeta.cli.run import params_of
from jaxmeta.core import Batch, Learner, Params
from jaxmeta.files import write_json, write_text
from jaxmeta.tasks.images import UnreadableImage, class_files, decode, image_files, in_colour
from jaxmeta.tasks.splits import warn_of_case

# Grey levels by which an image's channels must differ for it to count as colour.
_COLOUR = 8


def predict(
    run: str,
    *,
    support: str,
    query: str,
    json: str | None = None,
    csv: str | None = None,
    invert: bool = False,
    skip_unreadable: bool = False,
    learner: str | None = None,
    network: str | None = None,
    tasks: str | None = None,
) -> list[dict[str, Any]]:
    """Learn classes from folders of images, and name other images by them.

    The answer for an image depends on the support set and on itself, never on what else is asked.

    Args:
      run: the folder of a run on images.
      support: images to learn from: a folder with one subfolder a class, named as it.
      query: images to name: a folder, with subfolders or without, or a single image.
      json: also write the answers here, with the probability of each class.
      csv: also write the answers here, as a table of file, class and probabilities.
      invert: turn dark to light in all images. Without it images of strokes are turned where the support
        set says so, since training images have light ink on dark.
      skip_unreadable: leave out images that cannot be read.
      learner: module:name of a method of your own that the run was trained with.
      network: module:name of a network of your own that the run was trained with.
      tasks: module:name of tasks of your own that the run was trained with.

    Returns:
      `{file, class, probabilities: {class: p}}` for each image, `file` relative to `query`.

    Raises:
      FileNotFoundError, NotADirectoryError: a folder that is not there.
      ValueError: a run that was not trained on images; classes or images that cannot be used; more
        classes than the learner can tell apart.
      FloatingPointError: learning from the support set diverged.
    """
    folder = Path(run).expanduser()
    config = stored(folder, [name for name in (learner, network, tasks) if name is not None])
    spec = images_of(config)
    if spec is None:
        raise ArgumentError(
            "run", f"{run} was trained on {config.tasks['name']}, which are no images; nothing to predict"
        )
    target, table = folders.output_file("json", json), folders.output_file("csv", csv)
    classes = class_files(Path(support).expanduser(), "support")
    warn_of_case("--support", classes)
    fixed = config.names().facts.head
    ways = config.tasks["train_ways"] if fixed else len(classes)
    if len(classes) < 2 or len(classes) > ways:
        method = config.learner["name"]
        can = f"{method} was trained with {ways} ways and tells 2 to {ways} apart"
        raise ArgumentError("support", f"got {len(classes)} classes; {can if fixed else f'{method} needs 2'}")
    asked, root = _query_files(Path(query).expanduser())

    examples = [file for files in classes.values() for file in files]
    shown, kept = _read(examples, spec, skip_unreadable, "support")
    slots = np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in classes.values()])[
        kept
    ]
    names = list(classes)
    if empty := sorted(set(range(len(names))) - set(slots.tolist())):
        raise ArgumentError("support", f"of the class {names[empty[0]]!r} no image can be read")
    questions, readable = _read(asked, spec, skip_unreadable, "query")
    files = [asked[index] for index in readable]

    invert = _inverted(spec, shown, invert)
    if invert:
        shown, questions = 1 - shown, 1 - questions
    _warn_of_misfits("--support", spec, shown, [str(examples[index]) for index in kept])
    _warn_of_misfits("--query", spec, questions, [str(file) for file in files])

    method = build.learner_of(config, config.names().facts.rows["inductive"])
    batch = Batch(jnp.asarray(shown), jnp.asarray(slots), None, ways)
    params = params_of(folder, config)
    outputs = np.asarray(_answer(method, len(names), params, batch, jnp.asarray(questions)))
    if not np.isfinite(outputs).all():
        raise FloatingPointError(f"learning from {support} diverged: the answers are not finite")
    answers: list[dict[str, Any]] = [
        {
            "file": file.relative_to(root).as_posix(),
            "class": names[int(np.argmax(row))],
            "probabilities": dict(zip(names, map(float, row), strict=True)),
        }
        for file, row in zip(files, outputs, strict=True)
    ]
    if target is not None:
        write_json(target, answers)
    if table is not None:
        write_text(table, _as_csv(answers))
    _print(answers)
    return answers


def _as_csv(answers: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    names = list(answers[0]["probabilities"])
    writer.writerow(["file", "class", *names])
    for answer in answers:
        writer.writerow([answer["file"], answer["class"], *(answer["probabilities"][name] for name in names)])
    return text.getvalue()


@partial(jax.jit, static_argnums=(0, 1))
def _answer(
    learner: Learner, classes: int, params: Params, support: Batch, questions: Float[Array, "n h w c"]
) -> Float[Array, "n classes"]:
    """Return probabilities of the first `classes` slots."""
    adapted = learner.adapt(params, support, jax.random.key(0))

    def one(x: Float[Array, "h w c"]) -> Float[Array, " classes"]:
        return jax.nn.softmax(learner.predict(params, adapted, x[None])[0, :classes])

    # One image at a time: in a batch the order of float32 sums, and with it the last digit of an
    # answer, could depend on what else is asked.
    return jax.lax.map(one, questions)


def _query_files(query: Path) -> tuple[list[Path], Path]:
    """Return the images to name, and the folder their names are relative to."""
    if query.is_file():
        return [query], query.parent
    if not query.exists():
        raise ArgumentError("query", f"there is no {query}")
    folders = [query, *sorted(folder for folder in query.rglob("*") if folder.is_dir())]
    visible = [
        folder
        for folder in folders
        if not any(part.startswith(".") for part in folder.relative_to(query).parts)
    ]
    files = [file for folder in visible for file in image_files(folder)]
    if not files:
        raise ArgumentError("query", f"there is no image in {query}")
    return files, query


def _read(
    files: Sequence[Path], spec: ImageSpec, skip: bool, name: str
) -> tuple[Float[np.ndarray, "n h w c"], list[int]]:
    """Return the images in [0, 1] as the network takes them, and which of the files they are."""
    images, kept, problems, coloured = [], [], [], []
    for index, file in enumerate(files):
        try:
            images.append(decode(file, str(file), channels=spec.channels, size=spec.size))
            # Files of greys are often stored in colour.
            if in_colour(file):
                colours = decode(file, str(file), channels=3, size=None).astype(np.int32)
                if np.ptp(colours, axis=-1).max() > _COLOUR:
                    coloured.append(file.name)
        except UnreadableImage as error:
            problems.append(str(error))
        else:
            kept.append(index)
    if problems and (not skip or not kept):
        raise ArgumentError(name, f"{some(problems)}; --skip-unreadable leaves such images out")
    if problems:
        warnings.warn(f"--{name}: left out {some(problems)}", stacklevel=3)
    if coloured and spec.channels == 1:
        warnings.warn(
            f"--{name}: {some(coloured)} in colour, and the training images are grey; turned to grey",
            stacklevel=3,
        )
    if spec.channels == 3 and not coloured:
        warnings.warn(f"--{name}: the images are grey, and the training images are in colour", stacklevel=3)
    return np.stack(images).astype(np.float32) / 255, kept


def _misfits(spec: ImageSpec, mean: float) -> bool:
    """Return whether images of this mean look more like the opposite of the training images."""
    # Of strokes the paper decides; other images must differ clearly, since bright ones are no negatives.
    margin = 0.0 if spec.ink else 0.25
    return abs(mean - spec.mean) - abs(1 - mean - spec.mean) > margin


def _inverted(spec: ImageSpec, shown: Float[np.ndarray, "n h w c"], asked_for: bool) -> bool:
    """Return whether to turn dark to light: as asked, else as the support set of an ink run says."""
    if asked_for:
        return True
    if spec.ink and _misfits(spec, float(shown.mean())):
        print("ink       dark on light in --support, light on dark in training: all images are inverted")
        return True
    return False


def _warn_of_misfits(
    what: str, spec: ImageSpec, images: Float[np.ndarray, "n h w c"], names: Sequence[str]
) -> None:
    misfits = [
        name for name, mean in zip(names, images.mean((1, 2, 3)), strict=True) if _misfits(spec, float(mean))
    ]
    if misfits:
        warnings.warn(
            f"{what}: dark and light seem exchanged, compared to the training images (mean {spec.mean:.2f}), "
            f"in {some(misfits)}; --invert turns them in all images",
            stacklevel=3,
        )


def _print(answers: Sequence[Mapping[str, Any]]) -> None:
    width = max(len(answer["file"]) for answer in answers)
    for answer in answers:
        share = answer["probabilities"][answer["class"]]
        print(f"{answer['file']:<{width}}  {answer['class']}  {100 * share:.1f} %")
    # Where the queries lie in folders named as the classes, the truth is known.
    folders = [answer["file"].rpartition("/")[0].rpartition("/")[2] for answer in answers]
    if all(folder in answer["probabilities"] for folder, answer in zip(folders, answers, strict=True)):
        right = sum(folder == answer["class"] for folder, answer in zip(folders, answers, strict=True))
        share = 100 * right / len(answers)
        print(f"{right} of {len(answers)} lie in the folder of the class they are named as ({share:.1f} %)")
