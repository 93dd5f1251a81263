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


class AnyLoop(TypedDict, total=False):
    """Settings of any inner loop."""

    eval_steps: int | None
    norm: InnerLoopNorm
    loss: Loss
    metric: Metric | None


class TakesSteps(TypedDict, total=False):
    """Number of inner steps in training."""

    inner_steps: int


class ChoosesParameters(TypedDict, total=False):
    """Parameters that the inner loop changes."""

    adapts: Adapts | None


class ChoosesOptimizer(TypedDict, total=False):
    """Optimizer of the inner loop."""

    inner_optimizer: InnerOptimizer | None


class ChoosesDescent(ChoosesOptimizer, total=False):
    """Optimizer of the inner loop, its step size and its meta-learned hyperparameters."""

    inner_lr: float
    hyper: Hyper


class DrawsBatches(TypedDict, total=False):
    """Mini-batches of the support set."""

    inner_batch: int | None


class Stores(TypedDict, total=False):
    """Memory mode of the backward pass through the inner steps."""

    memory: Memory


class Truncates(TypedDict, total=False):
    """Truncation of the backward pass."""

    truncation: int | None


class ChoosesDerivatives(TypedDict, total=False):
    """Order of the meta-gradient, with the settings of implicit gradients."""

    order: Order
    proximal: float | None
    cg_steps: int
    damping: float


class CaviaSettings(AnyLoop, TakesSteps, ChoosesOptimizer, Stores, total=False):
    """Settings that `jm.cavia` forwards."""


class ImamlSettings(AnyLoop, ChoosesParameters, total=False):
    """Settings that `jm.imaml` forwards."""


class LSTMSettings(AnyLoop, ChoosesParameters, DrawsBatches, Stores, Truncates, total=False):
    """Settings that `jm.lstm_meta_learner` forwards."""


class MetaSGDSettings(LSTMSettings, TakesSteps, total=False):
    """Settings that `jm.meta_sgd` forwards."""


class FomamlSettings(AnyLoop, TakesSteps, ChoosesParameters, ChoosesDescent, DrawsBatches, total=False):
    """Settings that `jm.fomaml` forwards."""


class HeadOrBodySettings(
    AnyLoop, TakesSteps, ChoosesDescent, DrawsBatches, Stores, Truncates, ChoosesDerivatives, total=False
):
    """Settings that `jm.anil` and `jm.boil` forward."""


class MamlSettings(HeadOrBodySettings, ChoosesParameters, total=False):
    """All settings of `jm.maml`."""
