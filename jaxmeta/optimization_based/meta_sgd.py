"""Meta-SGD: MAML with a learned step size for every parameter."""

from typing import Unpack, get_args

import jax
import optax

from jaxmeta import declare
from jaxmeta.checks import ArgumentError, check_number, check_word, format_value
from jaxmeta.core import Key, Learner, PyTree, UnrolledOrder
from jaxmeta.nn.adapters import Network
from jaxmeta.optimization_based.maml import maml
from jaxmeta.optimization_based.settings import MetaSGDSettings


@declare.learner()
@declare.forwards(maml)
def meta_sgd(
    model: Network,
    *,
    inner_lr: float | tuple[float, float] = (0.005, 0.1),
    order: UnrolledOrder = "second",
    **settings: Unpack[MetaSGDSettings],
) -> Learner:
    r"""Build Meta-SGD, MAML with a learned step size for every parameter (Li et al. 2017).

    θ_j = θ_{j−1} − α ⊙ ∇L^S(θ_{j−1});  after one step ∂L^Q/∂α = −∇L^S(θ) ⊙ ∇L^Q(θ_1)

    α may become negative, so both the direction and the size of the update are learned.

    Params: as in `jm.maml`, with α under "hyper".

    Args:
      model: network to meta-learn; see `jm.maml`.
      inner_lr: initial step size α: one number for all parameters, or a range (low, high) from which each is
        drawn uniformly.
      order: order of the meta-gradient: "second" differentiates through the inner gradients, "first" treats
        them as constants.
      **settings: settings of `jm.maml`. The paper takes a single inner step.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `inner_lr` with low > high; errors of `jm.maml`.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> learner = jm.meta_sgd(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> learner.init(jax.random.key(1), task)["hyper"]["head"]["kernel"].shape
      (40, 1)

    References:
      Li et al., Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017, algorithm 1. The default
      range is taken from public implementations.
    """
    # "implicit" is excluded: the minimum does not depend on the step size, which would get no gradient.
    check_word("order", order, get_args(UnrolledOrder))
    ends = tuple(inner_lr) if isinstance(inner_lr, tuple | list) else (inner_lr, inner_lr)
    if len(ends) != 2:
        raise ArgumentError("inner_lr", f"got {format_value(inner_lr)}; it must be a number or (low, high)")
    low, high = ends
    check_number("inner_lr", low, 0)
    check_number("inner_lr", high, 0)
    if low > high:
        raise ArgumentError("inner_lr", f"got the range {inner_lr}; it must be (low, high) with low <= high")

    def initial_rates(key: Key, fast: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(fast)
        keys = jax.random.split(key, len(leaves))
        samples = [
            jax.random.uniform(leaf_key, leaf.shape, leaf.dtype)
            for leaf_key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.map(lambda u: low + (high - low) * u, jax.tree.unflatten(structure, samples))

    def descend(rates: PyTree) -> optax.GradientTransformation:
        return optax.stateless(lambda grads, params: jax.tree.map(lambda a, g: -a * g, rates, grads))

    return maml(model, inner_optimizer=descend, hyper=initial_rates, order=order, **settings)
