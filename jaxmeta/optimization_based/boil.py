"""BOIL: MAML whose inner loop adapts only the body."""

from typing import Unpack

from jaxmeta import declare
from jaxmeta.core import Learner
from jaxmeta.nn.adapters import Network
from jaxmeta.optimization_based.anil import Head, in_head, with_head
from jaxmeta.optimization_based.maml import maml
from jaxmeta.optimization_based.settings import HeadOrBodySettings


@declare.learner()
@declare.forwards(maml)
def boil(model: Network, *, head: Head = "head", **settings: Unpack[HeadOrBodySettings]) -> Learner:
    r"""Build BOIL ("body only update in inner loop"), MAML that adapts only the body (Oh et al. 2021).

    θ = (body ψ, head w):  ψ_j = ψ_{j−1} − α ∇_ψ L^S(ψ_{j−1}, w),  meta-loss L^Q(ψ_n, w)

    Because the head is fixed during adaptation, the body has to change the representation of each task.

    Args:
      model: network to meta-learn; see `jm.maml`.
      head: name of the head, a module in the parameters of `model`, or a predicate on a leaf's path.
      **settings: settings of `jm.maml`.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `head` matches no parameter, or all of them; errors of `jm.maml`.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid(shots=10, queries=10)
      >>> learner = jm.boil(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> task = tasks.sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> fast = learner.adapt(params, task.support, jax.random.key(2))["model"]
      >>> bool((fast["head"]["kernel"] == params["model"]["head"]["kernel"]).all())
      True

    References:
      Oh et al., BOIL: Towards Representation Change for Few-Shot Learning, 2021.
    """
    inside = in_head(head)
    return with_head(model, head, maml(model, adapts=lambda path: not inside(path), **settings), body=True)
