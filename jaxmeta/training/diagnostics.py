"""Comparison of two meta-gradients at the same parameters, such as the exact and the first-order one."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmeta.checks import ArgumentError, check_count, check_key
from jaxmeta.core import (
    Key,
    Learner,
    Params,
    PyTree,
    Source,
    TaskDistribution,
    TaskStream,
    check_tasks,
    episode_keys,
)
from jaxmeta.learner_form import normalized
from jaxmeta.training import sharding


class Alignment(NamedTuple):
    """The alignment of two meta-gradients g and h.

    Attributes:
      cosine: cosine of the angle between g and h; 0 where either is zero.
      norm_ratio: ‖g‖ / ‖h‖; unboundedly large where h alone is zero, 1 where both are zero.
    """

    cosine: Float[Array, ""] | float
    norm_ratio: Float[Array, ""] | float


def alignment(first: PyTree, second: PyTree) -> Alignment:
    """Return the cosine and the ratio of norms of two trees of the same structure."""

    def unit(tree: PyTree) -> tuple[PyTree, Array, Array]:
        # Scaled by the largest entry first, because the square of 1e-30 underflows in float32.
        largest = jnp.maximum(optax.tree.norm(tree, ord="inf"), jnp.finfo(dtype).tiny)
        scaled = optax.tree.scale(1 / largest, tree)
        return scaled, largest, jnp.maximum(optax.tree.norm(scaled), jnp.finfo(dtype).tiny)

    dtype = jnp.result_type(*jax.tree.leaves(first))
    (a, large_a, norm_a), (b, large_b, norm_b) = unit(first), unit(second)
    return Alignment(optax.tree.vdot(a, b) / norm_a / norm_b, large_a / large_b * (norm_a / norm_b))


def meta_gradient_alignment(
    learner: Learner,
    compared_to: Learner,
    params: Params,
    tasks: TaskDistribution,
    *,
    episodes: int = 200,
    key: Key,
) -> Alignment:
    r"""Compare the mean meta-gradients of two learners over the same episodes.

    For MAML and its first-order version, cos(g_MAML, g_FOMAML) measures the error in the direction of the
    first-order gradient, and ‖g_MAML‖ / ‖g_FOMAML‖ how much the factors ∏(I − αH_j) shrink or stretch it. A
    ratio that grows without bound indicates an inner step size α that is too large.

    Args:
      learner: learner whose `loss` gives the first meta-gradient.
      compared_to: learner of the same parameters, whose `loss` gives the second meta-gradient.
      params: parameters at which both gradients are taken.
      tasks: tasks whose episode i is drawn with `fold_in(key, i)`.
      episodes: number of episodes over which both gradients are averaged.
      key: key of the episodes.

    Returns:
      An `Alignment` of two numbers. To log them during training, pass `compared_to` to `jm.train`.

    Raises:
      ValueError: `episodes` is below 1, or `tasks` are a stream.

    Examples:
      >>> import optax
      >>> import jaxmeta as jm
      >>> tasks = jm.tasks.sinusoid(shots=10, queries=10)
      >>> network = jm.nn.MLP(out=1)
      >>> maml, fomaml = (make(network, loss=jm.losses.mse) for make in (jm.maml, jm.fomaml))
      >>> params = maml.init(jax.random.key(0), tasks.sample(jax.random.key(1)))
      >>> result = meta_gradient_alignment(maml, fomaml, params, tasks, episodes=20, key=jax.random.key(2))
      >>> -1 <= result.cosine <= 1
      True
    """
    check_count("episodes", episodes)
    learner, compared_to = normalized(learner), normalized(compared_to)
    check_tasks(tasks)
    if isinstance(tasks, TaskStream):
        raise ArgumentError(
            "tasks",
            "got a stream; it must be a jm.TaskDistribution. For tasks of a stream, pass compared_to to "
            "jm.train, which logs the alignment",
        )
    check_key("key", key)
    result = _alignment(learner, compared_to, episodes, params, sharding.as_argument(tasks.sample), key)
    return Alignment(*map(float, result))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _alignment(
    learner: Learner, compared_to: Learner, episodes: int, params: Params, sample: Source, key: Key
) -> Alignment:
    def accumulate(sums: PyTree, keys: Array) -> tuple[PyTree, None]:
        task = sample(keys[0])  # type: ignore[operator]
        grads = [
            jax.grad(lambda params: each.loss(params, task, keys[1])[0])(params)  # noqa: B023
            for each in (learner, compared_to)
        ]
        return jax.tree.map(jnp.add, sums, grads), None

    zeros = [jax.tree.map(jnp.zeros_like, params)] * 2
    sums, _ = jax.lax.scan(accumulate, zeros, episode_keys(key, jnp.arange(episodes)))
    return alignment(*sums)
