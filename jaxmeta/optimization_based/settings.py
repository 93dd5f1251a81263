"""The settings of `jm.maml` that other factories hand on to it, typed for editors and type checkers.

A factory says by `**settings: Unpack[…]` which of them it takes, and `declare.forwards` puts these, with
their defaults, into its signature. It refuses a setting that `jm.maml` has not, or has of another type; that
`MamlSettings` leaves none out is a test.
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
    """Their number in training."""

    inner_steps: int


class ChoosesParameters(TypedDict, total=False):
    """Which parameters the inner loop changes."""

    adapts: Adapts | None


class ChoosesOptimizer(TypedDict, total=False):
    """Any optax transformation in the inner loop."""

    inner_optimizer: InnerOptimizer | None


class ChoosesDescent(ChoosesOptimizer, total=False):
    """The inner optimizer, and what is learned of it."""

    inner_lr: float
    hyper: Hyper


class DrawsBatches(TypedDict, total=False):
    """Mini-batches of the support set."""

    inner_batch: int | None


class Stores(TypedDict, total=False):
    """How the backward pass gets at the inner steps."""

    memory: Memory


class Truncates(TypedDict, total=False):
    """How far back it goes."""

    truncation: int | None


class ChoosesDerivatives(TypedDict, total=False):
    """Which derivatives the meta-gradient has."""

    order: Order
    proximal: float | None
    cg_steps: int
    damping: float


class CaviaSettings(AnyLoop, TakesSteps, ChoosesOptimizer, Stores, total=False):
    """Settings that `jm.cavia` hands on."""


class ImamlSettings(AnyLoop, ChoosesParameters, total=False):
    """Settings that `jm.imaml` hands on."""


class LSTMSettings(AnyLoop, ChoosesParameters, DrawsBatches, Stores, Truncates, total=False):
    """Settings that `jm.lstm_meta_learner` hands on."""


class MetaSGDSettings(LSTMSettings, TakesSteps, total=False):
    """Settings that `jm.meta_sgd` hands on."""


class FomamlSettings(AnyLoop, TakesSteps, ChoosesParameters, ChoosesDescent, DrawsBatches, total=False):
    """Settings that `jm.fomaml` hands on."""


class HeadOrBodySettings(
    AnyLoop, TakesSteps, ChoosesDescent, DrawsBatches, Stores, Truncates, ChoosesDerivatives, total=False
):
    """Settings that `jm.anil` and `jm.boil` hand on."""


class MamlSettings(HeadOrBodySettings, ChoosesParameters, total=False):
    """All settings of `jm.maml`."""
