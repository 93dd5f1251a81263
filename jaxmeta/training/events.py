"""What a training reports while it goes on."""

from dataclasses import dataclass
from pathlib import Path

from jaxmeta.training.evaluate import Evaluation


@dataclass(frozen=True)
class Progress:
    """Reported at every `log_every` steps: means over the steps since the last report.

    `compile_s` is the time the compiled chunk took to build, the same in every report;
    `steps_per_second` has neither it nor validation and saving in it. `skipped` steps were not finite,
    and are in no mean.
    """

    step: int
    steps: int
    metrics: dict[str, float]
    steps_per_second: float
    compile_s: float
    skipped: int = 0


@dataclass(frozen=True)
class Validated:
    """Reported after each validation: `metric` is what `jm.evaluate` measures, `best` if none was better."""

    step: int
    metric: str
    evaluation: Evaluation
    best: bool


@dataclass(frozen=True)
class Saved:
    """Reported after each checkpoint."""

    step: int
    path: Path


@dataclass(frozen=True)
class Resumed:
    """Reported once, before anything else, by a run that continues: rows after `step` are void."""

    step: int


Event = Progress | Validated | Saved | Resumed
