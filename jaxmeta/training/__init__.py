"""From a learner and its tasks to trained parameters and a number with a confidence interval."""

from jaxmeta.training.check_learner import check_learner
from jaxmeta.training.checkpoint import load, load_params, save
from jaxmeta.training.diagnostics import Alignment, meta_gradient_alignment
from jaxmeta.training.evaluate import (
    ClassEvaluation,
    Episodes,
    Evaluation,
    calibrate,
    evaluate,
    evaluate_classes,
    evaluate_episodes,
    evaluate_metrics,
    run_episodes,
)
from jaxmeta.training.events import Progress, Resumed, Saved, Validated
from jaxmeta.training.loop import NonFiniteLoss, Stopped, train
from jaxmeta.training.progress import progress_bar
from jaxmeta.training.sharding import make_mesh
from jaxmeta.training.step import TrainState, init_state, meta_step, validation_key

__all__ = [
    "Alignment",
    "ClassEvaluation",
    "Episodes",
    "Evaluation",
    "NonFiniteLoss",
    "Progress",
    "Resumed",
    "Saved",
    "Stopped",
    "TrainState",
    "Validated",
    "calibrate",
    "check_learner",
    "evaluate",
    "evaluate_classes",
    "evaluate_episodes",
    "evaluate_metrics",
    "init_state",
    "load",
    "load_params",
    "make_mesh",
    "meta_gradient_alignment",
    "meta_step",
    "progress_bar",
    "run_episodes",
    "save",
    "train",
    "validation_key",
]
