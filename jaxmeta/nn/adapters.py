"""Adapters that make a `Model` of pure functions from the networks of several frameworks.

For every framework, parameters are a plain nested dict with string keys, so that patterns of paths,
optimizers and checkpoints work with them; batch statistics are explicit inputs and outputs; and randomness
comes from an explicit key, without which a model is deterministic.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, traverse_util
from flax.errors import InvalidRngError

from jaxmeta.checks import ArgumentError, call_of, described
from jaxmeta.core import Key, Model, Params, PyTree
from jaxmeta.nn import shared
from jaxmeta.nn.norm import STATISTICS, input_statistics

# Modules of NNX and Equinox are typed as callables, because jaxmeta imports neither package until it is used.
Network = Model | linen.Module | Callable[..., Any] | tuple[Callable[..., Any], Callable[..., Any]]
SWITCHES = ("deterministic", "train")
_AVERAGING = "use_running_average"


def as_model(network: Network, argument: str = "network") -> Model:
    """Return `network` as a `Model`; a `Model` is returned unchanged.

    Args:
      network: network of one of these kinds:

        - a `flax.linen.Module` of `(x)`, and of `mask`, `deterministic`, `train` or `use_running_average`
          where its `__call__` has them. A module with `deterministic` or `train` is stochastic: it may call
          `make_rng` where it is not deterministic. Batch normalisation is by `jm.nn.BatchNorm`, or by
          `flax.linen.BatchNorm`, which then normalises by its batch or by given statistics and never by its
          running averages.
        - a `flax.nnx.Module` (see `from_nnx`) or an `equinox.Module` (see `from_equinox`), whose parameters
          are the initial ones for every key; or the pair `(module, state)` of `equinox.nn.make_with_state`,
          whose state is not used.
        - a pair of functions `init(key, x) -> params` and `apply(params, x) -> outputs`.
      argument: name of the argument in errors.

    Raises:
      ValueError: `network` is of another kind, or its `__call__` requires another argument; or, at
        `init`, it keeps mutable state other than batch statistics, or draws random numbers where it should
        be deterministic.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = jm.nn.as_model(jm.nn.MLP(out=1))
      >>> params = model.init(jax.random.key(0), jnp.zeros((10, 1)))
      >>> model.apply(params, jnp.zeros((10, 1))).shape
      (10, 1)
    """
    if isinstance(network, Model):
        return network
    if isinstance(network, linen.Module):
        return _from_linen(network)
    if _is_module_of(network, "flax.nnx"):
        return from_nnx(network)
    if _is_module_of(network, "equinox"):
        return from_equinox(network)
    if isinstance(network, tuple) and len(network) == 2:
        if all(map(callable, network)):
            return Model(*network)
        if _is_module_of(network[0], "equinox"):
            return from_equinox(network[0])
    raise ArgumentError(
        argument,
        f"got {described(network)}; it must be a jaxmeta Model, a module of flax.linen, flax.nnx or "
        "equinox, or a pair of functions (init, apply); jm.nn.from_nnx and jm.nn.from_equinox take functions "
        f"that make modules{call_of(network)}",
    )


def forward(
    model: Model,
    params: Params,
    x: jax.Array | np.ndarray,
    *,
    mask: jax.Array | np.ndarray | None = None,
    stats: PyTree | None = None,
    key: Key | None = None,
) -> tuple[Any, PyTree | None]:
    """Return outputs and batch statistics of a model.

    Where several devices share the examples of a task, each computes its shard, if the model is divisible.

    Args:
      model: model, which gets only those of the following arguments that it takes.
      params: parameters of `model`.
      x: examples.
      mask: mask whose False marks padding.
      stats: statistics that normalise; None for those of `x`, which are returned.
      key: key of dropout and other randomness; None to turn it off.

    Returns:
      The outputs, and the statistics that normalised them; `stats` unchanged for a model without statistics.
    """
    n, split = x.shape[0], model.divisible and shared.num_shards() > 1
    if split:
        x, mask = shared.shard(jnp.asarray(x), None if mask is None else jnp.asarray(mask))
    randomness = {"key": key} if model.stochastic else {}
    if model.apply_norm is None:
        outputs = model.apply(params, x, **randomness)
    else:
        outputs, stats = model.apply_norm(params, x, stats=stats, mask=mask, **randomness)
    return shared.gather_shards(outputs, n) if split else outputs, stats


def _from_linen(network):
    name = type(network).__name__
    taken = call_arguments(network, "mask", *SWITCHES, _AVERAGING)

    def call(variables, x, mask=None, key=None):
        # Flax uses the stream "params" in the place of streams with other names, such as "dropout".
        rngs = {} if key is None else {"params": key}
        given_stats = set(traverse_util.flatten_dict(variables.get(STATISTICS, {})))
        with linen.intercept_methods(_explicit_statistics(given_stats)):
            return network.apply(variables, x, rngs=rngs, mutable=[STATISTICS], **_chosen(taken, mask, key))

    def init(key, x):
        norms: set[tuple[str, ...]] = set()
        with linen.intercept_methods(_explicit_statistics(norms, initializing=True)):
            variables = network.init(key, x, **_chosen(taken, None, None))
        kept = {
            f"{'/'.join(path)} of the collection {collection}"
            for collection, *path in traverse_util.flatten_dict(variables)
            if collection != "params" and not (collection == STATISTICS and tuple(path) in norms)
        }
        if kept:
            raise ValueError(
                f"{name} keeps mutable state: {', '.join(sorted(kept))}; the only state that a network "
                "may have is the statistics of jaxmeta.nn.BatchNorm or flax.linen.BatchNorm"
            )
        params = variables.get("params", {})
        try:
            jax.eval_shape(apply, params, x)
        except InvalidRngError:
            raise ValueError(
                f"{name} draws random numbers where it should be deterministic; its __call__ must take "
                "`deterministic` or `train`, and obey it (flax.linen.Dropout(rate)(x, deterministic))"
            ) from None
        return params

    def apply(params, x, *, key=None):
        return call({"params": params}, x, key=key)[0]

    def apply_norm(params, x, *, stats=None, mask=None, key=None):
        collections = {} if stats is None else {STATISTICS: stats}
        outputs, state = call({"params": params, **collections}, x, mask, key)
        new_stats = state.get(STATISTICS, {})
        if len(jax.tree.leaves(new_stats)) > len(jax.tree.leaves(stats)):
            _require_mask(name, taken, mask, "its batch normalisation")
        return outputs, new_stats

    stochastic = not taken.isdisjoint(SWITCHES)
    # One key for all examples would give every device's share the same dropout.
    divisible = getattr(network, "divisible", False) and not stochastic
    return Model(init, apply, apply_norm, stochastic, divisible)


def _explicit_statistics(statistics, initializing=False):
    """Return an interceptor that makes `flax.linen.BatchNorm` normalise by explicit statistics.

    Flax's running averages carry no gradient, which statistics of a support set must.

    Args:
      statistics: set of the paths of given statistics. Layers without given statistics normalise by their
        batch, and record its statistics.
      initializing: True while the network is initialised; the paths of all layers are then added to
        `statistics`.
    """

    def intercept(call, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, linen.BatchNorm):
            return call(*args, **kwargs)
        places = {(*layer.path, statistic) for statistic in ("mean", "var")}
        if initializing:
            statistics.update(places)
        elif not places <= statistics:
            if shared.num_shards() > 1:
                raise ValueError(
                    f"{'/'.join(layer.path)} is a flax.linen.BatchNorm, which knows only the examples of one "
                    "device, in a network with divisible = True; use jaxmeta.nn.BatchNorm"
                )
            arguments = inspect.signature(layer.__call__).bind(*args, **kwargs).arguments
            for statistic, value in input_statistics(
                arguments["x"], layer.axis, arguments.get("mask")
            ).items():
                layer.put_variable(STATISTICS, statistic, value)
        return call_in_inference(call, layer, _AVERAGING, args, kwargs)

    return intercept


def call_in_inference(call, layer, switch, args, kwargs):
    """Call a layer of Flax in inference mode, whatever its attribute and its caller's argument say.

    Args:
      call: intercepted call.
      layer: layer that is called.
      switch: name of the layer's attribute and argument for inference mode.
      args: positional arguments of the call.
      kwargs: keyword arguments of the call.
    """
    attribute = getattr(layer, switch)
    # Flax raises an error where both the attribute and the argument are set; modules are frozen dataclasses.
    object.__setattr__(layer, switch, None)
    try:
        return call(*args[:1], **{**kwargs, switch: True})
    finally:
        object.__setattr__(layer, switch, attribute)


def from_nnx(network: Callable[..., Any]) -> Model:
    """Return a `Model` of a Flax NNX module.

    Its parameters are its `nnx.Param`. `nnx.BatchNorm` normalises by its batch or by given statistics, never
    by its running averages. Random streams (of `nnx.Dropout`) restart from the explicit key in each call.

    Args:
      network: function `nnx.Rngs -> flax.nnx.Module`, called for each initialisation; or a module,
        which is never changed, and whose parameters are the initial ones for every key. The module is
        called with `x`, and with `mask`, `deterministic`, `train` and `use_running_average` where its
        `__call__` takes them.

    Raises:
      ValueError: `network` does not make an NNX module; `__call__` requires another argument; an
        `nnx.Dropout` has no `rngs`; or a call changes state other than `nnx.BatchNorm`'s.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> from flax import nnx
      >>> model = jm.nn.from_nnx(lambda rngs: nnx.Linear(4, 5, rngs=rngs))
      >>> params = model.init(jax.random.key(0), jnp.zeros((2, 4)))
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (5,), 'kernel': (4, 5)}
      >>> model.apply(params, jnp.zeros((2, 4))).shape
      (2, 5)
    """
    from flax import nnx

    is_module = isinstance(network, nnx.Module)
    template = nnx.clone(network) if is_module else network(nnx.Rngs(0))
    name = type(template).__name__
    if not isinstance(template, nnx.Module):
        raise ValueError(f"network must be a flax.nnx.Module or make one, got a function that makes {name}")
    taken = call_arguments(template, "mask", *SWITCHES, _AVERAGING)
    template = nnx.recursive_map(
        lambda _, node: _with_explicit_statistics(node) if isinstance(node, nnx.BatchNorm) else node, template
    )
    norms = set()
    for path, module in nnx.iter_modules(template):
        if isinstance(module, nnx.BatchNorm):
            norms.add(path)
        if isinstance(module, nnx.Dropout) and module.rngs is None:
            raise ValueError(f"{name} has an nnx.Dropout without a random stream; build it with rngs=rngs")

    def state(module):
        """Return parameters, statistics, random streams, and all other state."""
        parts = nnx.split(module, nnx.Param, nnx.BatchStat, nnx.RngState, ...)[1:]
        return [nnx.to_pure_dict(part) for part in parts]

    definition = nnx.graphdef(template)
    own, averages, streams, rest = state(template)
    others = [path for path in traverse_util.flatten_dict(averages) if path[:-1] not in norms]
    if others:
        raise ValueError(f"{name} keeps statistics in {others}, which are not of an nnx.BatchNorm")

    averaged = traverse_util.flatten_dict(_to_dict(averages))

    def run(params, x, *, stats=None, mask=None, key=None):
        given_stats = traverse_util.flatten_dict({} if stats is None else stats)
        module = nnx.merge(
            definition,
            _from_dict(params, own),
            _from_dict(traverse_util.unflatten_dict({**averaged, **given_stats}), averages),
            streams if key is None else _restarted(streams, key),
            rest,
        )
        module.set_attributes(deterministic=key is None, raise_if_not_found=False)
        for path, layer in nnx.iter_modules(module):
            if path in norms:
                layer.use_running_average = (*map(str, path), "mean") in given_stats  # type: ignore[attr-defined]
        before = state(module)
        outputs = module(x, **_chosen(taken, mask, key))
        after = state(module)
        changed = [path for i in (0, 3) for path in _changed(before[i], after[i])]
        if changed:
            raise ValueError(
                f"{name} changes {changed} when it is called; besides the statistics of nnx.BatchNorm and "
                "random streams it must keep no state"
            )
        if key is None and _changed(before[2], after[2]):
            raise ValueError(
                f"{name} draws random numbers where it should be deterministic; do not pass `deterministic` "
                "to its layers, which have an attribute of this name"
            )
        if len(given_stats) < len(averaged):
            _require_mask(name, taken, mask, "nnx.BatchNorm")
        return outputs, _to_dict(after[1])

    def init(key, x):
        params = _to_dict(own if is_module else state(network(nnx.Rngs(key)))[0])
        jax.eval_shape(run, params, x)
        # Copied, because a training loop that donates its parameters would delete those of the module.
        return jax.tree.map(jnp.copy, params)

    def apply(params, x, *, key=None):
        return run(params, x, key=key)[0]

    return Model(init, apply, run if averages else None, stochastic=bool(streams))


def from_equinox(network: Callable[..., Any], *, batched: bool = False) -> Model:
    """Return a `Model` of an Equinox module.

    Its parameters are its inexact arrays. A module whose `__call__` takes `key` is stochastic: each example
    gets its own key. Without a key, `key` is None and the module is in `equinox.nn.inference_mode`.

    The `__call__` of a network with `equinox.nn.BatchNorm` takes `x` and `state` and returns outputs and
    state, as is usual in Equinox. Each such layer normalises by the batch or by given statistics in any mode,
    never by its running averages. Padding does not enter the statistics; the network needs no `mask` for it.

    Images have the shape `(h, w, c)`, and Equinox's convolutions take `(c, h, w)`: transpose in `__call__`.

    Args:
      network: function `key -> equinox.Module`, called for each initialisation; or a module, whose
        parameters are the initial ones for every key. The function may return a pair `(module, state)`, as
        `equinox.nn.make_with_state` does.
      batched: True for a module that takes all examples at once; otherwise it is called for each example
        by `jax.vmap`.

    Raises:
      ValueError: `network` does not make an Equinox module; `__call__` requires another argument, or does not
        take and return state although a layer is an `equinox.nn.BatchNorm`; another layer is stateful; or,
        unless `batched`, two layers normalise over axes of different names.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = jm.nn.from_equinox(lambda key: eqx.nn.Linear(4, 5, key=key))
      >>> params = model.init(jax.random.key(0), jnp.zeros((2, 4)))
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (5,), 'weight': (5, 4)}
      >>> model.apply(params, jnp.zeros((2, 4))).shape
      (2, 5)
    """
    import equinox as eqx

    from jaxmeta.nn import equinox_norm

    is_module = isinstance(network, eqx.Module)

    def module_of(made: Any) -> Any:
        module = made[0] if isinstance(made, tuple) and len(made) == 2 else made
        if not isinstance(module, eqx.Module):
            raise ValueError(
                "network must be an equinox.Module or make one, got a function that makes "
                f"{type(module).__name__}"
            )
        return equinox_norm.with_explicit_statistics(module)

    template, norms = module_of(network if is_module else network(jax.random.key(0)))
    name = type(template).__name__
    taken = call_arguments(template, "key", *(["state"] if norms else []))
    if norms and "state" not in taken:
        raise ValueError(
            f"{name} has an equinox.nn.BatchNorm, {'/'.join(next(iter(norms)))}; its __call__ must take "
            "`state`, pass it to that layer, and return outputs and state"
        )
    axes = {layer.axis_name for layer in norms.values()}
    if len(axes) > 1 and not batched:
        raise ValueError(
            f"{name} normalises over axes of different names, {sorted(map(str, axes))}; give all of its "
            "equinox.nn.BatchNorm one axis_name"
        )
    stochastic = "key" in taken
    own, rest = eqx.partition(template, eqx.is_inexact_array)

    def init(key, x):
        del x
        params = own if is_module else eqx.filter(module_of(network(key))[0], eqx.is_inexact_array)
        # Copied, because a training loop that donates its parameters would delete those of the module.
        return jax.tree.map(jnp.copy, _to_dict(params))

    axis = next(iter(axes), None)

    def run(params, x, *, stats=None, mask=None, key=None):
        module = eqx.combine(_from_dict(params, own), rest)
        if stochastic:
            module = eqx.nn.inference_mode(module, value=key is None)
        given_stats = traverse_util.flatten_dict({} if stats is None else stats)
        real = jnp.ones(x.shape[0], bool) if mask is None else jnp.asarray(mask)
        module = equinox_norm.filled(module, given_stats, real)
        floats = [leaf for leaf in jax.tree.leaves((params, x)) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def call(x, key):
            randomness = {"key": key} if stochastic else {}
            if not norms:
                return module(x, **randomness), None
            state = equinox_norm.new_state(norms, jnp.result_type(jnp.float32, *floats))
            result = module(x, state=state, **randomness)
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], eqx.nn.State)):
                raise ValueError(
                    f"{name} has an equinox.nn.BatchNorm, but does not return the pair (outputs, state)"
                )
            return result

        if batched:
            outputs, state = call(x, key)
        else:
            keys = None if key is None or not stochastic else jax.random.split(key, x.shape[0])
            outputs, state = jax.vmap(call, out_axes=(0, None), axis_name=axis)(x, keys)
        new_stats = equinox_norm.statistics(module, state)
        return outputs, traverse_util.unflatten_dict(new_stats)

    def apply(params, x, *, key=None):
        return run(params, x, key=key)[0]

    return Model(init, apply, run if norms else None, stochastic=stochastic)


def _is_module_of(network: Network, package: str) -> TypeGuard[Callable[..., Any]]:
    """Return whether `network` is a module of a framework, without importing the framework."""
    framework = sys.modules.get(package)
    return framework is not None and isinstance(network, framework.Module)


def switches(network: Any, training: bool) -> dict[str, Any]:
    """Return the arguments that switch a module's call between training and inference, with their values."""
    values = {"deterministic": not training, "train": training, "use_running_average": not training}
    taken = inspect.signature(network.__call__).parameters
    return {name: value for name, value in values.items() if name in taken}


def call_arguments(network: Any, *offered: str) -> set[str]:
    """Return which of the `offered` arguments the network's `__call__` takes in addition to the examples."""
    rest = list(inspect.signature(network.__call__).parameters.values())[1:]
    required = [
        p.name for p in rest if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unknown = sorted(set(required) - set(offered))
    if unknown:
        raise ValueError(
            f"{type(network).__name__}.__call__ requires {unknown}; it may take the examples and {offered}"
        )
    return {p.name for p in rest if p.name in offered}


def _chosen(taken, mask, key):
    values = {"mask": mask, "deterministic": key is None, "train": key is not None, _AVERAGING: key is None}
    return {name: value for name, value in values.items() if name in taken}


def _require_mask(name, taken, mask, layer):
    if mask is not None and "mask" not in taken:
        raise ValueError(
            f"{name} normalises by batch statistics, and this batch is padded: its "
            f"__call__ must take `mask` and pass it to {layer}"
        )


def _strings(path):
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def _to_dict(tree):
    """Return the leaves of any tree as a plain nested dict with string keys."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return traverse_util.unflatten_dict({_strings(path): leaf for path, leaf in leaves})


def _from_dict(values, tree):
    """Return `tree` with the leaves of `values`, the inverse of `_to_dict`."""
    flat = traverse_util.flatten_dict(values)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_strings(path)], tree)


def _with_explicit_statistics(batch_norm):
    """Return an `nnx.BatchNorm` like `batch_norm` whose attribute alone chooses the statistics.

    It records those of the batch themselves: NNX's running averages carry no gradient, which statistics of a
    support set must.
    """

    class BatchNorm(type(batch_norm)):  # type: ignore[misc]
        def __init__(self, given):
            # NNX has already set attributes of its own, which must stay.
            for name, value in vars(given).items():
                if name not in vars(self):
                    setattr(self, name, value)

        def __call__(self, x, use_running_average=None, *, mask=None):
            if not self.use_running_average:
                stats = input_statistics(x, self.axis, mask)
                self.mean.set_value(stats["mean"])
                self.var.set_value(stats["var"])
            return super().__call__(x, use_running_average=True)

    return BatchNorm(batch_norm)


def _restarted(streams, key):
    """Return NNX's random streams at their start, each with its own key."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(streams))))

    def restarted(leaf):
        own = next(keys)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(own, leaf.shape)
        return jnp.zeros_like(leaf)

    return jax.tree.map(restarted, streams)


def _changed(before, after):
    """Return the paths at which two nested dicts do not have the identical array."""
    before, after = map(traverse_util.flatten_dict, (before, after))
    return {path for path in before.keys() | after.keys() if before.get(path) is not after.get(path)}
