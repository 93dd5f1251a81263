"""Networks with state for transfer learning: running statistics, dropout and frozen layers.

In few-shot learning, batch statistics are chosen by the learner, and no state is kept between batches
(`jm.nn.as_model`). Transfer learning trains as usual in Flax: a batch is normalised by its own statistics and
updates a running average, which is used in inference.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, traverse_util
from flax.errors import InvalidRngError

from jaxmeta.checks import ArgumentError, check_number
from jaxmeta.core import Key, PyTree
from jaxmeta.nn.adapters import (
    SWITCHES,
    Network,
    as_model,
    call_arguments,
    call_in_inference,
    forward,
    switches,
)
from jaxmeta.nn.norm import STATISTICS, BatchNorm

Variables = dict[str, PyTree]


class StatefulModel(NamedTuple):
    """A network with state as pure functions; `jm.nn.as_stateful` makes one.

    Attributes:
      init: `(key, x) -> variables`. Of these, "params" are trained; the other collections, such as
        "batch_stats", are the network's state.
      apply: `(variables, x) -> outputs` in inference mode: batch normalisation uses the running statistics,
        and dropout is off.
      train: `(variables, x, key, *, frozen=None, keep_statistics=False) -> (outputs, state)` in training
        mode: batch normalisation uses the statistics of its batch, and dropout is on. `state` holds the new
        values of the collections other than "params". `frozen` is a tree of Python bools with the structure
        of the parameters: a layer all of whose parameters are frozen runs in inference mode, and its
        statistics do not change. With `keep_statistics`, every batch normalisation uses its running
        statistics, which do not change.
      features: the network without its last part, with the same variables; None for a network without parts.
      network: function `() -> network` that returns the original network; None for a network with parts. It
        is a function because models are compared and hashed, which not all networks support.
      parts: names and models of a `chain`.
    """

    init: Callable[[Key, Any], Variables]
    apply: Callable[..., jax.Array]
    train: Callable[..., tuple[jax.Array, Variables]]
    features: "StatefulModel | None" = None
    network: Callable[[], Any] | None = None
    parts: tuple[tuple[str, "StatefulModel"], ...] = ()


def as_stateful(network: Network | StatefulModel, *, momentum: float = 0.9) -> StatefulModel:
    """Return `network` as a `StatefulModel`; a `StatefulModel` is returned unchanged.

    A `flax.linen.Module` may contain `flax.linen.BatchNorm`, `jm.nn.BatchNorm`, dropout and layers with other
    mutable collections; each frozen layer runs in inference mode. The module's `__call__` may take `mask`,
    `deterministic`, `train` or `use_running_average`. Other networks are converted by `jm.nn.as_model`; their
    dropout stays on in frozen layers, unless all layers are frozen.

    Args:
      network: network of any kind that `jm.nn.as_model` takes, or a `flax.linen.Module` with mutable state.
      momentum: weight of the previous value in the running statistics of `jm.nn.BatchNorm`;
        `flax.linen.BatchNorm` has its own attribute.

    Raises:
      ValueError: `jm.nn.as_model` refuses the network for a reason other than mutable state, or `momentum` is
        outside [0, 1).

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = jm.nn.as_stateful(jm.nn.Conv4(ways=5, filters=8))
      >>> x = jnp.zeros((4, 28, 28, 1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> outputs, state = model.train(variables, x, jax.random.key(1))
      >>> model.apply({**variables, **state}, x).shape
      (4, 5)
    """
    if isinstance(network, StatefulModel):
        return network
    check_number("momentum", momentum, 0)
    if momentum >= 1:
        raise ArgumentError("momentum", f"got {momentum}; it must be at least 0 and below 1")
    if isinstance(network, linen.Module):
        call_arguments(network, "mask", *SWITCHES, "use_running_average")
        return _from_linen(network, momentum)._replace(network=lambda: network)
    return _from_model(as_model(network), momentum)._replace(network=lambda: network)


def chain(parts: Mapping[str, Network | StatefulModel], *, momentum: float = 0.9) -> StatefulModel:
    """Return a model that applies networks in sequence.

    Each collection of its variables has one subtree for each part. Its `features` is the chain without the
    last part.

    Args:
      parts: networks by name, in order.
      momentum: see `as_stateful`.

    Raises:
      ValueError: `parts` is empty.
    """
    if not parts:
        raise ArgumentError("parts", "got none; there must be at least one network")
    models = {name: as_stateful(network, momentum=momentum) for name, network in parts.items()}

    def init(key: Key, x: Any) -> Variables:
        by_part = {}
        for index, (name, model) in enumerate(models.items()):
            by_part[name] = model.init(jax.random.fold_in(key, index), x)
            x = _zeros(jax.eval_shape(model.apply, by_part[name], x))
        return join_parts(by_part)

    def sequence(names: list[str]) -> StatefulModel:
        def apply(variables: Variables, x: Any) -> jax.Array:
            for name in names:
                x = models[name].apply(part_variables(variables, name), x)
            return x

        def train(
            variables: Variables,
            x: Any,
            key: Key,
            *,
            frozen: PyTree | None = None,
            keep_statistics: bool = False,
        ) -> tuple[jax.Array, Variables]:
            states = {}
            # `keep_statistics` is passed on only if set, because a user-defined model may not take it.
            settings = {"keep_statistics": True} if keep_statistics else {}
            for index, name in enumerate(names):
                part = None if frozen is None else frozen[name]
                x, states[name] = models[name].train(
                    part_variables(variables, name),
                    x,
                    jax.random.fold_in(key, index),
                    frozen=part,
                    **settings,
                )
            return x, join_parts(states)

        return StatefulModel(init, apply, train)

    names = list(models)
    return sequence(names)._replace(features=sequence(names[:-1]), parts=tuple(models.items()))


def part_variables(variables: Variables, part: str) -> Variables:
    """Return the variables of one part of a `chain`."""
    return {name: tree[part] for name, tree in variables.items() if part in tree}


def join_parts(by_part: Mapping[str, Variables]) -> Variables:
    """Return the variables of a `chain` from those of its parts."""
    names = dict.fromkeys(name for variables in by_part.values() for name in variables)
    return {
        name: {part: variables[name] for part, variables in by_part.items() if name in variables}
        for name in names
    }


def layers_in_order(network: linen.Module, x: PyTree) -> tuple[str, ...]:
    """Return the names of the top-level layers in the order in which `network` computes them.

    The names are the top-level keys of the parameters; parameters of the network itself come first.
    """
    seen: dict[str, None] = {}

    def record(call, args, kwargs, context):
        if context.module.path:
            seen.setdefault(context.module.path[0])
        return call(*args, **kwargs)

    with linen.intercept_methods(record):
        params = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, **switches(network, False)), x)[
            "params"
        ]
    own_params = [name for name in params if name not in seen]
    return (*own_params, *(name for name in seen if name in params))


def _zeros(shaped: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shaped)


def _from_linen(network: linen.Module, momentum: float) -> StatefulModel:
    def explicit_statistics(variables: Variables, x: Any) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
        """Return the shapes of the statistics of `jm.nn.BatchNorm`, which `network.init` does not return."""
        paths = set()

        def record(call, args, kwargs, context):
            if isinstance(context.module, BatchNorm):
                paths.add(context.module.path)
            return call(*args, **kwargs)

        def run(variables, x):
            with linen.intercept_methods(record):
                return network.apply(variables, x, mutable=[STATISTICS], **switches(network, False))[1]

        shapes = traverse_util.flatten_dict(jax.eval_shape(run, variables, x).get(STATISTICS, {}))
        return {path: leaf for path, leaf in shapes.items() if path[:-1] in paths}

    def init(key: Key, x: Any) -> Variables:
        variables = network.init(key, x, **switches(network, False))
        variables = jax.tree.map(lambda leaf: leaf, dict(variables))
        try:
            initial = _initial_statistics(explicit_statistics(variables, x))
        except InvalidRngError:
            raise ValueError(
                f"{type(network).__name__} draws random numbers in inference; its __call__ must take "
                "`deterministic` or `train`, and obey it (flax.linen.Dropout(rate)(x, deterministic))"
            ) from None
        stats = {**traverse_util.flatten_dict(variables.get(STATISTICS, {})), **initial}
        variables.setdefault("params", {})
        return {**variables, **({STATISTICS: traverse_util.unflatten_dict(stats)} if stats else {})}

    def apply(variables: Variables, x: Any) -> jax.Array:
        outputs: Any = network.apply(variables, x, **switches(network, False))
        return outputs

    def train(
        variables: Variables,
        x: Any,
        key: Key,
        *,
        frozen: PyTree | None = None,
        keep_statistics: bool = False,
    ) -> tuple[jax.Array, Variables]:
        is_frozen = frozen_layers(frozen)

        def keeps_statistics(layer: tuple[str, ...]) -> bool:
            return keep_statistics or is_frozen(layer)

        stats = traverse_util.flatten_dict(variables.get(STATISTICS, {}))
        averaged = (
            [path for path in explicit_statistics(variables, x) if not keeps_statistics(path[:-1])]
            if stats
            else []
        )
        given_stats = {path: leaf for path, leaf in stats.items() if path not in averaged}
        inputs = {name: tree for name, tree in variables.items() if name != STATISTICS}
        if given_stats:
            inputs[STATISTICS] = traverse_util.unflatten_dict(given_stats)

        def inference(call, args, kwargs, context):
            # A frozen layer runs in inference, although its caller passes the network's training mode.
            module, switch = context.module, _switch_of(context.module)
            freezes = keeps_statistics if isinstance(module, linen.BatchNorm) else is_frozen
            if switch is None or context.method_name != "__call__" or not freezes(module.path):
                return call(*args, **kwargs)
            return call_in_inference(call, module, switch, args, kwargs)

        mutable = [name for name in variables if name != "params"]
        rngs = {"dropout": key, "params": key}
        with linen.intercept_methods(inference):
            outputs, state = network.apply(inputs, x, rngs=rngs, mutable=mutable, **switches(network, True))
        state = jax.tree.map(lambda leaf: leaf, dict(state))
        after = traverse_util.flatten_dict(state.get(STATISTICS, {}))
        for path in averaged:
            after[path] = momentum * stats[path] + (1 - momentum) * after[path]
        # Frozen layers of flax.linen keep their statistics, and a wholly frozen network keeps all its state.
        after = {path: stats[path] if keeps_statistics(path[:-1]) else leaf for path, leaf in after.items()}
        unchanged = {name: variables[name] for name in mutable if is_frozen(())}
        return outputs, {
            **state,
            **({STATISTICS: traverse_util.unflatten_dict(after)} if after else {}),
            **unchanged,
        }

    return StatefulModel(init, apply, train)


def _initial_statistics(
    statistics: Mapping[tuple[str, ...], jax.ShapeDtypeStruct],
) -> dict[tuple[str, ...], jax.Array]:
    """Return the initial running statistics, those of `flax.linen.BatchNorm`: mean 0, variance 1."""
    return {
        path: (jnp.ones if path[-1] == "var" else jnp.zeros)(leaf.shape, leaf.dtype)
        for path, leaf in statistics.items()
    }


def _switch_of(module: linen.Module) -> str | None:
    """Return the name of the attribute and argument that puts a layer of Flax into inference mode."""
    if isinstance(module, linen.BatchNorm):
        return "use_running_average"
    return "deterministic" if isinstance(module, linen.Dropout) else None


def frozen_layers(frozen: PyTree | None) -> Callable[[tuple[str, ...]], bool]:
    """Return a predicate that tells whether all parameters of the layer at a path are frozen.

    A layer without parameters, such as dropout, is frozen if the layer that contains it is.
    """
    # Path entries are converted by `keystr`, because the parameters of plain functions may be any pytree.
    leaves = {
        tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(frozen)
    }

    def is_frozen(path: tuple[str, ...]) -> bool:
        for depth in range(len(path), -1, -1):
            beneath = [value for leaf_path, value in leaves.items() if leaf_path[:depth] == path[:depth]]
            if beneath:
                return all(beneath)
        return False

    return is_frozen


def _from_model(model: Any, momentum: float) -> StatefulModel:
    def statistics(params: PyTree, x: Any) -> PyTree:
        return forward(model, params, x)[1] or {}

    def init(key: Key, x: Any) -> Variables:
        params = model.init(key, x)
        stats = jax.eval_shape(statistics, params, x) if model.apply_norm is not None else {}
        if not jax.tree.leaves(stats):
            return {"params": params}
        initial = _initial_statistics(traverse_util.flatten_dict(stats))
        return {"params": params, STATISTICS: traverse_util.unflatten_dict(initial)}

    def apply(variables: Variables, x: Any) -> jax.Array:
        return forward(model, variables["params"], x, stats=variables.get(STATISTICS))[0]

    def train(
        variables: Variables,
        x: Any,
        key: Key,
        *,
        frozen: PyTree | None = None,
        keep_statistics: bool = False,
    ) -> tuple[jax.Array, Variables]:
        is_frozen = frozen_layers(frozen)
        before = traverse_util.flatten_dict(variables.get(STATISTICS, {}))
        given_stats = {path: leaf for path, leaf in before.items() if keep_statistics or is_frozen(path[:-1])}
        outputs, stats = forward(
            model,
            variables["params"],
            x,
            stats=traverse_util.unflatten_dict(given_stats) or None,
            key=None if is_frozen(()) else key,
        )
        if not before:
            return outputs, {}
        after = {
            path: before[path] if path in given_stats else momentum * before[path] + (1 - momentum) * leaf
            for path, leaf in traverse_util.flatten_dict(stats).items()
        }
        return outputs, {STATISTICS: traverse_util.unflatten_dict(after)}

    return StatefulModel(init, apply, train)
