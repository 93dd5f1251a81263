"""Implicit MAML: the meta-gradient of where the inner loop ends, whatever way it took there."""

import optax

from jaxmeta.checks import check_number
from jaxmeta.core import Learner
from jaxmeta.nn.adapters import Network
from jaxmeta.optimization_based.maml import maml


def imaml(
    model: Network,
    *,
    inner_optimizer: optax.GradientTransformation = optax.sgd(0.1),  # noqa: B008 - immutable
    proximal: float = 2.0,
    steps: int = 16,
    cg_steps: int = 5,
    damping: float = 0.0,
    **settings,
) -> Learner:
    r"""iMAML: `jm.maml(model, order="implicit", …)`, with the paper's settings for Omniglot.

    φ* = argmin_φ L^S(φ) + (λ/2)‖φ − θ‖²,  meta-gradient (I + H/λ)⁻¹ ∇L^Q(φ*),  H = ∇²L^S(φ*)

    The proximal term is in every inner step, in training and at test. (The official code takes its steps
    without it, then one step on it alone, tests without it, and has conjugate gradients on
    (1 + damping)v + Hv/(λ + 10); this is the paper's form.) Memory does not grow with the inner steps.

    Args:
      model: as of `jm.maml`.
      inner_optimizer: any optax transformation; it need not be differentiable.
      proximal: λ; 0.5 for mini-ImageNet in the paper.
      steps: of the inner loop, at least 1; the more, the nearer to φ* and the nearer to its gradient.
      cg_steps: of conjugate gradients.
      damping: see `jm.inner_loop`.
      **settings: of `jm.maml`, without `order`, `hyper` and `truncation`.

    Raises:
      ValueError: what `jm.maml` raises.

    Examples:
      >>> import jax, jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid(shots=10, queries=10)
      >>> learner = jm.imaml(jm.nn.MLP(out=1), loss=jm.losses.mse)
      >>> task = tasks.sample(jax.random.key(0))
      >>> params = learner.init(jax.random.key(1), task)
      >>> jax.grad(lambda params: learner.loss(params, task, jax.random.key(2))[0])(params)["model"].keys()
      dict_keys(['Dense_0', 'Dense_1', 'head'])

    References:
      Rajeswaran et al., Meta-Learning with Implicit Gradients, 2019, equations 3 and 6, algorithm 2.
    """
    check_number("proximal", proximal, above=0)
    return maml(
        model,
        inner_optimizer=inner_optimizer,
        order="implicit",
        proximal=proximal,
        steps=steps,
        cg_steps=cg_steps,
        damping=damping,
        **settings,
    )
