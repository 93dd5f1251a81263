"""Events that a training run reports."""

from dataclasses import dataclass
from pathlib import Path

from jaxmeta.training.evaluate import Evaluation


@dataclass(frozen=True)
class Progress:
    """The event of every `log_every` meta-steps, with means over the steps since the previous one.

    Attributes:
      step: number of meta-steps done.
      steps: number of meta-steps of the run.
      metrics: means of the loss and of the learner's metrics over the steps that were finite.
      steps_per_second: speed without compilation, validation and saving.
      compile_s: compile time of the run in seconds, the same in every event.
      skipped: number of steps that were skipped because they were not finite.
    """

    step: int
    steps: int
    metrics: dict[str, float]
    steps_per_second: float
    compile_s: float
    skipped: int = 0


@dataclass(frozen=True)
class Validated:
    """The event of a validation.

    Attributes:
      step: number of meta-steps done.
      metric: name of the metric.
      evaluation: result of `jm.evaluate`.
      best: True if it is the best validation so far.
    """

    step: int
    metric: str
    evaluation: Evaluation
    best: bool


@dataclass(frozen=True)
class Saved:
    """The event of a checkpoint, written to `path` after meta-step `step`."""

    step: int
    path: Path


@dataclass(frozen=True)
class Resumed:
    """The first event of a resumed run, which invalidates earlier events of steps after `step`."""

    step: int


Event = Progress | Validated | Saved | Resumed
