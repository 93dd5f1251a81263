"""Typed settings of `jm.maml` that other factories forward to it, for editors and type checkers.

A factory declares the settings it forwards by `**settings: Unpack[…]`, and `declare.forwards` adds them, with
their defaults, to its signature. It refuses settings that `jm.maml` does not have or annotates differently; a
test checks that `MamlSettings` is complete.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypedDict

from jaxmeta.core import InnerLoopNorm, Key, Loss, Memory, Metric, Optimizer, Order, PyTree

InnerOptimizer: TypeAlias = Optimizer | Callable[[PyTree], Optimizer]
Hyper: TypeAlias = PyTree | Callable[[Key, PyTree], PyTree]
Adapts: TypeAlias = Sequence[str] | Callable[[str], bool]


class CommonSettings(TypedDict, total=False):
    """Settings of any inner loop."""

    eval_steps: int | None
    norm: InnerLoopNorm
    loss: Loss
    metric: Metric | None


class StepSettings(TypedDict, total=False):
    """Number of inner steps in training."""

    inner_steps: int


class SelectionSettings(TypedDict, total=False):
    """Parameters that the inner loop changes."""

    adapts: Adapts | None


class OptimizerSettings(TypedDict, total=False):
    """Optimizer of the inner loop."""

    inner_optimizer: InnerOptimizer | None


class DescentSettings(OptimizerSettings, total=False):
    """Optimizer of the inner loop, its step size and its meta-learned hyperparameters."""

    inner_lr: float
    hyper: Hyper


class MiniBatchSettings(TypedDict, total=False):
    """Mini-batches of the support set."""

    inner_batch: int | None


class MemorySettings(TypedDict, total=False):
    """Memory mode of the backward pass through the inner steps."""

    memory: Memory


class TruncationSettings(TypedDict, total=False):
    """Truncation of the backward pass."""

    truncation: int | None


class OrderSettings(TypedDict, total=False):
    """Order of the meta-gradient, with the settings of implicit gradients."""

    order: Order
    proximal: float | None
    cg_steps: int
    damping: float


class CaviaSettings(CommonSettings, StepSettings, OptimizerSettings, MemorySettings, total=False):
    """Settings that `jm.cavia` forwards."""


class ImamlSettings(CommonSettings, SelectionSettings, total=False):
    """Settings that `jm.imaml` forwards."""


class LSTMSettings(
    CommonSettings, SelectionSettings, MiniBatchSettings, MemorySettings, TruncationSettings, total=False
):
    """Settings that `jm.lstm_meta_learner` forwards."""


class MetaSGDSettings(LSTMSettings, StepSettings, total=False):
    """Settings that `jm.meta_sgd` forwards."""


class FomamlSettings(
    CommonSettings, StepSettings, SelectionSettings, DescentSettings, MiniBatchSettings, total=False
):
    """Settings that `jm.fomaml` forwards."""


class HeadOrBodySettings(
    CommonSettings,
    StepSettings,
    DescentSettings,
    MiniBatchSettings,
    MemorySettings,
    TruncationSettings,
    OrderSettings,
    total=False,
):
    """Settings that `jm.anil` and `jm.boil` forward."""


class MamlSettings(HeadOrBodySettings, SelectionSettings, total=False):
    """All settings of `jm.maml`."""
