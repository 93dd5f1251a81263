"""Sums of two sine waves: regression tasks with five unknowns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmeta.core import Key, SplitName, Task, TaskDistribution
from jaxmeta.tasks.sinusoid import PointCounts, check_noise, regression_card, split_points, split_stream


def harmonic(
    split: SplitName = "train", *, shots: int = 10, queries: int = 10, noise: float = 0.0
) -> TaskDistribution:
    """Return regression tasks `y = a₁ sin(ωx + b₁) + a₂ sin(2ωx + b₂) + ε`.

    A task draws `ω ~ U[5, 7]`, `b₁, b₂ ~ U[0, 2π]`, `a₁, a₂ ~ N(0, 1)` and the centre of its inputs
    `μ ~ U[−4, 4]`; every `x ~ N(μ, 1)`, `ε ~ N(0, noise²)`. Harder than `sinusoid`: the wave oscillates
    several times between two support points, so that the family must be learned. The best fixed
    predictor is 0, with mean squared error `1 + noise²`.

    Args:
      split: "train", "validation" or "test". The parts differ only in their random streams: one key gives
        different tasks in each.
      shots: points of a task to learn from.
      queries: points of a task to evaluate on.
      noise: standard deviation of the noise on support and query targets; 0 by default, as in the
        `Harmonic` data set of the Torchmeta library.

    Returns:
      Tasks with `x` `(n, 1)` and `y` `(n, 1)`, float32.

    Raises:
      ValueError: an unknown split, fewer than one shot or query, or a negative noise.

    Examples:
      >>> import jax
      >>> task = harmonic("test", shots=20).sample(jax.random.key(0))
      >>> task.support.x.shape
      (20, 1)

    References:
      Lacoste et al., Uncertainty in Multitask Transfer Learning, 2018 (arXiv:1806.07528).
      Deleu et al., Torchmeta: A Meta-Learning Library for PyTorch, 2019 (`torchmeta.toy.Harmonic`).
    """
    card = regression_card("harmonic", split, shots, queries, "Lacoste et al. 2018, up to the noise given")
    check_noise(noise)
    counts = PointCounts(shots, queries)
    sample = jax.tree_util.Partial(_draw_harmonic, counts, jnp.float32(noise), split_stream(split))
    return TaskDistribution(sample, card)


def _draw_harmonic(counts: PointCounts, noise: Float[Array, ""], stream: Int[Array, ""], key: Key) -> Task:
    """Draw one task of two sine waves."""
    keys = jax.random.split(jax.random.fold_in(key, stream), 6)
    centre = jax.random.uniform(keys[0], (), jnp.float32, -4.0, 4.0)
    frequency = jax.random.uniform(keys[1], (), jnp.float32, 5.0, 7.0)
    phase = jax.random.uniform(keys[2], (2,), jnp.float32, 0.0, 2 * jnp.pi)
    amplitude = jax.random.normal(keys[3], (2,), jnp.float32)
    x = centre + jax.random.normal(keys[4], (counts.shots + counts.queries, 1), jnp.float32)
    y = amplitude[0] * jnp.sin(frequency * x + phase[0])
    y = y + amplitude[1] * jnp.sin(2 * frequency * x + phase[1])
    y = y + noise * jax.random.normal(keys[5], x.shape, jnp.float32)
    return split_points(x, y, counts.shots)
