"""Low-rank adaptation: a network whose kernels change by the product of two low-rank factors."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, check_count, check_number, format_value
from jaxmeta.core import Key, Model, Params, PyTree
from jaxmeta.nn.adapters import Network, as_model
from jaxmeta.paths import Patterns, leaves_by_path, matching, shortened

NETWORK, FACTORS = "network", "lora"
# Equinox's name for a kernel, whose first axis is the outputs.
_OUTPUTS_FIRST = "weight"
# Number of axes of a dense layer's kernel and of a 2-D convolution's.
_AXES = (2, 4)
# Folded into the key for the factors' draws. No known initialisation folds in this number itself, so that the
# factors are independent of the network's parameters.
_FACTORS_KEY = np.uint32(0xFFFFFFFD)


def lora(network: Network, *, rank: int = 4, alpha: float | None = None, where: Patterns = "**") -> Model:
    r"""Build a `Model` of `network` with low-rank factors added to its kernels.

    W' = W + (α/r) A B,  A ∈ R^{m×r} from N(0, 1/m),  B ∈ R^{r×n}, initially zero

    W is a kernel as a matrix of m inputs and n outputs; the inputs of a convolution are
    height × width × channels. At initialisation the outputs are equal to those of `network` initialised with
    the same key.

    The parameters are `{"network": params of network, "lora": {…: {"a", "b"}}}`, where the factors of the
    kernel "network/Dense_0/kernel" are "lora/Dense_0/kernel/a" and "lora/Dense_0/kernel/b". Hence
    `jm.maml(…, adapts="lora")` adapts the factors alone, `jm.anil` adapts the head and its factors, and
    `jm.transfer.fine_tune(…, train="lora")` trains the factors alone (`train=["body/lora", "head"]` for a
    `jm.transfer.classifier`). Batch statistics are under "network", too. To start from pretrained parameters
    of `network`, use `jm.transfer.swap_subtree(params, "network", pretrained)`.

    Args:
      network: network of any kind that `jm.nn.as_model` takes.
      rank: rank r of the factors, an upper bound on the rank of a kernel's change. A kernel with a side
        shorter than r has factors of that side's length.
      alpha: scale α, with which `rank` can be changed at the same step size; None for `rank`.
      where: patterns of the kernels that get factors, such as "head" or "**/query/kernel" (see
        `jm.transfer.matching`). Of the matching leaves, the floating-point ones of 2 or 4 axes count: kernels
        of dense layers and of convolutions. Outputs are the first axis of a leaf named "weight", as in
        Equinox, and the last axis of any other.

    Raises:
      ValueError: `rank` is below 1; `alpha` is not positive; `jm.nn.as_model` refuses the network; or, at
        `init`, a pattern matches no leaf, or no matching leaf is a kernel.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> model = jm.nn.lora(jm.nn.MLP(out=5, hidden=(32,)), rank=2)
      >>> params = model.init(jax.random.key(0), jnp.zeros((3, 8)))
      >>> jax.tree.map(jnp.shape, params["lora"]["Dense_0"])
      {'kernel': {'a': (8, 2), 'b': (2, 32)}}
      >>> learner = jm.maml(model, adapts="lora")

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1.
    """
    check_count("rank", rank)
    if alpha is not None:
        check_number("alpha", alpha, above=0)
    model = as_model(network)
    scale = 1.0 if alpha is None else alpha / rank

    def init(key: Key, x: Any) -> Params:
        params = model.init(key, x)
        draw = jax.random.fold_in(key, _FACTORS_KEY)
        factors = {}
        for number, (path, kernel) in enumerate(_kernels(params, where).items()):
            inputs, outputs = _sides(path, kernel.shape)
            factor_rank = min(rank, inputs, outputs)
            a = jax.random.normal(jax.random.fold_in(draw, number), (inputs, factor_rank), kernel.dtype)
            factors[path] = {
                "a": a / math.sqrt(inputs),
                "b": jnp.zeros((factor_rank, outputs), kernel.dtype),
            }
        nested = traverse_util.unflatten_dict(
            {tuple(path.split("/")): pair for path, pair in factors.items()}
        )
        return {NETWORK: params, FACTORS: nested}

    def apply(params: Params, x: Any, **settings: Any) -> Any:
        return model.apply(merge_lora(params, scale), x, **settings)

    def apply_norm(
        params: Params, x: Any, *, stats: PyTree | None = None, **settings: Any
    ) -> tuple[Any, PyTree]:
        assert model.apply_norm is not None
        # Statistics have the prefix of the parameters, because learners match layers with their statistics by
        # path.
        network_stats = None if stats is None else stats.get(NETWORK)
        outputs, network_stats = model.apply_norm(
            merge_lora(params, scale), x, stats=network_stats, **settings
        )
        return outputs, {NETWORK: network_stats}

    return model._replace(init=init, apply=apply, apply_norm=None if model.apply_norm is None else apply_norm)


def merge_lora(params: Params, scale: float = 1.0) -> Params:
    """Return the network's parameters with the products of the low-rank factors added to its kernels.

    Args:
      params: parameters of a model of `jm.nn.lora`.
      scale: α/r of that model, 1 by default.

    Returns:
      Parameters of the network inside it, with which it gives the same outputs.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxmeta as jm
      >>> network = jm.nn.MLP(out=5, hidden=(32,))
      >>> params = jm.nn.lora(network, rank=2).init(jax.random.key(0), jnp.zeros((3, 8)))
      >>> network.apply({"params": jm.nn.merge_lora(params)}, jnp.zeros((3, 8))).shape
      (3, 5)
    """
    factors = leaves_by_path(params[FACTORS])
    leaves, structure = jax.tree.flatten(params[NETWORK])
    return jax.tree.unflatten(
        structure,
        [
            leaf + scale * _product(path, leaf.shape, factors[f"{path}/a"], factors[f"{path}/b"])
            if f"{path}/a" in factors
            else leaf
            for path, leaf in zip(leaves_by_path(params[NETWORK]), leaves, strict=True)
        ],
    )


def _kernels(params: Params, where: Patterns) -> dict[str, Any]:
    """Return the kernels that get factors, by their paths."""
    leaves = leaves_by_path(params)
    kernels = {path: leaves[path] for path in matching(params, where, "where") if _is_kernel(leaves[path])}
    if not kernels:
        shapes = [f"{path} {jnp.shape(leaf)}" for path, leaf in leaves.items()]
        raise ArgumentError(
            "where",
            f"got {format_value(where)}, which matches no floating-point leaf of 2 or 4 axes; the leaves are "
            f"{', '.join(shortened(shapes))}",
        )
    return kernels


def _is_kernel(leaf: Any) -> bool:
    return jnp.ndim(leaf) in _AXES and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _sides(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a kernel."""
    outputs = shape[0 if _is_outputs_first(path) else -1]
    return math.prod(shape) // max(outputs, 1), outputs


def _product(path: str, shape: tuple[int, ...], a: Array, b: Array) -> Array:
    change = a @ b
    return (change.T if _is_outputs_first(path) else change).reshape(shape)


def _is_outputs_first(path: str) -> bool:
    return path.rpartition("/")[2] == _OUTPUTS_FIRST
