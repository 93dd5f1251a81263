"""Meta-SGD: MAML that learns a step size for every parameter besides."""

import jax
import optax

from jaxmeta.checks import ArgumentError, check_number, shown
from jaxmeta.core import Key, Learner, PyTree
from jaxmeta.nn.adapters import Network
from jaxmeta.optimization_based.maml import maml


def meta_sgd(model: Network, *, rates: float | tuple[float, float] = (0.005, 0.1), **settings) -> Learner:
    r"""Meta-SGD: meta-learns the initialisation θ and a step size for each of its entries.

    θ_j = θ_{j−1} − α ⊙ ∇L^S(θ_{j−1});  after one step ∂L^Q/∂α = −∇L^S(θ) ⊙ ∇L^Q(θ_1)

    α may turn negative: direction and size of the update are both learned.

    Params: those of `jm.maml`, with α under "hyper".

    Args:
      model: as of `jm.maml`.
      rates: initial α: one for all, or the range that each is drawn from.
      **settings: of `jm.maml`, without `inner_optimizer` and `hyper`. The paper takes a single step.

    Raises:
      ValueError: `rates` is an empty range; and what `jm.maml` raises.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> task = jm.tasks.sinusoid(shots=10, queries=10).sample(jax.random.key(0))
      >>> learner = jm.meta_sgd(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> learner.init(jax.random.key(1), task)["hyper"]["head"]["kernel"].shape
      (40, 1)

    References:
      Li et al., Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017, algorithm 1; the range is
      that of public implementations.
    """
    ends = tuple(rates) if isinstance(rates, tuple | list) else (rates, rates)
    if len(ends) != 2:
        raise ArgumentError("rates", f"got {shown(rates)}; it must be a number or (low, high)")
    low, high = ends
    check_number("rates", low)
    check_number("rates", high)
    if low > high:
        raise ArgumentError("rates", f"got the range {rates}; it must be (low, high)")

    def initial(key: Key, fast: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(fast)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.uniform(own, leaf.shape, leaf.dtype) for own, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.map(lambda u: low + (high - low) * u, jax.tree.unflatten(structure, drawn))

    def descend(rates: PyTree) -> optax.GradientTransformation:
        return optax.stateless(lambda grads, params: jax.tree.map(lambda a, g: -a * g, rates, grads))

    return maml(model, inner_optimizer=descend, hyper=initial, **settings)
