"""Learners and networks by name; a user-defined one, `module:name`, is imported."""

import difflib
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jaxmeta
from jaxmeta import nn
from jaxmeta.checks import ArgumentError

LEARNERS: dict[str, Callable[..., Any]] = {
    name: getattr(jaxmeta, name)
    for name in (
        "maml",
        "fomaml",
        "anil",
        "boil",
        "meta_sgd",
        "imaml",
        "maml_plus_plus",
        "cavia",
        "reptile",
        "lstm_meta_learner",
        "learned_optimizer",
        "prototypical",
        "matching",
        "siamese",
        "relation",
        "kernel_classifier",
        "ridge",
        "mahalanobis",
        "soft_kmeans",
        "label_propagation",
        "simple_shot",
        "fine_tuned_head",
        "mann",
        "metanet",
    )
}

NETWORKS: dict[str, Callable[..., Any]] = {
    "strided-conv4": nn.StridedConv4,
    "strided-conv4-flat": partial(nn.StridedConv4, flatten=True),
    "strided-conv4-without-scale": partial(nn.StridedConv4, use_scale=False),
    "conv4": nn.Conv4,
    "conv4-32": partial(nn.Conv4, filters=32),
    "resnet12": nn.ResNet12,
    "resnet": nn.ResNet,
    "squeezenet": nn.SqueezeNet,
    "vit": nn.ViT,
    "mlp": partial(nn.MLP, hidden=(256, 128, 64, 64), norm=True),
    "mlp-40": nn.MLP,
    "linear": partial(nn.MLP, hidden=(), use_bias=False),
    "relation": nn.RelationEmbedding,
    "koch": nn.Koch,
    "lrua": nn.MemoryNetwork,
    "lrua-feed-forward": partial(nn.MemoryNetwork, controller="feed_forward"),
    "ntm": partial(nn.MemoryNetwork, memory=nn.NTM()),
    "lstm": partial(nn.MemoryNetwork, memory=None),
    "feed-forward": partial(nn.MemoryNetwork, memory=None, controller="feed_forward"),
    "augmented-cnn": nn.AugmentedCNN,
    "augmented-cnn-32": partial(nn.AugmentedCNN, filters=32),
}

# Parameter names for the output width of a network.
_WIDTHS = ("ways", "out")


def is_own(name: str) -> bool:
    """Return whether a name is `module:name`, of user-defined code."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(map(str.isidentifier, module.split(".")))


def find(kind: str, name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the factory that a name refers to: an entry of the table, or what `module:name` imports.

    Args:
      kind: argument, for errors: "learner", "network" or "tasks".
      name: name, as given.
      table: built-in factories by name.

    Returns:
      The factory.

    Raises:
      ArgumentError: the name is unknown, or its module cannot be imported.
    """
    if name in table:
        return table[name]
    if is_own(name):
        return _imported(kind, name)
    raise ArgumentError(kind, f"there is no {name!r}; {known(name, table)}, or module:name of your own")


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """Return `table[name]`, or raise an ArgumentError that lists the names, the closest first."""
    if name in table:
        return table[name]
    raise ArgumentError(kind, f"there is no {name!r}; {known(name, table)}")


def known(name: str, names: Iterable[str]) -> str:
    """Return "known are …" with the names, those most similar to `name` first."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return "known are " + ", ".join([*close, *(other for other in names if other not in close)])


def width_name(network: Callable[..., Any]) -> str | None:
    """Return a network's parameter for the output width: "ways", "out", or its first required parameter."""
    parameters = inspect.signature(network).parameters
    for name in _WIDTHS:
        if name in parameters:
            return name
    for parameter in parameters.values():
        positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if positional and parameter.default is parameter.empty:
            return parameter.name
    return None


def takes_network(factory: Callable[..., Any]) -> bool:
    """Return whether a factory of a learner takes a network; a user-defined one may build its own."""
    kinds = {each.kind for each in inspect.signature(factory).parameters.values()}
    return bool(kinds - {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD})


def file_hash(name: str) -> str:
    """Return the SHA-256 of the file of a `module:name`; empty for a module without a file."""
    module = sys.modules[name.partition(":")[0]]
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def find_in_user_code(error: BaseException) -> str | None:
    """Return the file and line in user-defined code that an error comes from; None for errors of jaxmeta."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if os.path.realpath(frame.filename) in _own_files:
            return f"{frame.filename}, line {frame.lineno}"
    return None


# Files of imported user-defined modules.
_own_files: set[str] = set()


def _itself(learner: jaxmeta.Learner) -> jaxmeta.Learner:
    """Return a learner that is built already, as a factory without settings."""
    return learner


def _imported(kind: str, name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        # The folder comes last, so that a file in it cannot shadow an installed module.
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.split(".")[0] == error.name.split(".")[0]:
            raise ArgumentError(
                kind, f"got {name!r}, but there is no module {module_name!r} in {here} or installed"
            ) from None
        raise ArgumentError(kind, f"got {name!r}, whose module needs {error.name!r}: {error}") from error
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise ArgumentError(
            kind, f"got {name!r}, but its module has a syntax error: {error.msg} ({where})"
        ) from None
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ArgumentError(
            kind,
            f"got {name!r}, but its module raises {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})",
        ) from error
    if getattr(module, "__file__", None):
        _own_files.add(os.path.realpath(str(module.__file__)))
    factory = getattr(module, attribute, None)
    if kind == "learner" and isinstance(factory, jaxmeta.Learner):
        return partial(_itself, factory)
    if not callable(factory):
        functions = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise ArgumentError(
            kind,
            f"got {name!r}, but {module.__file__ or module_name} has no function {attribute!r}; "
            f"it has {', '.join(functions) or 'none'}",
        )
    return factory
