"""A body that has learned something, and a head that has not."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmeta import losses
from jaxmeta.checks import ArgumentError, check_count, check_real
from jaxmeta.core import Batch, Key
from jaxmeta.nn.adapters import Network
from jaxmeta.nn.layers import Dense
from jaxmeta.nn.stateful import StatefulModel, Variables, chain
from jaxmeta.transfer import host
from jaxmeta.transfer.subtree import swap_subtree

BODY, HEAD, ADAPTER = "body", "head", "adapter"
EVAL_BATCH = 256


def classifier(
    body: Network | StatefulModel,
    classes: int,
    *,
    adapter: Network | StatefulModel | None = None,
    momentum: float = 0.9,
) -> StatefulModel:
    """A network with a new linear head, and, if asked, with an adapter before it.

    Its variables have a subtree for each part: "params" → "adapter", "body", "head"; "batch_stats" →
    "body"; …, so that `with_body(variables, pretrained)` puts in what was learned elsewhere, and patterns
    such as "head" or "body/stage3*" say what is trained. Its `features` are those that the head reads.

    Args:
      body: the embedding, `(n, *shape) -> (n, d)`: one of ours with `ways=None`, or any network.
      classes: C of the target, at least 2.
      adapter: makes of the target's inputs what the body takes; see `jm.transfer.input_adapter`.
      momentum: of running statistics; see `jm.nn.as_stateful`.

    Raises:
      ValueError: fewer than 2 classes; at `init`, a body whose output is no `(n, d)`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = classifier(jm.nn.Conv4(filters=8), 10)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
      >>> jax.tree.map(jnp.shape, variables["params"]["head"])
      {'bias': (10,), 'kernel': (8, 10)}
    """
    check_count("classes", classes, 2)
    parts: dict[str, Any] = {} if adapter is None else {ADAPTER: adapter}
    parts |= {BODY: body, HEAD: Dense(classes)}
    model = chain(parts, momentum=momentum)

    assert model.features is not None
    embed = model.features.apply

    def init(key: Key, x: Any) -> Variables:
        variables = model.init(key, x)
        shape = jax.eval_shape(embed, variables, x).shape
        if len(shape) != 2:
            raise ArgumentError(
                "body",
                f"returns shape {shape} for {x.shape[0]} examples; it must be (n, d): take the network "
                "without its head (ways=None), or flatten its output",
            )
        return variables

    return model._replace(init=init)


def with_body(variables: Variables, pretrained: Variables) -> Variables:
    """`variables` of a classifier with the body's leaves taken from `pretrained`.

    Args:
      variables: of a `classifier`; not changed.
      pretrained: of the body alone: "params", and "batch_stats" where it has any.

    Raises:
      ValueError: leaves that the body does not have, lacks, or that have another shape or dtype, by name;
        use `jm.transfer.transplant` where only a part is to be taken.
    """
    if "params" not in pretrained:
        raise ArgumentError(
            "pretrained",
            f"got the collections {sorted(pretrained)}; it must have 'params', and 'batch_stats' "
            "where the body has batch statistics",
        )
    lacking = {name for name, tree in variables.items() if tree.get(BODY)} - set(pretrained)
    unknown = {name for name, tree in pretrained.items() if tree} - set(variables)
    if lacking or unknown:
        raise ArgumentError(
            "pretrained",
            f"got the collections {sorted(pretrained)}, and the body has "
            f"{sorted(name for name, tree in variables.items() if BODY in tree)}",
        )
    return {
        name: swap_subtree(tree, BODY, pretrained[name]) if tree.get(BODY) else tree
        for name, tree in variables.items()
    }


def as_images(x: Array | np.ndarray) -> Array:
    """Bytes as numbers in [0, 1]; anything else as it is."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


def in_batches(
    function: Any, variables: Variables, x: Array | np.ndarray, batch: int = EVAL_BATCH
) -> Float[Array, "n ..."]:
    """`function(variables, x)` of many examples, `batch` at a time, bytes taken as numbers in [0, 1].

    What it returns of an example must not depend on the others, as in inference.
    """
    check_count("batch", batch)
    check_real("x", x)
    n = x.shape[0]
    if n == 0:
        raise ArgumentError("x", "got no examples")
    batch = min(batch, n)
    # The last batch begins early enough to be whole: one compiled program, and nothing is padded.
    starts = [*range(0, n - batch, batch), n - batch]
    pieces, done = [], 0
    for start in starts:
        pieces.append(_one_batch(function, variables, jnp.asarray(x[start : start + batch]))[done - start :])
        done = start + batch
    return jnp.concatenate(pieces)


@partial(jax.jit, static_argnums=0)
def _one_batch(function, variables, x):
    return function(variables, as_images(x))


def extract_features(
    model: StatefulModel, variables: Variables, x: Array | np.ndarray, *, batch: int = EVAL_BATCH
) -> Float[Array, "n d"]:
    """Features of the frozen body in inference: computed once, kept, and used as often as one likes.

    Args:
      model: a `classifier`.
      variables: of it.
      x: `(n, *shape)`, bytes or floats.
      batch: examples at a time.

    Raises:
      ValueError: a model that says of no layer that it reads features.
    """
    if model.features is None:
        raise ArgumentError("model", "has no features; jm.transfer.classifier makes one that has")
    return in_batches(model.features.apply, variables, x, batch)


def predict_logits(
    model: StatefulModel, variables: Variables, x: Array | np.ndarray, *, batch: int = EVAL_BATCH
) -> Float[Array, "n classes"]:
    """Outputs in inference, `batch` examples at a time."""
    return in_batches(model.apply, variables, x, batch)


def accuracy(model: StatefulModel, variables: Variables, data: Batch, *, batch: int = EVAL_BATCH) -> float:
    """Part of the examples of `data` that the model names rightly; one whose outputs are NaN it does not."""
    right, count = losses.score(predict_logits(model, variables, data.x, batch=batch), data)["accuracy"]
    return float(right / count)


def confusion_matrix(
    predictions: Int[Array | np.ndarray, " _"], labels: Int[Array | np.ndarray, " _"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """How many examples of class i (row) were named j (column).

    Raises:
      ValueError: predictions and labels of different number, or a class outside [0, classes).
    """
    check_count("classes", classes)
    rows = host.numbers(labels, "labels")
    rows = host.labels(rows, "labels", rows=rows.size, classes=classes)
    columns = host.labels(predictions, "predictions", rows=rows.size, classes=classes)
    found = np.zeros((classes, classes), np.int64)
    np.add.at(found, (rows, columns), 1)
    return found
