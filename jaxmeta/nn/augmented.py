"""Layers with slow weights, which are trained, and fast weights, which are passed in.

A layer is called with `(x, fast=None)`. Each set of fast weights W* is applied separately, and the
activations are added, not the weights:

    z = a(W h) + a(W* h).

With no fast weights, or with fast weights of zero, a layer computes a(W h). Two modules that generate fast
weights from gradients, one coordinate at a time, are here too.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxmeta.checks import ArgumentError
from jaxmeta.core import Key, Params
from jaxmeta.nn.conv import conv
from jaxmeta.nn.coordinatewise import CoordinatewiseLSTM, log_and_sign
from jaxmeta.nn.defaults import relu
from jaxmeta.nn.embedding import flattened, max_pool_2x2, require_images

# None; a tree like the slow weights, from which layers may be missing; or a tuple of such trees.
Fast = Mapping[str, Any] | tuple[Any, ...] | None
Activation = Callable[[Array], Array]
PREPROCESS = 7.0


def published_init(key: Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Array:
    """Draw from U[−0.1, 0.1), as all slow weights of the published networks are initialised."""
    return jax.random.uniform(key, shape, dtype, -0.1, 0.1)


def _fast_of_layer(fast: Fast, name: str) -> Any:
    """Return the fast weights of the layer `name` of a network; None where it has none.

    Examples:
      >>> _fast_of_layer({"fc": {"kernel": 1}}, "fc"), _fast_of_layer({"fc": {"kernel": 1}}, "head")
      ({'kernel': 1}, None)
      >>> _fast_of_layer(({"fc": 1}, {"fc": 2}), "fc")
      (1, 2)
    """
    if isinstance(fast, tuple):
        return tuple(_fast_of_layer(each, name) for each in fast)
    return None if fast is None else fast.get(name)


def _kernels(slow: Array, fast: Fast) -> list[Array]:
    """Return the slow kernel and the kernel of each set of fast weights."""
    sets = fast if isinstance(fast, tuple) else (fast,)
    kernels = [each["kernel"] for each in sets if each is not None]
    for kernel in kernels:
        if kernel.shape != slow.shape:
            raise ArgumentError(
                "fast",
                f"got a kernel of shape {kernel.shape} for a layer whose slow kernel has {slow.shape}; "
                "they must agree; if fast weights differ between examples, use jax.vmap over the examples",
            )
    return [slow, *kernels]


def _sum_of_activations(
    product: Callable[[Array, Array], Array],
    x: Array,
    kernels: Sequence[Array],
    activation: Activation | None,
) -> Array:
    x, *kernels = promote_dtype(x, *kernels, dtype=None)
    terms = [product(x, kernel) for kernel in kernels]
    first, *others = terms if activation is None else map(activation, terms)
    return sum(others, start=first)


class AugmentedDense(linen.Module):
    """A linear layer without bias, a(W h) + a(W* h).

    Attributes:
      features: width of the output.
      activation: the activation a; None for W h + W* h.
      kernel_init: initialiser of the slow weights.

    Raises:
      ValueError: the shape of fast weights differs from that of the slow ones.

    Examples:
      >>> import jax.numpy as jnp
      >>> layer, h = AugmentedDense(1), jnp.ones((1, 1))
      >>> plus, minus = {"kernel": jnp.ones((1, 1))}, {"kernel": -jnp.ones((1, 1))}
      >>> float(layer.apply({"params": plus}, h, minus)[0, 0])  # the weights add up to 0
      1.0

    References:
      Munkhdalai & Yu, Meta Networks, 2017, section 3.3.
    """

    features: int
    activation: Activation | None = relu
    kernel_init: Callable[..., Any] = published_init

    @linen.compact
    def __call__(self, x: Float[Array, "n d"], fast: Fast = None) -> Float[Array, "n features"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return _sum_of_activations(jnp.matmul, x, _kernels(kernel, fast), self.activation)


class AugmentedConv(linen.Module):
    """A convolution without bias, a(W ∗ h) + a(W* ∗ h).

    Under `jax.vmap` over examples, each with its own fast weights, the slow kernel is still applied to all
    examples in one convolution.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      strides: step of the window along height and width.
      padding: "SAME" or "VALID".
      activation: the activation a; None for a sum of convolutions.
      kernel_init: initialiser of the slow weights.

    Raises:
      ValueError: the shape of fast weights differs from that of the slow ones.

    References:
      Munkhdalai & Yu, Meta Networks, 2017, section 3.3.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Literal["SAME", "VALID"] = "SAME"
    activation: Activation | None = relu
    kernel_init: Callable[..., Any] = published_init

    @linen.compact
    def __call__(self, x: Float[Array, "n h w c"], fast: Fast = None) -> Float[Array, "n h2 w2 features"]:
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))

        def convolve(x: Array, kernel: Array) -> Array:
            return conv(x, kernel, self.strides, self.padding)

        return _sum_of_activations(convolve, x, _kernels(kernel, fast), self.activation)


def max_pool_2x2_ceil(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Pool by 2×2 maxima with stride 2; an odd last row or column is padded to a window of its own.

    Examples:
      >>> import jax.numpy as jnp
      >>> max_pool_2x2_ceil(-jnp.ones((1, 3, 5, 1))).shape
      (1, 2, 3, 1)
    """
    edges = ((0, 0, 0), *((0, size % 2, 0) for size in x.shape[1:3]), (0, 0, 0))
    return max_pool_2x2(jax.lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), edges))


class AugmentedCNN(linen.Module):
    """The Omniglot network of Meta Networks.

    3×3 convolutions with ReLU and 2×2 max-pooling are followed by linear layers; there are neither biases nor
    normalisation. 28×28 images shrink to 14, 7, 4, 2 and 1. With `ways` it is a base learner: "fc" has a ReLU
    and "head" is linear; for 5 ways it has 152,448 weights, 148,032 of them in convolutions. With `ways=None`
    it is an embedding, whose last layer "fc" is linear.

    Attributes:
      ways: width of the linear layer "head"; None for an embedding without one.
      filters: channels of every convolution.
      blocks: number of convolutions, "conv_0", …; 0 for a network of linear layers, which takes inputs of
        any shape.
      features: width of the linear layer "fc".
      kernel_init: initialiser of the slow weights.

    Raises:
      ValueError: the shape of fast weights differs from that of the slow ones.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network, x = AugmentedCNN(ways=5), jnp.ones((3, 28, 28, 1))
      >>> slow = network.init(jax.random.key(0), x)["params"]
      >>> sum(leaf.size for leaf in jax.tree.leaves(slow))
      152448
      >>> fast = jax.tree.map(jnp.zeros_like, slow)
      >>> bool((network.apply({"params": slow}, x, fast) == network.apply({"params": slow}, x)).all())
      True

    References:
      Munkhdalai & Yu, Meta Networks, 2017, section 4.1.1, and the official code, whose pooling does not drop
      an odd last row.
    """

    ways: int | None = None
    filters: int = 64
    blocks: int = 5
    features: int = 64
    kernel_init: Callable[..., Any] = published_init

    @linen.compact
    def __call__(self, x: Float[Array, " n *shape"], fast: Fast = None) -> Float[Array, "n out"]:
        if self.blocks:
            require_images(x)
        for i in range(self.blocks):
            name = f"conv_{i}"
            layer = AugmentedConv(self.filters, kernel_init=self.kernel_init, name=name)
            x = max_pool_2x2_ceil(layer(x, _fast_of_layer(fast, name)))
        x = flattened(x)
        activation = None if self.ways is None else jax.nn.relu
        fc = AugmentedDense(self.features, activation, self.kernel_init, name="fc")
        x = fc(x, _fast_of_layer(fast, "fc"))
        if self.ways is None:
            return x
        head = AugmentedDense(self.ways, None, self.kernel_init, name="head")
        return head(x, _fast_of_layer(fast, "head"))


class Augmented(NamedTuple):
    """A network of slow and fast weights as pure functions.

    Attributes:
      init: `(key, x) -> slow`.
      apply: `(slow, x, fast=None) -> outputs`.
    """

    init: Callable[[Key, Array], Params]
    apply: Callable[..., Array]


def as_augmented(network: Any, argument: str = "network") -> Augmented:
    """Return `network` as an `Augmented`.

    Args:
      network: a module of flax.linen that is called with `(x, fast=None)`, made of `AugmentedConv` and
        `AugmentedDense`; or an object with pure functions `init(key, x)` and `apply(slow, x, fast=None)`.
      argument: name of the argument in errors.

    Raises:
      ValueError: `network` takes no `fast`; or, at `init`, it keeps state in addition to its weights.
    """
    call = type(network).__call__ if isinstance(network, linen.Module) else getattr(network, "apply", None)
    if call is None or "fast" not in inspect.signature(call).parameters:
        raise ArgumentError(
            argument,
            f"got {type(network).__name__}, whose call takes no `fast`; it must take (x, fast=None), as "
            "jm.nn.AugmentedCNN does; build such modules from jm.nn.AugmentedConv and jm.nn.AugmentedDense",
        )
    if not isinstance(network, linen.Module):
        return Augmented(network.init, network.apply)

    def init(key: Key, x: Array) -> Params:
        variables = network.init(key, x)
        if set(variables) != {"params"}:
            raise ArgumentError(
                argument,
                f"got {type(network).__name__}, which keeps {sorted(variables)}; it must have weights only",
            )
        return variables["params"]

    def apply(params: Params, x: Array, fast: Fast = None) -> Any:
        return network.apply({"params": params}, x, fast=fast)

    return Augmented(init, apply)


class TaskGenerator(linen.Module):
    """The generator of a task's fast weights: an LSTM over the gradients of samples, then a linear layer.

    Every coordinate has its own state, and all share the weights. The output is that after the last sample.

    Attributes:
      hidden: width of the LSTM's state.
      preprocess: the constant p of `log_and_sign`.
      kernel_init: initialiser of the kernels of both layers.

    References:
      Munkhdalai & Yu, Meta Networks, 2017, section 3.1: the function d with weights G.
    """

    hidden: int = 20
    preprocess: float = PREPROCESS
    kernel_init: Callable[..., Any] = published_init

    @linen.compact
    def __call__(
        self, gradients: Float[Array, "steps n"], valid: Bool[Array, " steps"] | None = None
    ) -> Float[Array, " n"]:
        """Return the fast weights; steps at which `valid` is False do not change the state."""
        steps, n = gradients.shape
        if valid is None:
            valid = jnp.ones(steps, bool)

        cell = CoordinatewiseLSTM(self.hidden, kernel_init=self.kernel_init, name="lstm")
        if self.is_initializing():
            zeros = jnp.zeros((self.hidden, n), gradients.dtype)
            cell((zeros, zeros), log_and_sign(gradients[0], self.preprocess))
        lstm, weights = cell.unbind()
        zeros = jnp.zeros((self.hidden, n), jnp.result_type(gradients, *jax.tree.leaves(weights)))

        def step(state: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
            gradient, is_valid = inputs
            new_state, _ = lstm.apply(weights, state, log_and_sign(gradient, self.preprocess))
            return jax.tree.map(lambda new, old: jnp.where(is_valid, new, old), new_state, state), None

        (h, _), _ = jax.lax.scan(step, (zeros, zeros), (gradients, valid))
        return _linear(self, "output", h, 1)[0]


class ExampleGenerator(linen.Module):
    """The generator of an example's fast weights: an MLP on every coordinate of its gradient.

    Attributes:
      hidden: width of both hidden layers.
      preprocess: the constant p of `log_and_sign`.
      kernel_init: initialiser of the kernels of all layers.

    References:
      Munkhdalai & Yu, Meta Networks, 2017, section 3.2: the function m with weights Z.
    """

    hidden: int = 20
    preprocess: float = PREPROCESS
    kernel_init: Callable[..., Any] = published_init

    @linen.compact
    def __call__(self, gradients: Float[Array, " n"]) -> Float[Array, " n"]:
        x = log_and_sign(gradients, self.preprocess)
        for i in range(2):
            x = jax.nn.relu(_linear(self, f"hidden_{i}", x, self.hidden))
        return _linear(self, "output", x, 1)[0]


def _linear(module: Any, name: str, x: Float[Array, "d n"], features: int) -> Float[Array, "features n"]:
    """Apply a linear layer with bias to each coordinate; coordinates are the last axis."""
    kernel = module.param(f"{name}_kernel", module.kernel_init, (x.shape[0], features))
    bias = module.param(f"{name}_bias", linen.initializers.zeros, (features,))
    return jnp.tensordot(kernel, x, (0, 0)) + bias[:, None]
