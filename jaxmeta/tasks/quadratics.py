"""Random quadratic functions, a first benchmark of learned optimizers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxmeta.checks import check_count, check_size
from jaxmeta.core import Batch, Key, SplitName, Task, TaskDistribution
from jaxmeta.tasks.sinusoid import PointCounts, regression_card, split_stream


def quadratics(split: SplitName = "train", *, dim: int = 10) -> TaskDistribution:
    """Return tasks of functions `f(θ) = ‖Wθ − y‖²` of `dim` variables, with entries of `W`, `y` ~ U[0, 1).

    As a regression task the rows of `W` are the examples and `θ` is a linear network without bias,
    `jm.nn.MLP(out=1, hidden=(), use_bias=False)`; `jm.losses.mse` is then `f/dim`. The query set equals the
    support set.

    Args:
      split: "train", "validation" or "test". The parts differ only in their random streams: one key gives
        different functions in each.
      dim: number of variables, and of rows of `W`; 10 in the paper.

    Returns:
      Tasks with `x` = W `(dim, dim)` and `y` `(dim, 1)`, float32.

    Raises:
      ValueError: an unknown split, or `dim` below 1.

    Examples:
      >>> import jax
      >>> task = quadratics("test").sample(jax.random.key(0))
      >>> task.support.x.shape, task.support.y.shape
      ((10, 10), (10, 1))

    References:
      Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016, section 3.1, with
      the distribution of the official code (the paper has Gaussian entries).
    """
    check_count("dim", dim)
    check_size("dim", (dim, dim + 1), "a function")
    card = regression_card(
        "quadratics", split, dim, dim, "Andrychowicz et al. 2016, section 3.1, as in its code"
    )
    return TaskDistribution(
        jax.tree_util.Partial(_draw_quadratic, PointCounts(dim, dim), split_stream(split)), card
    )


def _draw_quadratic(counts: PointCounts, stream: Int[Array, ""], key: Key) -> Task:
    """Draw one function."""
    dim = counts.shots
    values = jax.random.uniform(jax.random.fold_in(key, stream), (dim, dim + 1), jnp.float32)
    batch = Batch(values[:, :dim], values[:, dim:])
    return Task(batch, batch)
