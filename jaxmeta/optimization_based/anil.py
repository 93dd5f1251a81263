"""ANIL: MAML whose inner loop adapts only the head."""

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
    r"""Build ANIL ("almost no inner loop"), MAML that adapts only the head (Raghu et al. 2020).

    θ = (body ψ, head w):  w_j = w_{j−1} − α ∇_w L^S(ψ, w_{j−1}),  meta-loss L^Q(ψ, w_n)

    Both ψ and w are meta-learned; the gradient in ψ passes through the head's inner updates.

    Args:
      model: network to meta-learn; see `jm.maml`.
      head: name of the head, a module in the parameters of `model` ("head", or "decoder/out" for a nested
        one), or a predicate on a leaf's path such as "head/kernel".
      **settings: settings of `jm.maml`.

    Returns:
      A `Learner`.

    Raises:
      ValueError: `head` matches no parameter; errors of `jm.maml`.

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
    """Return a predicate on paths: whether a leaf belongs to the head."""
    if not isinstance(head, str):
        return head
    return lambda path: f"/{head}/" in f"/{path}/"


def with_head(model: Network, head: Head, learner: Learner, *, body: bool = False) -> Learner:
    """Make `learner.init` refuse a network without the head and, if `body`, one without a body."""

    def init(key: Key, task: Task) -> Params:
        leaves = paths(jax.eval_shape(as_model(model, "model").init, key, task.support.x))
        inside = [in_head(head)(leaf) for leaf in leaves]
        if not any(inside) or (body and all(inside)):
            matched, expected = ("all", "some but not all") if any(inside) else ("none", "at least one")
            raise ArgumentError(
                "head",
                f"got {head!r}, which matches {matched} of the network's leaves {leaves}; it must match "
                f"{expected} of them",
            )
        return learner.init(key, task)

    return learner._replace(init=init)
