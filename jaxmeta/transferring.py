"""What `jaxmeta transfer` and `jaxmeta rank` do: learn labelled images from what was learned elsewhere."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmeta.bodies import COMMAND, NONE, PIXELS, WEIGHTS, Body, load_body, untrained, with_width
from jaxmeta.config import file_name, json_target
from jaxmeta.core import Batch, Key
from jaxmeta.nn.stateful import Variables
from jaxmeta.recipes import RECIPES, Learnable, check_settings, fit, learnable, settings_of, trained
from jaxmeta.targets import Shots, Target, read_target, split_shots
from jaxmeta.training.figures import plot_confusion
from jaxmeta.training.report import write_json, write_text
from jaxmeta.transfer import (
    confusion_matrix,
    extract_features,
    feature_extraction,
    predict_logits,
    rank_sources,
    save_pretrained,
)
from jaxmeta.transfer.classifier import BODY, HEAD
from jaxmeta.transfer.ranking import SCORES, Candidate, Ranking
from jaxmeta.transfer.subtree import Report, leaves_by_path

_WORST = 5
# Fine-tuning of `rank` is brief.
_RANKED_STEPS = 100
# Of the standard normal distribution, for 95 %.
_Z = 1.959964


def transfer_run(source: str, target: str, flags: Mapping[str, Any]) -> Path:
    """Learns a target from what a source has learned, and reports how well.

    Args:
      source: a folder or file with a body; "none" for a network of --network with nothing learned.
      target: a source of labelled images, as of `train --tasks`.
      flags: those given of the command line's, by name.

    Returns:
      The transfer's folder.

    Raises:
      FileNotFoundError, ValueError: the user's input is at fault.
      FloatingPointError: learning diverged.
    """
    started = time.perf_counter()
    recipe = flags.get("recipe", "scratch" if source == NONE else "lp-ft")
    check_settings(recipe, flags)
    if source == NONE and recipe != "scratch":
        raise ValueError(f"--recipe: got {recipe}; with --source {NONE} there is only scratch")
    seed = flags.get("seed", 0)
    key, out = jax.random.key(seed), _new_folder(flags.get("out"), source, target)
    body = _body(source, "--source", flags)
    if recipe == "scratch":
        body = dataclasses.replace(body, variables=None)
    images, shots = _images(body, target, flags, key)
    learn, score = images.batch(shots.learn), images.batch(shots.score)
    start = _start(body, images, learn, flags, key)
    settings = settings_of(recipe, body, start, len(shots.learn), flags)
    report = {
        "source": source,
        "target": target,
        "recipe": recipe,
        **settings,
        "seed": seed,
        "about": {"source": body.about, "target": images.protocol, "recipe": RECIPES[recipe].description},
        "classes": len(images.classes),
        "shots": shots.said,
        "learned_from": len(shots.learn),
        "scored": len(shots.score),
        "images": start.form._asdict(),
        "pixels": str(body.pixels),
        "inverted": start.inverted,
        "statistics": start.statistics,
        "parameters": _counted(start, settings),
    }
    _announce(report, out)

    fitted = fit(recipe, start, learn, settings, jax.random.fold_in(key, 2), _progress(settings.get("steps")))
    predictions = _predictions(start, fitted.variables, score)
    confusion = confusion_matrix(predictions, score.y, len(images.classes))
    recalls = np.diag(confusion) / confusion.sum(1)
    report["accuracy"] = wilson(int(np.trace(confusion)), len(score.y))
    if body.variables is not None and "steps" in settings:
        # What training is measured by, of LP-FT its very start.
        probe = fitted.probe or feature_extraction(start.model, start.variables, learn)
        right = _predictions(start, probe, score) == score.y
        report["probe_accuracy"] = wilson(int(right.sum()), len(score.y))
    report |= {
        "recalls": dict(zip(images.classes, map(float, recalls), strict=True)),
        "losses": [round(float(loss), 6) for loss in fitted.losses],
        "leaves": {group: len(rows) for group, rows in _groups(start.leaves).items()},
        "wall_s": round(time.perf_counter() - started, 3),
        "device": jax.local_devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jaxmeta", "jax")},
    }

    out.mkdir(parents=True, exist_ok=True)
    network = with_width(body.network, len(images.classes))
    save_pretrained(out / WEIGHTS, _whole(fitted.variables), network=network, overwrite=True)
    plot_confusion(out / "confusion.png", confusion, images.classes, f"{recipe} from {source} to {target}")
    config = {
        "jaxmeta": version("jaxmeta"),
        "command": COMMAND,
        "source": source,
        "target": target,
        "recipe": recipe,
        "seed": seed,
        **flags,
        **settings,
        "images": start.form._asdict(),
        "pixels": body.pixels,
        "classes": images.classes,
    }
    write_json(out / "config.json", config)
    write_text(out / "report.md", transfer_markdown(report, start.leaves))
    write_json(out / "report.json", report)
    print(f"accuracy          {_shown(report['accuracy'])}")
    if "probe_accuracy" in report:
        print(f"  linear probe    {_shown(report['probe_accuracy'])}, the body as it was")
    print(f"{report['wall_s']:.0f} s in all")
    print(f"folder: {out}  (report.md, confusion.png)")
    return out


def rank_run(
    source_names: Sequence[str], target: str, score: str, fine_tune: bool, flags: Mapping[str, Any]
) -> Ranking:
    """Ranks sources by how well they promise to transfer to a target, and prints the table.

    Args:
      source_names: as of `transfer_run`.
      target: likewise.
      score: one of `SCORES`, by which to order.
      fine_tune: whether to fine-tune each of them, to see which score would have told.
      flags: those given of the command line's, by name.

    Raises:
      FileNotFoundError, ValueError: the user's input is at fault.
      FloatingPointError: fine-tuning diverged.
    """
    for field in ("steps", "rate", "batch"):
        if field in flags and not fine_tune:
            raise ValueError(f"--{field}: is of --fine-tune; add it, or leave this out")
    check_settings("lp-ft", flags)
    if len(set(source_names)) < max(2, len(source_names)):
        raise ValueError(f"--sources: got {' '.join(source_names)}; there must be two or more, each once")
    to = json_target(flags.get("json"))
    key = jax.random.key(flags.get("seed", 0))
    bodies = {name: _body(name, "--sources", flags) for name in source_names}
    without = [name for name, body in bodies.items() if body.head is None]
    if score in ("leep", "nce") and without:
        raise ValueError(f"--score: {score} needs a head of the source's own classes; {without[0]} has none")
    candidates, accuracies, widths = {}, {}, []
    for name, body in bodies.items():
        images, shots = _images(body, target, flags, key)
        learn, judged = images.batch(shots.learn), images.batch(shots.score)
        start = _start(body, images, learn, flags, key)
        features = extract_features(start.model, start.variables, learn.x, batch=start.at_once)
        widths.append(features.shape[1])
        candidates[name] = Candidate(features, _source_probs(body, features))
        if fine_tune:
            settings = settings_of("lp-ft", body, start, len(shots.learn), {"steps": _RANKED_STEPS, **flags})
            print(f"fine-tuning {name} …", flush=True)
            fitted = fit("lp-ft", start, learn, settings, jax.random.fold_in(key, 2))
            accuracies[name] = float((_predictions(start, fitted.variables, judged) == judged.y).mean())
    # Any features of so many dimensions would separate so few examples.
    shrinkage = "ledoit-wolf" if max(widths) >= len(learn.y) - 1 else None
    ranking = rank_sources(
        candidates, (None, learn.y), score=score, shrinkage=shrinkage, accuracies=accuracies or None
    )
    print(f"target    {target}: {len(images.classes)} classes, {shots.said}; {images.protocol}")
    print(f"by        {score}" + (f"; h_score with {shrinkage} shrinkage" if shrinkage else ""))
    print(ranking)
    if to is not None:
        write_json(to, _as_json(ranking, target, shots, shrinkage))
    return ranking


# --- Source and target ---------------------------------------------------------------------------


def _body(source: str, flag: str, flags: Mapping[str, Any]) -> Body:
    name, size = flags.get("network"), flags.get("image_size")
    if source == NONE:
        if flag != "--source":
            raise ValueError(f"{flag}: got {NONE}, which has nothing to transfer")
        if name is None:
            raise ValueError(f"--network: --source {NONE} needs one, such as conv4")
        body = untrained(name)
    else:
        body = load_body(source, network=name, image_size=size, flag=flag)
    return dataclasses.replace(body, pixels=PIXELS[flags["pixels"]]) if "pixels" in flags else body


def _images(body: Body, target: str, flags: Mapping[str, Any], key: Key) -> tuple[Target, Shots]:
    """The target's images, read as the body takes them where they can be."""
    size, channels, shots = flags.get("image_size", body.size), flags.get("channels"), flags.get("shots")
    if size is not None:
        channels = body.channels(size, channels)
    images = read_target(target, flags, shots, jax.random.fold_in(key, 3), size=size, channels=channels)
    return images, split_shots(images, shots, jax.random.fold_in(key, 0))


def _start(body: Body, images: Target, learn: Batch, flags: Mapping[str, Any], key: Key) -> Learnable:
    form = {"size": flags.get("image_size"), "channels": flags.get("channels")}
    return learnable(body, images, learn, **form, key=jax.random.fold_in(key, 1))


def _source_probs(body: Body, features: jax.Array) -> jax.Array | None:
    if body.head is None:
        return None
    return jax.nn.softmax(features @ body.head["kernel"] + body.head["bias"][None])


def _new_folder(given: str | None, source: str, target: str) -> Path:
    moment = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    name = re.sub(r"[^\w.-]+", "-", Path(source).name).strip("-.") or "here"
    default = f"runs/transfer-{name}-{file_name(target)}-{moment}"
    folder = Path(default if given is None else given).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"--out: {folder} exists and is not empty; choose another")
    return folder


# --- What comes out ------------------------------------------------------------------------------


def wilson(right: int, n: int) -> dict[str, float]:
    """A part of `n` independent examples, and Wilson's interval of 95 % around it.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), which, unlike the normal approximation, stays in [0, 1]
    and is no point where all are right.

    Returns:
      "mean", "low" and "high", and "ci95", half of the interval's width.

    Examples:
      >>> {name: round(value, 4) for name, value in wilson(10, 10).items()}
      {'mean': 1.0, 'low': 0.7225, 'high': 1.0, 'ci95': 0.1388}

    References:
      Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    p, unit = right / n, _Z**2 / n
    centre = p + unit / 2
    half = _Z * math.sqrt(p * (1 - p) / n + unit / (4 * n))
    low, high = (centre - half) / (1 + unit), (centre + half) / (1 + unit)
    return {"mean": p, "low": low, "high": high, "ci95": (high - low) / 2}


def _predictions(start: Learnable, variables: Variables, data: Batch) -> np.ndarray:
    logits = np.asarray(predict_logits(start.model, variables, data.x, batch=start.at_once))
    if not np.isfinite(logits).all():
        raise FloatingPointError("learning diverged: the answers are not finite; try a smaller --rate")
    return logits.argmax(-1)


def _counted(start: Learnable, settings: Mapping[str, Any]) -> dict[str, int]:
    sizes = {path: leaf.size for path, leaf in leaves_by_path(start.variables["params"]).items()}
    learned = sum(sizes[path] for path in trained(start, settings))
    return {"trained": learned, "frozen": sum(sizes.values()) - learned}


def _whole(variables: Variables) -> Variables:
    """Of body and head as of one network, which is what others load."""
    whole = {name: dict(tree.get(BODY, {})) for name, tree in variables.items()}
    whole["params"][HEAD] = variables["params"][HEAD]
    return {name: tree for name, tree in whole.items() if tree}


def _progress(steps: int | None) -> Callable[[int, float], None]:
    def show(step: int, loss: float) -> None:
        print(f"step {step:>6}/{steps}  loss {loss:.4f}", flush=True)

    return show


def _announce(report: Mapping[str, Any], out: Path) -> None:
    for name, said in _table(report).items():
        print(f"{name:<16}  {said}")
    print(f"{'folder':<16}  {out}", flush=True)


def _table(report: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a transfer, in words."""
    images, about, parameters = report["images"], report["about"], report["parameters"]
    patterns = report.get("train")
    rows = {
        "source": about["source"],
        "target": f"{report['target']}, {report['classes']} classes; {about['target']}",
        "learned from": f"{report['shots']}, {report['learned_from']:,} images",
        "scored": f"{report['scored']:,} other images",
        "images": f"{images['size']} × {images['size']}, {'grey' if images['channels'] == 1 else 'colour'}, "
        + report["pixels"]
        + ("; dark on light, the source's light on dark: all are inverted" if report["inverted"] else ""),
        "batch statistics": report["statistics"],
        "recipe": f"{report['recipe']}: {about['recipe']}"
        + (f"; of the body only {', '.join(patterns)}" if patterns else ""),
        "parameters": f"{parameters['trained']:,} trained, {parameters['frozen']:,} frozen",
        "steps": "rate" in report
        and f"{report['steps']:,} of {report['batch']} images, Adam, largest rate {report['rate']:g}",
        "L2-SP": None
        if report.get("l2_sp") is None
        else f"α = {report['l2_sp']:g}, and 0.01 towards zero for the head",
        "seed": report["seed"],
    }
    return {name: str(said) for name, said in rows.items() if said is not None and said is not False}


def _shown(row: Mapping[str, float]) -> str:
    return f"{100 * row['mean']:.2f} %  (95 % CI {100 * row['low']:.2f} to {100 * row['high']:.2f})"


def _groups(leaves: Report) -> dict[str, tuple]:
    return {group: getattr(leaves, group) for group in ("taken", "new", "left_over", "dropped")}


def transfer_markdown(report: Mapping[str, Any], leaves: Report) -> str:
    """`report.json`, for people, and the table of leaves."""
    lines = [
        f"# {report['target']} from {report['source']}, {report['recipe']}",
        "",
        "| accuracy | 95 % CI | |",
        "| --- | --- | --- |",
    ]
    said = {
        "accuracy": report["recipe"],
        "probe_accuracy": "for comparison: a linear probe, the body as it was",
    }
    for name, what in said.items():
        if name in report:
            mean, low, high = (f"{100 * report[name][part]:.2f}" for part in ("mean", "low", "high"))
            lines.append(f"| **{mean} %** | {low} to {high} | {what} |")
    lines += [
        "",
        f"Of {report['scored']:,} images that were not learned from. Wilson's interval: it is about these "
        "images, and not about other draws of those to learn from.",
        "",
        "| | |",
        "| --- | --- |",
    ]
    table = _table(report) | {"time": f"{report['wall_s']:.1f} s", "device": report["device"]}
    table["versions"] = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines += [f"| {name} | {text} |" for name, text in table.items()]
    worst = sorted(report["recalls"].items(), key=lambda pair: pair[1])[:_WORST]
    lines += [
        "",
        "The classes that are named rightly least often:",
        "",
        "| class | recall |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {100 * recall:.1f} % |" for name, recall in worst]
    lines += ["", "What became of the source's leaves; new ones are not of the source:", ""]
    return "\n".join(lines) + "\n" + leaves.markdown() + "\n"


def _as_json(ranking: Ranking, target: str, shots: Shots, shrinkage: str | None) -> dict[str, Any]:
    def finite(values: Mapping[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    return {
        "target": target,
        "shots": shots.said,
        "score": ranking.score,
        "shrinkage": shrinkage,
        "sources": [
            {
                "source": row.name,
                **{score: finite(row.scores).get(score) for score in SCORES},
                "accuracy": row.accuracy,
            }
            for row in ranking.rows
        ],
        "correlations": {score: finite(found._asdict()) for score, found in ranking.correlations.items()},
    }
