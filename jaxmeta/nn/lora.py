"""Low-rank adaptation: a network whose kernels change by the product of two thin factors."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from jaxmeta.checks import ArgumentError, check_count, check_number, shown
from jaxmeta.core import Key, Model, Params, PyTree
from jaxmeta.nn.adapters import Network, as_model
from jaxmeta.paths import Patterns, leaves_by_path, matching, shortened

NETWORK, FACTORS = "network", "lora"
# What Equinox calls a kernel, of which outputs are the first axis.
_OUTPUTS_FIRST = "weight"
# Axes of a dense layer's kernel and of a convolution's.
_AXES = (2, 4)
# Beyond every key that the network's initialisation is known to fold in.
_DRAW = np.uint32(0xFFFFFFFD)


def lora(network: Network, *, rank: int = 4, alpha: float | None = None, where: Patterns = "**") -> Model:
    r"""Build a `Model` of `network` with low-rank factors beside its kernels (Hu et al. 2021).

    W' = W + (α/r) A B,  A ∈ R^{m×r} from N(0, 1/m),  B ∈ R^{r×n} zero at first

    W is a kernel as a matrix of m inputs and n outputs: of a dense layer as it is, of a convolution with
    height × width × channels as its inputs. At initialisation the outputs are those of `network` with the
    same key.

    Params: `{"network": those of network, "lora": {…: {"a", "b"}}}`, where the factors of the kernel
    "network/Dense_0/kernel" are "lora/Dense_0/kernel/a" and "…/b". So `jm.maml(…, adapts="lora")` adapts the
    factors alone, `jm.anil` those of the head with the head, and `jm.transfer.fine_tune(…, train="lora")`
    trains them alone, of a `jm.transfer.classifier` with `train=["body/lora", "head"]`. Batch statistics
    likewise are under "network". Pretrained parameters of `network` take the place of those under "network":
    `jm.transfer.swap_subtree(params, "network", pretrained)`.

    Args:
      network: of any kind that `jm.nn.as_model` takes.
      rank: r, the most that the rank of a kernel's change can be. The factors of a kernel with a smaller side
        have the rank of that side.
      alpha: α, by which a change of rank does not need another step size; as `rank` if None.
      where: patterns of what gets factors, such as "head" or "**/query/kernel": of the leaves that they match
        those of 2 or 4 axes, which are the kernels of dense layers and of convolutions. See
        `jm.transfer.matching`. Outputs are the first axis of a leaf called "weight", as in Equinox, and the
        last of any other.

    Raises:
      ValueError: `rank` below 1; `alpha` that is not positive; what `jm.nn.as_model` raises; and at `init`,
        a pattern that matches no leaf, or patterns that match none of 2 or 4 axes.

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
        draw = jax.random.fold_in(key, _DRAW)
        factors = {}
        for number, (path, kernel) in enumerate(_kernels(params, where).items()):
            inputs, outputs = _sides(path, kernel.shape)
            thin = min(rank, inputs, outputs)
            a = jax.random.normal(jax.random.fold_in(draw, number), (inputs, thin), kernel.dtype)
            factors[path] = {
                "a": a / math.sqrt(inputs),
                "b": jnp.zeros((thin, outputs), kernel.dtype),
            }
        nested = traverse_util.unflatten_dict(
            {tuple(path.split("/")): both for path, both in factors.items()}
        )
        return {NETWORK: params, FACTORS: nested}

    def changed(params: Params) -> Params:
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

    def apply(params: Params, x: Any, **settings: Any) -> Any:
        return model.apply(changed(params), x, **settings)

    def apply_norm(
        params: Params, x: Any, *, stats: PyTree | None = None, **settings: Any
    ) -> tuple[Any, PyTree]:
        assert model.apply_norm is not None
        # Under the same name as the parameters, by whose paths layers and their statistics are found.
        given = None if stats is None else stats.get(NETWORK)
        outputs, found = model.apply_norm(changed(params), x, stats=given, **settings)
        return outputs, {NETWORK: found}

    return model._replace(init=init, apply=apply, apply_norm=None if model.apply_norm is None else apply_norm)


def _kernels(params: Params, where: Patterns) -> dict[str, Any]:
    """The leaves that get factors, by their paths."""
    leaves = leaves_by_path(params)
    kernels = {path: leaves[path] for path in matching(params, where, "where") if _is_kernel(leaves[path])}
    if not kernels:
        shapes = [f"{path} {jnp.shape(leaf)}" for path, leaf in leaves.items()]
        raise ArgumentError(
            "where",
            f"got {shown(where)}, which matches no floating-point leaf of 2 or 4 axes; the leaves are "
            f"{', '.join(shortened(shapes))}",
        )
    return kernels


def _is_kernel(leaf: Any) -> bool:
    return jnp.ndim(leaf) in _AXES and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _sides(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of inputs and of outputs of a kernel."""
    outputs = shape[0 if _is_outputs_first(path) else -1]
    return math.prod(shape) // max(outputs, 1), outputs


def _product(path: str, shape: tuple[int, ...], a: Array, b: Array) -> Array:
    change = a @ b
    return (change.T if _is_outputs_first(path) else change).reshape(shape)


def _is_outputs_first(path: str) -> bool:
    return path.rpartition("/")[2] == _OUTPUTS_FIRST
