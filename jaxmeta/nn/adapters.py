"""From a framework's network to a `Model` of pure functions.

Whatever the framework, parameters are a plain nested dict with strings as keys, so that paths
pick them, optimizers update them and checkpoints hold them; batch statistics are values handed in
and out; randomness comes from an explicit key, and without one there is none.
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
from jaxmeta.nn.norm import STATISTICS, entering

# The modules of NNX and Equinox are callables: neither is imported before its user does.
Network = Model | linen.Module | Callable[..., Any] | tuple[Callable[..., Any], Callable[..., Any]]
SWITCHES = ("deterministic", "train")
_AVERAGING = "use_running_average"


def as_model(network: Network, argument: str = "network") -> Model:
    """`network` as a `Model`; a `Model` passes through unchanged.

    Args:
      network: one of

        - a `flax.linen.Module` of `(x)`, and of `mask`, `deterministic`, `train` or `use_running_average`
          where its `__call__` names them. One that names `deterministic` or `train` is stochastic: it may
          call `make_rng` where it is not deterministic. Batch normalisation is that of `jm.nn.BatchNorm`, or
          of `flax.linen.BatchNorm`, which normalises by the batch it is given or by the statistics it is
          handed, whatever its call says of running averages, which are not used.
        - a `flax.nnx.Module` (see `from_nnx`) or an `equinox.Module` (see `from_equinox`), whose own
          parameters are the initialisation, whatever the key; of the pair `(module, state)` that
          `equinox.nn.make_with_state` gives, the module.
        - a pair of functions `init(key, x) -> params` and `apply(params, x) -> outputs`.
      argument: what errors call it.

    Raises:
      ValueError: `network` is none of these, or its `__call__` requires another argument; or, at
        `init`, it keeps mutable state of its own other than batch statistics, or draws random numbers where
        it should be deterministic.

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
    """Outputs and batch statistics of any model, which is handed only what it takes.

    Args:
      model: statistics are None where it has none, and `key` is unused where it is deterministic.
      params: of `model`.
      x: examples.
      mask: False marks padding.
      stats: what normalises; None for the statistics of `x`, which are returned.
      key: of dropout and the like, which None turns off.

    Where several devices share the examples of a task, each computes its share, if the model is divisible.
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
        # A stream of any other name falls back on "params".
        rngs = {} if key is None else {"params": key}
        handed = set(traverse_util.flatten_dict(variables.get(STATISTICS, {})))
        with linen.intercept_methods(_explicit_statistics(handed)):
            return network.apply(variables, x, rngs=rngs, mutable=[STATISTICS], **_chosen(taken, mask, key))

    def init(key, x):
        norms: set[tuple[str, ...]] = set()
        with linen.intercept_methods(_explicit_statistics(norms, fresh=True)):
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
        given = {} if stats is None else {STATISTICS: stats}
        outputs, state = call({"params": params, **given}, x, mask, key)
        found = state.get(STATISTICS, {})
        if len(jax.tree.leaves(found)) > len(jax.tree.leaves(stats)):
            _require_mask(name, taken, mask, "its batch normalisation")
        return outputs, found

    stochastic = not taken.isdisjoint(SWITCHES)
    # One key for all examples would give every device's share the same dropout.
    divisible = getattr(network, "divisible", False) and not stochastic
    return Model(init, apply, apply_norm, stochastic, divisible)


def _explicit_statistics(statistics, fresh=False):
    """What makes each `flax.linen.BatchNorm` called beneath normalise by statistics that are values.

    The running averages of Flax carry no gradient, and statistics of a support set must.

    Args:
      statistics: paths of the statistics that the network is handed; other layers normalise by those of
        their batch, and record them as they are.
      fresh: whether the network is being initialised: then the paths of its layers' statistics are added.
    """

    def intercept(call, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, linen.BatchNorm):
            return call(*args, **kwargs)
        places = {(*layer.path, statistic) for statistic in ("mean", "var")}
        if fresh:
            statistics.update(places)
        elif not places <= statistics:
            if shared.num_shards() > 1:
                raise ValueError(
                    f"{'/'.join(layer.path)} is a flax.linen.BatchNorm, which knows only the examples of one "
                    "device, in a network with divisible = True; use jaxmeta.nn.BatchNorm"
                )
            given = inspect.signature(layer.__call__).bind(*args, **kwargs).arguments
            for statistic, value in entering(given["x"], layer.axis, given.get("mask")).items():
                layer.put_variable(STATISTICS, statistic, value)
        return call_in_inference(call, layer, _AVERAGING, args, kwargs)

    return intercept


def call_in_inference(call, layer, switch, args, kwargs):
    """Call a layer of Flax in inference, whatever its attribute and its caller say.

    Args:
      call: the call that was intercepted, with its arguments.
      layer: of which `switch` is an attribute and an argument.
    """
    told = getattr(layer, switch)
    object.__setattr__(layer, switch, None)
    try:
        return call(*args[:1], **{**kwargs, switch: True})
    finally:
        object.__setattr__(layer, switch, told)


def from_nnx(network: Callable[..., Any]) -> Model:
    """A `Model` of a Flax NNX module.

    Its parameters are its `nnx.Param`. `nnx.BatchNorm` normalises by the batch it is given or by
    the statistics it is handed, whatever its call says of running averages, which are not used.
    Random streams (of `nnx.Dropout`) start anew from the explicit key in each call.

    Args:
      network: a function `nnx.Rngs -> flax.nnx.Module`, called for each initialisation; or a module,
        which is never changed, and whose own parameters are every initialisation. The module is
        called with `x`, and with `mask`, `deterministic`, `train` and `use_running_average` where its
        `__call__` takes them.

    Raises:
      ValueError: `network` makes no NNX module; `__call__` requires another argument; an `nnx.Dropout`
        has no `rngs`; or a call changes state other than `nnx.BatchNorm`'s.

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

    given = isinstance(network, nnx.Module)
    template = nnx.clone(network) if given else network(nnx.Rngs(0))
    name = type(template).__name__
    if not isinstance(template, nnx.Module):
        raise ValueError(f"network must be a flax.nnx.Module or make one, got one that makes {name}")
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
        """Parameters, statistics, random streams, and the rest."""
        parts = nnx.split(module, nnx.Param, nnx.BatchStat, nnx.RngState, ...)[1:]
        return [nnx.to_pure_dict(part) for part in parts]

    definition = nnx.graphdef(template)
    own, averages, streams, rest = state(template)
    others = [path for path in traverse_util.flatten_dict(averages) if path[:-1] not in norms]
    if others:
        raise ValueError(f"{name} keeps statistics in {others}, which are not of an nnx.BatchNorm")

    averaged = traverse_util.flatten_dict(_to_dict(averages))

    def run(params, x, *, stats=None, mask=None, key=None):
        handed = traverse_util.flatten_dict({} if stats is None else stats)
        module = nnx.merge(
            definition,
            _from_dict(params, own),
            _from_dict(traverse_util.unflatten_dict({**averaged, **handed}), averages),
            streams if key is None else _restarted(streams, key),
            rest,
        )
        module.set_attributes(deterministic=key is None, raise_if_not_found=False)
        for path, layer in nnx.iter_modules(module):
            if path in norms:
                layer.use_running_average = (*map(str, path), "mean") in handed  # type: ignore[attr-defined]
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
                f"{name} draws random numbers where it should be deterministic; leave `deterministic` of its "
                "layers to their attribute"
            )
        if len(handed) < len(averaged):
            _require_mask(name, taken, mask, "nnx.BatchNorm")
        return outputs, _to_dict(after[1])

    def init(key, x):
        params = _to_dict(own if given else state(network(nnx.Rngs(key)))[0])
        jax.eval_shape(run, params, x)
        # A training loop that donates its parameters must not delete the module's.
        return jax.tree.map(jnp.copy, params)

    def apply(params, x, *, key=None):
        return run(params, x, key=key)[0]

    return Model(init, apply, run if averages else None, stochastic=bool(streams))


def from_equinox(network: Callable[..., Any], *, batched: bool = False) -> Model:
    """A `Model` of an Equinox module.

    Its parameters are its inexact arrays. It is stochastic where its `__call__` takes `key`: each
    example then gets a key of its own, and without one `key` is None and the module is in
    `equinox.nn.inference_mode`.

    A network with `equinox.nn.BatchNorm` has a `__call__` of `x` and `state`, and returns outputs and state,
    as Equinox asks. Each such layer normalises by the batch, or by the statistics it is handed, whatever its
    mode; its running averages are not used. Padding is left out of the statistics without a `mask` in the
    network.

    Images come as `(h, w, c)`, and Equinox's convolutions want `(c, h, w)`: transpose in `__call__`.

    Args:
      network: a function `key -> equinox.Module`, called for each initialisation; or a module,
        whose own parameters are every initialisation. The function may return what
        `equinox.nn.make_with_state` does.
      batched: whether the module takes all examples at once; otherwise it is called for each, by
        `jax.vmap`.

    Raises:
      ValueError: `network` makes no Equinox module; `__call__` requires another argument, or takes or returns
        no state where a layer is an `equinox.nn.BatchNorm`; another layer is stateful; or, not `batched`, two
        layers normalise over axes of different names.

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

    given = isinstance(network, eqx.Module)

    def module_of(made: Any) -> Any:
        module = made[0] if isinstance(made, tuple) and len(made) == 2 else made
        if not isinstance(module, eqx.Module):
            raise ValueError(
                f"network must be an equinox.Module or make one, got one that makes {type(module).__name__}"
            )
        return equinox_norm.with_explicit_statistics(module)

    template, norms = module_of(network if given else network(jax.random.key(0)))
    name = type(template).__name__
    taken = call_arguments(template, "key", "state")
    if norms and "state" not in taken:
        raise ValueError(
            f"{name} has an equinox.nn.BatchNorm, {'/'.join(next(iter(norms)))}; its __call__ must take "
            "`state`, hand it to that layer, and return outputs and state"
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
        params = own if given else eqx.filter(module_of(network(key))[0], eqx.is_inexact_array)
        # A training loop that donates its parameters must not delete the module's.
        return jax.tree.map(jnp.copy, _to_dict(params))

    axis = next(iter(axes), None)

    def run(params, x, *, stats=None, mask=None, key=None):
        module = eqx.combine(_from_dict(params, own), rest)
        if stochastic:
            module = eqx.nn.inference_mode(module, value=key is None)
        handed = traverse_util.flatten_dict({} if stats is None else stats)
        real = jnp.ones(x.shape[0], bool) if mask is None else jnp.asarray(mask)
        module = equinox_norm.filled(module, handed, real)
        floats = [leaf for leaf in jax.tree.leaves((params, x)) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def call(x, key):
            randomness = {"key": key} if stochastic else {}
            if not norms:
                return module(x, **randomness), None
            state = equinox_norm.new_state(norms, jnp.result_type(jnp.float32, *floats))
            result = module(x, state=state, **randomness)
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], eqx.nn.State)):
                raise ValueError(
                    f"{name} has an equinox.nn.BatchNorm, and returns no pair of outputs and state"
                )
            return result

        if batched:
            outputs, state = call(x, key)
        else:
            keys = None if key is None or not stochastic else jax.random.split(key, x.shape[0])
            outputs, state = jax.vmap(call, out_axes=(0, None), axis_name=axis)(x, keys)
        found = equinox_norm.statistics(module, state)
        return outputs, traverse_util.unflatten_dict(found)

    def apply(params, x, *, key=None):
        return run(params, x, key=key)[0]

    return Model(init, apply, run if norms else None, stochastic=stochastic)


def _is_module_of(network: Network, package: str) -> TypeGuard[Callable[..., Any]]:
    """Whether `network` is a module of a framework that its user, but not this file, has imported."""
    framework = sys.modules.get(package)
    return framework is not None and isinstance(network, framework.Module)


def switches(network: Any, training: bool) -> dict[str, Any]:
    """Those arguments of a module's call that say whether it is being trained, with their values."""
    values = {"deterministic": not training, "train": training, "use_running_average": not training}
    taken = inspect.signature(network.__call__).parameters
    return {name: value for name, value in values.items() if name in taken}


def call_arguments(network: Any, *offered: str) -> set[str]:
    """Which arguments on offer the network's `__call__` takes beside the examples."""
    rest = list(inspect.signature(network.__call__).parameters.values())[1:]
    required = [
        p.name for p in rest if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unknown = sorted(set(required) - set(offered))
    if unknown:
        raise ValueError(
            f"{type(network).__name__}.__call__ requires {unknown}; beside the examples it may take {offered}"
        )
    return {p.name for p in rest if p.name in offered}


def _chosen(taken, mask, key):
    values = {"mask": mask, "deterministic": key is None, "train": key is not None, _AVERAGING: key is None}
    return {name: value for name, value in values.items() if name in taken}


def _require_mask(name, taken, mask, layer):
    if mask is not None and "mask" not in taken:
        raise ValueError(
            f"{name} normalises by batch statistics, and this batch is padded: its "
            f"__call__ must take `mask` and hand it to {layer}"
        )


def _strings(path):
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def _to_dict(tree):
    """The leaves of any tree in a plain nested dict whose keys are strings."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return traverse_util.unflatten_dict({_strings(path): leaf for path, leaf in leaves})


def _from_dict(values, tree):
    """`tree` with its leaves replaced by those of `values`: the inverse of `_to_dict`."""
    flat = traverse_util.flatten_dict(values)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_strings(path)], tree)


def _with_explicit_statistics(batch_norm):
    """An `nnx.BatchNorm` like the given one, told only by its attribute which statistics to use.

    It records those of the batch as they are: the running averages of NNX carry no gradient, and
    those of a support set must.
    """

    class BatchNorm(type(batch_norm)):  # type: ignore[misc]
        def __init__(self, given):
            # NNX's own records of a module are there before, and stay.
            for name, value in vars(given).items():
                if name not in vars(self):
                    setattr(self, name, value)

        def __call__(self, x, use_running_average=None, *, mask=None):
            if not self.use_running_average:
                stats = entering(x, self.axis, mask)
                self.mean.set_value(stats["mean"])
                self.var.set_value(stats["var"])
            return super().__call__(x, use_running_average=True)

    return BatchNorm(batch_norm)


def _restarted(streams, key):
    """NNX's random streams at their start, each with a key of its own."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(streams))))

    def restarted(leaf):
        own = next(keys)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(own, leaf.shape)
        return jnp.zeros_like(leaf)

    return jax.tree.map(restarted, streams)


def _changed(before, after):
    """Where two nested dicts do not hold the very same arrays."""
    before, after = map(traverse_util.flatten_dict, (before, after))
    return {path for path in before.keys() | after.keys() if before.get(path) is not after.get(path)}
