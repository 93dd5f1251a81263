"""ANIL: the inner loop adapts the head alone, and the body is shared by all tasks."""

from collections.abc import Callable
from typing import Unpack

import jax

from jaxmeta import declare
from jaxmeta.checks import ArgumentError
from jaxmeta.core import Key, Learner, Params, Task
from jaxmeta.nn.adapters import Network, as_model
from jaxmeta.optimization_based.maml import maml
from jaxmeta.optimization_based.settings import HeadOrBodySettings
from jaxmeta.optimization_based.trees import paths

Head = str | Callable[[str], bool]


@declare.learner()
@declare.forwards(maml)
def anil(model: Network, *, head: Head = "head", **settings: Unpack[HeadOrBodySettings]) -> Learner:
    r"""Build ANIL ("almost no inner loop"), MAML that adapts the head alone (Raghu et al. 2020).

    θ = (body ψ, head w):  w_j = w_{j−1} − α ∇_w L^S(ψ, w_{j−1}),  meta-loss L^Q(ψ, w_n)

    Both ψ and w are meta-learned; the gradient in ψ passes through the head's inner updates.

    Args:
      model: as of `jm.maml`.
      head: name of the head, a module in the parameters of `model` ("head", or "decoder/out" for one inside
        another), or a predicate on a leaf's path such as "head/kernel".
      **settings: as of `jm.maml`.

    Raises:
      ValueError: `head` names no parameter; and what `jm.maml` raises.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid(shots=10, queries=10)
      >>> learner = jm.anil(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> task = tasks.sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> fast = learner.adapt(params, task.support, jax.random.key(2))["model"]
      >>> bool((fast["Dense_0"]["kernel"] == params["model"]["Dense_0"]["kernel"]).all())
      True

    References:
      Raghu et al., Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML, 2020.
    """
    return with_head(model, head, maml(model, adapts=in_head(head), **settings))


def in_head(head: Head) -> Callable[[str], bool]:
    """Whether a leaf's path lies in the head."""
    if not isinstance(head, str):
        return head
    return lambda path: f"/{head}/" in f"/{path}/"


def with_head(model: Network, head: Head, learner: Learner, *, body: bool = False) -> Learner:
    """`learner`, whose `init` refuses a network without the head and, if asked, one without a body."""

    def init(key: Key, task: Task) -> Params:
        leaves = paths(jax.eval_shape(as_model(model, "model").init, key, task.support.x))
        inside = [in_head(head)(leaf) for leaf in leaves]
        if not any(inside) or (body and all(inside)):
            picks = "all" if any(inside) else "none"
            raise ArgumentError("head", f"got {head!r}, which picks {picks} of the network's leaves {leaves}")
        return learner.init(key, task)

    return learner._replace(init=init)
