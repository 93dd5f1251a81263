"""Sine waves of random amplitude and phase: the regression benchmark of MAML."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmeta.checks import ArgumentError, check_count, check_number, check_size, format_value
from jaxmeta.core import Batch, Key, ProtocolCard, SplitName, Task, TaskDistribution
from jaxmeta.tasks.splits import PARTS, check_part


def sinusoid(
    split: SplitName = "train",
    *,
    shots: int = 10,
    queries: int = 10,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, float(np.pi)),
    inputs: tuple[float, float] = (-5.0, 5.0),
    noise: float = 0.0,
) -> TaskDistribution:
    """Return regression tasks `y = A sin(x − φ) + ε` with one amplitude and phase per task.

    `A ~ U[amplitude]`, `φ ~ U[phase]`, every `x ~ U[inputs]`, `ε ~ N(0, noise²)`. The defaults are
    MAML's, for which predicting 0 has a mean squared error of 4.25167, and the best predictor that
    ignores the support set, `−1.62338 cos x`, has 3.00567. `phase=(0, 2π)` gives Reptile's tasks
    `a sin(x + b)`, since the sign of a phase uniform on the full circle does not matter.

    Args:
      split: "train", "validation" or "test". The parts differ only in their random streams: one key gives
        different tasks in each.
      shots: points of a task to learn from.
      queries: points of a task to evaluate on. The paper evaluates with 5, 10 and 20 of each.
      amplitude: range of the amplitude `A`.
      phase: range of the phase `φ`, in radians.
      inputs: range of the inputs `x`.
      noise: standard deviation of the noise on support and query targets.

    Returns:
      Tasks with `x` `(n, 1)` and `y` `(n, 1)`, float32.

    Raises:
      ValueError: an unknown split, fewer than one shot or query, an empty range, or a
        negative noise.

    Examples:
      >>> import jax
      >>> task = sinusoid(shots=5, queries=20).sample(jax.random.key(0))
      >>> task.support.x.shape, task.query.y.shape
      ((5, 1), (20, 1))

    References:
      Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017, section
      5.1. Nichol et al., On First-Order Meta-Learning Algorithms, 2018, section 3, for the full circle.
    """
    card = regression_card(
        "sinusoid", split, shots, queries, "Finn et al. 2017, section 5.1, with the given ranges and noise"
    )
    ranges = {"amplitude": amplitude, "phase": phase, "inputs": inputs}
    for name, interval in ranges.items():
        _check_interval(name, interval)
    check_noise(noise)
    data = {name: jnp.asarray(value, jnp.float32) for name, value in ranges.items()}
    data["noise"] = jnp.float32(noise)
    sample = jax.tree_util.Partial(_draw_sinusoid, PointCounts(shots, queries), data, split_stream(split))
    return TaskDistribution(sample, card)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class PointCounts:
    """Numbers of points of a regression task, as a static node of a pytree."""

    shots: int
    queries: int


def _draw_sinusoid(
    counts: PointCounts, data: Mapping[str, Float[Array, "..."]], stream: Int[Array, ""], key: Key
) -> Task:
    """Draw one sinusoid task; `data` holds the ranges and the noise."""
    keys = jax.random.split(jax.random.fold_in(key, stream), 4)
    amplitude = _uniform(keys[0], (), data["amplitude"])
    phase = _uniform(keys[1], (), data["phase"])
    x = _uniform(keys[2], (counts.shots + counts.queries, 1), data["inputs"])
    noise = data["noise"] * jax.random.normal(keys[3], x.shape, jnp.float32)
    return split_points(x, amplitude * jnp.sin(x - phase) + noise, counts.shots)


def _uniform(key: Key, shape: tuple[int, ...], bounds: Float[Array, "2"]) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, bounds[0], bounds[1])


def split_points(x: Float[Array, "n ..."], y: Float[Array, "n d"], shots: int) -> Task:
    """Build a regression task whose first `shots` points are the support set."""
    return Task(Batch(x[:shots], y[:shots]), Batch(x[shots:], y[shots:]))


def split_stream(split: SplitName) -> Int[Array, ""]:
    """Return a number to fold into a key, so that one key gives different tasks in each split."""
    return jnp.int32(PARTS.index(check_part(split)))


def regression_card(tasks: str, split: SplitName, shots: int, queries: int, protocol: str) -> ProtocolCard:
    """Check the arguments of a regression source and return its protocol card."""
    check_part(split)
    check_count("shots", shots)
    check_count("queries", queries)
    check_size("shots, queries", (shots + queries,), "a task")
    return ProtocolCard(tasks, split, "regression", None, shots, queries, protocol=protocol)


def check_noise(noise: float) -> None:
    """Check that `noise` is a standard deviation."""
    check_number("noise", noise, 0)


def _check_interval(name: str, interval: tuple[float, float]) -> None:
    if not isinstance(interval, tuple | list) or len(interval) != 2:
        raise ArgumentError(name, f"got {format_value(interval)}; it must be (low, high)")
    low, high = interval
    check_number(name, low)
    check_number(name, high)
    if not low < high:
        raise ArgumentError(name, f"got {format_value(interval)}; it must be (low, high) with low < high")
