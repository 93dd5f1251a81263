"""Pretrained features: the network of a source as a `jm.Model` of images."""

import hashlib
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_count
from jaxmeta.cli.backbones import Backbone, Input, load_backbone
from jaxmeta.cli.data import ImageSpec
from jaxmeta.core import Model, Params, PyTree
from jaxmeta.nn import StatefulModel, as_model
from jaxmeta.nn.adapters import forward
from jaxmeta.nn.norm import STATISTICS
from jaxmeta.tasks.feature_cache import hash_of_arrays
from jaxmeta.transfer import adabn

# Batch size of images from which batch statistics are computed.
_STATISTICS_BATCH = 64


def features(source: str | os.PathLike[str], *, network: str | None = None, size: int | None = None) -> Model:
    """Return a pretrained network without its head as a model of images.

    `init` returns the pretrained parameters for every key, so that a learner on this model is ready for use
    without training, and can be trained further. `apply` takes images in [0, 1] of any size with 1 or 3
    channels, converts them to the network's input (size, channels, mean and standard deviation of the
    pixels), and returns features of shape (n, dim). Batch normalisation uses the statistics of the source,
    which training does not change, so that an image's features do not depend on other images. Where a source
    has none, the learner's `norm` decides as for an untrained network.

    `jm.tasks.embedded(tasks, jm.features(source))` computes the features of all images once, for learners
    that do not change them, and keeps them in the cache folder.

    Args:
      source: a folder of `jaxmeta train` or `jaxmeta transfer`; a .safetensors or .msgpack file; a folder of
        Hugging Face's `save_pretrained`; or "hf:owner/name".
      network: name in `jaxmeta networks`, for weights that do not name their network.
      size: side in pixels of the network's images; by default that of its training images.

    Returns:
      A `Model`.

    Raises:
      ArgumentError: the source cannot be read, does not name its network, or does not say the size of its
        images.

    Examples:
      >>> import tempfile, jax, jaxmeta as jm
      >>> task = jm.tasks.glyphs(ways=5, shots=1, queries=3).sample(jax.random.key(0))
      >>> network = jm.nn.MLP(out=None, hidden=(8,))
      >>> variables = network.init(jax.random.key(1), task.support.x)
      >>> folder = tempfile.TemporaryDirectory()
      >>> weights = f"{folder.name}/weights.safetensors"
      >>> _ = jm.transfer.save_pretrained(weights, variables, network=network)
      >>> learner = jm.simple_shot(jm.features(weights, size=28), transform="l2n")
      >>> params = learner.init(jax.random.key(2), task)
      >>> adapted = learner.adapt(params, task.support, jax.random.key(3))
      >>> learner.predict(params, adapted, task.query.x).shape
      (15, 5)
    """
    if size is not None:
        check_count("size", size)
    backbone = load_backbone(os.fspath(source), network=network, size=size)
    return model_of(backbone, Input(spec_of(backbone, size), backbone.inverted, backbone.pixels))


def spec_of(backbone: Backbone, size: int | None) -> ImageSpec:
    """Return the specification of the images that a backbone takes.

    Raises:
      ArgumentError: neither the backbone nor the user gives their size.
    """
    side = backbone.size if size is None else size
    if side is None:
        raise ArgumentError("size", f"{backbone.source} does not say the size of its images; give it")
    channels = backbone.channels(side, None) or 3
    # A mean of 0.5 makes no difference between images and their negatives.
    known = backbone.images or ImageSpec(side, channels, 0.5, False)
    return known._replace(size=side, channels=channels)


def model_of(backbone: Backbone, input: Input, examples: Float[np.ndarray, "n h w c"] | None = None) -> Model:
    """Return a backbone as a model of images, whose `init` returns its parameters.

    Args:
      backbone: backbone of a source, used in inference mode.
      input: conversion of images into its input.
      examples: images before conversion; a backbone with batch normalisation but without statistics gets
        theirs. With None, such a backbone is normalised as the learner chooses.

    Returns:
      The model. Its `apply` has an attribute `description`, which with the parameters identifies the
      features; see `jaxmeta.tasks.feature_cache`.
    """
    adapter, model, variables = input.adapter(), backbone.model, backbone.variables
    assert variables is not None
    params = variables["params"]
    if needs_statistics(backbone, input):
        if examples is None:
            return _normalised_by_the_learner(backbone, adapter, params)
        wanted = jax.eval_shape(model.init, jax.random.key(0), _example(input))[STATISTICS]
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted)
        seen = adapter.apply({}, jnp.asarray(examples, jnp.float32))
        variables = adabn(model, {**variables, STATISTICS: blank}, seen, batch=_STATISTICS_BATCH)
    state = {name: tree for name, tree in variables.items() if name != "params"}
    apply = FixedFeatures(model, adapter, state, _description(backbone, input, state))
    return Model(lambda key, x: params, apply)


def needs_statistics(backbone: Backbone, input: Input) -> bool:
    """Return whether a backbone has batch normalisation, and no statistics for it."""
    wanted = jax.eval_shape(backbone.model.init, jax.random.key(0), _example(input))
    return STATISTICS in wanted and STATISTICS not in (backbone.variables or {})


class FixedFeatures:
    """The function `(params, images) -> features` of a network with fixed batch statistics.

    Args:
      model: network.
      adapter: conversion of images into its input.
      state: variables besides its parameters.
      description: text that identifies all of these.
    """

    def __init__(self, model: StatefulModel, adapter: Model, state: PyTree, description: str):
        self._model, self._adapter, self._state, self.description = model, adapter, state, description

    def __call__(self, params: Params, x: Float[Array, "n h w c"]) -> Float[Array, "n dim"]:
        x = self._adapter.apply({}, _checked(x))
        return self._model.apply({"params": params, **self._state}, x)


def _checked(x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ArgumentError("x", f"got {x.dtype}; images must be floats in [0, 1]: divide bytes by 255")
    return x


def _normalised_by_the_learner(backbone: Backbone, adapter: Model, params: Params) -> Model:
    model = as_model(backbone.network)

    def apply_norm(
        params: Params, x: Array, *, stats: PyTree = None, mask: Array | None = None
    ) -> tuple[Array, PyTree]:
        z, stats = forward(model, params, adapter.apply({}, _checked(x)), stats=stats, mask=mask)
        return z.reshape(z.shape[0], -1), stats

    return Model(lambda key, x: params, lambda params, x: apply_norm(params, x)[0], apply_norm)


def _example(input: Input) -> jax.ShapeDtypeStruct:
    side = input.images.size
    return jax.ShapeDtypeStruct((1, side, side, input.images.channels), jnp.float32)


def _description(backbone: Backbone, input: Input, state: PyTree) -> str:
    """Return the text of everything but the parameters that determines the features."""
    network = backbone.network
    facts: dict[str, Any] = {
        # Functions among the fields of a module are printed with their address.
        "network": re.sub(r" at 0x[0-9a-f]+", "", repr(network)),
        "code": _hash_of_code(type(network)),
        "state": hash_of_arrays(state),
        "size": input.images.size,
        "channels": input.images.channels,
        "inverted": input.inverted,
        "mean": input.pixels.mean,
        "std": input.pixels.std,
        "method": input.pixels.method,
    }
    return json.dumps(facts, sort_keys=True)


def _hash_of_code(kind: type) -> str:
    """Return the hash of the file that defines a network's class; empty where there is no such file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""
