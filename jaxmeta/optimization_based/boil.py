"""BOIL: the inner loop adapts the body alone, and the head is shared by all tasks."""

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
    r"""Build BOIL ("body only update in inner loop"), MAML that adapts the body alone (Oh et al. 2021).

    θ = (body ψ, head w):  ψ_j = ψ_{j−1} − α ∇_ψ L^S(ψ_{j−1}, w),  meta-loss L^Q(ψ_n, w)

    A head that no task changes makes the body move the features to where the head wants them.

    Args:
      model: as of `jm.maml`.
      head: name of the head, a module in the parameters of `model`, or a predicate on a leaf's path.
      **settings: as of `jm.maml`.

    Raises:
      ValueError: `head` names no parameter, or all; and what `jm.maml` raises.

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
