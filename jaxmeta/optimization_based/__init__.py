"""Methods that learn how to descend: one file per method, on the engine `inner_loop`.

| learner | what is learned |
| --- | --- |
| `maml` | an initialisation from which a few gradient steps suffice (Finn et al. 2017) |
| `fomaml` | MAML without second derivatives (Finn et al. 2017) |
| `anil` | MAML that adapts the head alone (Raghu et al. 2020) |
| `boil` | MAML that adapts the body alone (Oh et al. 2021) |
| `meta_sgd` | MAML with a learned step size for every parameter (Li et al. 2017) |
| `imaml` | MAML with implicit gradients (Rajeswaran et al. 2019) |
| `maml_plus_plus` | MAML with a multi-step loss, and learned step sizes for each layer and step (Antoniou et al. 2019) |
| `cavia` | MAML that adapts context parameters, which are further inputs, and no weights (Zintgraf et al. 2019) |
| `reptile` | an initialisation that moves towards each task's solution (Nichol et al. 2018) |
| `lstm_meta_learner` | an LSTM as the optimizer, and the initialisation that suits it (Ravi & Larochelle 2017) |
| `learned_optimizer` | gradient descent learned by gradient descent, for training from scratch (Andrychowicz et al. 2016) |

**Orders.** `inner_loop` runs any optax optimizer on a support set and can be differentiated in three ways,
`order=`, or `--order` on the command line:

| `order` | the meta-gradient | a setting of |
| --- | --- | --- |
| `"second"` | goes through every inner step; with `truncation=K` through the last K | `maml` `anil` `boil` `meta_sgd` `cavia` `lstm_meta_learner` `learned_optimizer` |
| `"first"` | treats the inner gradients as constants | the same; `fomaml` is `maml` with it |
| `"implicit"` | that of the minimum which the inner loop approaches, by conjugate gradients; needs `proximal=λ` | `maml` `anil` `boil`; `imaml` is `maml` with it |

**Memory.** The backward pass of second order needs the intermediate values of the inner steps, which can be
stored or recomputed: the gradient is the same for every `memory=`. The default `"auto"` stores them where all
steps of a task need at most 8 MB on CPUs or 256 MB on accelerators. Beyond that it recomputes them, which is
also faster on CPUs, since less memory is moved. `benchmarks/README.md` has time and memory by order, mode and
number of steps.

**Learned settings.** The inner optimizer may have settings that are learned (`hyper=` of `inner_loop`), which
is how Meta-SGD, MAML++ and the LSTM meta-learner are made.

**Without derivatives.** Where the inner loop has no derivative, or a misleading one, `evolution_gradient`
takes the place of `jax.value_and_grad`, and `persistent_evolution` that of truncated backpropagation through
a long unroll.

**How much the first-order gradient differs from the second-order one**, on sine waves before training (both
numbers are 1 for equal gradients):

>>> import jax
>>> import optax
>>> import jaxmeta as jm
>>> waves = jm.tasks.sinusoid("train", shots=10, queries=10)
>>> settings = {"inner_lr": 0.1, "loss": jm.losses.mse, "inner_steps": 5}
>>> second, first = (jm.maml(jm.nn.MLP(out=1), order=order, **settings) for order in ("second", "first"))
>>> params = second.init(jax.random.key(0), waves.sample(jax.random.key(0)))
>>> alignment = jm.meta_gradient_alignment(second, first, params, waves, episodes=100, key=jax.random.key(1))
>>> print(f"cosine {alignment.cosine:.1f}, ratio of norms {alignment.norm_ratio:.1f}")
cosine 0.8, ratio of norms 0.5

`jaxmeta train --diagnose` reports both numbers during training, and plots them.

**A learned optimizer is an optax optimizer.** Each task is an optimization run, here of ‖Wθ − y‖² with random
W and y and θ of 10 variables:

>>> linear = jm.nn.MLP(out=1, hidden=(), use_bias=False)
>>> learner = jm.learned_optimizer(linear, inner_steps=40, truncation=20, scale=0.1, loss=jm.losses.mse)
>>> functions = jm.tasks.quadratics("train")
>>> state = jm.train(
...     learner, functions, optax.adam(1e-2), steps=60, meta_batch=16, strategy="vmap", key=jax.random.key(0)
... )

The trained optimizer works with any parameters, any loss and any training loop:

>>> optimizer = jm.learned_optimizer_as_optax(state.params, scale=0.1)
>>> unseen = jm.tasks.quadratics("test").sample(jax.random.key(1)).support
>>> @jax.jit
... def descend(theta, opt_state):
...     value, gradient = jax.value_and_grad(lambda theta: ((unseen.x @ theta - unseen.y) ** 2).sum())(theta)
...     updates, opt_state = optimizer.update(gradient, opt_state, theta)
...     return optax.apply_updates(theta, updates), opt_state, value
>>> theta = jax.numpy.zeros((10, 1))
>>> opt_state = optimizer.init(theta)
>>> for _ in range(100):
...     theta, opt_state, value = descend(theta, opt_state)
>>> bool(value < 1)  # at θ = 0 it is 3.3 on average
True

`learned_optimizer_unroll` trains as published, with an outer step after every unroll. From the command line,
`jaxmeta train --preset quadratics` trains one.
"""  # noqa: E501

from jaxmeta.optimization_based.anil import anil
from jaxmeta.optimization_based.boil import boil
from jaxmeta.optimization_based.cavia import cavia
from jaxmeta.optimization_based.evolution import evolution_gradient, persistent_evolution
from jaxmeta.optimization_based.imaml import imaml
from jaxmeta.optimization_based.inner_loop import inner_loop
from jaxmeta.optimization_based.learned_optimizer import (
    learned_optimizer,
    learned_optimizer_as_optax,
    learned_optimizer_unroll,
)
from jaxmeta.optimization_based.lstm_meta_learner import lstm_meta_learner
from jaxmeta.optimization_based.maml import fomaml, maml
from jaxmeta.optimization_based.maml_plus_plus import maml_plus_plus
from jaxmeta.optimization_based.meta_sgd import meta_sgd
from jaxmeta.optimization_based.reptile import reptile

__all__ = [
    "anil",
    "boil",
    "cavia",
    "evolution_gradient",
    "fomaml",
    "imaml",
    "inner_loop",
    "learned_optimizer",
    "learned_optimizer_as_optax",
    "learned_optimizer_unroll",
    "lstm_meta_learner",
    "maml",
    "maml_plus_plus",
    "meta_sgd",
    "persistent_evolution",
    "reptile",
]
